"""Small runs of conditions by every port, codes, pixels, links of a chain and what draws in one pass, each in its last stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

OPTIM = {"kind": "muon", "lr": 1e-3, "adamw_lr": 1e-3}
PORTS: dict[str, dict[str, Any]] = {
    "concat": {"view": "small:8", "port": {"kind": "concat", "encoder": "pixels", "noise": 0.3}},
    "residual": {"view": "labels", "port": "residual"},
    "gated": {"view": "boxes", "port": {"kind": "gated", "most": 4}},
    "cross": {"view": "sketch", "port": "cross"},
    "triples": {"view": "graph", "port": "cross"},
}
VQ = {"channels": [8, 8, 8, 8], "layers": 1, "latent_channels": 4, "codes": 16, "norm_groups": 4, "middle_attention": False}
UNET = {"channels": [16, 16], "layers": 1, "attention": [False, True], "heads": 2, "norm_groups": 8}
PIXELS = {"kind": "latent_diffusion", "network": UNET, "variance": {"weight": 1e-3}}
BEFORE = [{"view": "small:2", "port": {"kind": "concat", "noise": 0.3}}]
LINK = {"kind": "latent_diffusion", "network": UNET, "after": "diffusion", "conditions": BEFORE}

JUDGE = {"channels": [8], "blocks": 1, "embedding": 8}
GAN = {
    "kind": "text_gan",
    "autoencoder": "pixels",
    "generator": {"channels": [8, 8], "blocks": 1, "heads": 2, "noise": 4, "style": 8},
    "discriminator": JUDGE,
}
ATTNGAN = GAN | {"damsm": 0.5, "contrastive": 0}
CVAE = {
    "kind": "cvae",
    "autoencoder": "pixels",
    "units": 4,
    "posterior": JUDGE,
    "decoder": {"channels": [8, 8], "blocks": 1, "heads": 2, "style": 8},
    "free_bits": 0.01,
    "warmup_images": 16,
}


def stage(model: str, resolution: int = 32, **more: Any) -> dict[str, Any]:
    own = {"images": 24, "batch": 4, "save_every_images": 8, "save_beside": False, "samples": 0, "ema": 0.9, "optim": OPTIM}
    return {"kind": "train", "model": model, "resolution": resolution} | own | more


def run_of(system: str, base: Path) -> dict[str, Any]:
    """The configuration of a small run whose last stage trains the system."""
    data = {"kind": "scenes", "tier": "T1" if system == "triples" else "one", "images": 16, "val": 4}
    if system in PORTS:
        diffusion = {"kind": "latent_diffusion", "conditions": [{**PORTS[system], "drop": 0.3}], "learn": "new"}
        if system == "concat":
            diffusion["learn"] = "all"
        return {"data": data, "init": str(base), "models": {"diffusion": diffusion}, "stages": {"last": stage("diffusion")}}
    models: dict[str, Any] = {"text": {"kind": "clip", "vocabulary": 600, "text": {"width": 16, "layers": 1, "heads": 2, "max_tokens": 20}}}
    stages: dict[str, Any] = {"text": stage("text", batch=8)}
    if system == "palette":
        models = {"autoencoder": {"kind": "palette", "codes": 8}}
        models["tokens"] = {"kind": "tokens", "order": "causal", "reads": "none", "network": {"width": 16, "layers": 1, "heads": 2}}
        stages = {"autoencoder": stage("autoencoder", 16), "codes": {"kind": "encode", "resolution": 16, "codes": True}}
        stages["last"] = stage("tokens", 16, latents="codes")
    elif system == "unconditional":
        models, network = {"autoencoder": {"kind": "pixels"}}, {**UNET, "heads": 1}
        models["diffusion"] = {"kind": "latent_diffusion", "text": "", "network": network}
        stages = {"last": stage("diffusion", 16)}
    elif system in ("masked", "causal", "words", "larger"):
        models["autoencoder"] = {"kind": "vq", "network": VQ, "adversarial": {"weight": 0}}
        order = "masked" if system in ("masked", "larger") else "causal"
        network = {"width": 16, "layers": 1, "heads": 2, "size_channels": 4}
        models["tokens"] = {"kind": "tokens", "order": order, "network": network, "reads": "words" if system == "words" else "text"}
        stages["autoencoder"] = stage("autoencoder")
        stages["codes"] = {"kind": "encode", "resolution": 32, "codes": True}
        stages["last"] = stage("tokens", latents="codes")
        if system == "larger":
            models["tokens"]["enlarges"] = 2
            stages["codes"]["resolution"] = 64
            stages["last"] = stage("tokens", 64, latents="codes")
    elif system in ("gan", "attngan", "cvae"):
        models |= {"pixels": {"kind": "pixels"}, system: {"gan": GAN, "attngan": ATTNGAN, "cvae": CVAE}[system]}
        stages["last"] = stage(system, 16)
    elif system == "prior":
        models["prior"] = {"kind": "prior", "network": {"heads": 2, "head_width": 8, "layers": 1}}
        stages["last"] = stage("prior")
    else:
        models |= {"autoencoder": {"kind": "pixels"}, "diffusion": PIXELS}
        stages["diffusion" if system == "link" else "last"] = stage("diffusion", 16)
        if system in ("vector", "adapter"):
            told = {"view": "embedding", "port": "vector" if system == "vector" else "cross", "drop": 0.3}
            models["diffusion"] = PIXELS | {"conditions": [told]}
        if system == "aligned":
            models["diffusion"] = PIXELS | {"align": {"weight": 0.5}}
        if system == "link":
            models["up"] = LINK
            stages["last"] = stage("up")
    return {"data": data, "models": models, "stages": stages}


SYSTEMS = [
    *PORTS,
    "masked",
    "causal",
    "words",
    "larger",
    "palette",
    "unconditional",
    "pixels",
    "link",
    "prior",
    "gan",
    "attngan",
    "cvae",
    "vector",
    "adapter",
    "aligned",
]
