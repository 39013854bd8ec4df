"""pix2pix and CycleGAN: gradients of the textbook's separate passes, drawing, and files of the published code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.data.scenes.source import Scenes, ScenesSource
from ldm.data.unpaired import OTHER, Unpaired, UnpairedSource
from ldm.data.views import ViewKind
from ldm.diffusion.batch import ImageBatch, rows
from ldm.diffusion.rng import Rng
from ldm.families.cyclegan import CycleGAN, CycleGANFamily
from ldm.families.draws import Wanted
from ldm.families.pix2pix import Pix2Pix, Pix2PixFamily
from ldm.families.registry import open_finished
from ldm.families.translator import in_view
from ldm.formats import translator_file
from ldm.models.translation import PatchGANConfig, ResNetGeneratorConfig, UNetGeneratorConfig, own_norms
from ldm.sampling import doubts
from ldm.text.prompt_syntax import literal, read

LABELS = ViewKind(form="classes", channels=3, names=("a", "b", "c"), colours=((255, 0, 0), (0, 255, 0), (0, 0, 255)))
SMALL: dict[str, Any] = {"discriminator": PatchGANConfig(channels=4, layers=1)}


def pix2pix(shown: ViewKind = LABELS, **fields: Any) -> Pix2PixFamily:
    torch.manual_seed(0)
    config = Pix2Pix(view="labels", generator=UNetGeneratorConfig(channels=4, downs=5), **{**SMALL, **fields})
    return Pix2PixFamily(config, shown, 32).double()


def cyclegan(**fields: Any) -> CycleGANFamily:
    torch.manual_seed(0)
    small = {
        "generator": ResNetGeneratorConfig(channels=4, blocks=1),
        "discriminator": PatchGANConfig(channels=4, layers=1, norm="instance"),
    }
    return CycleGANFamily(CycleGAN(domains=("day", "night"), **{**small, **fields}), ViewKind(form="map", channels=3), 32).double()


def batch(views: dict[str, Any], count: int = 3) -> ImageBatch:
    image = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1
    return ImageBatch(image=image, caption=("",) * count, size=torch.zeros(count, 6), position=torch.arange(count), views=views)


def labels(count: int = 3) -> dict[str, Any]:
    return {"labels": torch.randint(0, 3, (count, 1, 32, 32), generator=torch.Generator().manual_seed(2)).short()}


def other(count: int = 3) -> dict[str, Any]:
    return {OTHER: torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}


def gradients(family: Any, loss: Tensor) -> dict[str, Tensor]:
    family.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in family.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}


def same(family: Any, mine: dict[str, Tensor], *losses: tuple[str, Tensor]) -> None:
    """Whether gradients are those of separate losses, each of the parameters whose names begin with a word."""
    for word, loss in losses:
        theirs = {name: value for name, value in gradients(family, loss).items() if name.startswith(word)}
        own = {name: value for name, value in mine.items() if name.startswith(word)}
        assert own.keys() == theirs.keys() and own
        assert all(torch.allclose(own[name], value, rtol=1e-7, atol=1e-11) for name, value in theirs.items())


def test_pix2pix_learns_by_the_papers_two_losses() -> None:
    family, data = pix2pix(l1=7.0, adversarial=0.5), batch(labels())
    mine = gradients(family, torch.stack(list(family(data, Rng(0, data.position))[0].values())).sum())
    shown = 2 * F.one_hot(data.views["labels"][:, 0].long(), 3).permute(0, 3, 1, 2).double() - 1
    made = family.generators["generator"](shown)
    judge = family.discriminators["discriminator"].model
    real, fake = (judge(torch.cat([shown, image], 1)) for image in (data.image, made))
    player = 7 * (made - data.image).abs().mean() - 0.5 * torch.sigmoid(fake).log().mean()
    kept = judge(torch.cat([shown, made.detach()], 1))
    lesson = -0.5 * (torch.sigmoid(real).log().mean() + (1 - torch.sigmoid(kept)).log().mean())
    same(family, mine, ("generators", player), ("discriminators", lesson))


def test_cyclegan_learns_both_ways_by_the_papers_losses() -> None:
    family, data = cyclegan(cycle=10.0, identity_weight=5.0), batch(other())
    mine = gradients(family, torch.stack(list(family(data, Rng(0, data.position))[0].values())).sum())
    a, b = data.image, 2 * data.views[OTHER] - 1
    to_b, to_a = (family.generators[f"generator{one}"] for one in ("_A", "_B"))
    of_b, of_a = (family.discriminators[f"discriminator{one}"] for one in ("_A", "_B"))
    fake_b, fake_a = to_b(a), to_a(b)
    player = 10 * ((to_a(fake_b) - a).abs().mean() + (to_b(fake_a) - b).abs().mean())
    player = player + 5 * ((to_b(b) - b).abs().mean() + (to_a(a) - a).abs().mean())
    player = player + (of_b(fake_b) - 1).square().mean() + (of_a(fake_a) - 1).square().mean()
    lesson = torch.zeros(())
    for judge, real, fake in ((of_b, b, fake_b.detach()), (of_a, a, fake_a.detach())):
        lesson = lesson + 0.5 * ((judge(real) - 1).square().mean() + judge(fake).square().mean())
    same(family, mine, ("generators", player), ("discriminators", lesson))


def test_a_cyclegan_may_begin_as_the_identity() -> None:
    family, data = cyclegan(cycle=10.0, identity_weight=5.0, begin_as_identity=0.25), batch(other())
    family.total_images = 100
    own = family.both(data)
    for images, begins in ((0, True), (24, True), (25, False), (99, False)):
        family.progress(images)
        terms, _ = family.loss(data, Rng(0, data.position))
        for i, player in enumerate(("_A", "_B")):
            made, same = (family.generators[f"generator{player}"](own[k]) for k in (i, 1 - i))
            changed = (same - own[1 - i]).abs().mean() + (made - own[i]).abs().mean() * begins
            torch.testing.assert_close(terms[f"identity{player}"], 5 * changed)
            first = next(family.generators[f"generator{player}"].parameters())
            (slope,) = torch.autograd.grad(terms[f"adversarial{player}"], first)
            assert bool(slope.any()) is not begins
    with pytest.raises(UserError, match="begin_as_identity: needs identity_weight above 0"):
        CycleGAN(domains=("day", "night"), identity_weight=0, begin_as_identity=0.1)


@pytest.mark.parametrize("make", [lambda: (pix2pix(), batch(labels(4), 4)), lambda: (cyclegan(), batch(other(4), 4))])
def test_gradients_and_statistics_do_not_depend_on_how_a_batch_is_shared(make: Any) -> None:
    family, data = make()
    whole = gradients(family, torch.stack(list(family(data, Rng(0, data.position))[0].values())).sum())
    family.after_step(0, Rng(0, [0]))
    statistics = [norm.running_var.clone() for norm in own_norms(family)]
    fresh, _ = make()
    fresh.progress(0)
    for first in (0, 2):
        half = rows(data, first, first + 2)
        (torch.stack(list(fresh(half, Rng(0, half.position))[0].values())).sum() / 2).backward()
    fresh.after_step(0, Rng(0, [0]))
    parts = {name: p.grad for name, p in fresh.named_parameters()}
    assert all(torch.allclose(value, parts[name], rtol=1e-8, atol=1e-12) for name, value in whole.items())
    assert all(torch.allclose(a, norm.running_var) for a, norm in zip(statistics, own_norms(fresh), strict=True))


def test_parts_of_pix2pix_can_be_left_out() -> None:
    data = batch(labels())
    alone = pix2pix(adversarial=0)
    assert set(alone(data, Rng(0, data.position))[0]) == {"l1"} and not alone.discriminators
    blind = pix2pix(conditional=False, l1=0, r1=1.0, loss="relativistic")
    terms, _ = blind(data, Rng(0, data.position))
    assert set(terms) == {"adversarial", "discriminator", "r1"} and blind.discriminators["discriminator"].model[0].in_channels == 3
    with pytest.raises(UserError, match="l1: got 0, and adversarial too"):
        Pix2Pix(l1=0, adversarial=0)
    with pytest.raises(UserError, match="view 'labels': these samples have none"):
        pix2pix()(replace(data, views=None), Rng(0, data.position))


def saved(family: Any, folder: Path) -> Path:
    family.save(folder / "product")
    product = SimpleNamespace(folder=folder / "product", hash="")
    family.config.assemble({"model": product}, folder / "model", {})
    return folder / "model"


def test_pix2pix_is_saved_opened_and_draws_by_colours_or_numbers_whatever_the_neighbours(tmp_path: Path) -> None:
    family = pix2pix().float()
    found: Any = open_finished(saved(family, tmp_path))
    numbers = labels(2)["labels"]
    picture = torch.tensor(LABELS.colours, dtype=torch.uint8)[numbers[:, 0].long()]  # (2,32,32,3)
    assert torch.equal(in_view(picture.permute(0, 3, 1, 2), LABELS), numbers)
    drawn = found.sample(["", ""], edits=found.edits(picture))
    assert drawn.shape == (2, 32, 32, 3) and drawn.dtype == torch.uint8
    assert torch.equal(drawn[1:], found.sample([""], edits=found.edits(picture[1:])))
    assert torch.equal(drawn, found.sample(["", ""], edits=found.tell({"labels": numbers}, {}, (32, 32))))
    assert found.told == {"labels": LABELS} and found.content_hash and found.factor == 32
    with pytest.raises(UserError, match="draws of a picture alone; give one by --init FILE"):
        found.sample([""])
    with pytest.raises(UserError, match="mask: this model of kind pix2pix draws whole pictures"):
        found.edits(picture, torch.ones(2, 32, 32, dtype=torch.bool))
    said: list[str] = []
    assert torch.equal(drawn[:1], found.sample([""], edits=found.edits(picture[:1], None, 0.5), note=said.append))
    assert said == ["strength: changes nothing here, whole pictures are drawn at once"]
    asked: Any = SimpleNamespace(prompt="a word", width=32, height=32, seed=0, given="", negative="", to="")
    assert list(doubts.of([asked], found)) == ["prompt: this model of kind pix2pix reads none, so its words change nothing"]
    asked.prompt = ""
    assert not list(doubts.of([asked], found))
    with pytest.raises(UserError, match="negative: this model of kind pix2pix reads no negative prompt"):
        found.sample([""], negative=literal("dark"), edits=found.edits(picture))
    assert torch.equal(drawn[:1], found.sample([literal("")], negative=literal(""), edits=found.edits(picture[:1])))
    with pytest.raises(UserError, match="steps: got 5"):
        found.sample([""], settings=Wanted(steps=5), edits=found.edits(picture))


def test_a_prompt_says_which_way_cyclegan_goes(tmp_path: Path) -> None:
    found: Any = open_finished(saved(cyclegan().float(), tmp_path))
    edits = found.edits(torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8))
    night, day = (found.sample([word], edits=edits) for word in ("night", read("a (Day:1.2)")))
    assert not torch.equal(night, day)
    assert torch.equal(
        night[0], ((found.generators["generator_A"](edits[0].value)[0].clamp(-1, 1).permute(1, 2, 0) + 1) * 127.5).round().byte()
    )
    for word in ("", "day or night", "daylight"):
        with pytest.raises(UserError, match="say what the picture shall become: day or night"):
            found.sample([word], edits=edits)


@pytest.mark.slow
def test_a_published_file_is_written_and_opened_with_the_same_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    generator = UNetGeneratorConfig(channels=4, downs=6, norm="batch")
    family = Pix2PixFamily(Pix2Pix(generator=generator, **SMALL), ViewKind(form="map", channels=3), 64)
    said: list[str] = []
    [done] = family.publish(tmp_path, "fp32", said.append)
    assert done.max_error == 0 and said
    found: Any = open_finished(tmp_path / "latest_net_G.pth")  # a process of its own reads the pickle
    picture = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    assert found.kind == "pix2pix" and found.config.generator == generator and found.defaults["size"] == (256, 256)
    assert torch.equal(found.sample([""], edits=found.edits(picture)), family.sample([""], edits=family.edits(picture)))


@pytest.mark.parametrize(
    "generator",
    [
        UNetGeneratorConfig(channels=2, downs=7, norm="instance"),
        UNetGeneratorConfig(channels=2, downs=5, norm="none", skips=False),
        ResNetGeneratorConfig(channels=2, blocks=9),
        ResNetGeneratorConfig(channels=2, blocks=1, norm="batch", dropout=0.5),
    ],
)
def test_published_files_of_any_version_say_what_their_generator_is(generator: Any) -> None:
    state = generator.build(4, 2).state_dict()
    old = {f"module.{name}": value for name, value in state.items()}  # DataParallel's prefix, and statistics that nothing reads
    if generator.norm == "instance":
        name = "model.2" if generator.kind == "resnet" else "model.model.1.model.2"
        old |= {f"module.{name}.running_mean": torch.zeros(4), f"module.{name}.num_batches_tracked": torch.tensor(3)}
    found = translator_file.published(old)
    assert found is not None and found.keys() == state.keys()
    assert translator_file.config_of(found) == (generator, 4, 2)
    assert translator_file.published({"model.diffusion_model.out.0.weight": torch.zeros(1)}) is None


def test_a_damaged_published_file_names_its_weight(tmp_path: Path) -> None:
    state = ResNetGeneratorConfig(channels=2, blocks=1).build(3).state_dict()
    lacking = {name: value for name, value in state.items() if name != "model.10.conv_block.5.weight"}
    with pytest.raises(UserError, match=r"bad\.pth: .*missing: model\.10\.conv_block\.5\.weight"):
        translator_file.write_folder(lacking, Path("bad.pth"), tmp_path, lambda text: None)


# Unpaired data


def test_unpaired_samples_depend_on_their_position_alone() -> None:
    day, night = (Scenes(ScenesSource(tier="one", images=9, time=time), "train") for time in ("day", "night"))
    data = Unpaired(day, night)
    whole = data.load([0, 1, 2, 3], [0, 1, 2, 3], 32, 5, False)
    part = data.load([2, 3], [2, 3], 32, 5, False)
    assert torch.equal(whole.image[2:], part.image) and torch.equal(whole.views[OTHER][2:], part.views[OTHER])
    later = data.load([2], [11], 32, 5, False)
    assert torch.equal(later.image[0], part.image[0]) and not torch.equal(later.views[OTHER][0], part.views[OTHER][0])
    drawn = data.load([0] * 60, range(60), 32, 0, False).views[OTHER]
    pictures = night.load(range(9), range(9), 32, 0, False).image
    seen = {int((pictures - (2 * one - 1)).abs().flatten(1).sum(1).argmin()) for one in drawn}
    assert seen == set(range(9))
    assert data.fingerprint() != Unpaired(night, day).fingerprint() and not data.mirrors
    with pytest.raises(UserError, match="unpaired data has none but other"):
        data.with_views(("labels",))


def test_the_published_layout_of_two_domains(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trainA is missing; the layout is trainA and trainB"):
        UnpairedSource(path=str(tmp_path)).build("train")
    for name, count, shade in (("trainA", 3, 10), ("trainB", 2, 200), ("testA", 2, 20), ("testB", 2, 210)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.fromarray(np.full((40, 40, 3), shade + i, np.uint8)).save(tmp_path / name / f"{i}.png")
    train, val = (UnpairedSource(path=str(tmp_path)).build(split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, 2)
    found, held = (data.load([0, 1], [0, 1], 32, 0, False).to("cpu") for data in (train, val))
    assert float(found.image.max()) < -0.8 and float(found.views[OTHER].min()) > 0.7
    assert float(held.image.min()) > 20 / 127.5 - 1.01 and float(held.views[OTHER].min()) > 209 / 255
    with pytest.raises(UserError, match="path: give a folder with trainA and trainB, or two sources as a and b"):
        UnpairedSource(a=ScenesSource())
