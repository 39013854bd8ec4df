from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run of the quickstart's every stage."""
    import tiny

    out = tmp_path_factory.mktemp("runs") / "tiny"
    said = tiny.train(f"out={out}")
    (out / "said.txt").write_text(said)
    return out
