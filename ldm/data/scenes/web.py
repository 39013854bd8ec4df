"""Simulated web corruptions: upscaled originals, watermarks, blur, noise, wrong captions, and the metadata that filters read.

Each corruption is drawn for a scene by its address and known exactly; `aesthetic` and `p_watermark` are closed forms with noise, as the
scores of learned predictors are (the columns of LAION, Schuhmann 2022, arXiv 2210.08402), so that each filter's effect can be counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ldm.data.scenes.spec import UniformDraws

WATERMARK, WRONG_CAPTION, ENLARGED, BLURRED, NOISY = 0.15, 0.15, 0.25, 0.10, 0.10  # shares of the corpus


@dataclass(frozen=True)
class WebFields:
    """Corruptions of N web pictures: ground truth, and the three columns that a filter sees."""

    watermarked: NDArray[np.bool_]  # (N,)
    wrong_caption: NDArray[np.bool_]  # (N,) the caption is another scene's
    enlarged: NDArray[np.bool_]  # (N,)
    blur: NDArray[np.float64]  # (N,) standard deviation in units of the side, 0: sharp
    noise: NDArray[np.float64]  # (N,) standard deviation, 0: none
    original_px: NDArray[np.int64]  # (N,) seen by filters: side of the original
    aesthetic: NDArray[np.float64]  # (N,) seen by filters: 0..10
    p_watermark: NDArray[np.float64]  # (N,) seen by filters: 0..1
    other: NDArray[np.float64]  # (N,) in [0,1): which scene a wrong caption is taken from
    key: NDArray[np.uint64]  # (N,) addresses the noise

    def counts(self) -> dict[str, int]:
        """How many pictures bear each corruption."""
        marks = {
            "watermarked": self.watermarked,
            "wrong_caption": self.wrong_caption,
            "enlarged": self.enlarged,
            "blurred": self.blur > 0,
            "noisy": self.noise > 0,
        }
        return {name: int(mark.sum()) for name, mark in marks.items()}

    def take(self, rows: NDArray[np.int64]) -> WebFields:
        """Some of the pictures."""
        return WebFields(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def draw_web(keys: NDArray[np.uint64], pixels: int) -> WebFields:
    """The corruptions of pictures by address; sound originals measure 2 to 8 times `pixels`, enlarged ones a half or a quarter of it."""
    draw = UniformDraws(keys)
    u = draw(5) < (WATERMARK, WRONG_CAPTION, ENLARGED, BLURRED, NOISY)
    watermarked, wrong, enlarged, blurred, noisy = u.T
    sound = (pixels * 2 ** (1 + 2 * draw())).astype(np.int64)
    original = np.where(enlarged, np.where(draw() < 0.5, pixels // 2, pixels // 4), sound)
    blur, noise = np.where(blurred, 0.02 + 0.02 * draw(), 0), np.where(noisy, 0.05 + 0.05 * draw(), 0)
    error = (draw(2, 4).sum(2) - 2) * np.sqrt(3)  # nearly normal, deviation 1
    ugly = 1.5 * watermarked + 2.0 * enlarged + 50 * blur + 15 * noise
    aesthetic = np.clip(6.5 - ugly + 0.6 * error[:, 0], 0, 10)
    p_watermark = 1 / (1 + np.exp(-np.where(watermarked, 2.5, -2.5) - error[:, 1]))
    return WebFields(watermarked, wrong, enlarged, blur, noise, original, aesthetic, p_watermark, draw(), keys)


def corrupt(images: NDArray[np.float32], web: WebFields) -> NDArray[np.float32]:
    """Pictures (N,3,R,R) in [0,1] as they would be found: enlarged, watermarked, blurred, noisy. Wrong captions are the caller's."""
    out = images.copy()
    resolution = out.shape[-1]
    for original in np.unique(web.original_px[web.enlarged & (web.original_px < resolution)]).tolist():
        rows = np.flatnonzero(web.enlarged & (web.original_px == original))
        small = F.interpolate(torch.from_numpy(out[rows]), size=(original, original), mode="area")
        out[rows] = F.interpolate(small, size=(resolution, resolution), mode="bilinear").numpy()
    place = ((np.arange(resolution) + 0.5) / resolution).astype(np.float32)
    lines = np.abs((place[:, None] + place[None]) * 4 % 1 - 0.5) < 0.14
    dashes = (place[:, None] - place[None]) * 8 % 1 < 0.7
    out[web.watermarked] += np.float32(0.3) * (lines & dashes) * (1 - out[web.watermarked])
    for i in np.flatnonzero(web.blur > 0).tolist():
        from scipy import ndimage

        deviation = web.blur[i] * resolution
        out[i] = ndimage.gaussian_filter(out[i], (0, deviation, deviation), mode="nearest")
    for i in np.flatnonzero(web.noise > 0).tolist():
        rng = np.random.Generator(np.random.Philox(key=[int(web.key[i]), resolution]))
        out[i] += np.float32(web.noise[i]) * rng.standard_normal(out[i].shape, np.float32)
    return np.clip(out, 0, 1, out=out)
