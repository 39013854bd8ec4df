"""What can be drawn near a picture, beyond it, out of the noise it came from, and what is kept of many."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_model import SIDE
from PIL import Image

import ldm
from ldm.__main__ import main
from ldm.families.draws import Wanted
from ldm.sampling.recipe import Recipe, read_recipe
from ldm.sampling.webui_text import read_parameters

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
DDIM = ["--steps", "4", "--sampler", "ddim"]


def draw(out: Path, *words: str) -> list[np.ndarray]:
    """The pictures of a successful call, in the order of their numbers."""
    assert main(["sample", *words, "--out", str(out)]) == 0
    return [np.asarray(Image.open(path)) for path in sorted(out.glob("*.png"))]


def recipe(folder: Path, number: int = 0) -> Recipe:
    found = read_recipe(sorted(folder.glob("*.png"))[number])
    assert isinstance(found, Recipe)
    return found


@pytest.fixture(scope="module")
def model(kl_model: Path) -> list[str]:
    return ["--model", str(kl_model), *DDIM]


@pytest.fixture
def init(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(tmp_path / "init.png")
    return tmp_path / "init.png"


# Variations


def test_variations_lie_between_seeds(model: list[str], tmp_path: Path) -> None:
    three = draw(tmp_path / "v", *model, "a red circle", "--seed", "5", "--variations", "3", "--variation-strength", "0.3")
    assert len({image.tobytes() for image in three}) == 3
    near = draw(tmp_path / "near", *model, "a red circle", "--seed", "5", "--variations", "2", "--variation-strength", "1e-4")
    own = draw(tmp_path / "own", *model, "a red circle", "--seed", "5", "--n", "2")
    assert all(np.abs(image.astype(int) - own[0]).max() <= 1 for image in near)
    whole = draw(tmp_path / "whole", *model, "a red circle", "--seed", "5", "--variations", "1", "--variation-strength", "1")
    assert np.array_equal(whole[0], own[1])  # all the way is the next seed's picture
    made = recipe(tmp_path / "v", 2)
    assert (made.seed, made.variation_seed, made.variation) == (5, 8, 0.3)
    told = read_parameters(made.parameters())
    assert told is not None and told.fields["variation_seed"] == 8 and told.fields["variation"] == 0.3
    again = draw(tmp_path / "again", *model, "--from", str(sorted((tmp_path / "v").glob("*.png"))[2]))
    assert np.array_equal(again[0], three[2])


def test_variations_do_not_depend_on_neighbours(model: list[str], tmp_path: Path) -> None:
    words = [*model, "a red circle", "--variations", "3"]
    for batch in ("1", "8"):
        draw(tmp_path / batch, *words, "--batch", batch)
    one, eight = (sorted((tmp_path / batch).glob("*.png")) for batch in ("1", "8"))
    assert all(np.array_equal(Image.open(a), Image.open(b)) for a, b in zip(one, eight, strict=True))


# Beyond the edges


def test_outpainting_keeps_the_picture_and_draws_around_it(model: list[str], init: Path, tmp_path: Path) -> None:
    (wide,) = draw(tmp_path / "a", *model, "a red circle", "--init", str(init), "--outpaint", "left=16,bottom=8")
    assert wide.shape == (SIDE + 8, SIDE + 16, 3)
    assert np.array_equal(wide[:SIDE, 16:], np.asarray(Image.open(init)))
    assert len(np.unique(wide[:, :16].reshape(-1, 3), axis=0)) > 10
    assert recipe(tmp_path / "a").outpaint == "16,0,0,8" and recipe(tmp_path / "a").strength == 1
    again = draw(tmp_path / "b", *model, "--from", str(tmp_path / "a" / "00000_seed0.png"), "--init", str(init))
    assert np.array_equal(again[0], wide)
    (around,) = draw(tmp_path / "c", *model, "a red circle", "--init", str(init), "--outpaint", "8")
    assert around.shape == (SIDE + 16, SIDE + 16, 3)
    (but_left,) = draw(tmp_path / "d", *model, "a red circle", "--init", str(init), "--outpaint", "8,left=0")
    assert but_left.shape == (SIDE + 16, SIDE + 8, 3)


# Out of the noise it came from


def test_inverted_noise_leads_back(init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finished_model import finished_model

    from ldm.diffusion.process import Process
    from ldm.families.latent_diffusion import edits
    from ldm.text.prompt_syntax import literal

    # Near the denoiser of Gaussian data, as a trained network is near that of its own; of v that is a network that says little.
    family = ldm.load(finished_model(tmp_path, process=Process(target="v")))
    image = torch.tensor(np.asarray(Image.open(init)))[None]
    settings = family.settings(Wanted(steps=10, sampler="ddim", guidance=1.0))
    errors = []
    with torch.no_grad():
        family.denoiser.conv_out.weight.mul_(0.3)
        x0 = edits.encoded(family.codec, image)
        for rounds in (1, edits.ROUNDS, 20):
            monkeypatch.setattr(edits, "ROUNDS", rounds)
            edit = edits.from_inverted(family.engine(), image, literal("a ring"), settings)
            x = family.engine().draw(["a ring"], [0], settings, (SIDE, SIDE), edits=(edit,))[1]
            errors.append(float((x - x0).abs().max()))
    assert errors[1] < 0.02 and errors[1] < errors[0] / 3 and errors[2] < 1e-4, errors  # of latents with unit variance


def test_a_picture_is_edited_by_its_prompt(model: list[str], init: Path, tmp_path: Path) -> None:
    words = [*model, "a ring", "--invert", str(init), "--source", "a ring"]
    same = [draw(tmp_path / name, *words, *more)[0] for name, more in (("same", ()), ("seed", ("--seed", "1")))]
    made = recipe(tmp_path / "same")
    assert made.invert and made.source == "a ring" and made.guidance == 1 and made.strength == 1 and made.sampler == "ddim"
    assert np.array_equal(same[0], same[1])  # no noise of the seed's is in it
    rebuilt = draw(tmp_path / "r", *model, "a ring", "--init", str(init), "--strength", "0")[0]
    other = draw(tmp_path / "o", *model, "a large green square", "--invert", str(init), "--source", "a ring")[0]
    assert not np.array_equal(same[0], other)
    picture = str(tmp_path / "o" / "00000_seed0.png")
    assert np.array_equal(draw(tmp_path / "again", *model, "--from", picture, "--invert", str(init))[0], other)
    part = draw(tmp_path / "p", *model, "a large green square", "--invert", str(init), "--source", "a ring", "--strength", "0")[0]
    assert np.array_equal(part, rebuilt)


def test_prompt_to_prompt(model: list[str], init: Path, tmp_path: Path) -> None:
    words = [*model, "a blue ring", "--source", "a red ring", "--seed", "5"]
    one = draw(tmp_path / "one", *words)[0]
    made = recipe(tmp_path / "one")
    assert (made.source, made.cross_replace, made.self_replace, made.invert, made.seed) == ("a red ring", 0.8, 0.4, False, 5)
    picture = str(tmp_path / "one" / "00000_seed5.png")
    assert np.array_equal(draw(tmp_path / "again", *model, "--from", picture)[0], one)
    less = draw(tmp_path / "less", *model, "--from", picture, "--cross-replace", "0.5")[0]
    assert (
        recipe(tmp_path / "less").cross_replace == 0.5 and recipe(tmp_path / "less").self_replace == 0.4 and not np.array_equal(less, one)
    )
    inverted = [*model, "a blue ring", "--invert", str(init), "--source", "a red ring"]
    plain, taken = (
        draw(tmp_path / "plain", *inverted)[0],
        draw(tmp_path / "taken", *inverted, "--cross-replace", "0.8", "--self-replace", "1")[0],
    )
    assert recipe(tmp_path / "plain").cross_replace == 0 and not np.array_equal(plain, taken)
    again = draw(tmp_path / "again2", *model, "--from", str(tmp_path / "taken" / "00000_seed0.png"), "--invert", str(init))[0]
    assert np.array_equal(again, taken)


# The best of several


@pytest.fixture(scope="module")
def clip(kl_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random CLIP in transformers' layout, with the model's own tokenizer."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(kl_model / "tokenizer")
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "bos_token_id": 0,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_best_of_several_is_kept(model: list[str], clip: Path, tmp_path: Path) -> None:
    from ldm.metrics.judges import ClipJudge

    words = [*model, "a red circle", "a blue ring", "--n", "2", "--seed", "3"]
    every = draw(tmp_path / "all", *model, "a red circle", "a blue ring", "--n", "6", "--seed", "3")
    best = draw(tmp_path / "best", *words, "--best", "3", "--judge", str(clip), "--batch", "2")
    judge = ClipJudge.load(clip)
    prompts = ["a red circle"] * 6 + ["a blue ring"] * 6
    scores = judge.scores(torch.tensor(np.stack(every)), prompts)
    winners = [start + int(np.argmax(scores[start : start + 3])) for start in (0, 3, 6, 9)]
    assert all(np.array_equal(image, every[k]) for image, k in zip(best, winners, strict=True))
    made = recipe(tmp_path / "best", 1)
    assert made.seed == 3 + winners[1] and made == recipe(tmp_path / "all", winners[1])
    # What is there is not drawn again, whichever of a group it was.
    assert len(draw(tmp_path / "best", *words, "--best", "3", "--judge", str(clip), "--resume")) == 4


def test_the_models_own_clip_keeps_the_best(own_clip_model: Path, tmp_path: Path) -> None:
    from ldm.text.own_clip import OwnClip

    words = ["--model", str(own_clip_model), *DDIM, "a small red circle", "a large blue ring", "--seed", "3"]
    every = draw(tmp_path / "all", *words, "--n", "4")
    best = draw(tmp_path / "best", *words, "--best", "4", "--judge", "own")
    image = torch.tensor(np.stack(every)).permute(0, 3, 1, 2) / 127.5 - 1
    cosine = OwnClip.load(own_clip_model / "clip").similarity(image, ["a small red circle"] * 4 + ["a large blue ring"] * 4)
    winners = [int(cosine[:4].argmax()), 4 + int(cosine[4:].argmax())]
    assert all(np.array_equal(image, every[k]) for image, k in zip(best, winners, strict=True))


def test_scenes_are_judged_by_their_checker(tmp_path: Path) -> None:
    from ldm.config.errors import UserError
    from ldm.data.scenes.render import render, to_bytes
    from ldm.data.scenes.source import prompts
    from ldm.metrics.judges import judge_of

    known = prompts("one", 4, 0)
    pictures = torch.tensor(np.concatenate([to_bytes(render(known.specs.take([i]), 64)) for i in range(4)]))
    judge = judge_of("scenes", "")
    right, wrong = judge.scores(pictures, list(known.text)), judge.scores(pictures, [*known.text[1:], known.text[0]])
    assert min(right) > 0.9 and max(wrong) < 1
    with pytest.raises(UserError, match="'a cat' is no caption of a scene"):
        judge.scores(pictures[:1], ["a cat"])


# A filter and a mark


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random safety checker in diffusers' layout."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(0)
    made: Any = StableDiffusionSafetyChecker(CLIPConfig(vision_config=VISION, projection_dim=8))
    with torch.no_grad():
        made.concept_embeds.normal_()
        made.special_care_embeds.normal_()
        made.concept_embeds_weights.fill_(2.0)  # more than any cosine: nothing is flagged
        made.special_care_embeds_weights.fill_(2.0)
    folder = tmp_path_factory.mktemp("safety")
    made.save_pretrained(folder / "lets_all_pass")
    with torch.no_grad():
        made.concept_embeds_weights.fill_(-2.0)
    made.save_pretrained(folder / "withholds_all" / "safety_checker")
    return folder


def test_what_a_checker_flags_is_not_written(model: list[str], checker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = draw(tmp_path / "plain", *model, "a red circle", "--n", "2")
    passed = draw(tmp_path / "passed", *model, "a red circle", "--n", "2", "--safety", str(checker / "lets_all_pass"))
    assert all(np.array_equal(a, b) for a, b in zip(plain, passed, strict=True))
    capsys.readouterr()
    assert draw(tmp_path / "none", *model, "a red circle", "--n", "2", "--safety", str(checker / "withholds_all")) == []
    said = capsys.readouterr().err
    assert "withheld the picture of seed 1 for 'a red circle'" in said and "0 pictures of" in said


def test_the_filter_looks_as_diffusers_does(checker: Path) -> None:
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    from ldm.sampling.safety import SafetyFilter

    kind: Any = StableDiffusionSafetyChecker
    theirs = kind.from_pretrained(checker / "lets_all_pass").eval()
    found = SafetyFilter.load(checker / "lets_all_pass")
    pictures = torch.tensor(np.random.default_rng(0).integers(0, 256, (16, 40, 56, 3), dtype=np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    values = processor(images=list(pictures.numpy()), return_tensors="pt").pixel_values
    with torch.no_grad():
        seen = torch.nn.functional.normalize(theirs.visual_projection(theirs.vision_model(values)[1]))
        cosine = (seen @ torch.nn.functional.normalize(theirs.concept_embeds).T).max(1).values
        for made in (theirs, found.checker):
            made.concept_embeds_weights.fill_(float(cosine.median()) - 1e-3)
        _, wanted = theirs(clip_input=values, images=np.zeros((16, 2, 2, 3), np.float32))
    assert 0 < sum(wanted) < 16 and found.flagged(pictures) == wanted


def test_a_mark_is_hidden_and_a_recipe_remembers_it(model: list[str], tmp_path: Path) -> None:
    from ldm.sampling.watermark import seek

    size = ["--size", "64x64"]
    plain = draw(tmp_path / "plain", *model, "a red circle", *size)[0]
    marked = draw(tmp_path / "marked", *model, "a red circle", *size, "--watermark", "ldm")[0]
    assert seek(plain) is None and seek(marked) == "ldm" and np.abs(marked.astype(int) - plain).max() < 24
    again = draw(tmp_path / "again", *model, "--from", str(tmp_path / "marked" / "00000_seed0.png"))[0]
    assert np.array_equal(again, marked)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--outpaint", "8"], "outpaint: no picture to go on from; give it by --init"),
        (["--init", "init.png", "--outpaint", "up=8"], "px for some of left, top, right, bottom are needed"),
        (["--init", "init.png", "--outpaint", "left=-8"], "outpaint: got 'left=-8'"),
        (["--init", "init.png", "--outpaint", "8,16,24,32"], "outpaint: got '8,16,24,32'; px for some of left, top"),
        (["--init", "init.png", "--outpaint", "left=8,left=16"], "outpaint: got 'left=8,left=16'"),
        (["--init", "init.png", "--outpaint", "left=8,16"], "outpaint: got 'left=8,16'"),
        (["--init", "init.png", "--outpaint", "left=99999"], "outpaint: got"),
        (["--init", "init.png", "--outpaint", "3"], "both must be multiples of 8"),
        (["--init", "init.png", "--outpaint", "8", "--size", "64"], "not together with --mask or --size"),
        (["--invert", "none.png"], "invert: none.png: No such file"),
        (["--invert", "init.png", "--init", "init.png"], "not together with --init"),
        (["--invert", "init.png", "--sampler", "euler_a"], "invert: euler_a does not go back the way it came; choose ddim or euler"),
        (["--invert", "init.png", "--eta", "0.5"], "ddim with eta 0.5 does not go back"),
        (["--source", "a ring", "--init", "init.png"], "source: says what the picture of --invert shows, or what the seed draws"),
        (["--source", "a ring", "--hires", "2"], "source: not together with --hires"),
        (["--source", "a ring", "--cross-replace", "0", "--self-replace", "0"], "source: no step takes anything of it"),
        (["--source", "a ring AND a circle"], "source: attention is exchanged between two prompts without AND"),
        (["--cross-replace", "0.5"], "cross_replace: got 0.5, but nothing to take attention from; give --source PROMPT"),
        (["--variation-strength", "0.5"], "no variations; give --variations 4"),
        (["--best", "2"], "best: who chooses? Give --judge own, scenes or"),
        (["--best", "2", "--judge", "own"], "model has no clip/, no CLIP of its own run; give --judge scenes"),
        (["--best", "2", "--judge", "none"], "judge: none: no CLIP here"),
        (["--best", "2", "--judge", "scenes", "--variations", "2"], "not together with --variations"),
        (["--safety", "none"], "safety: none: no safety checker here"),
        (["--watermark", "far too long for a small picture"], "in a picture of 32x32 px 1 to 1 are possible"),
    ],
)
def test_mistakes_are_one_line(
    kl_model: Path,
    init: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--model", str(kl_model), "a red circle", "--out", "pictures", *words]) == 2
    said = capsys.readouterr().err.strip()
    assert expected in said and "\n" not in said and not list((tmp_path / "pictures").glob("*.png"))
