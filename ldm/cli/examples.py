"""Examples at the end of each verb's help: commands that the pages have, too, and that run there."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "sample": (
        'sample "a green ring" "a yellow square" --n 4 --seed 7 --steps 50 --guidance 4 --sampler dpmpp_2m --grid rings.png'
        " --model runs/quickstart",
        'sample "a yellow square" --init picture.png --mask mask.png --model runs/quickstart',
    ),
    "demo": ("demo runs/quickstart",),
    "grid": ('grid "a green ring" --x guidance=1,3,7 --y steps=5,20 --out settings.png --model runs/quickstart',),
    "animate": ('animate "a green ring" --to "a yellow square" --frames 24 --out film.webp --model runs/quickstart',),
    "info": ("info picture.png",),
    "caption": ("caption pictures --model runs/captioner --dry-run",),
    "data check": ("data check pictures --html page.html",),
    "data index": ("data index shards",),
    "data hash": ("data hash pictures --out table.parquet",),
    "data curate": (
        "data curate laion/ --out curated --subset improved-aesthetics --max-unsafe 0.5 --unique url --unique caption --val-share 0.01",
    ),
    "data fetch": ("data fetch curated/train.parquet --out fetched --img2dataset fetch/bin/img2dataset --size 512 --processes 4",),
    "data encode": ("data encode shards --model runs/quickstart --resolution 64 --out latents-64 --text",),
    "classifier": ("classifier latents --model runs/quickstart --words circle,square,ring --images 100000 --out shapes.safetensors",),
    "evaluate": (
        "evaluate runs/quickstart --on pictures",
        "evaluate runs/quickstart --tier one --n 40 --images 32 --guidance 1,2,3,5 --plot curve.png --plot curve.html",
    ),
    "ema": ("ema runs/folder --length 0.1 --out models/longer",),
    "report": ("report runs/NAME",),
    "watch": ("watch runs/quickstart",),
    "bench": ("bench B1 B7 --json bench.json",),
    "export": (
        "export runs/quickstart --to diffusers --dtype fp16 --out exported/quickstart",
        "export runs/quickstart --to single-file --dtype fp16 --out exported/quickstart.safetensors",
    ),
    "doctor": ("doctor",),
    "plan": ("plan configs/presets/lora-8gb.yaml data.path=pictures --device 4090",),
}


def shown(verb: str) -> str | None:
    """The end of a verb's help; None: it has no examples."""
    found = EXAMPLES.get(verb)
    return "\n\n".join(("For example:", *(f"ldm {one}" for one in found))) if found else None
