"""Verbs on a pretended accelerator; prints a JSON object of exit codes and of copies and reads back for each step of training.

python pretended_worker.py cuda|mps MODEL PICTURES OUT [NAME ...]      only these jobs, where they are named
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

import tiny
from finished_model import token_model
from pretend_device import COUNT, WHERE, pretend

from ldm.__main__ import main

BATCH = 4
kind, model, pictures, out = sys.argv[1], *map(Path, sys.argv[2:5])
DRAW = ["sample", "a red circle", "--model", str(model), "--steps", "3", "--seed", "1"]
codes = token_model(out / "tokens")
START = ["--init", str(pictures / "0.png")]
MASK = ["--mask", str(out / "mask.png")]
SAMPLERS = ["ddpm", "ddim", "plms", "euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lcm"]
DRAWN = {
    **{f"sampler {name}": ["--sampler", name] for name in SAMPLERS},
    "img2img": [*START, "--strength", "0.6"],
    "inpainting": [*START, *MASK],
    "outpainting": [*START, "--outpaint", "right=8,bottom=8"],
    "inversion": ["--invert", str(pictures / "0.png"), "--sampler", "ddim"],
    "hires fix": ["--hires", "2"],
    "variations": ["--variations", "2"],
    "negative prompt": ["--negative", "a blue ring"],
    "bf16": ["--precision", "bf16"],
    "low memory": ["--low-memory"],
}
PLAIN = [*tiny.WORDS, *tiny.only("autoencoder"), "stages.autoencoder.resolution=32", "stages.autoencoder.also=[]"]
PLAIN += ["stages.autoencoder.samples=0", "stages.autoencoder.images=32", "models.autoencoder.network.channels=[8,8]"]
PLAIN += ["models.autoencoder.network.norm_groups=4"]
GAME = [
    "models.autoencoder.kind=vq",
    "models.autoencoder.adversarial={weight: 0.5, start: 0.25, discriminator: {channels: 8, layers: 2, norm_groups: 8}}",
]


def tuning(adapt: str, images: int, *words: str) -> list[str]:
    """A fine-tuning of so many images, whose loss is told at its end alone."""
    file = out / f"{len(list(out.iterdir()))}.yaml"
    file.write_text(
        f"init: {model}\ndata: {{kind: folder, path: {pictures}, val_share: 0.25}}\nout: {file.with_suffix('')}\nworkers: 0\n"
        f"models: {{diffusion: {{kind: latent_diffusion{adapt}}}}}\nstages:\n  tune: {{kind: train, model: diffusion, resolution: 32,"
        f" images: {images}, batch: {BATCH}, samples: 2, log_every_steps: 1000, held_out: 0}}\n  export: {{kind: export}}\n"
    )
    return ["train", str(file), *words]


def codes_in(steps: int) -> list[str]:
    """A picture by codes in so many steps."""
    return ["sample", "a red circle", "--model", str(codes), "--steps", str(steps), "--out", str(out / f"codes{steps}")]


def jobs() -> dict[str, list[str]]:
    """What is done, by name."""
    drawn = {name: [*DRAW, *words, "--out", str(out / name.replace(" ", "_"))] for name, words in DRAWN.items()}
    return {
        **drawn,
        **{f"drawn in {n} steps": [*DRAW, "--steps", n, "--out", str(out / f"steps{n}")] for n in ("4", "8")},
        **{f"euler_a in {n} steps": [*DRAW, "--sampler", "euler_a", "--steps", n, "--out", str(out / f"ancestral{n}")] for n in ("4", "8")},
        **{f"codes in {n} steps": codes_in(n) for n in (4, 8)},
        "codes in part": [*codes_in(3), *START, *MASK, "--strength", "0.6"],
        "grid": ["grid", "--x", "guidance=1,3", "--y", "steps=2,3", "a red circle", "--model", str(model), "--out", str(out / "g.png")],
        "animate": [
            *["animate", "red", "--to", "blue", "--frames", "3", "--steps", "2"],
            "--model",
            str(model),
            "--out",
            str(out / "film.gif"),
        ],
        "encode": ["data", "encode", str(pictures), "--model", str(model), "--resolution", "32", "--text", "--out", str(out / "latents")],
        "evaluate": ["evaluate", str(model), "--on", "scenes", "--tier", "one", "--n", "2", "--images", "4", "--steps", "2"],
        "VQ with discriminator": ["train", "configs/quickstart.yaml", *PLAIN, *GAME, f"out={out / 'vq'}"],
        "fp16": ["train", "configs/quickstart.yaml", *PLAIN, "stages.autoencoder.precision=fp16", f"out={out / 'fp16'}"],
        "LoRA": tuning(", adapt: {kind: lora, rank: 2}", 16),
        "textual inversion": tuning(", adapt: {kind: textual_inversion, token: <thing>, init: red}", 16),
        "offload": tuning("", 16, "stages.tune.offload=true", "stages.tune.precision=bf16"),
        "recomputed": tuning("", 16, "stages.tune.checkpointing=true", "stages.tune.offload=true", "stages.tune.precision=bf16"),
        "inpainting U-Net": tuning(", inpaint: {}", 16),
        "eight steps": tuning("", 8 * BATCH),
        "sixteen steps": tuning("", 16 * BATCH),
    }


ended: dict[str, int | str] = {}
counts: dict[str, dict[str, int]] = {}
with pretend(kind):
    for name, words in jobs().items():
        if sys.argv[5:] and name not in sys.argv[5:]:
            continue
        begun = time.process_time()
        COUNT.clear()
        WHERE.clear()
        try:
            ended[name] = main(words)
        except Exception as error:
            traceback.print_exc()
            ended[name] = f"{type(error).__name__}: {error}"
        counts[name] = dict(COUNT)
        if sys.argv[5:]:
            print("\n".join(f"{count:6d}  {line}" for line, count in WHERE.most_common(20)), file=sys.stderr)
        print(f"{name}: {ended[name]}, {time.process_time() - begun:.1f} s", file=sys.stderr)
print(json.dumps({"codes": ended, "counts": counts}))
