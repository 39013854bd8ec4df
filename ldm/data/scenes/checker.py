"""Scenes read back from pixels, exactly and without any learned part: colour, shape, size, cell, fill and background.

Images are read at 64 pixels at most. Coloured pixels vote for one of eight hues and fall into components; each component is compared with
all six shapes over scale and offset by intersection over union, with other objects' pixels left out. An image whose colour is not explained
by accepted objects is invalid, so that blobs and noise earn nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.fit import RANGE, fit
from ldm.data.scenes.geometry import relation_of
from ldm.data.scenes.spec import SIDE, Specs, hues

WORK = 64  # px, the largest size that is read
CHROMA = 0.20  # of a coloured pixel: greatest minus least channel
LEAST_AREA = 0.36 * SIDE[0] ** 2
LEAST_IOU = 0.72
COHERENT = 0.6  # share of an object's inner pixels that show its hue
UNEXPLAINED = 0.15  # share of all colour
BORDERS = np.sqrt(SIDE[1:] * SIDE[:-1])  # between the size classes, 18 % from each
CHUNK = 1 << 16  # pixels at a time

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Reading:
    """What N images show: M objects in all, in order of images."""

    image: NDArray[np.int64]  # (M,) which image
    colour: NDArray[np.int64]  # (M,) indices of the word lists of `scene_spec`
    shape: NDArray[np.int64]  # (M,)
    size: NDArray[np.int64]  # (M,)
    cell: NDArray[np.int64]  # (M,)
    fill: NDArray[np.int64]  # (M,)
    x: NDArray[np.float64]  # (M,) centre of the bounding box
    y: NDArray[np.float64]  # (M,)
    side: NDArray[np.float64]  # (M,) square root of the area
    iou: NDArray[np.float64]  # (M,) of the fit
    valid: NDArray[np.bool_]  # (N,) whether the objects explain the colour
    tone: NDArray[np.int64]  # (N,)
    texture: NDArray[np.int64]  # (N,)

    def objects(self, image: int) -> slice:
        """Where the objects of one image stand."""
        return slice(int(np.searchsorted(self.image, image)), int(np.searchsorted(self.image, image + 1)))


def reads_back(specs: Specs, images: NDArray) -> NDArray[np.bool_]:
    """Whether each scene's image (N,H,W,3) shows exactly its objects, their relation and its background, (N,)."""
    found, fills = read(images), specs.rich.astype(np.int64)
    seen = _codes(found.colour, found.shape, found.size, found.cell, found.fill * fills[found.image])
    there = specs.shape >= 0
    true = np.where(there, _codes(specs.colour, specs.shape, specs.size, specs.cell, specs.fill), -1)
    good = found.valid & (found.tone == specs.tone) & (found.texture == specs.texture)
    good &= np.bincount(found.image, minlength=len(specs)) == specs.count
    for i in np.flatnonzero(good):
        at = found.objects(int(i))
        order, wanted = np.argsort(seen[at], kind="stable"), np.argsort(true[i][there[i]], kind="stable")
        good[i] = (seen[at][order] == true[i][there[i]][wanted]).all()
        if good[i] and len(order) == 2 and seen[at][0] != seen[at][1]:
            was, now = (
                relation_of(x[o][1] - x[o][0], y[o][1] - y[o][0])
                for x, y, o in ((specs.x[i], specs.y[i], wanted), (found.x[at], found.y[at], order))
            )
            good[i] = was == now or was < 0
    return good


def _codes(colour: NDArray, shape: NDArray, size: NDArray, cell: NDArray, fill: NDArray) -> NDArray[np.int64]:
    return (((colour * 6 + shape) * 3 + size) * 9 + cell) * 2 + fill


def read(images: NDArray) -> Reading:
    """Read images (N,H,W,3): uint8, or floating point in [0,1].

    Raises:
        ValueError: if the images are not square RGB pictures of at least 16 pixels.
    """
    if images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2] or images.shape[1] < 16:
        raise ValueError(f"scenes are read from square RGB images (N,H,W,3) of at least 16 px, not from shape {images.shape}")
    step = max(1, CHUNK // min(images.shape[1], WORK) ** 2)
    parts = [_read(_planes(images[i : i + step])) for i in range(0, max(1, len(images)), step)]
    offset = np.repeat(np.arange(len(parts)) * step, [len(part.image) for part in parts])
    values = {name: np.concatenate([getattr(part, name) for part in parts]) for name in Reading.__dataclass_fields__}
    values["image"] = values["image"] + offset
    return Reading(**values)


def _planes(images: NDArray) -> Array:
    """The images as (N,3,h,w) float32 in [0,1] with h at most WORK, averaged over areas."""
    planes = images.transpose(0, 3, 1, 2).astype(np.float32)
    if images.dtype == np.uint8:
        planes /= 255
    np.clip(planes, 0, 1, out=planes)
    size = planes.shape[-1]
    if size > WORK:
        edges = np.arange(WORK + 1) * (size / WORK)
        low, high = edges[:-1, None], edges[1:, None]
        cover = np.clip(np.minimum(high, np.arange(size) + 1) - np.maximum(low, np.arange(size)), 0, None)
        weights = (cover * (WORK / size)).astype(np.float32)
        planes = weights @ planes @ weights.T
    return planes


def _read(planes: Array) -> Reading:
    n, _, size, _ = planes.shape
    chroma, hue = _colour(planes)
    vote = _vote(hue)
    labels, image, colour = _components(vote)
    m = len(image)
    own = labels[image] == np.arange(1, m + 1)[:, None, None]
    other = (labels[image] > 0) & ~own
    median = np.array([np.median(chroma[i][mask]) for i, mask in zip(image, own, strict=True)], np.float32).reshape(m)
    alpha = chroma[image] / np.maximum(median, 1e-3)[:, None, None]
    np.clip(alpha, 0, 1, out=alpha)
    alpha *= _grow(own, 1) & ~other
    shape, x, y, side, iou = fit(alpha, _grow(other, 1) & ~own, _grow(own, 1), other)
    core = _shrink(own)
    core = np.where(np.asarray(core.any(axis=(1, 2)))[:, None, None], core, own)
    coherent = ((hue[image] == colour[:, None, None]) & core).sum((1, 2)) / np.maximum(core.sum((1, 2)), 1)
    accepted = np.asarray((iou >= LEAST_IOU) & (side > RANGE[0]) & (side < RANGE[1]) & (coherent >= COHERENT))
    fill = _fill(planes.max(1)[image], _shrink(core))
    explained = np.zeros((n, size, size), bool)
    np.logical_or.at(explained, image[accepted], _grow(own[accepted], 2))
    smooth = _smooth(planes)
    coloured = smooth.max(1) - smooth.min(1) > CHROMA
    total = coloured.sum((1, 2))
    valid = (coloured & ~explained).sum((1, 2)) <= UNEXPLAINED * total
    tone, texture = _background(planes.mean(1), _grow(coloured | (vote >= 0), 2))
    cell = np.clip((y * 3).astype(int), 0, 2) * 3 + np.clip((x * 3).astype(int), 0, 2)
    found = {"image": image, "colour": colour, "shape": shape, "size": np.searchsorted(BORDERS, side), "cell": cell, "fill": fill}
    found |= {"x": x, "y": y, "side": side, "iou": iou}
    return Reading(**{name: values[accepted] for name, values in found.items()}, valid=valid, tone=tone, texture=texture)


def _fill(value: Array, core: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Striped where brightness varies inside an object by more than light explains; what is too small to tell is solid."""
    weight = core.sum((1, 2))
    mean = (value * core).sum((1, 2)) / np.maximum(weight, 1)
    spread = np.sqrt((((value - mean[:, None, None]) ** 2) * core).sum((1, 2)) / np.maximum(weight, 1))
    return ((weight >= 16) & (spread > 0.11 * mean)).astype(np.int64)


# ---- pixels ----------------------------------------------------------------------------------------------------------------------------
@cache
def _hue_table() -> NDArray[np.int8]:
    """The nearest of the eight colours for each whole degree of hue."""
    gap = np.abs(np.arange(361)[:, None] - hues()[None])
    return np.minimum(gap, 360 - gap).argmin(1).astype(np.int8)


def _colour(planes: Array) -> tuple[Array, NDArray[np.int8]]:
    """Chroma (N,h,w) and the nearest colour, -1 where there is too little."""
    red, green, blue = planes[:, 0], planes[:, 1], planes[:, 2]
    high = np.maximum(np.maximum(red, green), blue)
    chroma = high - np.minimum(np.minimum(red, green), blue)
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(high == red, (green - blue) / safe % 6, np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    nearest = _hue_table()[np.rint(hue * 60).astype(np.int64)]
    return chroma, np.where(chroma > CHROMA, nearest, np.int8(-1))


def _box(values: NDArray) -> NDArray:
    """Sums over 3 x 3 neighbourhoods, zero outside."""
    padded = np.pad(values, ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]


def _vote(hue: NDArray[np.int8]) -> NDArray[np.int8]:
    """The commonest class (or none, -1) in each 3 x 3 neighbourhood."""
    most = _box((hue < 0).astype(np.uint8))
    inside = np.full(hue.shape[1:], 9, np.uint8)
    inside -= _box(np.ones((1, *hue.shape[1:]), np.uint8))[0]
    most += inside  # what lies outside the image has no colour
    winner = np.full(hue.shape, -1, np.int8)
    for colour in range(8):
        votes = _box((hue == colour).astype(np.uint8))
        better = votes > most
        winner[better] = colour
        np.maximum(most, votes, out=most)
    return winner


def _components(vote: NDArray[np.int8]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Connected pixels of one colour: labels (N,h,w) from 1, and each component's image and colour, in order of images."""
    from scipy import ndimage

    flat = np.zeros((3, 3, 3), bool)
    flat[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    labels = np.zeros(vote.shape, np.int32)
    last = 0
    for colour in range(8):
        part, many = ndimage.label(vote == colour, flat)
        labels += np.where(part > 0, part + np.int32(last), 0)
        last += many
    where = np.flatnonzero(labels.reshape(-1))
    ids = labels.reshape(-1)[where]
    area = np.bincount(ids, minlength=last + 1)
    first = np.zeros(last + 1, np.int64)
    first[ids[::-1]] = where[::-1]
    pixels = vote.shape[1] * vote.shape[2]
    keep = np.flatnonzero(area >= LEAST_AREA * pixels)
    keep = keep[keep > 0]
    keep = keep[np.argsort(first[keep], kind="stable")]
    rename = np.zeros(last + 1, np.int32)
    rename[keep] = np.arange(1, len(keep) + 1)
    return rename[labels], first[keep] // pixels, vote.reshape(-1)[first[keep]].astype(np.int64)


def _grow(mask: NDArray[np.bool_], times: int) -> NDArray[np.bool_]:
    """Dilated by one pixel in all eight directions, several times."""
    out = mask.copy()
    for _ in range(times):
        line = out.copy()
        line[:, 1:] |= out[:, :-1]
        line[:, :-1] |= out[:, 1:]
        out = line.copy()
        out[:, :, 1:] |= line[:, :, :-1]
        out[:, :, :-1] |= line[:, :, 1:]
    return out


def _shrink(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return ~_grow(~mask, 1)


def _smooth(planes: Array) -> Array:
    """Binomial 1-2-1 smoothing both ways, edges repeated."""
    padded = np.pad(planes, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16


# ---- background ------------------------------------------------------------------------------------------------------------------------
def _background(luma: Array, covered: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tone from the median, texture from the strongest waves: stripes have one at the texture's frequency, checks two at its diagonal.

    Returns:
        tone and texture, (N,); -1 where next to no background is left.
    """
    n, size, _ = luma.shape
    weight = (~covered).astype(np.float64)
    area = weight.sum((1, 2))
    free = area >= 0.04 * size * size
    median = np.array([np.median(image[~mask]) if ok else 0 for image, mask, ok in zip(luma, covered, free, strict=True)])
    tone = np.where(free, np.searchsorted([0.22, 0.60], median), -1)
    place = np.linspace(-1, 1, size)
    basis = np.stack([np.ones((size, size)), *np.meshgrid(place, place)]).reshape(3, -1)
    flat, light = weight.reshape(n, size * size), luma.reshape(n, size * size)
    normal = np.einsum("np,ip,jp->nij", flat, basis, basis, optimize=True) + 1e-6 * np.eye(3)
    plane = np.linalg.solve(normal, ((flat * light) @ basis.T)[..., None])[..., 0]
    residual = ((light - plane @ basis) * flat).reshape(n, size, size)
    waves = np.abs(np.fft.rfft2(residual, (2 * size, 2 * size))) * 2 / np.maximum(area, 1)[:, None, None]
    cycles = np.hypot(np.fft.fftfreq(2 * size, 1 / size)[:, None], np.fft.rfftfreq(2 * size, 1 / size))
    stripes, checks = (np.where((cycles > a) & (cycles <= b), waves, 0).max((1, 2)) for a, b in ((4.0, 6.3), (6.3, 8.9)))
    texture = np.where(np.maximum(stripes, checks) < 0.009, 0, np.where(stripes > checks, 1, 2))
    return tone, np.where(free, texture, -1)
