"""Watermark: a text hidden in a picture's pixels, for whoever looks for it.

It says where a picture is from as long as nobody minds: it is not secret, and cropping, resizing or redrawing takes it away.
Luma's 8x8 cosine coefficients of middling frequency are moved onto one of two lattices, one for each bit (quantisation index
modulation, Chen 2001); the bits repeat over the whole picture, and a checksum tells a watermark from chance.
"""

from __future__ import annotations

import binascii
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ldm.config.errors import UserError

MOST_BYTES = 32  # of a text
STEP = 16.0  # between two points of a lattice, in grey levels; pixels change by about 1
PLACES = ((0, 2), (1, 1), (2, 0), (1, 2), (2, 1), (0, 3), (3, 0))  # of the coefficients, (row, column)
LEAST_REPEATS = 3
LUMA = np.array([0.299, 0.587, 0.114])
ROUNDS = 24  # of moving coefficients and pixels in turn
Bytes = NDArray[np.uint8]


def hide(pixels: Bytes, text: str) -> Bytes:
    """The picture (H,W,3) with `text` in it.

    Raises:
        UserError: if the text is too long for it.
    """
    check(text, (pixels.shape[0], pixels.shape[1]))
    bits = _bits(text.encode())
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    found = pixels.astype(np.float64)
    inner = found[:height, :width]
    carried = bits[_order(height, width) % len(bits)]  # (blocks,places)
    rows, columns = np.array(PLACES).T
    for _ in range(ROUNDS):
        blocks = _cosine(inner @ LUMA)  # (blocks,8,8)
        now = blocks[:, rows, columns]
        # The nearest point of the bit's lattice.
        wanted = (np.round(now / STEP - carried / 2) + carried / 2) * STEP
        if (np.abs(wanted - now) < STEP / 16).all():
            break
        change = np.zeros_like(blocks)
        change[:, rows, columns] = wanted - now
        inner += _pixels(change, height, width)[..., None]
        np.clip(inner, 0, 255, out=inner)
    return np.round(found).astype(np.uint8)


def seek(pixels: Bytes) -> str | None:
    """The text hidden in a picture (H,W,3), or None. By chance something is found in one picture of half a million."""
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    if not height or not width:
        return None
    rows, columns = np.array(PLACES).T
    values = _cosine(pixels[:height, :width].astype(np.float64) @ LUMA)[:, rows, columns]
    # 1 on the lattice of bit 0, -1 on that of bit 1.
    votes = np.cos(2 * np.pi * values / STEP).ravel()
    order = _order(height, width).ravel()
    for length in range(1, MOST_BYTES + 1):
        many = 8 * (length + 3)
        if len(order) < LEAST_REPEATS * many:
            break
        bits = np.bincount(order % many, votes, many) < 0
        data = np.packbits(bits).tobytes()
        if data[0] == length and binascii.crc_hqx(data[:-2], 0x1D0F) == int.from_bytes(data[-2:], "big"):
            try:
                return data[1:-2].decode()
            except UnicodeDecodeError:
                continue
    return None


def check(text: str, size: tuple[int, int]) -> None:
    """Refuse texts that a picture of `size` (height, width) px cannot carry.

    Raises:
        UserError: saying how long it may be.
    """
    length = len(text.encode())
    slots = (size[0] // 8) * (size[1] // 8) * len(PLACES)
    room = min(MOST_BYTES, slots // (8 * LEAST_REPEATS) - 3)
    if not 1 <= length <= room:
        said = f"1 to {room} are possible" if room > 0 else "nothing fits"
        raise UserError(f"watermark: {text!r} has {length} bytes; in a picture of {size[1]}x{size[0]} px {said}")


def _bits(data: bytes) -> NDArray[np.int64]:
    """Length, text, checksum."""
    whole = bytes([len(data)]) + data
    whole += binascii.crc_hqx(whole, 0x1D0F).to_bytes(2, "big")
    return np.unpackbits(np.frombuffer(whole, np.uint8)).astype(np.int64)


def _order(height: int, width: int) -> NDArray[np.int64]:
    """A number for every coefficient, (blocks,places), the same for all pictures of a size."""
    blocks = (height // 8) * (width // 8)
    return np.random.Generator(np.random.Philox(key=7)).permutation(blocks * len(PLACES)).reshape(blocks, -1)


@lru_cache(maxsize=1)
def _basis() -> NDArray[np.float64]:
    """The cosine transform of 8 values, orthonormal (8,8)."""
    k, n = np.mgrid[:8, :8]
    return np.cos(np.pi * (2 * n + 1) * k / 16) * np.where(k == 0, 1 / 8, 1 / 4) ** 0.5


def _cosine(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients (blocks,8,8) of values (H,W)."""
    height, width = values.shape
    blocks = values.reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3).reshape(-1, 8, 8)
    return _basis() @ blocks @ _basis().T


def _pixels(blocks: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    """Values (H,W) of coefficients (blocks,8,8)."""
    values = _basis().T @ blocks @ _basis()
    return values.reshape(height // 8, width // 8, 8, 8).transpose(0, 2, 1, 3).reshape(height, width)
