"""Mistakes are told before torch is loaded: those of a configuration in the words that torch's own classes would give."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ldm.cli.command import given_of
from ldm.cli.given import by_run, look
from ldm.cli.train import validated
from ldm.config import stand_ins
from ldm.config.errors import UserError
from ldm.config.options import Given
from ldm.config.own_words import in_own_words
from ldm.config.schema import read
from ldm.data.file_names import bare
from ldm.formats.model_place import factor_of, no_model

ROOT = Path(__file__).parents[2]
QUICKSTART = "configs/quickstart.yaml"
MISTAKES = [
    "batch=4",
    "stages.diffusion-low.btch=4",
    "stages.diffusion-low.batch=0",
    "seed=many",
    "models.autoencoder.kind=vqq",
    "models.diffusion.adapt={kind: lora, rnk: 4}",
    "data={kind: folder}",
    "data.path=pictures",
    "data.pairs=[cyan elephant]",
    "stages.diffusion-low.resolution=33",
    "stages.diffusion-high.latents=latents-hgh",
    "stages.more={kind: train, model: difusion, images: 64, resolution: 32}",
    "stages.more={kind: train, model: diffusion, images: 64, resolution: 32, latents: none}",
    "stages.evaluation.require={shapes.bnd: 0.5}",
    "models.diffusion.unet=sd9",
    "out=https://me:secret@example.org/runs",
]
ASKED = """
import contextlib, io, json, sys
from ldm.__main__ import main
answers = []
for word in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(word.split("|"))
    answers.append((code, said.getvalue(), "torch" in sys.modules))
print(json.dumps(answers))
"""


def asked(*words: str) -> list[tuple[int, str, bool]]:
    """Exit code, what was said, and whether torch was loaded, of calls in one fresh process."""
    done = subprocess.run([sys.executable, "-c", ASKED], input=json.dumps(words), capture_output=True, text=True, check=True)
    return [tuple(one) for one in json.loads(done.stdout)]


@pytest.mark.slow
def test_mistakes_are_told_without_torch_and_in_the_same_words() -> None:
    for word, (code, said, loaded) in zip(MISTAKES, asked(*(f"train|{QUICKSTART}|{word}" for word in MISTAKES)), strict=True):
        with pytest.raises(UserError) as real:
            validated(read(ROOT / QUICKSTART, [word]), Path(QUICKSTART))
        assert (code, said) == (2, f"ldm train: {real.value}\n".replace("secret@", "")), word
        assert not loaded, word


@pytest.mark.slow
def test_help_and_parts_that_are_not_there_need_no_torch() -> None:
    (code, said, loaded), whole = asked(f"train|{QUICKSTART}|--help|stages.difusion-low", f"train|{QUICKSTART}|--help")
    assert code == 2 and "did you mean stages.diffusion-low" in said and not loaded
    assert whole == (0, "", False)


@pytest.mark.slow
def test_data_that_is_not_there_needs_no_torch() -> None:
    parts = "data={kind: several, parts: [{source: {kind: folder, path: docs}}, {source: {kind: folder, path: nowhere}}]}"
    for code, said, loaded in asked("train|configs/folder.yaml|data.path=nowhere", f"train|configs/folder.yaml|{parts}"):
        assert (code, loaded) == (2, False)
        assert said == "ldm train: data.path: nowhere is not a folder; give the folder that holds your images\n"


NOWHERE = "nowhere: no such folder or file; give a model or run folder, a weights file, or a hub name such as owner/name"
NO_MODEL = "docs: no model in this folder (neither model_index.json nor ldm.json); give the folder of a model or of a run"
NO_DATA = "nowhere does not exist; give a folder of images, of tar shards or of parquet files"
NO_IMAGES = "no images here; put PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF files into it or correct data.path"
NO_CAPTIONS = (
    "2 images but no captions (data.captions=auto); write x.txt beside each x.jpg, or a metadata.jsonl with file_name and text, or set"
    " data.captions=filename, or kohya for folders such as '10_sks dog'"
)
LOST = {  # words of a verb: what it says
    "sample|a|--model|nowhere": NOWHERE,
    "sample|a|--model|docs": NO_MODEL,
    "sample|a|--model|MODEL|--lora|nowhere:0.5": "nowhere: no such file; give a LoRA's .safetensors file or its folder",
    "sample|a|--model|MODEL|--n|2|--best|2|--judge|nowhere": "judge: nowhere: no CLIP here; a folder that transformers' CLIPModel opens"
    " is needed, or own or scenes",
    "sample|a|--model|MODEL|--size|65x66": "size: got 65x66; both must be multiples of 4",
    "grid|a|--model|MODEL|--x|guidance=1,2|--size|66": "size: got 66x66; both must be multiples of 4",
    "animate|a|--to|b|--model|MODEL|--size|64x66": "size: got 64x66; both must be multiples of 4",
    "sample|a|--model|MODEL|--device|bla": "device: got 'bla'; give cuda, or one of several such as cuda:1, or mps or cpu",
    "sample|a|--model|MODEL|--init|nowhere": "init: nowhere: No such file or directory",
    "sample|a|--model|MODEL|--init|configs": "init: configs: a folder; give one picture",
    "sample|a|--model|MODEL|--init|configs/quickstart.yaml": "init: configs/quickstart.yaml: not an image: none of PNG, JPEG, WEBP, GIF,"
    " BMP, TIFF, AVIF",
    "sample|a|--model|MODEL|--vae|nowhere": "vae: nowhere: No such file or directory",
    "sample|a|--model|MODEL|--out|ring.png": "out: ring.png is named as a file, and pictures go into a folder under numbers; give"
    " --out ring, or --grid ring.png: one file with all of them, or with the only one",
    "sample|a|--model|MODEL|--grid|ring.jpg": "grid: ring.jpg: a PNG is written; give a name that ends in .png",
    "grid|a|--model|MODEL|--x|guidance=1,2|--out|ring.webp": "out: ring.webp: a PNG is written; give a name that ends in .png",
    "grid|a|--model|nowhere|--x|guidance=1,2": NOWHERE,
    "animate|a|--model|MODEL|--clip|nowhere": "clip: nowhere: No such file or directory",
    "demo|nowhere": NOWHERE,
    "evaluate|MODEL|nowhere": NOWHERE,
    "evaluate|docs": NO_MODEL,
    "evaluate|MODEL|--on|nowhere": NO_DATA,
    "evaluate|MODEL|--tier|T9": "tier: got 'T9'; there are one, T0, T1, T2, T3",
    "evaluate|MODEL|--features|nowhere": "features: nowhere has no config.json; a folder is needed as save_pretrained writes it",
    "classifier|nowhere|--model|MODEL|--words|a,b|--out|f": "nowhere: no latent cache here (cache.json is missing)",
    "export|docs|--to|diffusers|--out|made": NO_MODEL,
    "export|configs/quickstart.yaml|--to|diffusers|--out|made": "configs/quickstart.yaml: a configuration, and no model; train it, and"
    " give its run folder, such as runs/quickstart",
    "caption|configs|--model|MODEL": "configs: no pictures here; .jpg, .jpeg, .jpe, .jfif, .png, .apng, .webp, .avif, .bmp, .gif, .tif,"
    " .tiff are read",
    "caption|train.py|--model|MODEL": "train.py: no picture; .jpg, .jpeg, .jpe, .jfif, .png, .apng, .webp, .avif, .bmp, .gif, .tif, .tiff"
    " are read",
    "data|check|configs": f"configs: {NO_IMAGES}",
    "data|check|train.py": "train.py is one file; give a folder of images, tar shards, or parquet with image bytes",
    "data|check|MODEL/bare": in_own_words(f"MODEL/bare: {NO_CAPTIONS}", "data check"),
    "data|hash|MODEL/bare|--out|made": in_own_words(f"MODEL/bare: {NO_CAPTIONS}", "data hash"),
    "train|configs/folder.yaml|data.path=configs": f"configs: {NO_IMAGES}",
    "train|configs/folder.yaml|data.path=MODEL/bare": f"MODEL/bare: {NO_CAPTIONS}",
    "data|check|nowhere": NO_DATA,
    "data|index|nowhere": NO_DATA,
    "data|hash|nowhere|--out|made": NO_DATA,
    "data|encode|nowhere|--model|MODEL|--out|made": NO_DATA,
    "data|encode|docs|--model|nowhere|--out|made": NOWHERE,
}


@pytest.mark.slow
def test_what_is_not_there_is_told_by_every_verb_without_torch(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for part in ("unet", "vae", "bare"):
        (tmp_path / part).mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL", "block_out_channels": [8, 16, 16]}')
    for name in ("a.png", "b.jpg"):
        (tmp_path / "bare" / name).touch()
    answers = asked(*(words.replace("MODEL", str(tmp_path)) for words in LOST))
    for (words, told), (code, said, loaded) in zip(LOST.items(), answers, strict=True):
        assert (code, said, loaded) == (2, f"ldm {words.split('|')[0]}: {told}\n".replace("MODEL", str(tmp_path)), False), words


def test_a_run_that_is_not_finished_and_one_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "begun" / "stages").mkdir(parents=True)
    (tmp_path / "runs" / "done" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "done" / "model" / "ldm.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "not finished" in no_model("runs/begun") and "no such folder" in no_model("runs/don")
    assert no_model("runs/done") == no_model("owner/name") == no_model(by_run("done")) == ""
    assert by_run("done") == str(Path("runs/done")) and by_run("") == ""


def test_every_model_cache_and_adapter_that_a_verb_is_told_is_looked_for() -> None:
    from ldm.cli import animate, caption, classifier, data, encode, evaluate, export, grid, sample
    from ldm.demo import server

    drawn = {"model": Given.MODEL, "lora": Given.LORA, "embedding": Given.EMBEDDING, "vae": Given.FILE, "device": Given.DEVICE}
    edited = dict.fromkeys(("init", "mask", "invert"), Given.PICTURE)
    assert given_of(sample.sample) == drawn | edited | {"judge": Given.CLIP}
    assert given_of(grid.grid) == drawn | edited
    assert given_of(animate.animate) == drawn | {"clip": Given.FILE}
    assert given_of(server.demo) == drawn
    assert given_of(evaluate.evaluate) == {"model": Given.MODEL, "clip": Given.CLIP, "device": Given.DEVICE}
    assert given_of(classifier.classifier) == {"cache": Given.CACHE, "model": Given.MODEL, "device": Given.DEVICE}
    assert given_of(export.export) == {"model": Given.MODEL}
    assert given_of(caption.caption) == {"paths": Given.PICTURES, "device": Given.DEVICE}
    assert given_of(encode.encode) == {"data": Given.DATA, "model": Given.MODEL, "device": Given.DEVICE}
    assert [given_of(one) for one in (data.check, data.index, data.hash_pictures)] == [{"path": Given.DATA}] * 3


def test_tiers_are_those_of_the_scenes() -> None:
    from ldm.cli.evaluate import TIERS
    from ldm.data.scenes import spec

    assert tuple(spec.TIERS) == TIERS


def test_a_clip_is_looked_for_where_its_option_finds_one(own_clip_model: Path, tmp_path: Path) -> None:
    look(Given.CLIP, "clip", str(own_clip_model))
    for option, name, said in (
        ("judge", str(own_clip_model), "or own or scenes"),
        ("clip", str(tmp_path), "or own$"),
        ("clip", "scenes", "or own$"),
    ):
        with pytest.raises(UserError, match=f"^{option}: .*no CLIP here; .*{said}"):
            look(Given.CLIP, option, name)


def test_a_folder_with_pictures_and_anything_beside_them_is_left_to_who_reads_it(tmp_path: Path) -> None:
    assert bare(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "A.JPG").touch()
    assert bare(tmp_path)
    (tmp_path / "words.csv").touch()
    assert not bare(tmp_path)


def test_a_factor_is_told_by_autoencoders_beside_a_unet_alone(tmp_path: Path) -> None:
    (tmp_path / "model" / "vae").mkdir(parents=True)
    said = tmp_path / "model" / "vae" / "config.json"
    said.write_text('{"_class_name": "VQModel", "block_out_channels": [8, 16, 16, 16]}')
    assert factor_of(str(tmp_path)) == 1  # a transformer, whose patches count too
    (tmp_path / "model" / "unet").mkdir()
    assert factor_of(str(tmp_path)) == factor_of(str(tmp_path / "model")) == 8
    for other in ('{"_class_name": "AutoencoderDC", "block_out_channels": [8, 16]}', '{"_class_name": "VQModel"}', "[]", "{"):
        said.write_text(other)
        assert factor_of(str(tmp_path)) == 1


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="a class's methods are compiled at once there")
def test_postponed_methods_are_those_of_a_dataclass(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Any:
        @dataclasses.dataclass(frozen=True, slots=True, kw_only=True, order=True)
        class Pair:
            first: int = 1
            second: list[int] = dataclasses.field(default_factory=lambda: [2], hash=False)

        return Pair

    usual = made()
    monkeypatch.setattr(dataclasses, "_create_fn", dataclasses._create_fn)  # type: ignore[attr-defined]
    stand_ins._postpone_methods()
    postponed = made()
    for one in (usual, postponed):
        assert one() == one(first=1) and one() != one(second=[]) and one() < one(first=2) and hash(one()) == hash(one(second=[]))
        with pytest.raises(dataclasses.FrozenInstanceError):
            one().first = 3
    assert repr(usual()) == repr(postponed()) and dataclasses.asdict(usual()) == dataclasses.asdict(postponed())


def test_what_only_the_packages_themselves_can_do_is_done_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> str:
        import colorsys

        return str(colorsys.rgb_to_hsv(1, 0, 0))

    def mistaken() -> str:
        raise UserError("a mistake")

    monkeypatch.delitem(sys.modules, "torch", raising=False)  # as in a fresh process
    monkeypatch.setattr(stand_ins, "HEAVY", ("colorsys",))
    assert stand_ins.told(lambda: "import colorsys") == "import colorsys"
    with pytest.raises(UserError, match="a mistake"):
        stand_ins.told(mistaken)
    assert stand_ins.told(work) == "(0.0, 1.0, 1)" == work()


@pytest.mark.parametrize("use", ["module.zeros(3)", "bool(module.cuda)", "list(module.shapes)", "module.pi + 1"])
def test_a_stand_in_works_for_nobody_but_an_import(use: str) -> None:
    module = stand_ins._Finder().create_module(stand_ins.importlib.machinery.ModuleSpec("torch", None))
    with pytest.raises(stand_ins.Needed):
        eval(use, {"module": module})
