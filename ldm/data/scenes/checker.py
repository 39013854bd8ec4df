"""Scene checker: reads scenes back from pixels, exactly and without any learned part; shapes by template matching."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ldm.data.scenes.geometry import HALF_HEIGHT, HALF_WIDTH, TRIANGLE, distance, relation_of
from ldm.data.scenes.spec import SIDE, Specs, hues

RANGE = (SIDE[0] / 1.18, SIDE[-1] * 1.18)  # of an object's side: the size classes' borders lie 18 % off
LEAST_SEEN = 0.65  # share of a shape that must be visible
WINDOW = 1.15  # half the width of the canonical window, in sides of the object
BELOW = TRIANGLE * np.sqrt(3) / 12  # a triangle's centroid below the centre of its box

Array = NDArray[np.floating]


@cache
def _bank(grid: int, fine: bool) -> tuple[Array, NDArray[np.float64]]:
    """Templates of all shapes in the canonical window, centroid in the middle: (6,T,grid*grid), and their (T,3) scale and offset."""
    scales = (0.88, 0.94, 1.0, 1.06, 1.12) if fine else (1.0,)
    offsets = (-0.08, 0.0, 0.08) if fine else (0.0,)
    moves = np.array([(s, dx, dy) for s in scales for dx in offsets for dy in offsets])
    ticks = ((np.arange(grid) + 0.5) / grid * 2 - 1) * WINDOW
    column, row = np.meshgrid(ticks, ticks)
    bank = np.empty((6, len(moves), grid * grid), np.float32)
    pixel = 2 * WINDOW / grid
    for shape in range(6):
        for i, (scale, dx, dy) in enumerate(moves):
            below = scale * BELOW if shape == 2 else 0.0
            far = distance(shape, column - dx, row - dy + below, np.full(column.shape, scale))
            bank[shape, i] = np.clip(0.5 - far / pixel, 0, 1).reshape(-1)
    return bank, moves


def _window(
    alpha: Array, ignore: NDArray[np.bool_], item: NDArray[np.int64], x: NDArray, y: NDArray, side: NDArray, grid: int
) -> tuple[Array, Array]:
    """Canonical views (W, grid*grid) of components `item` about (x, y) [px]: the mask, and the weights that leave out other objects."""
    size = alpha.shape[-1]
    ticks = (((np.arange(grid) + 0.5) / grid * 2 - 1) * WINDOW).astype(np.float32)
    columns = x.astype(np.float32)[:, None] + ticks * side.astype(np.float32)[:, None] - np.float32(0.5)
    rows = y.astype(np.float32)[:, None] + ticks * side.astype(np.float32)[:, None] - np.float32(0.5)
    x0, y0 = np.floor(columns), np.floor(rows)
    fx, fy = (columns - x0)[:, None, :], (rows - y0)[:, :, None]
    xi, yi = x0.astype(np.int64), y0.astype(np.int64)
    left, right = (np.clip(v, 0, size - 1)[:, None, :] for v in (xi, xi + 1))
    up, down = (np.clip(v, 0, size - 1)[:, :, None] * size for v in (yi, yi + 1))
    base = (item * size * size)[:, None, None]
    flat = alpha.reshape(-1)
    top = flat[base + up + left] * (1 - fx) + flat[base + up + right] * fx
    bottom = flat[base + down + left] * (1 - fx) + flat[base + down + right] * fx
    mask = (top * (1 - fy) + bottom * fy > 0.5).astype(np.float32)
    near_x, near_y = np.rint(columns).astype(np.int64), np.rint(rows).astype(np.int64)
    inside = ((near_x >= 0) & (near_x < size))[:, None, :] & ((near_y >= 0) & (near_y < size))[:, :, None]
    at = base + np.clip(near_y, 0, size - 1)[:, :, None] * size + np.clip(near_x, 0, size - 1)[:, None, :]
    weight = (inside & ~ignore.reshape(-1)[at]).astype(np.float32)
    return (mask * weight).reshape(-1, grid * grid), weight.reshape(-1, grid * grid)


def _overlap(mask: Array, weight: Array, templates: Array) -> Array:
    """Intersection over union of W masks with T templates, (W,T); less where most of the template would be hidden."""
    both, drawn = mask @ templates.T, weight @ templates.T
    return _union(mask, both, drawn, templates.sum(1))


def _union(mask: Array, both: Array, drawn: Array, whole: Array) -> Array:
    area = mask.sum(1).reshape(-1, *[1] * (both.ndim - 1))
    return both / np.maximum(area + drawn - both, 1e-6) * np.minimum(1, drawn / (LEAST_SEEN * whole))


def fit(
    alpha: Array, ignore: NDArray[np.bool_], near: NDArray[np.bool_], other: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Each component's best shape, the centre of its box, its side (units of the image) and the fit's intersection over union."""
    m, size = len(alpha), alpha.shape[-1]
    centre = np.arange(size) + 0.5
    mass = np.maximum(alpha.sum((1, 2)), 1e-6)
    x, y = (alpha.sum(1) @ centre) / mass, (alpha.sum(2) @ centre) / mass
    best = np.zeros((m, 6))
    pose = np.zeros((m, 6, 3))  # centroid and side, px
    _refine(alpha, ignore, np.arange(m), None, x, y, np.sqrt(mass), best, pose)
    touching = np.flatnonzero((near & other).any((1, 2)))
    if len(touching):
        item, shape, x, y, side = _anchored(alpha, ignore, touching)
        _refine(alpha, ignore, item, shape, x, y, side, best, pose)
    shape = best.argmax(1)
    rows = np.arange(m)
    x, y, side = pose[rows, shape].T
    return shape, x / size, (y - np.where(shape == 2, BELOW * side, 0)) / size, side / size, best[rows, shape]


def _refine(
    alpha: Array,
    ignore: NDArray[np.bool_],
    item: NDArray,
    shape: NDArray | None,
    x: NDArray,
    y: NDArray,
    side: NDArray,
    best: NDArray,
    pose: NDArray,
) -> None:
    """Compare views with the fine bank (of all shapes, or of `shape`) and keep what beats `best` (m,6)."""
    bank, moves = _bank(32, True)
    mask, weight = _window(alpha, ignore, item, x, y, side, 32)
    for kind in range(6):
        rows = np.arange(len(item)) if shape is None else np.flatnonzero(shape == kind)
        if not len(rows):
            continue
        fits = _overlap(mask[rows], weight[rows], bank[kind])
        choice = fits.argmax(1)
        iou = fits[np.arange(len(rows)), choice]
        scale, dx, dy = moves[choice].T
        won = iou > best[item[rows], kind]
        best[item[rows[won]], kind] = iou[won]
        found = np.stack([x[rows] + dx * side[rows], y[rows] + dy * side[rows], scale * side[rows]], 1)
        pose[item[rows[won]], kind] = found[won]


def _anchored(alpha: Array, ignore: NDArray[np.bool_], item: NDArray[np.int64]) -> tuple[NDArray, ...]:
    """For components that others may hide in part: each shape's best pose among those that touch the visible box at two sides or more."""
    size = alpha.shape[-1]
    solid = np.asarray(alpha[item] > 0.5)
    across, down = np.asarray(solid.any(axis=1)), np.asarray(solid.any(axis=2))
    left, right = across.argmax(1), size - across[:, ::-1].argmax(1)
    top, bottom = down.argmax(1), size - down[:, ::-1].argmax(1)
    poses = []
    for shape in range(6):
        wide, high = HALF_WIDTH[shape], HALF_HEIGHT[shape]
        by_width, by_height = (right - left) / (2 * wide), (bottom - top) / (2 * high)
        middle_x, middle_y = (left + right) / 2, (top + bottom) / 2
        choices = [
            (middle_x, top + high * by_width, by_width),
            (middle_x, bottom - high * by_width, by_width),
            (left + wide * by_height, middle_y, by_height),
            (right - wide * by_height, middle_y, by_height),
        ]
        for side in SIDE * size:
            for x in (left + wide * side, right - wide * side):
                choices += [(x, top + high * side, np.full(len(item), side)), (x, bottom - high * side, np.full(len(item), side))]
        poses.append(np.stack([np.stack(choice, 1) for choice in choices], 1))
    table = np.stack(poses, 1)  # (m,6,16,3): centre of the box and side, px
    table[:, 2, :, 1] += BELOW * table[:, 2, :, 2]
    m, shapes, many, _ = table.shape
    flat = table.reshape(-1, 3)
    flat[:, 2] = np.clip(flat[:, 2], RANGE[0] * size, RANGE[1] * size)
    mask, weight = _window(alpha, ignore, np.repeat(item, shapes * many), flat[:, 0], flat[:, 1], flat[:, 2], 16)
    bank, _ = _bank(16, False)
    drawn, both = (np.einsum("mscp,sp->msc", v.reshape(m, shapes, many, -1), bank[:, 0]) for v in (weight, mask))
    iou = _union(mask, both.reshape(-1), drawn.reshape(-1), np.tile(np.repeat(bank[:, 0].sum(1), many), m))
    choice = iou.reshape(m, shapes, many).argmax(2)
    chosen = np.take_along_axis(table, choice[..., None, None], 2).reshape(-1, 3)
    return np.repeat(item, shapes), np.tile(np.arange(shapes), m), chosen[:, 0], chosen[:, 1], chosen[:, 2]


WORK = 64  # px, the largest size that is read
CHROMA = 0.20  # of a coloured pixel: greatest minus least channel
LEAST_AREA = 0.36 * SIDE[0] ** 2
LEAST_IOU = 0.72
COHERENT = 0.6  # share of an object's inner pixels that show its hue
UNEXPLAINED = 0.15  # share of all colour
BORDERS = np.sqrt(SIDE[1:] * SIDE[:-1])  # between the size classes, 18 % from each
CHUNK = 1 << 16  # pixels at a time


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


def coverage(images: NDArray, reading: Reading) -> Iterator[tuple[int, Array]]:
    """Each object that was read, by its number, and the share of every pixel that it covers, (h,w) with h at most WORK."""
    for i in np.unique(reading.image).tolist():
        chroma, hue = _colour(_planes(images[i : i + 1]))
        labels, _, colours = _components(_vote(hue))
        size = labels.shape[-1]
        middles = np.array([np.argwhere(labels[0] == k + 1).mean(0) + 0.5 for k in range(len(colours))]) / size
        for number in range(*reading.objects(i).indices(len(reading.image))):
            far = np.hypot(middles[:, 0] - reading.y[number], middles[:, 1] - reading.x[number])
            k = int(np.where(colours == reading.colour[number], far, np.inf).argmin())
            own = labels == k + 1
            alpha = np.clip(chroma / max(float(np.median(chroma[own])), 1e-3), 0, 1) * (_grow(own, 1) & ~((labels > 0) & ~own))
            yield number, alpha[0]


def colours(images: NDArray) -> NDArray[np.int8]:
    """The colour of each pixel of images (N,H,W,3), (N,h,w) with h at most WORK: an index of `COLOURS`, -1 for none."""
    return _vote(_colour(_planes(images))[1])


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
