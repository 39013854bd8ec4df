"""Latent text-to-image diffusion for people who train; public names load on first use."""

from __future__ import annotations

__version__ = "0.1.0"
