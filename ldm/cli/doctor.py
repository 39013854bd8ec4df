"""The doctor verb: diagnoses of installation, hardware and environment, each problem with its fix."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from ldm.cli.command import call
from ldm.config.counts import plural

# Each package with what it is for, imported to see whether it works: a broken one may be found only then.
NEEDED = {
    "torch": "everything",
    "torchvision": "open_clip",
    "numpy": "everything",
    "scipy": "Fréchet distance",
    "PIL": "images",
    "pydantic": "configuration",
    "yaml": "configuration",
    "re2": "patterns of LoRA files",
    "typer": "commands",
    "rich": "progress",
    "safetensors": "weights",
    "tokenizers": "text",
    "transformers": "text encoders",
    "accelerate": "training",
    "psutil": "several machines",
    "diffusers": "pipelines",
    "datasets": "data sets of the hub",
    "peft": "low-rank adapters",
    "open_clip": "OpenCLIP text encoders",
    "matplotlib": "plots",
    "wandb": "tracker=wandb",
}
OPTIONAL = {
    "xformers": "memory-saving attention on CUDA",
    "duckdb": "ldm data curate",
    "ray": "ldm data curate --ray",
    "gradio": "ldm demo",
    "tensorboard": "tracker=tensorboard",
    "torch_fidelity": "FID",
    "prodigyopt": "optim.kind=prodigy",
    "material": "make docs",
    "s3fs": "shards at s3://",
    "aiohttp": "shards at http://",
    "gcsfs": "shards at gs://",
    "onnxruntime": "ldm export --to onnx",
    "openvino": "ldm sample --backend openvino",
}
DISTRIBUTIONS = {
    "PIL": "pillow",
    "yaml": "PyYAML",
    "open_clip": "open_clip_torch",
    "re2": "google-re2",
    "torch_fidelity": "torch-fidelity",
    "material": "mkdocs-material",
}
LEAST_DISK_GB, LEAST_MEMORY_GB = 4.0, 3.0  # of the quickstart: its run folder, its process
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "WANDB_SILENT": "true"}


@dataclass
class Findings:
    """Diagnosis; `problems` says what stands in a run's way, `notes` what is good to know."""

    ldm: str = ""
    python: str = ""
    platform: str = ""
    packages: dict[str, str] = field(default_factory=dict)  # version, or why it does not work
    devices: list[str] = field(default_factory=list)
    cores: int = 0
    threads: int = 0  # torch's own choice
    memory_gb: float | None = None  # free now; None: the system does not tell
    disk_gb: float = 0.0  # free where the runs go
    variables: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(words: Sequence[str]) -> int:
    """`ldm doctor`: the exit code."""
    return call(doctor, words, "ldm doctor")


def doctor(
    out: Annotated[Path, typer.Option(help="The folder that runs are written to.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Say what is installed and what the machine has; 1 if something stands in a run's way, each problem with its fix."""
    found = look_around(out)
    print(json.dumps(asdict(found), indent=1, ensure_ascii=False) if as_json else "\n".join(lines(found)))
    return 1 if found.problems else 0


def look_around(out: Path) -> Findings:
    """Everything this process can find out; opens no connection."""
    from ldm.config.version import __version__
    from ldm.distributed.environment import usable_cores

    found = Findings(ldm=__version__, python=platform.python_version(), platform=platform.platform(), cores=usable_cores())
    for name, why in (NEEDED | OPTIONAL).items():
        said, works = probe(name)
        found.packages[name] = said
        distribution = DISTRIBUTIONS.get(name, name)
        if not works and name in NEEDED:
            found.problems.append(f"{name} (for {why}): {said}; install it with: python -m pip install -U {distribution}")
        elif not works and said != "not installed":
            found.problems.append(f"{name} (optional, for {why}): {said}; mend it with: python -m pip install -U {distribution}")
    _devices(found)
    _room(found, out)
    prefixes = ("OMP_", "MKL_", "CUDA_", "WANDB_MODE", "HF_HUB_OFFLINE", "HF_HOME", "ACCELERATE_", "MALLOC_", "PYTORCH_")
    found.variables = {n: v for n, v in sorted(os.environ.items()) if n.startswith(prefixes)}
    if launcher := _launch_file():
        found.notes.append(f"accelerate launch without --config_file uses {launcher}")
    return found


def probe(name: str) -> tuple[str, bool]:
    """A package's version, or why it does not work, and whether it does."""
    former = {key: os.environ.get(key) for key in QUIET}
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # what openvino would report itself by
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        return ("not installed" if error.name == name else f"needs {error.name}, which is not installed"), False
    except Exception as error:  # a binary made for another torch fails in many ways
        return f"does not load ({type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''})", False
    finally:
        for key, value in former.items():
            if value is None:
                os.environ.pop(key, None)
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(name, name)), True
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown version")), True


def _devices(found: Findings) -> None:
    torch: Any = sys.modules.get("torch")
    if torch is None:
        return
    found.threads = torch.get_num_threads()
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            own = torch.cuda.get_device_properties(number)
            bf16 = "" if torch.cuda.is_bf16_supported() else ", no bf16: use precision=fp16"
            found.devices.append(f"cuda:{number} {own.name}, {own.total_memory / 1e9:.0f} GB, capability {own.major}.{own.minor}{bf16}")
    elif torch.version.cuda and Path("/dev/nvidia0").exists():
        found.problems.append(
            f"a GPU is there, but torch {torch.__version__} cannot use it: its CUDA {torch.version.cuda} needs a newer driver, "
            "or a torch for this driver"
        )
    if torch.backends.mps.is_available():
        found.devices.append("mps")
    found.devices.append(f"cpu, {found.cores} cores")
    if found.threads > found.cores:
        found.notes.append(f"{found.threads} threads for {found.cores} usable cores; OMP_NUM_THREADS={found.cores} may be faster")


def _room(found: Findings, out: Path) -> None:
    place = out.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        found.problems.append(f"{place}: is a file, and runs need a folder there; name another with --out, and with out=DIR to train")
        return
    if not os.access(place, os.W_OK):
        found.problems.append(f"{place}: may not be written to; name another folder with out=DIR")
    found.disk_gb = round(shutil.disk_usage(place).free / 1e9, 1)
    if found.disk_gb < LEAST_DISK_GB:
        need = f"a quickstart takes up to {LEAST_DISK_GB:g}"
        found.problems.append(f"{place}: {found.disk_gb} GB free, and {need}; name another folder with out=DIR")
    found.memory_gb = free_memory_gb()
    if found.memory_gb is not None and found.memory_gb < LEAST_MEMORY_GB:
        found.problems.append(f"{found.memory_gb} GB of memory free, and a quickstart takes up to {LEAST_MEMORY_GB:g}; end other programs")


def free_memory_gb() -> float | None:
    """Memory that a new process may have, GB: the system's, or the container's where that is less."""
    amounts = []
    with suppress(OSError, ValueError):  # not Linux, or no limit
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                amounts.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            amounts.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return round(min(amounts) / 1e9, 1) if amounts else None


def _launch_file() -> str:
    """Accelerate's own configuration file, which a launch takes silently."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    file = home / "accelerate" / "default_config.yaml"
    return str(file) if file.exists() else ""


def lines(found: Findings) -> Iterator[str]:
    """The findings for a reader."""
    yield f"ldm {found.ldm}, Python {found.python}, {found.platform}"
    yield f"devices    {'; '.join(found.devices) or 'none'} ({found.threads} threads)"
    memory = f"{found.memory_gb} GB" if found.memory_gb is not None else "unknown"
    yield f"free       {memory} memory, {found.disk_gb} GB disk"
    for name, said in found.packages.items():
        yield f"  {name:<14} {said}{f'  (optional: {OPTIONAL[name]})' if name in OPTIONAL else ''}"
    for name, value in found.variables.items():
        yield f"  {name}={value}"
    for note in found.notes:
        yield f"note: {note}"
    for problem in found.problems:
        yield f"problem: {problem}"
    yield f"{plural(len(found.problems), 'problem')} found" if found.problems else "nothing stands in the way"
