"""Launcher detection: accelerate launch, torchrun or srun, how many processes, and where each setting came from."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.config.files import at_home

UNSUPPORTED = {  # variables of accelerate launch, by what they switch on
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}

OVERRULED_FSDP = ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING")  # of accelerate's settings, those that would change what is done


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A launch, before its processes are connected."""

    by: str  # the launcher
    file: str = ""  # its configuration file, where it says
    world: int = 1
    machines: int = 1
    world_from: str = "accelerate launch or torchrun start several"
    sharded: bool = False  # weights, optimiser and EMA split over the processes (FSDP2)
    overruled: tuple[str, ...] = ()  # what the launcher says and the stages know better

    def splits(self, shardable: bool) -> bool:
        """Whether a model's weights are sharded, where that is possible at all."""
        return self.sharded and self.world > 1 and shardable


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a training stage shares out to the processes of a launch."""

    batch: int  # samples of one update, over all processes
    passes: int  # forward passes of one update on each process
    precision: str
    shardable: bool = False  # whether FSDP2 can split the model's weights


def adopt_slurm(environment: MutableMapping[str, str]) -> bool:
    """Where `srun` started one task per process and no launcher in between, name the processes as launchers do.

    Only a step of its own tells SLURM_STEP_NUM_TASKS; the batch script does not, and is one process.

    Raises:
        UserError: when a needed variable is missing or is no number.
    """
    if "RANK" in environment or _number(environment, "WORLD_SIZE", 1) > 1 or _number(environment, "SLURM_STEP_NUM_TASKS", 1) <= 1:
        return False
    try:
        rank, local = int(environment["SLURM_PROCID"]), int(environment["SLURM_LOCALID"])
        nodes = environment.get("SLURM_STEP_NODELIST") or environment["SLURM_JOB_NODELIST"]
        port = 20_000 + int(environment["SLURM_JOB_ID"]) % 10_000
    except (KeyError, ValueError) as error:
        raise UserError(f"SLURM_STEP_NUM_TASKS asks for several processes, but {error} is missing or no number; start with srun") from None
    environment["RANK"], environment["LOCAL_RANK"] = str(rank), str(local)
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment.setdefault("MASTER_ADDR", first_host(nodes))
    environment.setdefault("MASTER_PORT", str(port))
    environment["LDM_SLURM"] = nodes
    return True


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `gpu[003-006,9],cpu1` gives `gpu003`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def launched(environment: Mapping[str, str], parent: list[str] | None = None) -> Launched:
    """What the environment tells of this launch.

    Args:
        parent: the command line of the process that started this one, which names accelerate's file; None: looked up.

    Raises:
        UserError: for a way of spreading the work that `ldm` does not have.
    """
    for name, what in UNSUPPORTED.items():
        if environment.get(name, "").lower() == "true":
            raise UserError(f"the launcher asks for {what}; ldm has DDP and FSDP2: start with configs/accelerate/*.yaml or torchrun")
    sharded = environment.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if sharded and environment.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launcher asks for FSDP 1; ldm has FSDP2: set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does")
    world = _number(environment, "WORLD_SIZE", 1)
    each = _number(environment, "LOCAL_WORLD_SIZE", 0)
    machines = -(-world // each) if each else 1
    overruled = []
    if (said := environment.get("ACCELERATE_MIXED_PRECISION", "no")) not in ("no", "None", ""):
        overruled.append(f"mixed_precision {said}")
    if (said := environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) not in ("1", "auto", ""):
        overruled.append(f"gradient_accumulation_steps {said}")
    if (said := environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) not in ("no", ""):
        overruled.append(f"dynamo_backend {said}")
    overruled += [
        f"{name.lower()} {said}" for name in OVERRULED_FSDP if sharded and (said := environment.get(name, "false").lower()) == "true"
    ]
    by, file, asked = "python", "", "accelerate launch or torchrun start several"
    if "ACCELERATE_MIXED_PRECISION" in environment:
        by, file = "accelerate launch", accelerate_file(_parent() if parent is None else parent)
        asked = file or "accelerate's words"
    elif "TORCHELASTIC_RUN_ID" in environment:
        by, asked = "torchrun", "torchrun's --nproc-per-node and --nnodes"
    elif "LDM_SLURM" in environment:
        by, asked = "srun", "SLURM_STEP_NUM_TASKS"
        machines = _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_JOB_NUM_NODES", 1))
    elif world > 1:
        by, asked = "RANK and WORLD_SIZE", "WORLD_SIZE"
    return Launched(by=by, file=file, world=world, machines=machines, world_from=asked, sharded=sharded, overruled=tuple(overruled))


def here() -> Launched:
    """The launch that this process belongs to; every verb asks here who it is.

    Raises:
        UserError: as `adopt_slurm` and `launched`.
    """
    adopt_slurm(os.environ)
    return launched(os.environ)


def works_alone(verb: str) -> None:
    """Refuse several processes for a verb whose work is not shared out: each would do all of it, and write over the others.

    Raises:
        UserError: naming the launcher.
    """
    found = here()
    if found.world > 1:
        raise UserError(f"{found.by} started {found.world} processes, and {verb} works as one; start it once, without {found.by}")


def _number(environment: Mapping[str, str], name: str, otherwise: int) -> int:
    text = environment.get(name) or str(otherwise)
    if not text.isdecimal():
        raise UserError(f"{name}: got {text}; launchers put a whole number there")
    return int(text)


def accelerate_file(command: list[str]) -> str:
    """The configuration file that `accelerate launch` was given, or finds by itself; empty where there is none."""
    for i, word in enumerate(command):
        if word in ("--config_file", "--config-file"):
            return command[i + 1] if i + 1 < len(command) else ""
        if word.startswith(("--config_file=", "--config-file=")):
            return word.partition("=")[2]
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    default = at_home(home) / "accelerate" / "default_config.yaml"
    return str(default) if default.is_file() else ""


def _parent() -> list[str]:
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")
    except (OSError, UnicodeDecodeError):
        return []


def about(found: Launched, device: str, work: Mapping[str, Work], file: str) -> Iterator[str]:
    """The start in lines: who launched how many processes on what, and what each stage makes of them, with their origins."""
    world = found.world
    by = f"{found.by} ({found.file})" if found.file else found.by
    machines = f" on {found.machines} machines" if found.machines > 1 else ""
    where = "no accelerator was found" if device == "cpu" else "found here"
    if device == "cpu" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        where = "ACCELERATE_USE_CPU"
    split = ", weights and optimiser sharded (FSDP2)" if any(found.splits(stage.shardable) for stage in work.values()) else ""
    yield f"launched by {by}: {world} process{'es' * (world > 1)}{machines} ({found.world_from}), device {device} ({where}){split}"
    for name, stage in work.items():
        share, passes = stage.batch // world, stage.passes
        micro = f" = {passes} x {share // passes} (micro_batch)" if passes > 1 else ""
        each = f" = {world} x {share}" if world > 1 else ""
        yield f"{name}: batch {stage.batch}{each}{micro}, precision {stage.precision} (stages.{name} in {file})"
    yield from unheeded(found, work)


def unheeded(found: Launched, work: Mapping[str, Work]) -> Iterator[str]:
    """What the launcher asks for and will not have, a line each."""
    if found.overruled:
        by = f"{found.by} ({found.file})" if found.file else found.by
        yield f"{by} says {', '.join(found.overruled)}; the stages' own precision, micro_batch, checkpointing and compile count instead"
    if found.sharded and found.world == 1:
        yield "the launcher asks for FSDP2, but a single process has nobody to share weights with: nothing is sharded"
    elif found.sharded and (held := [name for name, stage in work.items() if not stage.shardable]):
        yield f"FSDP2: {', '.join(held)}: every process holds these weights whole (DDP)"


def record(found: Launched, device: str, work: Mapping[str, Work]) -> dict[str, Any]:
    """The start for log.jsonl."""
    stages = {name: {**asdict(stage), "per_process": stage.batch // found.world} for name, stage in work.items()}
    return {"launch": asdict(found) | {"device": device, "stages": stages}}
