"""`ldm evaluate`: what it measures, prints and writes, and what it answers to mistakes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_model import clip_product
from painters import SIDE, Painter
from PIL import Image

import ldm
import ldm.families.registry
from ldm.__main__ import main as ldm_main
from ldm.cli.evaluate import main
from ldm.config.errors import UserError
from ldm.data.pictures import to_uint8
from ldm.data.scenes.source import ScenesSource
from ldm.metrics.adherence import Adherence
from ldm.metrics.distances import Frechet
from ldm.metrics.extractors import OwnFeatures, nearest
from ldm.metrics.neighbours import Neighbours
from ldm.metrics.reconstruction import Reconstruction
from ldm.runs.evaluation import measure
from ldm.runs.neighbours_page import neighbours_page
from ldm.runs.report_metrics import measurements
from ldm.runs.tradeoff import curve_of
from ldm.text.own_clip import OwnClip


@pytest.fixture(autouse=True)
def places(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders where the models of these tests lie, as far as a look tells."""
    here = tmp_path_factory.mktemp("here")
    for name in ("MODEL", "other", "A", "B"):
        (here / name).mkdir()
        (here / name / "model_index.json").write_text("{}")
    monkeypatch.chdir(here)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    """Stands in for the model, whatever folder is named."""
    found = Painter()
    monkeypatch.setattr(ldm.families.registry, "open_finished", lambda folder, device: found)
    return found


def test_results_are_named_by_kind_and_numbered_where_a_kind_comes_again():
    data = ScenesSource(tier="one", val=8).build("val")
    metrics = [Reconstruction(images=4), Frechet(images=4), Reconstruction(images=4, size=64), Reconstruction(images=2)]
    found = measure(Painter(), metrics, data=data, resolution=SIDE, seed=0, pictures=None, progress=lambda *line: None)
    assert list(found) == ["reconstruction", "frechet", "reconstruction_2", "reconstruction_3"]
    assert [found[name]["protocol"]["resolution"] for name in list(found) if name[0] == "r"] == [SIDE, 64, SIDE]


def test_the_verb_measures_everything_and_writes_it(painter, tmp_path, capsys):
    target = tmp_path / "new" / "result.json"
    words = ["MODEL", "--tier", "one", "--n", "12", "--images", "8", "--guidance", "1, 2.5", "--seed", "3", "--steps", "5"]
    painter.__init__(seed=3)
    assert main([*words, "--json", str(target), "--pictures", str(tmp_path / "shown")]) == 0
    found = json.loads(target.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert list(found) == ["model", "model_hash", "version", "on", "adherence", "reconstruction", "frechet", "frechet_2"]
    assert [found[name]["protocol"]["guidance"] for name in ("frechet", "frechet_2")] == [1, 2.5]
    assert (found["model"], found["model_hash"], found["version"], found["on"]) == ("MODEL", "hash", ldm.__version__, "scenes")
    assert found["adherence"]["seen"]["bind"] == found["adherence"]["held_out"]["bind"] == 1
    protocol = found["adherence"]["protocol"]
    assert (protocol["prompts"], protocol["guidance"], protocol["steps"], protocol["seed"]) == (6, [1, 2.5], 5, 3)
    assert found["reconstruction"]["protocol"].items() >= {"images": 8, "resolution": SIDE}.items()
    assert found["frechet"]["protocol"]["images"] == 8
    assert math.isfinite(found["frechet"]["distance"])
    for path in (tmp_path / "shown").glob("*.png"):
        Image.open(path).load()
    said = capsys.readouterr()
    assert "1.000 [1.00, 1.00]" in said.out and "held-out" in said.out and "fréchet distance" in said.out
    assert "the checker on perfect pictures: bind 1.000 seen" in said.out and str(target) in said.err


def test_a_folder_of_images_is_measured_without_adherence(painter, tmp_path, capsys):
    images = ScenesSource(tier="one", val=40).build("val")
    batch = images.load(range(40), range(40), SIDE, 0, False)
    folder = tmp_path / "data"
    folder.mkdir()
    for i, (image, caption) in enumerate(zip(batch.image, batch.caption, strict=True)):
        Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption)
    assert main(["MODEL", "--on", str(folder), "--images", "4", "--guidance", "2", "--json", str(tmp_path / "r.json")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert "adherence" not in found and found["on"] == str(folder) and found["reconstruction"]["psnr"] == 100
    assert "bind" not in found["reconstruction"] and "checker" not in capsys.readouterr().out


def test_a_whole_model_is_measured(kl_model, tmp_path, capsys):
    words = [str(kl_model), "--tier", "one", "--n", "2", "--images", "4", "--steps", "2", "--guidance", "1,2", "--device", "cpu"]
    words += ["--abilities", "2", "--completion", "16"]
    for name in ("a.json", "b.json"):
        assert main([*words, "--json", str(tmp_path / name)]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert set(found["adherence"]["intervals"]) == {"1", "2"} and found["adherence"]["checker"] == {"seen": 1.0, "held_out": 1.0}
    assert found["completion"]["protocol"]["images"] == 16 and found["completion"]["grey"] < 0.5
    assert found["abilities"]["protocol"]["prompts"] == 2 and found["abilities"]["protocol"]["guidance"] == 1
    assert {"mean", "object", "partial", "wording"} <= set(
        found["abilities"]
    ) and "abilities at guidance 2, 2 prompts each: mean" in capsys.readouterr().out
    assert found["adherence"]["protocol"]["size"] == SIDE and len(found["model_hash"]) == 64
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_pictures_are_drawn_as_is_asked_for_and_the_protocol_says_it(kl_model, tmp_path, monkeypatch):
    drawn: list[bytes] = []
    sample = ldm.load(str(kl_model)).__class__.sample

    def watched(self, *words, **named):
        images = sample(self, *words, **named)
        drawn.append(images.numpy().tobytes())
        return images

    monkeypatch.setattr(type(ldm.load(str(kl_model))), "sample", watched)
    base = [str(kl_model), "--tier", "one", "--n", "2", "--images", "4", "--steps", "2", "--sampler", "ddim", "--device", "cpu"]
    for number, words in enumerate(([], ["--eta", "1"], ["--spacing", "karras"], ["--guidance-interval", "0,0.4"])):
        file = tmp_path / f"{number}.json"
        assert main([*base, *words, "--json", str(file)]) == 0
        told = json.loads(file.read_text())
        asked = {0: {}, 1: {"eta": 1.0}, 2: {"spacing": "karras"}, 3: {"guidance_from": 0.0, "guidance_to": 0.4}}[number]
        for name in ("adherence", "frechet"):
            assert asked.items() <= told[name]["protocol"].items(), (name, words)
    half = len(drawn) // 4
    assert len({tuple(drawn[i : i + half]) for i in range(0, len(drawn), half)}) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "model"),
        (["MODEL", "--truncation", "0.5"], "truncation: "),
        (["MODEL", "--temperature", "0.5"], "temperature: "),
        (["MODEL", "--eta", "nan"], "--eta"),
        (["MODEL", "--spacing", "kerras"], "spacing: got 'kerras'; choose one of"),
        (["MODEL", "--tier", "T9"], "T9"),
        (["MODEL", "--guidance", "1,two"], "'1,two'"),
        (["MODEL", "--guidance", "-1"], "guidance"),
        (["MODEL", "--guidance", "nan"], "guidance"),
        (["MODEL", "--n", "1"], "--n"),
        (["MODEL", "--images", "3"], "--images"),
        (["MODEL", "--on", "nowhere/at/all"], "nowhere/at/all"),
        (["MODEL", "--sampler", "ddmi"], "ddmi"),
        (["MODEL", "--nonsense"], "--nonsense"),
        (["MODEL", "--features", "inception"], "inception has no config.json"),
        (["MODEL", "--features", "timm=x.safetensors"], "timm/MODEL=FILE"),
        (["MODEL", "--features", "inception=no.pth"], "no.pth is not here"),
        (["MODEL", "--clip", "no/clip"], "no CLIP here"),
        (
            ["MODEL", "--clip", "own"],
            "no CLIP here; a folder that transformers' CLIPModel opens is needed, or a model with a CLIP of its own",
        ),
        (["MODEL", "other", "--clip", "own"], "clip: own is another space for each model"),
        (["MODEL", "--guidance", "0,2"], "0 leaves the prompt out"),
        (["MODEL", "MODEL"], "named twice"),
        (["MODEL", "--split", "test"], "split: got test; there are val, train and all"),
        (["MODEL", "--split", "all"], "split: all cannot be had beside --on scenes"),
        (["MODEL", "--plot", "x.png"], "plot: a curve needs several scales"),
        (["MODEL", "--plot", "x.gif", "--guidance", "1,2"], "ends in .png, .svg, .html"),
        (["MODEL", "--on", "DATA", "--plot", "x.png", "--guidance", "1,2"], "give --clip FOLDER"),
        (["MODEL", "other", "--pictures", "x"], "of one model at a time"),
        (["MODEL", "--neighbours", "2"], "neighbours: changes nothing without --pictures"),
        (["MODEL", "--features", "own"], "no CLIP of its own run"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(words, said, kl_model, capsys):
    assert ldm_main(["evaluate", *(str(kl_model) if word == "MODEL" else word for word in words)]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("ldm evaluate: ") and said in error and len(error.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_told_before_the_work(painter, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file" / "result.json"):
        assert ldm_main(["evaluate", "MODEL", "--tier", "one", "--n", "2", "--images", "4", "--json", str(target)]) == 2
        assert str(target) in capsys.readouterr().err
    assert not painter.calls


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    assert ldm_main(["evaluate", str(tmp_path / "gone")]) == 2
    assert "gone" in capsys.readouterr().err


def test_adherence_of_a_measurement_is_what_the_configuration_says(tmp_path: Path):
    told: list = []
    found = measure(
        Painter(),
        [Adherence(tier="one", prompts=2)],
        data=None,
        resolution=SIDE,
        seed=0,
        pictures=tmp_path / "s",
        progress=lambda *line: told.append(line),
    )
    assert found["adherence"]["seen"]["bind"] == 1 and told[-1][:2] == (4, 4) and len(list((tmp_path / "s").glob("*.png"))) == 2


class Unsteady(Painter):
    """Listens above guidance 2 and draws another's picture below."""

    def __init__(self, listens_from: float = 2.0) -> None:
        super().__init__(listens=lambda guidance, prompt: guidance >= listens_from)


def test_several_models_share_one_plot_over_guidance(monkeypatch, tmp_path, capsys):
    painters = {"A": Unsteady(2.0), "B": Unsteady(4.0)}
    monkeypatch.setattr(ldm.families.registry, "open_finished", lambda folder, device: painters[folder])
    files = [tmp_path / name for name in ("curve.png", "curve.svg", "curve.html")]
    words = ["A", "B", "--tier", "one", "--n", "8", "--images", "8", "--guidance", "1,3,5", "--json", str(tmp_path / "r.json")]
    assert main([*words, *(word for file in files for word in ("--plot", str(file)))]) == 0
    told = json.loads((tmp_path / "r.json").read_text())["models"]
    assert [one["model"] for one in told] == ["A", "B"]
    for one, bind in zip(told, ([0, 1, 1], [0, 0, 1]), strict=True):
        curve = curve_of(one)
        assert curve is not None and [p.guidance for p in curve.points] == [1, 3, 5]
        assert [p.score > 0.9 for p in curve.points] == [bool(b) for b in bind]
        assert [p.distance for p in curve.points] == [one[name]["distance"] for name in ("frechet", "frechet_2", "frechet_3")]
    Image.open(files[0]).load()
    assert files[1].read_text().startswith("<?xml") and "<table" in files[2].read_text() and "Fréchet distance" in files[2].read_text()
    assert "A\n" in capsys.readouterr().out
    drawn = [call for call in painters["A"].calls if len(call["prompts"]) == 8]
    assert [call["guidance"] for call in drawn] == [1, 3, 5]  # one set of pictures a scale


def test_the_curve_is_over_clip_scores_where_there_are_any():
    frechet = {"distance": 5.0, "protocol": {"guidance": 1.0, "features": "inception v3, 2048"}}
    result = {
        "frechet": frechet,
        "frechet_2": {"distance": 4.0, "protocol": {**frechet["protocol"], "guidance": 3.0}},
        "clip_score": {"score": 20.0, "protocol": {"guidance": 1.0}},
        "clip_score_2": {"score": 25.0, "protocol": {"guidance": 3.0}},
    }
    curve = curve_of(result)
    assert curve is not None and curve.distance == "FID" and curve.score == "CLIP score"
    assert [(p.guidance, p.score, p.distance) for p in curve.points] == [(1, 20, 5), (3, 25, 4)]
    assert "FID against CLIP score" in measurements({"evaluation": result}, {})
    assert curve_of({"frechet": frechet}) is None and curve_of({"frechet": {"skipped": "x"}, "clip_score": 3, "adherence": {}}) is None


def test_a_split_says_which_pictures_are_compared(painter, tmp_path):
    found = {}
    for split in ("val", "train"):
        words = ["MODEL", "--tier", "one", "--n", "4", "--images", "8", "--split", split, "--json", str(tmp_path / f"{split}.json")]
        assert main(words) == 0
        found[split] = json.loads((tmp_path / f"{split}.json").read_text())
    assert found["train"]["split"] == "train" and found["train"]["frechet"] != found["val"]["frechet"]
    assert found["train"]["adherence"] == found["val"]["adherence"]  # of prompts that no part of the data has


def test_all_of_a_folder_is_measured_on(painter, tmp_path):
    pictures = tmp_path / "held-out"
    pictures.mkdir()
    for i in range(8):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a small red circle")
    target = tmp_path / "found.json"
    assert main(["MODEL", "--on", str(pictures), "--split", "all", "--images", "8", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["split"] == "all" and found["reconstruction"]["protocol"]["images"] == 8


def test_copies_are_nearer_than_held_out_pictures(monkeypatch, tmp_path, capsys):
    source = ScenesSource(tier="one", val=24, images=60)
    train, val = source.build("train"), source.build("val")

    class Copies(Painter):
        def sample(self, prompts, seeds=None, settings=None, **rest):
            many = list(range(len(prompts)))
            return to_uint8(train.load([7 * i % 60 for i in many], many, SIDE, 0, False).image)

    asked = Neighbours(images=8, nearest=2)
    options = {"data": val, "resolution": SIDE, "seed": 0, "pictures": tmp_path, "progress": lambda *line: None, "train": train}
    found = measure(Copies(), [asked], **options)["neighbours"]
    assert found["distance"] == pytest.approx(0, abs=1e-4) and found["closer"] == 1 and found["held_out"] > 1e-4
    assert [row["samples"][0] for row in found["nearest"]] == [7 * i for i in range(8)]
    assert {name: found[name] for name in asked.names(True)} and len(found["nearest"][0]["distances"]) == 2
    page = neighbours_page(tmp_path, {"model": "A", "neighbours": found}).read_text()
    assert page.count("<img") == 8 * 3 and "sample 49: 0.0000" in page and "100% of the drawn ones" in page
    faithful = measure(Painter(), [asked], **options)["neighbours"]
    assert faithful["distance"] > 1e-4
    monkeypatch.setattr(ldm.families.registry, "open_finished", lambda folder, device: Painter())
    monkeypatch.setattr("ldm.cli.evaluate._has_own", lambda model: False)
    monkeypatch.setattr("ldm.cli.evaluate.LEARNED", 40)
    words = ["MODEL", "--tier", "one", "--n", "4", "--images", "8", "--neighbours", "2", "--pictures", str(tmp_path / "shown")]
    assert main(words) == 0
    assert "nearest of 40 training pictures" in capsys.readouterr().out and (tmp_path / "shown" / "neighbours.html").is_file()


def test_own_features_are_those_of_the_runs_clip(kl_model, tmp_path):
    shutil.copytree(kl_model, tmp_path / "model")
    with pytest.raises(UserError, match=r"has no clip/, no CLIP of its own run"):
        OwnFeatures(path=str(kl_model)).check()
    clip_product(tmp_path / "clip")
    clip = tmp_path / "clip" / "clip"
    shutil.copytree(clip if clip.is_dir() else tmp_path / "clip", tmp_path / "model" / "clip")
    extractor = OwnFeatures(path=str(tmp_path / "model")).load(torch.device("cpu"))
    image = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
    wanted = OwnClip.load(tmp_path / "model" / "clip").embed_images(image)
    assert torch.allclose(torch.from_numpy(extractor.features(image)).float(), wanted, atol=1e-6)
    assert extractor.protocol["features"] == "the run's own CLIP"


def test_nearest_is_by_cosine() -> None:
    index, far = nearest(np.array([[1.0, 0.1], [0.0, -2.0]]), np.array([[0.0, -1.0], [9.0, 0.0], [1.0, 1.0]]), 2)
    assert index.tolist() == [[1, 2], [0, 1]] and far[1].tolist() == pytest.approx([0, 1]) and far[0, 0] == pytest.approx(1 - 1 / 1.01**0.5)


class Writes:
    """A captioner: it says of every picture the same."""

    able = frozenset({"caption"})
    kind, content_hash = "tokens", "hash"
    defaults = {"size": (SIDE, SIDE)}  # noqa: RUF012

    def parameters(self):
        return iter([torch.zeros(1)])

    def settings(self):
        from ldm.families.draws import DIRECT

        return DIRECT

    def captions(self, image, seeds, settings=None):
        return ["a red square on a white background"] * len(seeds)


def test_a_model_is_measured_by_what_it_is_able_to(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ldm.families.registry, "open_finished", lambda folder, device: Writes())
    assert main(["MODEL", "--tier", "one", "--images", "8", "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [name for name in found if isinstance(found[name], dict)] == ["captions"]
    assert found["captions"]["f1"] < 0.6 and "captions: words_f1" in capsys.readouterr().out
    monkeypatch.setattr(Writes, "able", frozenset({"translate"}))
    with pytest.raises(UserError, match="MODEL: a model of kind tokens has nothing that is measured here; an evaluate stage"):
        main(["MODEL"])
