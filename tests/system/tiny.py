"""The quickstart at a size that trains in seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WORDS = [
    "data.images=48",
    "data.val=8",
    "models.text.vocabulary=600",
    "models.text.text.width=32",
    "models.autoencoder.network.channels=[8,8,8,8]",
    "models.diffusion.network.channels=[32,32,32]",
    "models.diffusion.network.heads=1",
    "models.diffusion.defaults.steps=2",
    "stages.text.images=64",
    "stages.text.batch=16",
    "stages.autoencoder.images=64",
    "stages.autoencoder.batch=8",
    "stages.autoencoder-gate.on_miss=warn",
    "stages.autoencoder-gate.metrics=[{kind: reconstruction, images: 4}]",
    "stages.diffusion-low.images=64",
    "stages.diffusion-low.batch=16",
    "stages.diffusion-low.samples=2",
    "stages.diffusion-high.images=64",
    "stages.diffusion-high.batch=16",
    "stages.diffusion-high.samples=2",
    "stages.evaluation-low=null",
    "stages.evaluation.metrics=[{kind: adherence, tier: one, prompts: 4}, {kind: frechet, images: 4}]",
]


def start(*words: str, config: str = "configs/quickstart.yaml", launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A training process on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, "train.py", config, *WORDS, *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train(*words: str, config: str = "configs/quickstart.yaml", launcher: tuple[str, ...] = ()) -> str:
    """What a training process says, which must succeed."""
    process = start(*words, config=config, launcher=launcher)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return said


def only(*names: str) -> list[str]:
    """Words that remove all stages of the quickstart but these."""
    every = [
        "text",
        "autoencoder",
        "autoencoder-gate",
        "latents-low",
        "diffusion-low",
        "latents-high",
        "diffusion-high",
        "evaluation",
        "export",
    ]
    return [f"stages.{name}=null" for name in every if name not in names]


FOLDER = [word for word in WORDS if not word.startswith(("data.", "stages.evaluation"))]


def start_folder(*words: str) -> subprocess.Popen[str]:
    """A training process on a folder of pictures."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "train.py", "configs/folder.yaml", *FOLDER, *words]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


MARK = "marked"
MARKED = {
    "WANDB_API_KEY": "0123456789abcdefmarked0123456789abcdef01",
    "HF_TOKEN": "hf_markedMARKEDmarked",
    "AWS_SECRET_ACCESS_KEY": "marked/key+of/a/bucket",
    "HTTPS_PROXY": "http://user:markedpassword@127.0.0.1:9",
    "WANDB_BASE_URL": "http://127.0.0.1:9",
}


def start_marked(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The quickstart's first stage with secrets in its environment that can be told by a word, and no server that answers."""
    command = [sys.executable, "train.py", "configs/quickstart.yaml", *WORDS, *only("text"), f"out={folder}", *words]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **MARKED, **environment}
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=120)


def marked_files(folder: Path) -> list[Path]:
    """The files that tell one of those secrets."""
    return [path for path in folder.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes().lower()]
