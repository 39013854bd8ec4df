"""Safe reading of pickled checkpoints (.ckpt, .pt, .bin) with weights_only=True, in a child process.

The child, `ldm.formats.pickles IN OUT`, writes the tensors of IN as safetensors to OUT. A pickle names functions to call; torch's
weights_only reader calls none but those that make tensors, and what it cannot bear kills the child alone, which takes no code
from the current folder and no more memory and time than a file of that size can need.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO, Any, cast

from ldm.config.counts import plural
from ldm.config.errors import UserError, first_line
from ldm.config.files import isolated

SECONDS = 1800  # after which the child counts as hung
CPU_S, BYTES_PER_S = 60, 20_000_000  # of work that a file may cost: to start, and for its bytes
TIMES = 4  # the size of a file that its tensors may have together: names may share one storage, as tied weights do
SPARE = 2**20  # bytes, of small buffers that are stored as one number
COPIES, ROOM = 4, 2**29  # of the tensors in memory at a time; bytes that torch needs besides
# What trainers leave beside the weights. Their names are read as empty stand-ins, never imported.
HARMLESS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.", "omegaconf.", "argparse.", "easydict.")
PARAMETERS = "torch.nn.modules.container.ParameterDict"  # in the web UI's embeddings of 2022
EMBEDDING = "string_to_param"  # where its embeddings have their vectors, by what stands for the word
REASON = re.compile(r"WeightsUnpickler error: ([^\n]+)")
REFUSED = re.compile(r"(?:Unsupported global|Unsupported class): (?:GLOBAL )?([\w.]+)")


def convert(pickle: Path, target: Path) -> None:
    """Write a checkpoint's tensors to `target`, a safetensors file, by a child process.

    Raises:
        UserError: naming the file and what was refused or damaged.
    """
    words = isolated("ldm.formats.pickles", str(pickle.resolve()), str(target.resolve()))
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise UserError(f"{pickle}: not read within {SECONDS} s; the file is damaged") from None
    if done.returncode == 2:
        raise UserError(done.stderr.strip().splitlines()[-1].replace(str(pickle.resolve()), str(pickle), 1))
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{pickle}: reading it killed its process ({lines[-1][:200]}); the file is damaged or hostile")


class Placeholder:
    """Stand-in for pickled trainer objects: it takes anything and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class Parameters(dict[str, Any]):
    """Stand-in for a pickled ParameterDict: its parameters by name."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and isinstance(inner := state.get("_parameters"), dict):
            self.update(inner)


def read(path: Path) -> dict[str, Any]:
    """The checkpoint as weights_only reads it, with stand-ins for trainers' own objects.

    Raises:
        UserError: naming the first global that was refused, or what is damaged.
    """
    import torch

    _check_archive(path)
    allowed: set[str] = set()
    while True:
        try:
            with path.open("rb") as opened:  # by its name torch would take it for something else
                found = torch.load(opened, map_location="cpu", weights_only=True)
            break
        except Exception as error:  # of pickle, zipfile, torch: each damage has its own
            refused = REFUSED.search(str(error))
            if refused is None:
                raise UserError(f"{path}: not a checkpoint that torch can read ({_reason(error)})") from None
            name = refused[1]
            if name in allowed or not name.startswith((*HARMLESS, PARAMETERS)):
                raise UserError(
                    f"{path}: would call {name}, which may run code, and was not read; get the model as .safetensors, or convert it on"
                    " a machine that you do not mind losing"
                ) from None
            allowed.add(name)
            stand_in = Parameters if name == PARAMETERS else type(name.rpartition(".")[2], (Placeholder,), {})
            torch.serialization.add_safe_globals([(stand_in, name)])  # type: ignore[list-item]
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, not weights by name")
    return found


def _reason(error: Exception) -> str:
    """What of torch's error says something: it advises at length to read without safety before it tells what was wrong."""
    said = str(error)
    if "Invalid magic number" in said:
        return "a pickle that torch.save did not write; save its tensors by torch.save, or as .safetensors"
    if "Unsupported operand" in said:
        return "pickled with a protocol that is not read safely; save it by torch.save without `pickle_protocol`, or as .safetensors"
    found = REASON.search(said)
    return found[1].strip()[:160] if found else first_line(error, 160)


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than its size: torch packs nothing."""
    total, size = 0, path.stat().st_size
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # each damage has its own; torch says what it is
        total = sum(entry.file_size for entry in archive.infolist())
        names = archive.namelist()
    if names and not any(name.endswith(("data.pkl", "constants.pkl")) for name in names):
        raise UserError(
            f"{path}: an archive of {plural(len(names), 'file')}, such as {ascii(names[0])[:100]}, and no checkpoint of torch's; unpack it"
        )
    if total > size:
        raise UserError(f"{path}: unpacks to {total:,} bytes, but the file has {size:,}; it is damaged or hostile")


def require_plain(tensors: dict[str, Any], path: Path) -> None:
    """Refuse tensors that are not numbers in memory, or that are more than a file of this size can hold.

    Raises:
        UserError: naming the tensor.
    """
    import torch

    from ldm.formats.tensor_file import KINDS

    size, total = path.stat().st_size, 0
    for name, value in tensors.items():
        if value.layout is not torch.strided or value.device.type != "cpu" or value.dtype not in KINDS.values():
            kind = f"{value.layout}, {value.device.type}, {value.dtype}".replace("torch.", "")
            raise UserError(f"{path}: {ascii(name)[:200]} is no plain tensor ({kind})")
        total += value.numel() * value.element_size()
        if total > TIMES * size + SPARE:
            said = f"{ascii(name)[:200]} of shape {list(value.shape)[:8]}"
            raise UserError(f"{path}: its tensors have {total:,} bytes up to {said}, but the file has {size:,}; it is damaged or hostile")


def limit(size: int) -> None:
    """Bound this process' memory and time by a file's size in bytes, where the system can."""
    try:
        import resource

        with open("/proc/self/status") as status:
            used = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
    except (ImportError, OSError, StopIteration):
        return
    spent = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
    for kind, most in (
        (resource.RLIMIT_DATA, used + ROOM + COPIES * (TIMES * size + SPARE)),
        (resource.RLIMIT_CPU, spent + CPU_S + size // BYTES_PER_S),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard < 0 else min(most, hard), hard))


def save_pickle(values: dict[str, Any], file: Path) -> None:
    """torch.save through Python's own file, whose errors say what the disk said."""
    import torch

    problems: list[OSError] = []
    with file.open("wb") as opened:
        try:
            torch.save(values, cast(IO[bytes], _Reporting(opened, problems)))
        except RuntimeError:
            if problems:
                raise problems[0] from None
            raise


class _Reporting:
    """File wrapper that records write errors, because torch.save only says that something failed."""

    def __init__(self, file: Any, problems: list[OSError]) -> None:
        self.file, self.problems = file, problems

    def write(self, data: Any) -> int:
        """As the file's."""
        try:
            return int(self.file.write(data))
        except OSError as error:
            self.problems.append(error)
            raise

    def flush(self) -> None:
        """As the file's."""
        self.file.flush()


def weights(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors by name, from state_dict where there is one, and the texts and numbers beside them."""
    import torch

    inside = found.get("state_dict", found)
    inside = inside if isinstance(inside, dict) else found
    if isinstance(words := found.get(EMBEDDING), dict):
        inside = {f"{EMBEDDING}.{name}": value for name, value in words.items()}
    tensors = {name: value for name, value in inside.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    beside = {str(k): v if isinstance(v, str) else json.dumps(v) for k, v in found.items() if isinstance(v, str | int | float)}
    return tensors, beside


def main(words: list[str]) -> int:
    """The child: convert IN to OUT; 2 after a refusal, which it prints."""
    import torch
    from safetensors.torch import save_file

    source, target = (Path(word) for word in words)
    torch.set_num_threads(1)  # each thread's stack counts as memory
    limit(source.stat().st_size)
    try:
        tensors, beside = weights(read(source))
        if not tensors:
            raise UserError(f"{source}: no tensors in it")
        require_plain(tensors, source)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    # Tensors may be views of one another; a file has each for itself.
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, target, metadata=beside)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
