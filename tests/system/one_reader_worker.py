"""One of several processes that take up a state: what each reads from files, and what it holds then."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2])]

from ldm.config.errors import UserError  # noqa: E402
from ldm.distributed.one_reader import one_reader  # noqa: E402
from ldm.distributed.processes import Learners, leave  # noqa: E402
from ldm.training.checkpoint import newest_valid  # noqa: E402


def read_bytes() -> int:
    """That this process has asked files for."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    processes = Learners()
    folder = Path(str(folder).replace("RANK", str(processes.rank)))
    before, said = read_bytes(), ""
    try:
        found = one_reader(processes, lambda: newest_valid(folder, print))
    except UserError as error:
        found, said = None, str(error)
    asked = read_bytes() - before
    digest = hashlib.sha256()
    for name, group in [] if found is None else found[1].items():
        for each, tensor in group.items():
            digest.update(f"{name} {each} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.float().numpy().tobytes())
    told = {"bytes": asked, "sum": digest.hexdigest(), "said": said, "step": found[2].step if found else None}
    (out / f"{processes.rank}.json").write_text(json.dumps(told))
    processes.close()
    leave(0)
