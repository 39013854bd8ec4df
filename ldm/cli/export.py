"""The export verb: a model as a diffusers pipeline folder, as graphs (ONNX, OpenVINO) or as a single-file CompVis checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldm.cli.command import call
from ldm.cli.models import model_for
from ldm.cli.progress import working
from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.config.options import Given

if TYPE_CHECKING:
    from ldm.families.draws import Draws
    from ldm.formats.rounding import Comparison

SUFFIXES = {
    "diffusers": "",
    "single-file": ".safetensors",
    "compvis-ckpt": ".ckpt",
    "published": "",
    "onnx": "",
    "openvino": "",
}  # of what is written; empty: a folder
FORMS = tuple(SUFFIXES)
GRAPHS = {"onnx": ("fp32",), "openvino": ("fp32", "fp16")}  # forms of graphs, and the precisions of their weights
PRECISIONS = {"fp32": 4, "fp16": 2, "bf16": 2}  # bytes of a weight
Option = typer.Option


def main(words: Sequence[str]) -> int:
    """`ldm export MODEL --to FORM --out PATH`: the exit code."""
    return call(export, words, "ldm export")


def export(
    model: Annotated[str, typer.Argument(help="A folder or file of a model, or owner/name on the hub."), Given.MODEL],
    to: Annotated[str, Option(help="diffusers onnx openvino published: a folder; single-file: .safetensors; compvis-ckpt: .ckpt.")],
    out: Annotated[Path, Option(help="Where to: a folder, or a file with the suffix of its kind.")],
    dtype: Annotated[str, Option(help="Precision of the weights: fp32 fp16 bf16.")] = "fp32",
    variant: Annotated[str, Option(help="diffusers: fp16 puts .fp16 into the names of the weights.")] = "",
    max_shard: Annotated[float, Option(help="diffusers: parts of more GB are written as several files.")] = 10.0,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace what is at OUT.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object about the result.")] = False,
) -> int:
    """Write a model in another form, read it back from disk and compare every weight; nothing is kept that differs."""
    _check_words(to, out, dtype, variant, max_shard)
    model = model_for(model)
    _check_target(model, to, out, overwrite)
    began = time.monotonic()

    from ldm.families.registry import exported, open_finished

    _tell(f"reading {model}")
    if to == "published":
        return _publish(open_finished(model), out, dtype, began, as_json)
    source = exported(model)
    weights = sum(value.numel() for part in source.parts.values() for value in part.state.values()) * PRECISIONS[dtype]
    _check_room(out, weights)
    notices = list(source.notices)
    done: list[Comparison] = []
    writing = partial(working, f"writing and comparing {out}")
    if to in GRAPHS:
        from ldm.formats.atomic import commit
        from ldm.formats.graph_folder import beyond_onnx_pipeline, check_graphs, write_graphs

        check_graphs(source, to)
        with writing() as tell:
            commit(out, lambda folder: done.extend(write_graphs(source, folder, to, dtype, tell)))
        if unopened := beyond_onnx_pipeline(source, to):
            notices.append(unopened)
    elif to == "diffusers":
        from ldm.formats.atomic import commit
        from ldm.formats.pipeline_folder import write_pipeline

        with writing() as tell:
            commit(out, lambda folder: done.extend(write_pipeline(source, folder, dtype, variant, int(max_shard * 1e9), tell)))
        if not source.network.stock:
            own = source.network.to_diffusers()["_class_name"]
            notices.append(f"its {source.network.folder} is ldm's own ({own}), so only ldm opens this folder")
        elif source.network.reads_size and not source.pair:
            notices.append("its network is told sizes, which StableDiffusionPipeline does not do; ldm does")
        elif not source.clip:
            notices.append("its text encoder is no CLIP, so no stock pipeline joins these parts; ldm does")
    else:
        from ldm.formats.compvis_file import sayable, write_file

        said = sayable(source)
        if said.obstacles:
            notices.append(f"no YAML, because CompVis' own code cannot draw with it ({'; '.join(said.obstacles)}); ldm can")
        with writing() as tell:
            _commit_beside(out, lambda file: done.extend(write_file(said, file, dtype, tell)))
    return _done(out, to, dtype, began, done, notices, as_json)


def _publish(model: Draws, out: Path, dtype: str, began: float, as_json: bool) -> int:
    """The model as files of the code that its kind was published with."""
    from ldm.formats.atomic import commit

    done: list[Comparison] = []
    notices: list[str] = []
    with working(f"writing and comparing {out}"):
        commit(out, lambda folder: done.extend(model.publish(folder, dtype, notices.append)))
    return _done(out, "published", dtype, began, done, notices, as_json)


def _done(out: Path, to: str, dtype: str, began: float, done: Sequence[Comparison], notices: Sequence[str], as_json: bool) -> int:
    """Tell of what was written."""
    files = sorted(_files(out))
    size = sum(file.stat().st_size for file in files)
    for notice in notices:
        _tell(f"note: {notice}")
    if as_json:
        told = {"out": str(out), "to": to, "dtype": dtype, "bytes": size, "seconds": round(time.monotonic() - began, 2)}
        names = [file.relative_to(out.parent).as_posix() for file in files]
        print(json.dumps({**told, "parts": [part.to_dict() for part in done], "files": names, "notices": notices}, ensure_ascii=False))
    else:
        from ldm.formats.rounding import size_text

        worst = max(part.max_error for part in done)
        print(f"{out}: {to}, {dtype}, {size_text(size)}, max abs error {worst:.3g}, {time.monotonic() - began:.1f} s")
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_words(to: str, out: Path, dtype: str, variant: str, max_shard: float) -> None:
    if to not in FORMS:
        raise UserError(f"--to: got {to!r}; choose one of {', '.join(FORMS)}")
    if dtype not in PRECISIONS:
        raise UserError(f"--dtype: got {dtype!r}; choose one of {', '.join(PRECISIONS)}")
    if dtype not in GRAPHS.get(to, PRECISIONS):
        raise UserError(f"--dtype: got {dtype}; --to {to} writes {' or '.join(GRAPHS[to])}")
    if not SUFFIXES[to] and out.suffix in (".safetensors", ".ckpt", ".pth"):
        form = next((f"--to {form}, or " for form, suffix in SUFFIXES.items() if suffix == out.suffix), "")
        raise UserError(f"--out: got {out}; {to} is a folder; write {form}a folder's name")
    if SUFFIXES[to] and out.suffix != SUFFIXES[to]:
        raise UserError(f"--out: got {out}; {to} is a file whose name ends in {SUFFIXES[to]}")
    if variant and (variant, dtype, to) != ("fp16", "fp16", "diffusers"):
        raise UserError(f"--variant: got {variant!r}; there is fp16 alone, and it needs --to diffusers --dtype fp16")
    if not 0 < max_shard < float("inf"):
        raise UserError(f"--max-shard: got {max_shard}; a positive number of GB is needed")
    if max_shard != 10.0 and to != "diffusers":
        raise UserError(f"--max-shard: {to} is {'one file' if SUFFIXES[to] else 'not split'}; leave it out, or write --to diffusers")


def _beside(file: Path) -> tuple[Path, ...]:
    """What belongs to a single file: its YAML and the folder of its tokenizer."""
    return file.with_suffix(".yaml"), file.with_name(f"{file.stem}.tokenizer")


def _files(out: Path) -> list[Path]:
    """The files of what was written."""
    roots = [out] if out.is_dir() else [out, *_beside(out)]
    return [file for root in roots for file in ([root] if root.is_file() else root.rglob("*")) if file.is_file()]


def _check_target(model: str, to: str, out: Path, overwrite: bool) -> None:
    there = [path for path in (out, *(_beside(out) if SUFFIXES[to] else ())) if path.exists() or path.is_symlink()]
    if there and not overwrite:
        raise UserError(f"--out: {there[0]} is there already; choose another name, or add --overwrite")
    source, target = at_home(model).resolve(), out.resolve()
    if source.exists() and (target == source or target in source.parents or source in target.parents):
        raise UserError(f"--out: {out} and the model {model} lie within each other; choose a place of its own")
    if (to == "diffusers" or to in GRAPHS) and there and not (out / "model_index.json").is_file():
        raise UserError(
            f"--out: {out} holds no {'diffusers' if to == 'diffusers' else to} model that could be overwritten; choose another name"
        )
    if to == "published" and there and not list(out.glob("latest_net_*.pth")):
        raise UserError(f"--out: {out} holds no published model that could be overwritten; choose another name")
    if SUFFIXES[to] and out.is_dir():
        raise UserError(f"--out: {out} is a folder; {to} is a file")
    above = next((path for path in target.parents if path.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out: {out} cannot be written, because {above} is no folder that lets you write; choose another place")


def _check_room(out: Path, needed: int) -> None:
    """Whether the disk has room for the weights, before minutes are spent."""
    from ldm.formats.rounding import size_text

    above = next(path for path in out.resolve().parents if path.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        room = f"{size_text(needed)} are needed on that disk and {size_text(free)} are free"
        raise UserError(f"--out: {out}: {room}; make room, or choose another place or --dtype fp16")


def _commit_beside(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write(file)` fill a folder of its own, then put the file and what belongs to it at `out`, the file itself last.

    Raises:
        OSError: as the file system says, with what was there untouched.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary / out.name)
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        for path in _beside(out):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
            if (temporary / path.name).exists():
                (temporary / path.name).rename(path)
        (temporary / out.name).replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
