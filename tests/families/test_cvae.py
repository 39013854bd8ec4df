"""Conditional VAE: the bound in closed form, drawing, units that are active, and a folder that opens again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ldm.config.errors import UserError
from ldm.diffusion.batch import MomentBatch, Text, rows
from ldm.diffusion.rng import Rng
from ldm.families.autoencoder import KL as KLModel
from ldm.families.autoencoder import measure
from ldm.families.clip import Clip
from ldm.families.cvae import CVAE, CVAEDefaults, CVAEFamily, divergence
from ldm.families.draws import Wanted
from ldm.families.family import Context, Product
from ldm.families.registry import load, open_finished
from ldm.formats.latent_codec import save_codec
from ldm.metrics.bench import Bench
from ldm.metrics.units import Units
from ldm.models import cost
from ldm.models.variational import DecoderConfig, PosteriorConfig
from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.text.prompt_syntax import read
from ldm.training.settings import Train
from tests.finished_model import CAPTIONS, KL, STORY, Pictures

SIDE = 32  # 4x4 latents
PROMPTS = ["a small red circle", "a large blue ring", "a small green square"]
CPU = torch.device("cpu")
TEXT = SmallText(width=16, layers=2, heads=2, max_tokens=16)
DECODER = DecoderConfig(channels=(8,), blocks=2, heads=2, style=8)
SIZES: dict[str, Any] = {
    "units": 6,
    "posterior": PosteriorConfig(channels=(8,), blocks=1, embedding=8),
    "decoder": DECODER,
    "defaults": CVAEDefaults(chunk=2),
}


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Product]:
    """A text encoder and an autoencoder with random weights."""
    root = tmp_path_factory.mktemp("products")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 600, TEXT.max_tokens)
    TextEncoder(small_clip_text(TEXT, tokenizer), tokenizer).save(root / "text")
    network = KL.build().eval()
    save_codec(root / "autoencoder" / "vae", network, measure(network, cast(Any, Pictures()), SIDE, 0, CPU, images=8))
    return {name: Product(root / name, name) for name in ("text", "autoencoder")}


def context(products: dict[str, Product], **more: Any) -> Context:
    data = cast(Any, Pictures())
    return Context(data=data, val=data, resolution=SIDE, seed=0, total_images=8, products=products, **more)


def built(products: dict[str, Product], init: Product | None = None, **fields: Any) -> CVAEFamily:
    torch.manual_seed(1)
    return CVAE(**{**SIZES, **fields}).build(context(products, init=init))


@pytest.fixture(scope="module")
def family(products: dict[str, Product]) -> CVAEFamily:
    return built(products)


def latents(family: CVAEFamily) -> MomentBatch:
    """A batch in float64, deterministic latents."""
    captions = ("a small red circle", "a large blue ring", "a small green square", "a small red circle")
    text = family.text.encode(list(captions))
    text = Text(tokens=text.tokens.double(), mask=text.mask, pooled=cast(Tensor, text.pooled).double())
    mean = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return MomentBatch(mean=mean, std=None, caption=captions, size=torch.zeros(4, 6), position=torch.arange(4), text=text)


def test_the_divergence_is_that_of_two_gaussians() -> None:
    made = torch.Generator().manual_seed(0)
    mean, logvar = (torch.randn(5, 7, generator=made, dtype=torch.float64) for _ in range(2))
    unit = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    assert torch.allclose(divergence(mean, logvar), kl_divergence(Normal(mean, (0.5 * logvar).exp()), unit), rtol=1e-12)
    assert not divergence(torch.zeros(3), torch.zeros(3)).any()


@pytest.mark.parametrize(("free", "beta"), [(0.0, 1.0), (0.05, 0.5)])
def test_the_loss_is_the_evidences_bound(free: float, beta: float, products: dict[str, Product]) -> None:
    """By torch's own distributions in float64: the likelihood of latents at a drawn z, and what of the divergence is not free."""
    family = built(products, free_bits=free, beta=beta).double()
    torch.nn.init.normal_(family.decoder.logstd)
    batch, rng = latents(family), Rng(0, range(4))
    terms, gauges = family(batch, rng)
    mean, logvar = family.encoder(batch.mean, cast(Any, batch.text).pooled)
    posterior = Normal(mean, (0.5 * logvar).exp())
    z = mean + posterior.scale * rng.normal("cvae/z", (6,))
    likelihood = Normal(family.decoder(z, [batch.text]), family.decoder.logstd.exp()[:, None, None]).log_prob(batch.mean)
    each = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean)))
    assert free == 0 or (each < free).any()
    assert torch.allclose(terms["reconstruction"], -likelihood.mean())
    assert torch.allclose(terms["kl"], beta * torch.where(each > free, each, free).sum(1).mean() / 64)
    assert torch.allclose(gauges["kl_nats"], each.sum(1).mean())
    halves = [family(rows(batch, i, i + 2), Rng(0, range(i, i + 2)))[0] for i in (0, 2)]  # no picture knows of another
    assert all(torch.allclose(value, (halves[0][name] + halves[1][name]) / 2) for name, value in terms.items())
    found = torch.autograd.grad(terms["kl"], family.encoder.out.weight, retain_graph=True)[0]
    assert found.any() and not any(torch.autograd.grad(terms["kl"], [*family.decoder.parameters()], allow_unused=True))


def test_the_weight_of_the_divergence_rises(products: dict[str, Product]) -> None:
    family = built(products, beta=2.0, warmup_images=100)
    batch, seen = Pictures().load([0, 1], [0, 1], SIDE, 0, False), []
    for images in (0, 25, 100, 300):
        family.progress(images)
        seen.append(float(family(batch, Rng(0, range(2)))[0]["kl"].detach()))
    assert seen[0] == 0 and seen[1] == pytest.approx(seen[2] / 4) and seen[2] == seen[3]


def test_it_learns_what_words_leave_open(products: dict[str, Product]) -> None:
    """Pictures of one caption whose brightness varies: z knows it, and draws as much of it as there is."""
    family = built(products, units=4)
    made = torch.Generator().manual_seed(0)
    shift, captions = torch.randn(256, 1, 1, 1, generator=made), ("a small red circle",) * 256
    whole = shift.expand(-1, 4, 4, 4).contiguous()
    batch = MomentBatch(mean=whole, std=None, caption=captions, size=torch.zeros(256, 6), position=torch.arange(256))
    optim = torch.optim.Adam(family.parameters(), 1e-2)
    for step in range(100):
        part = rows(batch, 64 * (step % 4), 64 * (step % 4) + 64)
        optim.zero_grad()
        torch.stack(list(family(part, Rng(step, part.position))[0].values())).sum().backward()
        optim.step()
    found, (mean, _) = family.units(batch), family.posterior(batch)
    assert 1 <= found["active"] <= found["units"] == 4 and 1 < found["nats"] < 10
    known = torch.corrcoef(torch.cat([mean, shift[:, :, 0, 0]], 1).T)[-1, :-1]
    assert float(known.abs().max()) > 0.9
    with torch.no_grad():
        drawn = family.made(torch.randn(256, 4, generator=made), [family.words(batch)], None, 1.0).mean((1, 2, 3))
    assert abs(float(drawn.mean())) < 0.4 and 0.4 < float(drawn.std()) < 1.4  # as brightness varies among pictures


def test_no_picture_depends_on_its_neighbours_and_noise_is_the_seeds(family: CVAEFamily) -> None:
    whole = family.sample(PROMPTS, [3, 4, 5])
    assert torch.equal(family.sample(PROMPTS[1:2], [4])[0], whole[1])
    assert torch.equal(family.sample(PROMPTS[::-1], [5, 4, 3]).flip(0), whole)
    assert not torch.equal(family.sample(PROMPTS[:1], [9])[0], whole[0]) and not torch.equal(family.sample(PROMPTS[1:2], [3])[0], whole[0])
    noise = family.noise([3, 4, 5], (SIDE, SIDE))
    assert noise.shape == (3, 6) and torch.equal(family.sample(PROMPTS, [0, 0, 0], latents=noise), whole)
    still = Wanted(truncation=0.0)
    assert torch.equal(family.sample(PROMPTS[:1], [0], still), family.sample(PROMPTS[:1], [1], still))
    a, b = PROMPTS[:2]
    mixed = family.sample([read(f"[{a}:{b}:0.5]")], [3])
    assert not torch.equal(mixed, family.sample([a], [3])) and not torch.equal(mixed, family.sample([b], [3]))
    with pytest.raises(UserError, match="sampler: got 'ddim': this model of kind cvae draws at once"):
        family.sample(PROMPTS[:1], settings=Wanted(sampler="ddim"))
    with pytest.raises(UserError, match="init: this model of kind cvae starts from no picture"):
        family.edits(whole[:1])


def test_a_model_folder_draws_the_same_pictures(family: CVAEFamily, products: dict[str, Product], tmp_path: Path) -> None:
    family.save(tmp_path / "product")
    family.config.assemble({**products, "model": Product(tmp_path / "product", "")}, tmp_path / "model", STORY)
    found = load(tmp_path / "model")
    assert torch.equal(found.sample(PROMPTS, [3, 4, 5]), family.sample(PROMPTS, [3, 4, 5])) and found.content_hash
    again = built(products, init=Product(tmp_path / "product", ""))
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), family.state_dict().values(), strict=True))
    bench = Bench(found, cast(Any, Pictures()), SIDE, 0, CPU, None, lambda done, total, what: None)
    measured, finished = Units(images=12).run(bench), family.finish(context(products))
    assert {name: measured[name] for name in ("active", "units")} == {"active": finished["units_active"], "units": 6}
    assert measured["nats"] == pytest.approx(finished["units_nats"], abs=1e-3) and finished["units_of"] == 12
    (tmp_path / "model" / "encoder" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="encoder"):
        open_finished(tmp_path / "model")


def test_the_plan_counts_its_networks(family: CVAEFamily) -> None:
    others = {"text": Clip(text=TEXT, vocabulary=600), "autoencoder": KLModel(network=KL)}
    found = family.config.footprint(cast(Any, Train(model="vae", images=8, resolution=SIDE)), SIDE, others, print)
    assert found.learned == {"encoder": cost.count(family.encoder), "decoder": cost.count(family.decoder)}
    assert found.cost.forward > 0 and family.config.step_px(others) == 8
    assert family.config.parameters(others, print) == cost.count(DECODER.build(1, 4, 16, 16, 6))
    wide = DecoderConfig(channels=(16, 8), blocks=1, heads=2, style=8)
    assert wide.step == 2 and wide.build(4, 3, 16, 16, 6).sides == [2, 4]
    for wrong, said in ({"channels": ()}, "channels: got"), ({"channels": (6,)}, "heads: 4 does not divide channels 6"):
        with pytest.raises(UserError, match=said):
            DecoderConfig(**cast(Any, wrong))
    assert math.isclose(float(family.decoder.deviation.detach().exp().mean()), 1.0)
