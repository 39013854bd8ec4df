"""Scene renderer: signed distance functions with antialiased edges, at any resolution."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from ldm.data.scenes.geometry import distance
from ldm.data.scenes.spec import COLOUR_RGB, STEP, TONE_RGB, Specs, hashed

CHUNK = 1 << 16  # pixels at a time: what stays in a core's cache
TEXTURE = 0.05  # amplitude of the background's texture
SHADOW = (0.02, 0.03, 0.25)  # of rich scenes: offset to the right and down, darkening


def render(specs: Specs, resolution: int) -> NDArray[np.float32]:
    """The images (N,3,R,R) in [0,1]; the same scene at two resolutions differs in sampling and grain alone."""
    out = np.empty((len(specs), 3, resolution, resolution), np.float32)
    step = max(1, CHUNK // resolution**2)
    for start in range(0, len(specs), step):
        part = slice(start, start + step)
        _render(specs.take(part), resolution, out[part])
    return out


def to_bytes(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Images (N,3,H,W) in [0,1] as 8-bit pictures (N,H,W,3)."""
    return np.ascontiguousarray((images * 255 + np.float32(0.5)).astype(np.uint8).transpose(0, 2, 3, 1))


def _render(specs: Specs, resolution: int, out: NDArray[np.float32]) -> None:
    centre = ((np.arange(resolution, dtype=np.float64) + 0.5) / resolution).astype(np.float32)
    column, row = centre[None, None, :], centre[None, :, None]
    out[:] = TONE_RGB[specs.tone][:, :, None, None]
    textured = np.flatnonzero(specs.texture > 0)
    if len(textured):
        out[textured] += np.float32(TEXTURE) * _texture(specs.take(textured), column, row)[:, None]
    rich = np.flatnonzero(specs.rich)
    if len(rich):
        fine = _wave((column - row) * np.float32(40)) * _wave((column + row) * np.float32(37))
        out[rich] += np.float32(0.02) * fine[:, None]
    for k in range(specs.shape.shape[1]):
        for shape in range(6):
            objects = np.flatnonzero(specs.shape[:, k] == shape)
            if len(objects):
                _paint(specs, k, shape, objects, column, row, out)
    _light(specs, column, row, out)
    grainy = np.flatnonzero(specs.grain > 0)
    if len(grainy):
        noise = _normals(specs.key[grainy], out[0].size, resolution).reshape(-1, *out.shape[1:])
        out[grainy] += noise * specs.grain[grainy, None, None, None].astype(np.float32)
    np.clip(out, 0, 1, out=out)


def _paint(specs: Specs, k: int, shape: int, objects: NDArray, column: NDArray, row: NDArray, out: NDArray[np.float32]) -> None:
    """Lay object k of some scenes over what is painted so far."""
    x, y, side = (values[objects, k].astype(np.float32)[:, None, None] for values in (specs.x, specs.y, specs.side))
    scale = np.float32(out.shape[-1])
    colour = np.broadcast_to(COLOUR_RGB[specs.colour[objects, k]][:, :, None, None], (len(objects), *out.shape[1:]))
    under = out[objects]
    shaded = np.flatnonzero(specs.rich[objects])
    if len(shaded):
        right, down, dark = (np.float32(v) for v in SHADOW)
        dx, dy = np.broadcast_arrays(column - x[shaded] - right, row - y[shaded] - down)
        blurred = np.clip(np.float32(0.5) - distance(shape, dx, dy, side[shaded]) * np.float32(40), 0, 1)
        under[shaded] *= (1 - dark * blurred)[:, None]
    striped = np.flatnonzero(specs.fill[objects, k] == 1)
    if len(striped):
        lines = _wave((column + row - x[striped] - y[striped]) / (np.float32(0.4) * side[striped]))
        colour = colour.copy()
        colour[striped] *= (np.float32(0.81) + np.float32(0.19) * np.clip(lines * 3, -1, 1))[:, None]
    dx, dy = np.broadcast_arrays(column - x, row - y)
    alpha = distance(shape, dx, dy, side)
    alpha *= -scale
    alpha += np.float32(0.5)
    np.clip(alpha, 0, 1, out=alpha)
    out[objects] = under + alpha[:, None] * (colour - under)


def _wave(turns: NDArray) -> NDArray:
    """A sine of period 1 made of two parabolas: only exactly rounded operations, so that pictures agree on every machine."""
    turns = turns - np.floor(turns) - np.float32(0.5)
    return turns * (np.float32(8) - np.float32(16) * np.abs(turns))


def _texture(specs: Specs, column: NDArray, row: NDArray) -> NDArray[np.float32]:
    """Stripes, or the product of two perpendicular waves, (N,R,R) in [-1,1]."""
    angle, period = specs.wave[:, 0], specs.wave[:, 1]
    across, down = ((f(angle) / period).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    first, second = (specs.wave[:, i].astype(np.float32)[:, None, None] for i in (2, 3))
    stripes = _wave(column * across + row * down + first)
    checks = np.flatnonzero(specs.texture == 2)
    stripes[checks] *= _wave(row * across[checks] - column * down[checks] + second[checks])
    return stripes


def _light(specs: Specs, column: NDArray, row: NDArray, out: NDArray[np.float32]) -> None:
    """Brightness falls linearly from the lit corner to the opposite one; hue stays."""
    angle, fall = specs.light[:, 0], specs.light[:, 1]
    across, down = ((fall * f(angle) / np.sqrt(2)).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    middle = (1 - fall / 2).astype(np.float32)[:, None, None]
    half = np.float32(0.5)
    out *= (middle + (column - half) * across + (row - half) * down)[:, None]


@cache
def _quantiles() -> NDArray[np.float32]:
    """The normal distribution's quantiles at 65,536 equal steps."""
    return torch.special.ndtri((torch.arange(65536, dtype=torch.float64) + 0.5) / 65536).float().numpy()


def _normals(keys: NDArray[np.uint64], many: int, resolution: int) -> NDArray[np.float32]:
    """Standard normal numbers (N, many), four from each hashed counter."""
    counter = np.arange(1, (many + 3) // 4 + 1, dtype=np.uint64) * STEP
    words = hashed((keys + np.uint64(resolution))[:, None] + counter)
    return _quantiles()[words.astype("<u8", copy=False).view("<u2")][:, :many]
