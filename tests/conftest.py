from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


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
