"""The page of a run: whole, self-contained, and written from whatever is left of a run folder."""

from __future__ import annotations

import base64
import json
import re
import xml.etree.ElementTree as xml
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from layout_boxes import opened, problems
from PIL import Image

from ldm.__main__ import main as ldm_main
from ldm.config.errors import UserError
from ldm.runs.report import CHECKPOINTS, caption_of, duration, report, short
from ldm.runs.report_curves import POINTS, curve, intervals, smoothed, thinned
from ldm.runs.report_words import MEANINGS

VOID = {"meta", "link", "img", "br", "input"}
PROMPTS = ["a large red circle & <b>more</b>", "a small blue ring"]


class Page(HTMLParser):
    """What stands in a page; refuses tags that are not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Opened."""
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        """Opened and closed."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Closed."""
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        """Text."""
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        """All that is read."""
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, Any]]:
        """The attributes of all tags of a kind."""
        return [found for name, found in self.tags if name == tag]


def sheet(path: Path, seed: int = 0, side: int = 40, noise: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (side, side, 3), np.uint8) if noise else np.full((side, side, 3), seed * 9 % 256, np.uint8)
    Image.fromarray(pixels).save(path)


def share(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.05, "high": mean + 0.04, "n": 100}


ADHERENCE = {
    "seen": {"bind": 0.912, "strict": 0.871},
    "held_out": {"bind": 0.783, "strict": 0.702},
    "intervals": {
        scale: {
            "seen": {"bind": share(0.912 - i / 10), "strict": share(0.871)},
            "held-out": {"bind": share(0.783 - i / 10), "strict": share(0.702)},
        }
        for i, scale in enumerate(("2.5", "4"))
    },
    "shapes": {"seen": {"iou": 0.937, "iou_worst": 0.872}, "held_out": {}, "ideal": {"iou": 0.993, "iou_worst": 0.984}},
    "checker": {"seen": 1.0, "held_out": 0.99},
    "protocol": {"tier": "one", "prompts": 100, "guidance": [2.5, 4.0], "steps": 20, "sampler": "ddim", "seed": 0, "size": 64},
}
STAGES: dict[str, dict[str, Any]] = {
    "autoencoder": {"kind": "train", "model": "autoencoder", "images": 6400, "resolution": 64},
    "diffusion": {"kind": "train", "model": "diffusion", "images": 6400, "resolution": 64},
    "evaluation": {"kind": "evaluate", "of": "diffusion", "require": {"adherence.seen.bind": 0.9, "adherence.held_out.bind": 0.9}},
}
RESULTS: dict[str, dict[str, Any]] = {
    "evaluation": {
        "adherence": ADHERENCE,
        "reconstruction": {"psnr": 31.25, "ssim": 0.97, "bind": 0.995, "protocol": {"images": 200, "resolution": 64}},
        "abilities": {"mean": 0.75, "object": 1.0, "partial": 0.5, "by_ability": {}, "protocol": {"tier": "one", "prompts": 24}},
        "frechet": {"distance": 12.34, "real_real_floor": 3.21, "protocol": {"images": 256}},
    }
}


def make_run(folder: Path, *, name: str = "a run", steps: int = 40) -> Path:
    """A finished run folder without its models."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": name, "data": {"kind": "scenes", "tier": "one"}, "stages": STAGES}))
    lines: list[dict[str, Any]] = [{"note": "ldm 0.1.0, torch 2, 1 x cpu", "time": 1.0}, {"note": "warning: <i>too</i> low", "time": 2.0}]
    for stage in ("autoencoder", "diffusion"):
        for k in range(1, steps + 1):
            lines.append(
                {
                    "stage": stage,
                    "step": k,
                    "images": 160 * k,
                    "loss": 5 / k,
                    "terms": {"reconstruction": 4 / k, "kl": 1 / k},
                    "gauges": {"grad_norm_model": 0.5 + k % 3},
                    "lr": 1e-3 * (1 - k / 50),
                    "images_per_s": 100.0 + k,
                    "seconds": 1.5 * k,
                    "peak_memory_mb": 500.0 + k,
                    "time": float(k),
                }
            )
        for k in (1600, 3200, 6400):
            sheet(folder / "stages" / stage / "samples" / f"{k:09d}.png", k // 1600)
    for path in ("adherence-seen-64", "adherence-held-out-64", "reconstruction-64"):
        sheet(folder / "stages" / "evaluation" / "samples" / f"{path}.png", len(path))
    (folder / "stages" / "evaluation" / "samples" / "prompts.json").write_text(json.dumps({"adherence-seen-64": PROMPTS}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for stage, settings in STAGES.items():
        done = {
            "stage": stage,
            "kind": settings["kind"],
            "key": "k" * 64,
            "inputs": {},
            "product": "p" * 64,
            "seconds": 75.0,
            "images": settings.get("images", 0),
            "result": RESULTS.get(stage, {}),
            "version": "0.1.0",
        }
        (folder / "stages" / stage / "done.json").write_text(json.dumps(done))
    (folder / "metrics.json").write_text(json.dumps({"version": "0.1.0", "evaluations": RESULTS, "training": {}}))
    (folder / "model").mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its page; read only."""
    folder = make_run(tmp_path_factory.mktemp("report") / "run")
    assert report(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def text(finished: Path) -> str:
    return (finished / "report.html").read_text()


def pictures(page: Page) -> list[Image.Image]:
    found = []
    for img in page.all("img"):
        head, data = img["src"].split(",", 1)
        assert re.fullmatch(r"data:image/(png|jpeg);base64", head)
        image = Image.open(BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        found.append(image)
    return found


def test_the_page_asks_nothing_of_any_network(text):
    page = Page(text)
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, name)
    assert not re.search(r"https?://|@import|url\((?!#)|file:", text)
    assert all("src" not in script for script in page.all("script"))


def test_the_page_reads_well_in_light_and_dark_and_on_a_phone(text):
    page = Page(text)
    assert {"name": "viewport", "content": "width=device-width,initial-scale=1"} in page.all("meta")
    assert "prefers-color-scheme:dark" in text and "color-scheme:light dark" in text and "max-width:100%" in text
    for link in page.all("a"):
        assert link["href"][1:] in {found["id"] for found in page.all("section")}


def test_pictures_are_whole_and_in_the_order_of_time(finished, text):
    page = Page(text)
    found = pictures(page)
    assert len(found) == 9 and all(image.size == (40, 40) for image in found)
    stored = finished / "stages" / "diffusion" / "samples"
    shown = [np.asarray(image.convert("RGB"))[0, 0, 0] for image in found[3:6]]
    assert shown == [np.asarray(Image.open(stored / f"{k:09d}.png"))[0, 0, 0] for k in (1600, 3200, 6400)]
    assert "after 6,400 images" in page.text and text.count('class="row slides"') == 2


def test_figures_stand_with_intervals_and_protocol(text):
    words = Page(text).text
    for part in ("0.912", "0.783", "0.86 – 0.95", "31.2", "12.3", "0.702", "tier one", "prompts 100", "steps 20", "sampler ddim"):
        assert part in words, part
    assert "adherence.seen.bind 0.912 reaches 0.9" in words and "adherence.held_out.bind 0.783 stays below 0.9" in words
    assert "0.990 held-out from perfect pictures" in words
    assert "seen pairs 0.937 0.872 perfect pictures 0.993 0.984" in words and "object" in words and "partial" in words


def test_the_headline_has_the_key_figures_with_their_intervals(text):
    tiles = re.search(r'<div class="tiles">.*?</header>', text, re.DOTALL)[0]
    for part in ("0.912", "0.86 – 0.95", "0.783", "0.73 – 0.82", "31.2", "12.3", "3.2", "3 min 45 s"):
        assert part in tiles, part


def test_timings_settings_and_commands_are_told(finished, text):
    words = Page(text).text
    for part in ("1 min 15 s", "6,400", "540 MB", "64 px", "It ran with ldm 0.1.0", "k" * 16, "kind: evaluate"):
        assert part in words, part
    assert f"python train.py …/{finished.name}/config.yaml" in words
    assert f"python -m ldm evaluate …/{finished.name} --on scenes --tier one" in words


@pytest.mark.usefixtures("undrawn")
def test_words_of_the_run_are_never_markup(tmp_path):
    folder = make_run(tmp_path / "run", name="<script>alert(1)</script>")
    text = report(folder).read_text()
    page = Page(text)
    assert len(page.all("script")) == 1 and "<i>" not in text and len(page.all("b")) > 3
    assert "<script>alert(1)</script>" in page.text and PROMPTS[0] in page.text


def test_every_drawing_is_well_formed_and_its_names_are_its_own(text):
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 2 * (1 + 2 + 1 + 1 + 1) + 2  # loss, two terms, rate, speed, a gauge; bind and strict over guidance
    for drawing in drawings:
        xml.fromstring(drawing)
        assert "currentColor" in drawing and 'width="100%"' in drawing and "viewBox" in drawing
    names = re.findall(r'\bid="([^"]*)"', text)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', text)) <= set(names)


def test_the_same_run_gives_the_same_page(finished, text):
    assert report(finished).read_text() == text
    assert not list(finished.glob(".*"))


@pytest.mark.usefixtures("undrawn")
def test_large_pictures_and_many_checkpoints_stay_small(tmp_path):
    folder = make_run(tmp_path / "run", steps=3)
    for k in range(30):
        sheet(folder / "stages" / "diffusion" / "samples" / f"{k * 100:09d}.png", k, side=500, noise=True)
    path = report(folder)
    page = Page(path.read_text())
    assert path.stat().st_size < 5e6 and len(pictures(page)) == CHECKPOINTS + 6
    assert "after 0 images" in page.text and "after 6,400 images" in page.text


def damage(relative: str, content: str | bytes | None) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        for path in folder.glob(relative):
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return do


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves cost a tenth of a second each: here they are only asked for."""
    monkeypatch.setattr("ldm.runs.report.curve", lambda x, y: "<svg></svg>" if len(x) > 1 else None)
    monkeypatch.setattr("ldm.runs.report_metrics.intervals", lambda lines: "<svg></svg>")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("content", [None, "", "{", b"\x00\xff\xfe", "[]", "null", "7", '{"stages": 3, "result": 3, "name": [1]}'])
@pytest.mark.parametrize(
    "where", ["config.yaml", "log.jsonl", "metrics.json", "stages/*/done.json", "stages/*/samples/*.png", "stages/*/samples/prompts.json"]
)
def test_missing_and_damaged_files_cost_only_what_they_held(tmp_path, where, content):
    folder = make_run(tmp_path / "run", steps=3)
    damage(where, content)(folder)
    page = Page(report(folder).read_text())
    pictures(page)
    if "done" not in where:
        assert "0.912" in page.text
    if "png" not in where:
        assert len(page.all("img")) == 9
    if "log" not in where:
        assert page.all("svg")


STRANGE = [None, True, 3, -1.5, float("nan"), float("inf"), "x", [], [1, "x"], {}, {"x": None}, {"mean": "x"}, 10**400]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("seed", range(6))
def test_values_of_any_kind_are_survived(tmp_path, seed):
    folder = make_run(tmp_path / "run", steps=3)
    rng = np.random.default_rng(seed)

    def spoil(value: Any) -> Any:
        if rng.random() < 0.08:
            return STRANGE[rng.integers(len(STRANGE))]
        if isinstance(value, dict):
            return {key: spoil(child) for key, child in value.items()}
        return [spoil(child) for child in value] if isinstance(value, list) else value

    originals = {path: path.read_text() for path in (*folder.glob("stages/*/done.json"), folder / "log.jsonl", folder / "config.yaml")}
    for _ in range(8):
        for path, whole in originals.items():
            if path.suffix == ".yaml":
                path.write_text(yaml.safe_dump(spoil(yaml.safe_load(whole))))
            elif path.suffix == ".jsonl":
                path.write_text("\n".join(json.dumps(spoil(json.loads(line))) for line in whole.splitlines()))
            else:
                path.write_text(json.dumps(spoil(json.loads(whole))))
        Page(report(folder).read_text())


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_still_going_has_a_page(tmp_path):
    folder = make_run(tmp_path / "run")
    for path in ("stages/diffusion/done.json", "stages/evaluation/done.json", "metrics.json"):
        (folder / path).unlink()
    whole = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text(whole[: len(whole) - 2100])  # torn in the middle of a line
    page = Page(report(folder).read_text())
    assert "unfinished : diffusion, evaluation to do" in page.text and re.search(r"[56],\d\d\d of 6,400", page.text)
    assert "images trained on" in page.text and len(page.all("img")) == 9


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    (tmp_path / "config.yaml").write_text("name: early\nstages: {text: {kind: train, model: text, images: 10}}\n")
    page = Page(report(tmp_path).read_text())
    assert "early" in page.text and "waiting" in page.text and not page.all("img")


def test_what_is_no_run_is_refused(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "gone"):
        with pytest.raises(UserError, match=r"no run here|no such folder; a run"):
            report(folder)
        assert ldm_main(["report", str(folder)]) == 2
        assert capsys.readouterr().err.startswith("ldm report: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("undrawn")
def test_the_verb_says_where_the_page_is(tmp_path, capsys):
    folder = make_run(tmp_path / "run", steps=2)
    assert ldm_main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")


def test_thinning_keeps_short_curves_and_the_mean_of_long_ones():
    x, y = thinned([3, 1, 2, 4], [30, 10, float("nan"), 40])
    assert x.tolist() == [1, 3, 4] and y.tolist() == [10, 30, 40]
    x, y = thinned(range(POINTS * 10), range(POINTS * 10))
    assert len(x) == POINTS and (x == y).all() and y.mean() == pytest.approx((POINTS * 10 - 1) / 2) and (np.diff(x) > 0).all()


def test_smoothing_is_a_running_mean():
    y = np.random.default_rng(0).random(100)
    found = smoothed(y, 0.06)
    assert found == pytest.approx([y[max(0, i - 3) : i + 4].mean() for i in range(100)])


def test_a_single_value_is_no_curve():
    assert curve([1], [2]) is None and curve([1, 2], [float("nan"), 1]) is None
    assert intervals({"a": {1.0: (0.5, 0.4, 0.6)}}) is None
    for y in ([1, 1], [0, 0], [1e-90, 1e90], [-1e90, 1e90]):
        xml.fromstring(curve([1, 2], y))


def test_words_for_durations_counts_and_pictures():
    assert [duration(s) for s in (0.26, 59, 60, 3725)] == ["0.3 s", "59 s", "1 min 00 s", "1 h 02 min"]
    assert [short(n) for n in (999, 12_345, 2_500_000, 3e9)] == ["999", "12.3k", "2.5 M", "3 G"]
    assert "seen in training, 64 px" in caption_of("adherence-seen-64") and "never seen in training" in caption_of("adherence-held-out")
    assert "32 px" in caption_of("reconstruction-32") and caption_of("other") == "other"
    assert caption_of("abilities-unseen_pair-64") == "ability: unseen pair, 64 px"


def test_a_page_says_what_its_figures_mean(tmp_path: Path) -> None:
    text = Page(report(make_run(tmp_path / "run", steps=4)).read_text(encoding="utf-8")).text
    for name in ("bind", "strict", "held_out", "psnr", "ssim", "distance", "real_real_floor", "iou", "loss", "images/s"):
        assert MEANINGS[name] in text, name


@pytest.mark.slow
def test_nothing_is_clipped_or_lies_over_another_at_a_desk_and_on_a_phone(tmp_path):
    with opened() as browser:
        page = browser.new_page()
        page.goto(report(make_run(tmp_path / "run", steps=4)).as_uri())
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        assert problems(page) == []
        assert not page.evaluate("[...document.querySelectorAll('.row')].some(one => one.scrollWidth > one.clientWidth)")
        said = page.inner_text("main")
        assert all(MEANINGS[name] in said for name in ("bind", "strict", "psnr", "ssim", "distance", "iou", "loss", "images/s"))
        (tmp_path / "data").mkdir()
        for number in range(4):
            Image.new("RGB", (90 + 40 * number, 100), (60 * number, 99, 140)).save(tmp_path / "data" / f"{number}.png")
            (tmp_path / "data" / f"{number}.txt").write_text("a picture with a rather long caption " * (1 + number))
        assert ldm_main(["data", "check", str(tmp_path / "data"), "--html", str(tmp_path / "page.html")]) == 0
        page.goto((tmp_path / "page.html").as_uri())
        assert problems(page) == []
