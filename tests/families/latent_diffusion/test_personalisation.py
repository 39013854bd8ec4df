"""Custom Diffusion and rank-one edits: what learns, the files that other programs open, and that the base comes back to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from finished_model import Pictures
from pipelines import pipeline_folder
from safetensors.torch import load_file
from torch import Tensor

from ldm.config.errors import UserError
from ldm.data.scenes.source import ScenesSource
from ldm.diffusion.rng import Rng
from ldm.families.family import Context, Product
from ldm.families.latent_diffusion.family import LatentDiffusion, load
from ldm.families.latent_diffusion.fine_tuning import AdaptedFamily
from ldm.families.latent_diffusion.personalisation import CustomDiffusion, CustomFamily, RankOne, RankOneFamily, inward
from ldm.formats.embedding_files import read_embedding
from ldm.formats.lora_files import CUSTOM, find, read
from ldm.formats.part import load_part
from ldm.models.dit import DiTConfig
from ldm.models.lora import Merged, Pair
from ldm.models.mmdit import MMDiTConfig

THING = CustomDiffusion(token="<thing>", init="a red square")
WORD = RankOne(token="red")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion written by diffusers; read only."""
    return pipeline_folder(tmp_path_factory.mktemp("base"))


class Named(Pictures):
    """Pictures of which the first six have a new word in their captions."""

    def captions(self, index: Any, position: Any, seed: int) -> list[str]:
        """Of each picture."""
        return ["a <thing>" if i < 6 else text for i, text in zip(index, super().captions(index, position, seed), strict=True)]


def learned(base: Path, adapt: Any, steps: int = 2) -> Any:
    torch.manual_seed(0)
    products = {"text": Product(base, "t"), "autoencoder": Product(base, "a")}
    context = Context(data=Named(), val=Named(), resolution=32, seed=0, total_images=8, products=products, init=Product(base, "base"))
    family = LatentDiffusion(adapt=adapt).continued(base).build(context)
    assert isinstance(family, AdaptedFamily)
    for module in family.frozen():
        module.eval()
    optimizer = torch.optim.AdamW(family.averaged(), 1e-2)
    for step in range(steps):
        batch = Named().load([0, 8], [2 * step, 2 * step + 1], 32, 0, False)
        terms, _ = family(batch, Rng(0, batch.position))
        optimizer.zero_grad()
        terms["denoising"].backward()
        optimizer.step()
    return family


def answers(network: Any, cross: Tensor) -> Tensor:
    torch.manual_seed(1)
    x, t = torch.randn(len(cross), 4, 8, 8), torch.tensor([400] * len(cross))
    with torch.no_grad():
        return network(x, t, encoder_hidden_states=cross).sample


@pytest.mark.slow
def test_custom_diffusion_is_what_diffusers_opens(base: Path, tmp_path: Path) -> None:
    family: CustomFamily = learned(base, THING)
    assert [group.name for group in family.parameter_groups()] == ["model", "word"]
    plain, state = load(base), family.inner.denoiser.state_dict()
    changed = {name for name, value in plain.denoiser.state_dict().items() if not torch.equal(value, state[name])}
    assert changed and {name.split(".", 1)[1].rpartition("attn2.")[2] for name in changed} == {"to_k.weight", "to_v.weight"}
    assert len(changed) == len(family.weights)
    family.save(tmp_path)
    tokens = torch.randn(2, 6, plain.text.width)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(base)
    pipeline.unet.load_attn_procs(tmp_path / "custom", weight_name=CUSTOM, _pipeline=pipeline)  # without it nothing is set, in 0.42
    theirs = pipeline.unet
    whole = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    torch.testing.assert_close(answers(theirs, tokens), answers(whole, tokens), atol=1e-5, rtol=1e-4)
    theirs.save_attn_procs(tmp_path / "back", weight_name="pytorch_custom_diffusion_weights.bin", safe_serialization=False)
    for folder in (tmp_path / "custom", tmp_path / "back"):  # our file, and one that diffusers writes
        networks: Any = {"unet": plain.denoiser, **plain.text.networks}
        before = {name: value.clone() for name, value in plain.denoiser.state_dict().items()}
        merged = Merged(networks, [(read(find(folder)), 1.0)])
        for name, value in load_part(tmp_path / "unet")[1].items():
            torch.testing.assert_close(value, plain.denoiser.state_dict()[name], atol=1e-7, rtol=1e-6)
        merged.undo()
        assert all(torch.equal(value, plain.denoiser.state_dict()[name]) for name, value in before.items())
    assert read_embedding(tmp_path / "custom").token == "<thing>"


def test_the_product_of_custom_diffusion_is_the_base_with_its_files(base: Path, tmp_path: Path) -> None:
    from ldm.__main__ import main

    family: CustomFamily = learned(base, THING)
    family.save(tmp_path)
    plain = load(base)
    files = tmp_path / "custom"
    plain.adapt([(read(files), 1.0)], [read_embedding(files)])
    text = family.inner.text
    text.forget()
    assert torch.equal(plain.text.encode(["a <thing> ring"]).tokens, text.encode(["a <thing> ring"]).tokens)
    for name, value in family.inner.denoiser.state_dict().items():
        torch.testing.assert_close(plain.denoiser.state_dict()[name], value, atol=1e-7, rtol=1e-6)
    words = ["sample", "a <thing>", "--model", str(base), "--size", "32", "--steps", "1", "--out", str(tmp_path / "out")]
    assert main([*words, "--lora", str(files), "--embedding", str(files)]) == 0


def test_a_rank_one_edit_is_a_lora_of_rank_one(base: Path, tmp_path: Path) -> None:
    family: RankOneFamily = learned(base, WORD)
    family.save(tmp_path)
    lora = read(tmp_path / "lora" / "kohya.safetensors")
    pairs = list(lora.pairs["unet"].values())
    assert len(pairs) == len(family.unet) and all(isinstance(one, Pair) and one.rank == 1 and one.alpha == 1 for one in pairs)
    assert all(torch.equal(one.down, pairs[0].down) and one.up.abs().max() > 0 for one in pairs)  # type: ignore[attr-defined]
    plain = load(base)
    position = len(plain.text.words("a"))  # "a large red circle" among others: what the word's states have in common is its key
    state = plain.text.encode(["a red ring"]).tokens[0, plain.text.words_start + position]
    key = pairs[0].down[0]  # type: ignore[attr-defined]
    other = plain.text.encode(["a blue ring"]).tokens[0, plain.text.words_start + position]
    assert abs(float(key @ state)) > abs(float(key @ other))
    networks: Any = {"unet": plain.denoiser, **plain.text.networks}
    before = {name: value.clone() for name, value in plain.denoiser.state_dict().items()}
    merged = Merged(networks, [(lora, 1.0)])
    assert all(torch.equal(value, plain.denoiser.state_dict()[name]) for name, value in load_part(tmp_path / "unet")[1].items())
    merged.undo()
    assert all(torch.equal(value, plain.denoiser.state_dict()[name]) for name, value in before.items())
    small = sum(value.numel() for value in load_file(tmp_path / "lora" / "kohya.safetensors").values())
    assert small < 0.05 * sum(p.numel() for p in plain.denoiser.parameters())


def test_the_key_answers_to_its_word_alone() -> None:
    """Of all directions that answer with 1, the one whose answers to other states are least in squares."""
    torch.manual_seed(0)
    states, own = torch.randn(500, 16) @ torch.randn(16, 16), torch.randn(16)
    key = inward(states, own, 1e-6)[0]
    assert float(key @ own) == pytest.approx(1, abs=1e-5)
    least = float((states @ key).square().sum())
    for _ in range(20):
        aside = torch.randn(16)
        other = key + 0.1 * (aside - own * float(aside @ own) / float(own @ own))
        assert float(other @ own) == pytest.approx(1, abs=1e-4) and float((states @ other).square().sum()) >= least - 1e-3


@pytest.mark.parametrize("adapt", [THING, WORD], ids=["custom", "rank_one"])
def test_frozen_weights_in_a_half_type_leave_the_product_as_it_is(base: Path, tmp_path: Path, adapt: Any) -> None:
    found = []
    for half in (False, True):
        family = learned(base, adapt, 0)
        if half:
            family.compute_in(torch.bfloat16)
        with torch.no_grad():
            for parameter in family.averaged():
                parameter += 0.01
        family.save(tmp_path / str(half))
        found.append(load_part(tmp_path / str(half) / "unet")[1])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_what_does_not_suit_is_one_line(base: Path) -> None:
    with pytest.raises(UserError, match=r"adapt.token: 'zzz' is in none of the data's .* captions, such as"):
        learned(base, RankOne(token="zzz"))
    with pytest.raises(UserError, match="token: got 'a b'"):
        CustomDiffusion(token="a b", init="ball")
    with pytest.raises(UserError, match="token: empty"):
        RankOne(token=" ")
    mmdit = MMDiTConfig(heads=2, head_width=16, layers=1, context_width=16)
    for adapt in (THING, WORD):
        adapt.suits(DiTConfig(heads=2, head_width=16, layers=1, context_width=16).build())
        with pytest.raises(UserError, match="changes keys and values of the text, which this network does not have"):
            adapt.suits(mmdit.build())


def test_scenes_call_their_object_by_a_name() -> None:
    named = ScenesSource(tier="one", images=40, val=4, captions=1, pairs=("orange cross", "purple triangle"), called="<thing>").build(
        "train"
    )
    plain = ScenesSource(tier="one", images=40, val=4, captions=1, pairs=("orange cross", "purple triangle")).build("train")
    index = list(range(40))
    texts, own = named.captions(index, index, 0), plain.captions(index, index, 0)
    assert all("<thing>" in text and "orange" not in text and "triangle" not in text for text in texts)
    assert [text.replace("a <thing>", "X") for text in texts] == [
        text.replace("an orange cross", "X").replace("a purple triangle", "X") for text in own
    ]
    assert named.fingerprint() != plain.fingerprint()
    assert torch.equal(named.load(index, index, 32, 0, False).image, plain.load(index, index, 32, 0, False).image)
    with pytest.raises(UserError, match="called: scenes of tier T1 have several objects"):
        ScenesSource(tier="T1", called="<thing>")
