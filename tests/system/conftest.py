from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole commands are slow, all of them."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run of the quickstart's every stage."""
    import tiny

    out = tmp_path_factory.mktemp("runs") / "tiny"
    said = tiny.train(f"out={out}")
    (out / "said.txt").write_text(said)
    return out
