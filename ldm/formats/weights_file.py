"""Weights of a file by name: safetensors, or what an older program pickled, which a child process turns into safetensors."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.files import require_regular
from ldm.formats.part import AGAIN, read_safetensors
from ldm.formats.pickles import convert
from ldm.formats.signature import is_pickle
from ldm.formats.tensor_file import read_texts


def read_weights(file: Path, room: Path | None = None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and the texts beside them; what it holds counts, not how it is called.

    Args:
        room: a folder for the converted file, where it may be large; None: the system's for temporary ones.

    Raises:
        UserError: if it is missing, damaged or something else, or would run code.
    """
    try:
        require_regular(file)
        pickled = is_pickle(file)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {AGAIN}") from None
    if not pickled:
        return read_safetensors(file), read_texts(file)
    try:
        if room is not None:
            room.mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(dir=room)
    except OSError as error:
        raise UserError(f"{room or gettempdir()}: no room to convert {file.name} in ({error.strerror or error})") from None
    with folder as made:
        target = Path(made) / "weights.safetensors"
        convert(file, target)
        return read_safetensors(target), read_texts(target)
