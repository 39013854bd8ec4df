"""OpenVINO graph: a network converted from its torch module, kept on disk by what it was made of, and compiled for this machine's CPU."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError, first_line
from ldm.formats.atomic import Damaged, commit, verify
from ldm.formats.integrity import cache_folder
from ldm.formats.model_folder import say

KEPT = "openvino"  # below the cache folder
PRECISION = "fp32"
FARTHEST = 1e-4  # how far its answer may lie from torch's, relative: beyond rounding, which is 2e-6 of the networks that were measured
OTHERWISE = "torch draws it: ldm sample --backend torch"


def load_openvino() -> Any:
    """The package, without the other one by which it would tell its makers that it is used.

    Raises:
        UserError: if it is not installed.
    """
    if find_spec("openvino") is None:
        raise UserError(f"backend: openvino is not installed here; pip install 'ldm-train[openvino]', or {OTHERWISE}")
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def check_openvino(device: torch.device, precision: str) -> None:
    """Refuse where OpenVINO would not compute, or something else.

    Raises:
        UserError: saying what is missing.
    """
    if device.type != "cpu":
        raise UserError(f"backend: openvino computes on CPUs, and the model lies on {device}; give --device cpu, or {OTHERWISE}")
    load_openvino()
    if precision != PRECISION:
        why = "in half precision openvino rounds the time of a step, such as 951 to 952, and draws another picture"
        raise UserError(f"precision: got {precision}; {why}; give --precision {PRECISION}, or {OTHERWISE}")


@dataclass(frozen=True)
class Graph:
    """Compiled graph for inputs of one shape."""

    request: Any  # OpenVINO's inference request

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output for inputs in the order of the module's."""
        found = self.request.infer([value.contiguous().numpy() for value in inputs], share_inputs=True)
        return torch.from_numpy(found[0])


def compiled(module: nn.Module, inputs: Sequence[Tensor], weights: str, said: str) -> Graph:
    """A module's graph for inputs of these shapes, from the cache where it was converted before.

    A fresh one is compared with what torch makes of the inputs.

    Args:
        module: in eval mode, of tensors alone; gives one tensor.
        weights: the hash of the module's weights, see `weights_hash`.
        said: what else the module computes by, such as its configuration.

    Raises:
        UserError: if it cannot be converted, or computes something else.
    """
    openvino = load_openvino()
    core = openvino.Core()
    folder = cache_folder() / KEPT / _key(module, inputs, weights, said, str(openvino.__version__))
    model, fresh = _kept(core, folder), False
    if model is None:
        model, fresh = _converted(openvino, module, inputs), True
        try:
            _clear(folder.parent)
            _keep(folder, lambda place: openvino.save_model(model, place / "graph.xml", compress_to_fp16=False))
        except (OSError, RuntimeError) as error:
            reason = first_line(error)
            say(f"LDM_CACHE: the converted network is not kept, and converted again next time ({reason})")
    wishes = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # several processes would share the first core
    }
    graph = Graph(core.compile_model(model, "CPU", wishes).create_infer_request())
    if fresh:
        with torch.autocast("cpu", enabled=False):
            right = module(*inputs)
        apart = float((graph(inputs) - right).norm() / right.norm().clamp_min(1e-12))
        if not apart <= FARTHEST:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"backend: openvino's answer lies {apart:.1e} from torch's; {OTHERWISE}")
    return graph


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of a module's parameters and buffers, names, shapes and types included."""
    found = hashlib.sha256()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _key(module: nn.Module, inputs: Sequence[Tensor], weights: str, said: str, version: str) -> str:
    """What a graph depends on: weights, shapes, versions, and the code of every layer."""
    shapes = [(tuple(value.shape), str(value.dtype)) for value in inputs]
    found = hashlib.sha256(f"{weights}\n{shapes}\n{said}\n{version}\n{torch.__version__}\n".encode())
    for file in sorted({str(sys.modules[type(part).__module__].__file__) for part in module.modules()}):
        found.update(Path(file).read_bytes())
    return found.hexdigest()[:40]


def _converted(openvino: Any, module: nn.Module, inputs: Sequence[Tensor]) -> Any:
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return openvino.convert_model(torch.export.export(module, tuple(inputs)))
    except Exception as error:  # converters refuse with many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"backend: openvino does not convert this network ({reason}); {OTHERWISE}") from error


def _kept(core: Any, folder: Path) -> Any | None:
    """The graph in a folder; None where there is none, or none that is whole."""
    if not folder.is_dir():
        return None
    try:
        verify(folder)
        return core.read_model(folder / "graph.xml")
    except (Damaged, OSError, RuntimeError):
        shutil.rmtree(folder, ignore_errors=True)
        return None


def _keep(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill a folder of this process' own, and give it its name unless another process was faster."""
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    commit(own, write)
    try:
        own.rename(folder)
    except OSError:
        shutil.rmtree(own, ignore_errors=True)


def _clear(place: Path) -> None:
    """Remove what processes that are gone have left unfinished; one on another machine would convert again next time."""
    for path in place.glob("*"):
        if (own := re.fullmatch(r"\.?[0-9a-f]{40}\.(\d+)(\.partial|\.old)?", path.name)) and not _runs(int(own[1])):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
