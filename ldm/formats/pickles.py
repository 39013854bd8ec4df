"""Safe reading of pickled checkpoints (.ckpt, .pt, .bin) with weights_only=True, in a child process.

`python -m ldm.formats.pickles IN OUT` writes the tensors of IN as safetensors to OUT. A pickle names functions to call; torch's
weights_only reader calls none but those that make tensors, and what it cannot bear kills the child alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError

SECONDS = 1800  # after which the child counts as hung
# What trainers leave beside the weights. Their names are read as empty stand-ins, never imported.
HARMLESS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "omegaconf.", "argparse.", "easydict.")
PARAMETERS = "torch.nn.modules.container.ParameterDict"  # in the web UI's embeddings of 2022
EMBEDDING = "string_to_param"  # where its embeddings have their vectors, by what stands for the word
REFUSED = re.compile(r"(?:Unsupported global|Unsupported class): (?:GLOBAL )?([\w.]+)")


def convert(pickle: Path, target: Path) -> None:
    """Write a checkpoint's tensors to `target`, a safetensors file, by a child process.

    Raises:
        UserError: naming the file and what was refused or damaged.
    """
    words = [sys.executable, "-m", "ldm.formats.pickles", str(pickle), str(target)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{pickle}: not read within {SECONDS} s; the file is damaged") from None
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{pickle}: reading it killed its process ({lines[-1][:200]}); the file is damaged or hostile")


class Placeholder:
    """Stand-in for pickled trainer objects: it takes anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Parameters(dict[str, Any]):
    """Stand-in for a pickled ParameterDict: its parameters by name."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and isinstance(inner := state.get("_parameters"), dict):
            self.update(inner)


def read(path: Path) -> dict[str, Any]:
    """The checkpoint as weights_only reads it, with stand-ins for trainers' own objects.

    Raises:
        UserError: naming the first global that was refused, or what is damaged.
    """
    import torch

    allowed: set[str] = set()
    while True:
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
            break
        except Exception as error:  # of pickle, zipfile, torch: each damage has its own
            refused = REFUSED.search(str(error))
            if refused is None:
                raise UserError(f"{path}: not a checkpoint that torch can read ({str(error).splitlines()[0][:160]})") from None
            name = refused[1]
            if name in allowed or not name.startswith((*HARMLESS, PARAMETERS)):
                raise UserError(
                    f"{path}: would call {name}, which may run code, and was not read; get the model as .safetensors, or convert it on"
                    " a machine that you do not mind losing"
                ) from None
            allowed.add(name)
            stand_in = Parameters if name == PARAMETERS else type(name.rpartition(".")[2], (Placeholder,), {})
            torch.serialization.add_safe_globals([(stand_in, name)])  # type: ignore[list-item]
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not weights by name")
    return found


def weights(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors by name, from state_dict where there is one, and the texts and numbers beside them."""
    import torch

    inside = found.get("state_dict", found)
    inside = inside if isinstance(inside, dict) else found
    if isinstance(words := found.get(EMBEDDING), dict):
        inside = {f"{EMBEDDING}.{name}": value for name, value in words.items()}
    tensors = {name: value for name, value in inside.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    beside = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in found.items() if isinstance(v, str | int | float)}
    return tensors, beside


def main(words: list[str]) -> int:
    """The child: convert IN to OUT; 2 after a refusal, which it prints."""
    from safetensors.torch import save_file

    source, target = (Path(word) for word in words)
    try:
        tensors, beside = weights(read(source))
        if not tensors:
            raise UserError(f"{source}: no tensors in it")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    # Tensors may be views of one another; a file has each for itself.
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, target, metadata=beside)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
