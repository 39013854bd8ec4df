"""What is found out before the first step: whether every shape fits into the memory, and whether the network compiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ldm.data.buckets import Sorted, lines
from ldm.errors import UserError, out_of_memory
from ldm.families.family import Family

if TYPE_CHECKING:
    from ldm.train import Trainer


def try_shapes(trainer: Trainer, model: torch.nn.Module, buckets: Sorted) -> None:
    """Tell of the buckets, and make a forward and a backward pass in each shape, the largest first; nothing is learned.

    Raises:
        UserError: naming the shape that needs more memory than there is.
    """
    stage, name, log = trainer.stage, trainer.folder.name, trainer.log
    log.note(f"{name}: {len(buckets.rows)} buckets, each batch in one shape")
    for line in lines(buckets.rows):
        log.note(f"  {line}")
    if buckets.missed:
        log.note(f"{name}: {buckets.missed:,} pictures are never reached in {stage.steps:,} updates; lower batch or raise images")
    log.record({"buckets": buckets.rows, "stage": name, "images": trainer.step * stage.batch})
    count = stage.micro_batch or stage.batch // trainer.processes.world
    buffers = {key: buffer.clone() for key, buffer in trainer.family.named_buffers()}
    trainer.family.progress(stage.images)  # with every part of the loss
    one = {shape: int(members[0]) for shape, members in zip(buckets.order.shapes, buckets.order.members, strict=True)}
    for shape in buckets.shapes:
        batch = trainer.data.load([one[shape]] * count, range(count), shape, trainer.seed, False)
        try:
            with trainer.processes.apart(model):
                trainer.gradients(model, batch)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise UserError(f"stages.{name}: {count} pictures of {shape[1]}x{shape[0]} px {_too_many(trainer, error)}") from None
        finally:
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for key, buffer in trainer.family.named_buffers():
            buffer.copy_(buffers[key])


def too_large(trainer: Trainer, error: Exception) -> UserError:
    """What to tell where memory ran out in the middle of training."""
    count = trainer.stage.micro_batch or trainer.stage.batch // trainer.processes.world
    what = f"at step {trainer.step} {count} pictures of {trainer.stage.resolution} px"
    goes_on = "the same command goes on from the last checkpoint, with checkpointing too; another changed setting begins the stage anew"
    return UserError(f"stages.{trainer.folder.name}: {what} {_too_many(trainer, error)}; {goes_on}")


def _too_many(trainer: Trainer, error: Exception) -> str:
    """That they do not fit, and what helps, most first."""
    stage, name = trainer.stage, trainer.folder.name
    count = stage.micro_batch or stage.batch // trainer.processes.world
    helps = [f"set stages.{name}.micro_batch={count // 2} (the update stays that of {stage.batch} pictures)"] if count > 1 else []
    if stage.precision == "fp32":
        helps.append(f"stages.{name}.precision=bf16")
    if stage.family != "text" and not _recomputes(trainer.family):
        helps.append(f"stages.{name}.checkpointing=true")
    helps.append("a lower resolution")
    return f"do not fit into the memory ({str(error).splitlines()[0][:200]}); {', or '.join(helps)}"


def _recomputes(family: Family) -> bool:
    """Whether a network of it recomputes its blocks already; a base that is adapted is not among its modules."""
    return any(getattr(part, "checkpointing", False) for network in (family, *family.compilable()) for part in network.modules())


def compile_networks(family: Family, device: torch.device, sharded: bool) -> None:
    """Have torch compile what nearly all of a step goes through, in place, when it is first called; names of weights stay.

    Raises:
        UserError: for a family that has no such network, for sharded weights, or without a compiler.
    """
    from ldm.families.running import check_compiler

    networks = family.compilable()
    if not networks:
        raise UserError("compile: true is for stages of family: diffusion; leave it out")
    if sharded:
        raise UserError("compile: true is not for sharded weights (FSDP2); leave one of them out")
    check_compiler(device)
    for network in networks:
        network.compile()
