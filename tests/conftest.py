from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch loads: small tensors gain nothing from more
TESTS = Path(__file__).parent
# Helpers are imported by their names: tests/*.py, tests/data/tars.py, tests/system/tiny.py and so on.
sys.path[:0] = [str(TESTS / folder) for folder in (".", "data", "system", "training")]

CLONED = ("configs", "docs", "ldm", "tests", "README.md", "pyproject.toml", "mkdocs.yml", "sample.py", "train.py")
NETWORK = "tests open no connection to other machines"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is marked `large` or `soak`, unless -m names it."""
    for mark in ("large", "soak"):
        if mark in config.option.markexpr:
            continue
        left_out = [item for item in items if item.get_closest_marker(mark)]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True, scope="session")
def no_network() -> None:
    """Every connection to another machine is refused, so that a test that wants one fails at once."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def own(host: Any) -> bool:
        return str(host).startswith("127.") or host in ("::1", "localhost", "", None, socket.gethostname())

    def guarded_connect(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and not own(address[0]):
            raise ConnectionRefusedError(f"{NETWORK}: {address}")
        connect(self, address)

    def guarded_look_up(host: Any, *rest: Any, **more: Any) -> Any:
        if not own(host.decode() if isinstance(host, bytes) else host):
            raise socket.gaierror(socket.EAI_NONAME, f"{NETWORK}: {host}")
        return look_up(host, *rest, **more)

    socket.socket.connect, socket.getaddrinfo = guarded_connect, guarded_look_up  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="session")
def as_cloned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests see what a fresh clone has, not the runs and pictures that its user has made there."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("clone")
    for name in CLONED:
        (folder / name).symlink_to(TESTS.parent / name)
    os.chdir(folder)
    yield
    os.chdir(before)


@pytest.fixture(autouse=True, scope="session")
def ldm_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What data sets keep of themselves goes to a folder of the tests."""
    os.environ["LDM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def kl_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny model with random weights and a KL autoencoder; read only."""
    from finished_model import finished_model

    return finished_model(tmp_path_factory.mktemp("kl"))


@pytest.fixture(scope="session")
def vq_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny model with random weights and a VQ autoencoder; read only."""
    from finished_model import finished_model

    return finished_model(tmp_path_factory.mktemp("vq"), "vq")


@pytest.fixture(scope="session")
def own_clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny model with random weights and its run's own CLIP; read only."""
    from finished_model import own_clip_model

    return own_clip_model(tmp_path_factory.mktemp("own"))
