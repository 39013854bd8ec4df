import pytest
import torch
from peak_memory import peak_kib
from torch import Tensor
from torch.nn import functional as F

from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.inference import prepare
from ldm.models.stripes import Stripes

KL = KLConfig(channels=(8, 16, 16), layers=1, norm_groups=4)
ATTENDS = KLConfig(channels=(8, 16), layers=2, norm_groups=4, attention=(False, True))
MOVQ = VQConfig(channels=(32, 64, 64), layers=1, norm_groups=32, codes=16, norm="spatial")
CLOSE = {torch.float64: 1e-12, torch.float32: 2e-5}


def built(config, dtype):
    torch.manual_seed(0)
    network = config.build().to(dtype).eval()
    with torch.no_grad():  # norms that do something
        for name, value in network.named_parameters():
            if "norm" in name:
                value.add_(0.3 * torch.randn_like(value))
    return network


def draw(*shape: int, seed: int = 0) -> Tensor:
    # Different on the left and the right, at the top and below, so that a part has other statistics than the whole.
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * torch.linspace(0.2, 3, shape[3]) + torch.linspace(-2, 2, shape[2])[:, None]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("config", [KL, ATTENDS, MOVQ], ids=["kl", "attends", "movq"])
@pytest.mark.parametrize("prepared", [False, True])
@torch.no_grad()
def test_stripe_by_stripe_is_the_same_as_at_once(config, prepared, dtype):
    network = built(config, dtype)
    if prepared:
        network = prepare(network, channels_last=True)
    for height, width in ((6, 8), (5, 3), (7, 9)):
        z = draw(2, network.decoder.conv_in.in_channels, height, width).to(dtype)
        codes = z if config is MOVQ else None
        image = draw(2, 3, height * network.factor, width * network.factor, seed=1).to(dtype)
        kept = image.clone(), z.clone()
        for places in (1, 40, 100, 10**6):
            ways = Stripes(places)
            for found, wanted in (
                (ways.decode(network.decoder, z, codes), network.decoder(z, codes)),
                (ways.encode(network.encoder, image), network.encoder(image)),
            ):
                torch.testing.assert_close(found, wanted, rtol=CLOSE[dtype], atol=CLOSE[dtype])
        assert torch.equal(image, kept[0]) and torch.equal(z, kept[1])


@torch.no_grad()
def test_tiles_with_statistics_of_their_own_would_be_visible():
    """Why not simply tiles: the same network on a part of the latents gives other colours."""
    network, z = built(KL, torch.float32), draw(1, 4, 16, 16).float()
    whole = network.decoder(z)
    striped = Stripes(64).decode(network.decoder, z)
    tile = network.decoder(z[..., :8])[..., :16]  # away from the cut

    def psnr(a: Tensor, b: Tensor) -> float:
        return float(10 * torch.log10((whole.max() - whole.min()) ** 2 / F.mse_loss(a, b)))

    assert psnr(striped, whole) > 100 and psnr(tile, whole[..., :16]) < 40


NETWORK = """
from ldm.models.autoencoder import KLConfig
from ldm.models.stripes import Stripes
network = KLConfig(channels=(32, 64), layers=1, norm_groups=8, middle_attention=False).build().eval().requires_grad_(False)
z = torch.randn(1, 4, 320, 320)
network.decoder(z[..., :8, :8])
"""


@pytest.mark.slow
def test_stripes_need_less_than_half_the_memory():
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # memory goes back to the system at once, so that the peak is that of the tensors
    whole = peak_kib(NETWORK, "network.decoder(z)", **exact)
    assert 0 < peak_kib(NETWORK, "Stripes(64 * 64).decode(network.decoder, z)", **exact) < 0.5 * whole
