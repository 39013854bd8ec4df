"""Weights of a file by name: safetensors, or what an older program pickled, which a child process turns into safetensors."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.files import require_regular
from ldm.formats.part import AGAIN, read_safetensors
from ldm.formats.pickles import convert
from ldm.formats.tensor_file import read_texts

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04")  # how torch's files begin, today's and those before 2020
LENGTH = 8  # bytes of the header's length, in which a safetensors file begins; its upper half is zero


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file by name, and the texts beside them; what it holds counts, not how it is called.

    Raises:
        UserError: if it is missing, damaged or something else, or would run code.
    """
    try:
        require_regular(file)
        with file.open("rb") as opened:
            first = opened.read(LENGTH)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {AGAIN}") from None
    if not first.startswith(PICKLES) or not any(first[LENGTH // 2 :]):
        return read_safetensors(file), read_texts(file)
    with TemporaryDirectory() as folder:
        target = Path(folder) / "weights.safetensors"
        convert(file, target)
        return read_safetensors(target), read_texts(target)
