"""What trainings of a denoiser begin with."""

from __future__ import annotations

import pytest
from finished_model import autoencoder_product, text_product

from ldm.families.family import Product


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Product]:
    """A text encoder and an autoencoder with random weights, as their stages leave them; read only."""
    root = tmp_path_factory.mktemp("products")
    text_product(root / "text")
    autoencoder_product(root / "autoencoder")
    return {name: Product(root / name, "") for name in ("text", "autoencoder")}
