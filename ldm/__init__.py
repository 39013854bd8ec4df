"""Latent text-to-image diffusion for people who train; public names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "UserError", "load", "start"]

if TYPE_CHECKING:
    from ldm.errors import UserError
    from ldm.families.running import load
    from ldm.run import Run, start

_HOME = {"Run": "ldm.run", "start": "ldm.run", "load": "ldm.families.running", "UserError": "ldm.errors"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
