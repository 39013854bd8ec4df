"""Reconstruction metrics: PSNR and SSIM."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config.schema import Count, Positive, config
from ldm.data.scenes.checker import read
from ldm.data.scenes.source import Scenes
from ldm.metrics import adherence, frechet, shapes
from ldm.metrics.bench import Bench, Values
from ldm.metrics.extractors import Features, RandomFeatures


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio (B,), dB, of images (B,C,H,W) in [0,1]; equal images have infinity."""
    errors = [(x.double() - y.double()).square().mean() for x, y in zip(a, b, strict=True)]
    return -10 * torch.log10(torch.stack(errors))


def ssim(a: Tensor, b: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Structural similarity (B,) of images (B,C,H,W) in [0,1], mean over channels and places (Wang 2004, eq. 13).

    Gaussian window, K1 = 0.01, K2 = 0.03, places where the window fits; images smaller than it get a smaller one.
    """
    size = min(window, a.shape[2], a.shape[3])
    offset = torch.arange(size, dtype=torch.float64, device=a.device) - (size - 1) / 2
    line = torch.exp(-0.5 * (offset / sigma).square())
    line = line / line.sum()
    # One image at a time: a few hundred large ones in double precision would take many gigabytes.
    return torch.stack([_ssim(x.double(), y.double(), line) for x, y in zip(a, b, strict=True)])


def _ssim(x: Tensor, y: Tensor, line: Tensor) -> Tensor:
    """Of two images (C,H,W), with the window's profile along either axis."""
    moments = torch.stack([x, y, x * x, y * y, x * y]).flatten(0, 1)[:, None]  # every map by itself: (5C,1,H,W)
    blurred = F.conv2d(F.conv2d(moments, line.view(1, 1, 1, -1)), line.view(1, 1, -1, 1))
    mx, my, xx, yy, xy = blurred[:, 0].unflatten(0, (5, len(x)))
    xx, yy, xy = xx - mx * mx, yy - my * my, xy - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * mx * my + c1) * (2 * xy + c2) / ((mx * mx + my * my + c1) * (xx + yy + c2))).mean()


@config
class Reconstruction:
    """How faithful the autoencoder is: PSNR, SSIM, Fréchet distance of reconstructions and, on scenes, what the checker reads from them.

    PSNR and SSIM reward the mean of what may have been there; the distance of reconstructions from images (rFID where the
    features are Inception's) is what a discriminator betters.
    """

    kind: Literal["reconstruction"] = "reconstruction"
    images: Positive = 200  # validation images
    size: Count = 0  # px; 0: the stage's own
    features: Features = RandomFeatures()  # what reconstructions and images are compared by

    asks = "reconstruct"  # of the model

    def names(self, scenes: bool) -> tuple[str, ...]:
        """The plain values of the result; what the checker reads only on scenes."""
        return ("psnr", "ssim", "frechet", *((*adherence.METRICS, "iou", "iou_worst") if scenes else ()))

    def check_weights(self) -> None:
        """Raises UserError for weights that are not here."""
        self.features.check()

    def run(self, bench: Bench) -> Values:
        """Means over validation images."""
        if self.size:
            bench = replace(bench, resolution=self.size)
        real = bench.real(self.images).image
        made = []
        for start in range(0, len(real), 50):
            with torch.no_grad():
                made.append(bench.model.reconstruct(real[start : start + 50].to(bench.device)).cpu())
            bench.progress(min(start + 50, len(real)), len(real), "reconstruction")
        images = torch.cat(made).float().clamp(-1, 1)
        a, b = (images + 1) / 2, (real + 1) / 2
        # Equal images have infinite PSNR, which JSON does not know.
        found: Values = {"psnr": round(float(psnr(a, b).clamp(max=100).mean()), 3), "ssim": round(float(ssim(a, b).mean()), 4)}
        extractor = self.features.load(bench.device)
        if len(real) > 1:
            sets = [extractor.features(x) for x in (real, images)]
            if isinstance(self.features, RandomFeatures):
                sets = frechet.standardise(*sets)
            found["frechet"] = round(frechet.distance(*sets), 3)
        if isinstance(bench.data, Scenes):
            drawn = a.permute(0, 2, 3, 1).double().numpy()
            reading = read(drawn)
            scores = adherence.grade(reading, bench.data.targets(range(len(real))))
            found |= {name: round(value.mean, 4) for name, value in adherence.summary(scores).items()}
            found |= shapes.summary(shapes.overlaps(drawn, reading))
        pairs = torch.stack([real[:16], images[:16]], 1).flatten(0, 1)
        bench.show(f"reconstruction-{bench.resolution}", pairs, 8)
        return {**found, "protocol": {"images": len(real), "resolution": bench.resolution, **extractor.protocol}}
