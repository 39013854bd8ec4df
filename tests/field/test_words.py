"""A text or path field takes its word of the command line as it stands; ~ is the home folder in every path field."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.cli.command import call
from ldm.cli.train import main as train
from ldm.config.errors import UserError
from ldm.config.introspection import hints_of, without_annotation, without_null
from ldm.config.schema import PathText, config, dump, load

# The text fields of a run that name no file, by class.
NAMES = {
    "Condition.view",
    "CVAE.autoencoder",
    "CVAE.text",
    "CustomDiffusion.init",
    "CustomDiffusion.token",
    "Grounding.sampler",
    "LatentDiffusion.after",
    "Pix2Pix.view",
    "Prior.text",
    "RankOne.token",
    "ScenesSource.called",
    "Completion.sampler",
    "Diversity.sampler",
    "TextGAN.after",
    "TextGAN.autoencoder",
    "TextGAN.text",
    "Tokens.after",
    "Tokens.autoencoder",
    "Tokens.small",
    "Tokens.text",
    "ToldViews.sampler",
    "Subsets.sampler",
    "Wobble.sampler",
    "Abilities.sampler",
    "Neighbours.sampler",
    "ClipScore.sampler",
    "DatasetsSource.prefix",
    "DatasetsSource.suffix",
    "FolderSource.prefix",
    "FolderSource.suffix",
    "Frechet.sampler",
    "ShardsSource.prefix",
    "ShardsSource.suffix",
    "Tags.separator",
    "Timm.model",
    "Adherence.sampler",
    "DatasetsSource.caption",
    "DatasetsSource.image",
    "DatasetsSource.part",
    "Defaults.sampler",
    "Encode.model",
    "Evaluate.of",
    "Export.of",
    "FolderSource.caption",
    "LatentDiffusion.autoencoder",
    "LatentDiffusion.text",
    "PerceptualClip.model",
    "Run.name",
    "TextualInversion.init",
    "TextualInversion.token",
    "Train.model",
    "PretrainedText.architecture",
}
ODD = [
    "/pics/set #2",
    "photo of sks dog #3, blue",
    "[V] dog",
    "sks: a dog",
    "kind: a dog",
    "a: b: c",
    "{red|blue} dog",
    "{a: b}",
    '"quoted" dog',
    '"all quoted"',
    "'tis",
    "*star",
    "&anchor",
    "!tag",
    "%d",
    "@home",
    "`tick`",
    "- dog",
    "? x",
    "|",
    ">",
    "true",
    "~",
    "Null",
    "007",
    "1_000",
    "3e-4",
    " two  blanks ",
    "a=b",
    "[1, 2]",
    "{0: x}",
    "a\nb",
    "#",
]


@config
class Text:
    """Text fields of every kind."""

    caption: str = "photo"
    column: str | None = None
    path: PathText = ""
    seed: int = 0


def said(folder: Path, *words: str, text: str = "caption: a photo") -> Text:
    file = folder / "run.yaml"
    file.write_text(text)
    return load(file, words, Text)


@pytest.mark.parametrize("word", ODD)
def test_a_text_takes_its_word_as_it_stands(tmp_path: Path, word: str) -> None:
    made = said(tmp_path, f"caption={word}", f"column={word}", f"path=/{word}")
    assert (made.caption, made.column, made.path) == (word, word, f"/{word}")
    assert type(made.caption) is str
    (tmp_path / "again.yaml").write_text(dump(made))
    assert load(tmp_path / "again.yaml", [], Text) == made
    assert said(tmp_path, "caption=[1, 2]", "caption=kind: x", f"caption={word}").caption == word  # the later one holds


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(blacklist_categories=["Cs"])))
def test_any_word_is_a_text(tmp_path_factory: pytest.TempPathFactory, word: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    assert said(folder, f"caption={word}").caption == ("photo" if word == "null" else word)


def test_null_gives_the_default_back(tmp_path: Path) -> None:
    assert said(tmp_path, "caption=null").caption == "photo"


def test_what_yaml_cannot_read_is_refused_where_no_text_belongs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.yaml: seed: got '\[V\] dog': expected '<document start>', but found '<scalar>'"):
        said(tmp_path, "seed=[V] dog")


# The home folder


def classes(kind: Any, seen: set[Any]) -> Iterator[Any]:
    """Every configuration class below a type."""
    kind = without_annotation(kind)
    if dataclasses.is_dataclass(kind) and kind not in seen:
        seen.add(kind)
        yield kind
    for inner in hints_of(kind).values() if dataclasses.is_dataclass(kind) else typing.get_args(kind):
        if without_annotation(inner) not in seen:
            yield from classes(inner, seen)


def test_every_text_field_of_a_run_is_known_as_a_path_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.runs.run import Run

    monkeypatch.setenv("HOME", str(tmp_path))
    kinds = {
        f"{kind.__name__}.{name}": hint
        for kind in classes(Run, set())
        for name, hint in hints_of(kind).items()
        if without_null(hint) is str
    }
    assert kinds.keys() >= NAMES
    for name, hint in kinds.items():
        read = pydantic.TypeAdapter(hint).validate_python
        assert read("~/x") == ("~/x" if name in NAMES else f"{tmp_path}/x"), f"{name}: is it a path (PathText), or a name (NAMES)?"


def test_base_config_and_options_know_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "above.yaml").write_text("seed: 3")
    assert said(tmp_path, text="base: ~/above.yaml").seed == 3
    with pytest.raises(UserError, match=str(tmp_path / "no.yaml")):
        train(["~/no.yaml"])
    with pytest.raises(UserError, match=str(tmp_path / "a=1" / "no.yaml")):
        train(["~/a=1/no.yaml", "seed=1"])
    found: list[Path] = []

    def verb(out: Path, more: list[Path]) -> int:
        found.extend([out, *more])
        return 0

    verb.__annotations__ = {"out": Path, "more": list[Path], "return": int}
    call(verb, ["~/a", "~/b", "~nobody-here/c"], "verb")
    assert found == [tmp_path / "a", tmp_path / "b", Path("~nobody-here/c")]


def test_a_run_reads_the_folder_that_its_word_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for name, count in (("set", 5), ("set #2", 9)):
        (tmp_path / name).mkdir()
        for i in range(count):
            Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / name / f"{i}.png")
    file = tmp_path / "run.yaml"
    file.write_text(
        "data: {kind: folder, path: x, caption: x, val_share: 0.3}\nmodels: {autoencoder: {kind: kl}}\n"
        "stages: {autoencoder: {kind: train, model: autoencoder, resolution: 32, images: 8, batch: 4}}"
    )
    from ldm.runs.run import Run

    run = load(file, [f"data.path={tmp_path}/set #2", "data.caption=photo of sks dog #3, blue"], Run)
    parts = [run.data.build(part) for part in ("train", "val")]
    assert sum(len(part) for part in parts) == 9
    assert run.data.caption == "photo of sks dog #3, blue"  # type: ignore[union-attr]


def test_fields_inside_what_may_be_null_are_told_and_taken(tmp_path: Path) -> None:
    from ldm.runs.run import Run

    words = ["models.diffusion.adapt={kind: lora, foo: 1}", "stages.text.buckets.foo=1", "prior_preservation.path=[V] dog #2", "init=x"]
    with pytest.raises(UserError) as raised:
        load(Path(__file__).parents[2] / "configs" / "quickstart.yaml", words, Run)
    said = str(raised.value)
    assert "adapt.foo: unknown field; known are kind, method, rank, alpha, targets" in said
    assert "stages.text.buckets.foo: unknown field; known are step, max_aspect" in said
    assert "prior_preservation" not in said and "known are \n" not in said
