"""Latent text-to-image diffusion for people who train; public names load on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ldm.config.version import __version__

__all__ = ["Run", "UserError", "__version__", "load", "start"]

if TYPE_CHECKING:
    from ldm.config.errors import UserError
    from ldm.families.registry import load
    from ldm.runs.execution import start
    from ldm.runs.run import Run

_HOME = {"Run": "ldm.runs.run", "start": "ldm.runs.execution", "load": "ldm.families.registry", "UserError": "ldm.config.errors"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)
