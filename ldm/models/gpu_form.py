"""Form of networks on a CUDA GPU: convolutions channel last, and which float32 products may be rounded to TF32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def channel_last(modules: Iterable[nn.Module]) -> None:
    """Lay the weights of convolutions out with their channels last, as tensor cores read them; values stay as they are."""
    for module in modules:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def round_products(to_tf32: bool) -> None:
    """Whether float32 products and convolutions of CUDA GPUs may round what they multiply to 10 bits (TF32), from here on.

    Torch's own choice is yes for convolutions and no for products.
    """
    torch.backends.cuda.matmul.allow_tf32 = to_tf32
    torch.backends.cudnn.allow_tf32 = to_tf32
