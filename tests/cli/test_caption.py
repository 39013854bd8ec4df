"""`ldm caption`: text files beside pictures, by a run's captioner or one of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.__main__ import main


class Writer:
    """Says how red a picture is, and which seed it got."""

    defaults: ClassVar = {"size": (16, 16)}
    settings: ClassVar[list[Any]] = []
    asked: ClassVar[list[tuple[int, ...]]] = []

    def captions(self, image: torch.Tensor | None, seeds: Sequence[int], settings: Any) -> list[str]:
        self.asked.append(tuple(seeds))
        self.settings.append(settings)
        assert image is None or image.shape[1:] == (3, 16, 16)
        shades = [0.0] * len(seeds) if image is None else image[:, 0].mean((1, 2)).tolist()
        return ["" if shade == -1 else f"red {shade:.1f}, seed {seed}" for shade, seed in zip(shades, seeds, strict=True)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five pictures, one of them captioned, with a mask of one and a file that is none; and a model."""
    Writer.asked = []
    monkeypatch.setattr("ldm.families.registry.open_finished", lambda folder, device: Writer())
    pictures = tmp_path / "pictures"
    (pictures / "deep").mkdir(parents=True)
    for name, red in {"a.png": 255, "b.jpg": 179, "deep/c.webp": 255, "d.png": 255, "a_mask.png": 0}.items():
        Image.new("RGB", (40, 24), (red, 0, 0)).save(pictures / name)
    (pictures / "D.TXT").write_text("mine")
    (pictures / "e.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    (tmp_path / "model").mkdir()
    return tmp_path


def run(place: Path, *words: str) -> int:
    return main(["caption", str(place / "pictures"), "--model", str(place / "model"), "--device", "cpu", *words])


def texts(place: Path) -> dict[str, str]:
    root = place / "pictures"
    return {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*.[tT]*") if path.is_file()}


def test_text_files_are_written_once_and_anew_only_where_that_is_asked(place, capsys):
    assert run(place, "--batch", "2") == 1
    written = {"a.txt": "red 1.0, seed 0\n", "b.txt": "red 0.4, seed 1\n", "deep/c.txt": "red 1.0, seed 3\n", "D.TXT": "mine"}
    said = capsys.readouterr().err
    assert texts(place) == written and "e.png: left out, not an image" in said and "3 captions written, 1 stood already" in said
    (place / "pictures" / "b.txt").unlink()
    (place / "pictures" / "e.png").unlink()
    assert run(place, "--seed", "10", "--prefix", "sks,", "--suffix", ", photo") == 0
    assert texts(place) == {**written, "b.txt": "sks, red 0.4, seed 11, photo\n"}  # its own seed, whatever stands beside it
    assert run(place, "--overwrite", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "D.TXT" not in out and f"{place / 'pictures' / 'd.png'}\tred 1.0, seed 2\n" in out and texts(place)["D.TXT"] == "mine"
    assert run(place, "--overwrite") == 0
    assert texts(place)["D.TXT"] == "red 1.0, seed 2\n" and len(texts(place)) == 4


def test_a_stopped_call_leaves_whole_files_and_goes_on(place, monkeypatch):
    real = Writer.captions

    def stopped(self: Writer, image: Any, seeds: Sequence[int], settings: Any) -> list[str]:
        if len(Writer.asked) == 2:
            raise KeyboardInterrupt
        return real(self, image, seeds, settings)

    monkeypatch.setattr(Writer, "captions", stopped)
    assert run(place, "--batch", "1") == 130
    assert len(texts(place)) == 3 and not list((place / "pictures").glob(".*"))
    monkeypatch.setattr(Writer, "captions", real)
    assert run(place) == 1 and len(texts(place)) == 4 and Writer.asked[-1] == (3,)


def test_pictures_that_share_a_text_file_or_get_no_words_are_told(place, capsys):
    folder = place / "other"
    folder.mkdir()
    for name in ("x.png", "x.jpg"):
        Image.new("RGB", (16, 16), (255, 0, 0)).save(folder / name)
    Image.new("RGB", (16, 16)).save(folder / "y.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "y.png", "text": "no"}) + "\n")
    assert main(["caption", str(folder), str(folder / "y.png"), "--model", str(place / "model"), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert "x.png: left out, x.txt belongs to" in said and "y.png: left out, the model wrote no words" in said
    assert "training reads metadata.jsonl before text files; set data.captions=txt" in said
    assert sorted(path.name for path in folder.glob("*.txt")) == ["x.txt"]


def test_captions_of_nothing_are_printed(place, capsys):
    words = ["--count", "2", "--seed", "5", "--temperature", "0.5", "--top-k", "3", "--top-p", "0.25", "--device", "cpu"]
    assert main(["caption", "--model", str(place / "model"), *words]) == 0
    assert capsys.readouterr().out == "red 0.0, seed 5\nred 0.0, seed 6\n"
    told = Writer.settings[-1]
    assert (told.temperature, told.top_k, told.top_p) == (0.5, 3, 0.25)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--model M", "pictures: none; name a folder or files, or give --count"),
        ("P --model M --count 2", "count: is of a model of captions alone"),
        ("P --model nowhere", "model: nowhere: no such folder"),
        ("nowhere --model M", "nowhere: no such file or folder"),
        ("P/D.TXT --model M", "D.TXT: no picture"),
        ("M --model M", "no pictures here"),
        ("P --model M --temperature -1", "temperature"),
    ],
)
def test_mistakes_get_one_line(place, words, said, capsys):
    paths = {"P": str(place / "pictures"), "M": str(place / "model")}
    told = [paths.get(word, word.replace("P/", f"{paths['P']}/")) for word in words.split()]
    assert main(["caption", *told]) == 2
    assert said in capsys.readouterr().err


def blip(folder: Path) -> Any:
    """A BLIP with random weights, and its processor."""
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"abcdefgh"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    common = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**common, "vocab_size": len(words), "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text |= {"encoder_hidden_size": 16, "max_position_embeddings": 80}
    config = BlipConfig(text_config=text, vision_config={**common, "image_size": 16, "patch_size": 8})
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config).eval()
    torch.nn.init.normal_(model.text_decoder.cls.predictions.decoder.weight, std=1.0)
    processor = BlipProcessor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


COMMON: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def git(folder: Path) -> tuple[Any, Any, Any]:
    """A GIT with random weights that sees pictures, its picture processor and its tokenizer."""
    from transformers import BertTokenizer, CLIPImageProcessor, GitConfig, GitForCausalLM, GitProcessor

    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    processor = GitProcessor(
        CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}), BertTokenizer(str(folder / "vocab.txt"))
    )
    own = {"vocab_size": 13, "max_position_embeddings": 80, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    model = GitForCausalLM(GitConfig(vision_config={**COMMON, "image_size": 16, "patch_size": 8}, **own, **COMMON)).eval()
    torch.nn.init.normal_(model.output.weight, std=1.0)
    torch.nn.init.normal_(model.git.visual_projection.visual_projection[0].weight, std=1.0)
    processor.save_pretrained(folder)
    return model, processor.image_processor, processor.tokenizer


def vit_gpt2(folder: Path) -> tuple[Any, Any, Any]:
    """A ViT and a GPT-2 that attends to it, with random weights, its picture processor and its tokenizer."""
    from transformers import GPT2Config, GPT2Tokenizer, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig, ViTImageProcessor

    folder.mkdir()
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate("abcdefgh\u0120")}}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = GPT2Tokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    decoder = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(vocabulary), n_positions=80, bos_token_id=0, eos_token_id=0)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**COMMON, image_size=16, patch_size=8), decoder)
    torch.manual_seed(0)
    model = VisionEncoderDecoderModel(config).eval()
    for name, weight in model.named_parameters():
        if "crossattention" in name or name.endswith("wte.weight"):
            torch.nn.init.normal_(weight, std=1.0)
    written = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0, "max_length": 9, "suppress_tokens": [0, 9]}
    for name, value in written.items():
        setattr(model.generation_config, name, value)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, processor, tokenizer


@pytest.mark.parametrize("make", [git, vit_gpt2])
def test_git_and_vit_gpt2_write_what_they_write_in_transformers(place, capsys, make):
    model, processor, tokenizer = make(place / "theirs")
    model.save_pretrained(place / "theirs")
    (place / "pictures" / "e.png").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place / "pictures" / "a.png")
    words = ["caption", str(place / "pictures"), "--model", str(place / "theirs"), "--device", "cpu"]
    assert main([*words, "--batch", "3", "--overwrite"]) == 0
    for name in ("a.png", "d.png"):
        pixels = processor(images=Image.open(place / "pictures" / name), return_tensors="pt").pixel_values
        limit = {} if model.generation_config.max_length else {"max_new_tokens": 64}
        with torch.no_grad():
            ids = model.generate(pixel_values=pixels, do_sample=False, **limit)
        wanted = " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())
        text = "a.txt" if name == "a.png" else "D.TXT"
        assert wanted and texts(place)[text] == f"{wanted}\n"
    if make is vit_gpt2:
        assert len(wanted) == 8  # as generation_config.json says: 9 with the start
        assert texts(place)["a.txt"] != texts(place)["D.TXT"]
    capsys.readouterr()
    assert main([*words, "--overwrite", "--seed", "1"]) == 2
    assert "seed: " in capsys.readouterr().err


def test_a_captioner_of_transformers_writes_what_it_writes_there(place, capsys):
    model, processor = blip(place / "blip")
    (place / "pictures" / "e.png").unlink()
    noise = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place / "pictures" / "a.png")
    assert main(["caption", str(place / "pictures"), "--model", str(place / "blip"), "--device", "cpu", "--batch", "3"]) == 0
    with torch.no_grad():
        ids = model.generate(pixel_values=processor(images=Image.fromarray(noise), return_tensors="pt").pixel_values, max_new_tokens=64)
    wanted = " ".join(processor.decode(ids[0], skip_special_tokens=True).split())
    assert wanted and texts(place)["a.txt"] == f"{wanted}\n"
    assert main(["caption", str(place / "pictures"), "--model", str(place / "blip"), "--temperature", "1"]) == 2
    assert "temperature: " in capsys.readouterr().err
    (place / "blip" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    assert main(["caption", str(place / "pictures"), "--model", str(place / "blip"), "--overwrite"]) == 2
    assert "a model of type 'bert'; captioners are blip, git, vision-encoder-decoder" in capsys.readouterr().err
