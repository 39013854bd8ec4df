"""Meanings of a report's figures, for whoever has not read docs/report.md."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

MEANINGS = {
    # of an adherence evaluation: shares of prompts
    "bind": "share of prompts whose colour and shape the exact checker reads from the same object",
    "strict": "share of prompts with everything right: count, bind, every stated size, place and relation",
    "colour": "share with the stated colour",
    "shape": "share with the stated shape",
    "size": "share with the stated size",
    "cell": "share with the stated place",
    "fill": "share with the stated filling",
    "rel": "share with the stated relation of two objects",
    "count": "share with the stated number of objects",
    "tone": "share with the stated lightness",
    "texture": "share with the stated texture",
    "bg": "share with the stated background",
    "seen": "prompts with colour-shape pairs that training showed",
    "held_out": "prompts with pairs that training never showed",
    "iou": "overlap of what was drawn with the ideal shape (intersection over union)",
    # of reconstructions and of sets of pictures
    "psnr": "likeness of reconstructions to the originals, dB; higher is better",
    "ssim": "structural likeness of reconstructions, 1: equal",
    "distance": "Fréchet distance between pictures and held-out images; lower is better",
    "real_real_floor": "the same between two sets of real images: what a perfect model would have",
    "kernel": "unbiased kernel distance of features (KID); lower is better",
    "gaussian": "1000 x Gaussian MMD of features (CMMD); lower is better",
    "precision": "share of pictures that lie near real ones: quality",
    "recall": "share of real images that lie near pictures: variety",
    "score": "100 x the likeness of pictures and captions by a CLIP",
    "real": "the same of the real images",
    "retrieval": "share of pictures whose own caption is the likest of all to a CLIP (R-precision)",
    "retrieval_real": "the same of the real images",
    # of a training
    "loss": "what is minimised; of a diffusion model its level depends on the noise, and only a fall tells something",
    "learning rate": "of the optimiser, with its schedule",
    "images/s": "training speed, over all devices",
    "share waited for data": "above 0.1 the data are the bottleneck: more workers, or a latent cache",
    "MFU": "share of the devices' peak arithmetic that the networks use",
    "lambda": "weight of the discriminator's gradient that balances it with the reconstruction's",
    "lambda_clamped": "1: that weight was at its bound",
    "logit_margin": "how well the discriminator tells real from made; far from 0: it wins",
    "code_use": "share of the codebook that is used",
    "perplexity": "number of codes that are used as if equally often",
}


def explained(names: Iterable[str]) -> str:
    """HTML that says what figures mean, one line each; nothing of names that say it themselves."""
    found = {name: MEANINGS[name] for name in dict.fromkeys(names) if name in MEANINGS}
    lines = "<br>".join(f"<b>{escape(name.replace('_', ' '))}</b>: {escape(text)}" for name, text in found.items())
    return f'<p class="note">{lines}</p>' if lines else ""
