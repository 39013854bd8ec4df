"""Every preset at its full size: the memory that drawing with it takes, against its weights and what was computed for training.

Left out unless asked for: `python -m pytest -m large -s tests/parity/test_large_memory.py`, with 13 GB of free memory and
half an hour. Prints the table of docs/performance.md.
"""

from __future__ import annotations

import pytest
from peak_memory import peak_kib

from ldm.config.presets import names
from ldm.models import cost
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.unet import UNetConfig

pytestmark = [pytest.mark.large, pytest.mark.timeout(1800)]
GIB = 2**30
SIDES = {"sdxl": 128, "ldm-text2img-1.45B": 32}  # of latents; 64 otherwise
PIXELS = 512

# Weights are written once, by one value: what they are does not change what the pass needs.
BUILD = """
from ldm.diffusion.batch import Cond, Text
from ldm.config.schema import build
from ldm.families.autoencoder import KL, VQ
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.models.inference import prepare
torch.set_num_threads(2)
dtype, half = torch.{dtype}, torch.{dtype} != torch.float32
config = build({{"network": {name!r}}}, {owner}, "test").network
with torch.device("meta"):
    network = config.build().eval()
    if half:
        network.to(dtype)
"""
UNET = """
with torch.no_grad(), torch.autocast("cpu", dtype, enabled=half):
    network = prepare(network.to_empty(device="cpu"), in_place=True, channels_last=True)
    for weight in network.parameters():
        weight.fill_(0.01)
    states, size = torch.ones(2, 77, config.context_width), torch.zeros(2, 6)
    pooled = torch.ones(2, config.pooled_channels or config.context_width)
    cond = Cond(text=Text(tokens=states, mask=torch.ones(2, 77, dtype=torch.bool), pooled=pooled), size=size)
    network(torch.ones(2, config.in_channels, {side}, {side}), torch.zeros(2), cond)
"""
AUTOENCODER = """
with torch.no_grad(), torch.autocast("cpu", dtype, enabled=half):
    network = prepare(network.to_empty(device="cpu"), in_place=True, channels_last=True)
    for weight in network.parameters():
        weight.fill_(0.01)
    if {encode}:
        network.encode(torch.ones(1, 3, {pixels}, {pixels}))
    else:
        network.decode(torch.ones(1, network.latent_channels, {pixels} // network.factor, {pixels} // network.factor))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", names(UNetConfig))
def test_a_guided_step_needs_weights_and_less_than_training_keeps(name: str, dtype: str) -> None:
    from ldm.config.schema import build
    from ldm.families.latent_diffusion.family import LatentDiffusion

    side, size = SIDES.get(name, 64), 4 if dtype == "float32" else 2
    network = build({"network": name}, LatentDiffusion, "test").network
    parameters, computed = cost.denoiser(network, side, side, 77)
    before = BUILD.format(name=name, dtype=dtype, owner="LatentDiffusion")
    found = peak_kib(before, UNET.format(side=side)) * 1024 / GIB
    weights = parameters * size / GIB
    print(f"{name} {dtype}: weights {weights:.2f}, guided step {found:.2f}, above its weights {found - weights:.2f} GiB")
    assert weights < found < weights + 2 * computed.activations / GIB


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*names(KLConfig), *names(VQConfig)])
def test_encoding_and_decoding_need_weights_and_less_than_training_keeps(name: str, dtype: str) -> None:
    from ldm.config.schema import build
    from ldm.families.autoencoder import KL, VQ

    owner = KL if name in names(KLConfig) else VQ
    size = 4 if dtype == "float32" else 2
    parameters, *sides = cost.autoencoder(build({"network": name}, owner, "test").network, PIXELS, PIXELS)
    weights, before = parameters * size / GIB, BUILD.format(name=name, dtype=dtype, owner=owner.__name__)
    for word, encode, computed in zip(("encode", "decode"), (True, False), sides, strict=True):
        found = peak_kib(before, AUTOENCODER.format(encode=encode, pixels=PIXELS)) * 1024 / GIB
        print(f"{name} {dtype}: weights {weights:.2f}, {word} {PIXELS} px {found:.2f}, above its weights {found - weights:.2f} GiB")
        assert weights < found < weights + computed.activations / GIB
