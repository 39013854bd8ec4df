"""Pretrained parts that others read: what their files have not is refused before any work, and a real CLIP offers both of its sides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import CAPTIONS, KL, SIDE, TEXT, VQ, Pictures
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.families.family import Context, Product
from ldm.families.perceptual_loss import PerceptualClip
from ldm.families.pretrained import PretrainedText
from ldm.families.prior import Prior, PriorFamily
from ldm.models.prior_transformer import PriorTransformerConfig
from ldm.models.vision_tower import VisionTower
from ldm.runs.pretrained import find
from ldm.runs.run import Run
from ldm.text.encoder import train_tokenizer
from ldm.text.own_clip import OwnClip
from ldm.text.pretrained import load_clip

STAGE = {"kind": "train", "resolution": 32, "images": 8}
READERS: dict[str, dict[str, Any]] = {  # of an image tower
    "prior": {"kind": "prior", "network": {"heads": 2, "head_width": 8, "layers": 1}},
    "captioner": {"kind": "tokens", "reads": "image", "writes": "caption", "order": "causal"},
    "autoencoder": {"kind": "kl", "perceptual": {"kind": "clip"}},
    "diffusion": {"kind": "latent_diffusion", "conditions": [{"view": "embedding", "port": "vector"}]},
}


def run_of(reader: str, path: Path | str, model: dict[str, Any] | None = None) -> Run:
    models = {"text": {"kind": "pretrained_text", "path": str(path)}, reader: model or READERS[reader]}
    stages: dict[str, Any] = {reader: {**STAGE, "model": reader}}
    if reader == "diffusion":
        models["autoencoder"], stages = {"kind": "kl"}, {"autoencoder": {**STAGE, "model": "autoencoder"}, **stages}
    return build({"data": {"kind": "scenes", "tier": "one"}, "models": models, "stages": stages}, Run, "run.yaml")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of both sides as others publish it, in float16, with the published mean and deviation of pixels."""
    folder = tmp_path_factory.mktemp("published")
    tokenizer = train_tokenizer(CAPTIONS, 560, TEXT.max_tokens)
    tokenizer.save_pretrained(folder)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 16, **ends}
    vision = {**small, "hidden_size": 40, "image_size": 30, "patch_size": 10}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)).half().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("reader", READERS)
def test_a_text_encoder_alone_is_refused_by_whoever_reads_an_image_tower(reader: str, tmp_path: Path, clip: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    with pytest.raises(UserError) as told:
        run_of(reader, tmp_path)
    said = f"models.{reader}.text: got text, a model of kind pretrained_text ({tmp_path}), which has no image tower; use kind clip"
    assert str(told.value).startswith(said) or said in str(told.value)
    assert run_of(reader, clip) and run_of(reader, "owner/unknown")  # what lies on the hub is not known yet


def test_an_open_clip_offers_both_towers(tmp_path: Path) -> None:
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP

    vision: dict[str, Any] = {"image_size": 12, "layers": 2, "width": 24, "patch_size": 4, "head_width": 8, "mlp_ratio": 2.0}
    text: dict[str, Any] = {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    said = {"model_cfg": {"embed_dim": 10, "vision_cfg": vision, "text_cfg": text}, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    image, words = torch.rand(2, 3, 12, 12) * 2 - 1, ["a red circle", "a blue ring"]
    for kind in CLIP, CustomTextCLIP:
        folder = tmp_path / kind.__name__
        folder.mkdir()
        theirs = kind(embed_dim=10, vision_cfg=CLIPVisionCfg(**vision), text_cfg=CLIPTextCfg(**text)).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():  # fresh norms and biases would hide a wrong name
                parameter += 0.1 * torch.randn_like(parameter)
        save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps(said))
        given = PretrainedText(path=str(folder))
        assert given.has_tower and given.text_shape(print).embedding == 10 and given.image_tower(12, print).places(12) == 9
        own = load_clip(folder)
        if kind is CLIP:
            given.adopt(given.found_for(given.find(given.path, print), {"has_tower": "x"}), folder / "adopted")
            own = OwnClip.load(folder / "adopted" / "clip")
        ids, mask = own.text.tokens(words)
        with torch.no_grad():
            seen, read = theirs.encode_image(image, normalize=True), theirs.encode_text(ids.where(mask, 0), normalize=True)
        torch.testing.assert_close(own.embed_images(image), seen, rtol=0, atol=1e-5)
        torch.testing.assert_close(own.embed_captions(words), read, rtol=0, atol=1e-5)
        assert float(own.logit_scale) == pytest.approx(float(theirs.logit_scale.detach()), abs=1e-6)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**said["model_cfg"], "vision_cfg": {"timm_model_name": "x"}}}))
    with pytest.raises(UserError, match=r"vision_cfg\.timm_model_name is not supported; only CLIP's own vision transformers are"):
        given.found_for(given.find(given.path, print), {"has_tower": "x"})
    assert given.text_shape(print).embedding == 0 and given.found_for(given.find(given.path, print), {}).tower is None  # words alone
    assert not PretrainedText(path=str(folder / "open_clip_model.safetensors"), architecture="ViT-B-32").has_tower


def test_who_reads_words_alone_may_have_it(tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    assert run_of("autoencoder", tmp_path, {"kind": "kl"})


def test_a_plan_refuses_it_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text_encoder").mkdir()
    text = {"kind": "pretrained_text", "path": str(tmp_path)}
    values = {"data": {"kind": "scenes", "tier": "one"}, "models": {"text": text, "prior": READERS["prior"]}}
    (tmp_path / "run.yaml").write_text(json.dumps({**values, "stages": {"prior": {**STAGE, "model": "prior"}}}))
    assert main(["train", str(tmp_path / "run.yaml"), "--plan"]) == 2
    assert f"models.prior.text: got text, a model of kind pretrained_text ({tmp_path})" in capsys.readouterr().err


def test_what_is_known_only_when_it_is_found_is_refused_then(monkeypatch: pytest.MonkeyPatch, clip: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("ldm.text.pretrained.hub_folder", lambda name, patterns: clip)
    assert find(run_of("prior", "owner/clip"))["text"].tower == clip
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    monkeypatch.setattr("ldm.text.pretrained.hub_folder", lambda name, patterns: alone)
    with pytest.raises(UserError, match=r"models.prior.text: owner/clip has no image tower; use kind clip, or a CLIP of both towers"):
        find(run_of("prior", "owner/clip"))


@pytest.mark.parametrize(("network", "fits"), [(KL, False), (VQ, True)])
def test_codes_are_asked_of_a_vq_alone(tmp_path: Path, network: Any, fits: bool) -> None:
    (tmp_path / "config.json").write_text(json.dumps(network.to_diffusers()))
    values = {
        "data": {"kind": "scenes", "tier": "one"},
        "models": {
            "autoencoder": {"kind": "pretrained_autoencoder", "path": str(tmp_path)},
            "text": {"kind": "clip"},
            "tokens": {"kind": "tokens"},
        },
        "stages": {"text": {**STAGE, "model": "text"}, "tokens": {**STAGE, "model": "tokens"}},
    }
    if fits:
        assert build(values, Run, "run.yaml")
        return
    with pytest.raises(UserError, match=r"models.tokens.autoencoder: got autoencoder, .* which has no codebook; use kind vq"):
        build(values, Run, "run.yaml")


def test_a_published_clip_offers_both_sides(clip: Path, tmp_path: Path) -> None:
    given = PretrainedText(path=str(clip), max_tokens=16)
    plain, asked = given.find(given.path, print), {"has_tower": "models.prior.text"}
    seen = given.found_for(plain, asked)
    assert seen.tower == clip and seen.hash != plain.hash and given.found_for(plain, {}) == plain
    given.adopt(plain, tmp_path / "words")
    assert not (tmp_path / "words" / "clip").exists()  # what nobody reads is not copied
    given.adopt(seen, tmp_path / "both")

    own, theirs = OwnClip.load(tmp_path / "both" / "clip"), CLIPModel.from_pretrained(clip, dtype=torch.float32).eval()
    assert isinstance(own.tower, VisionTower) and not own.tower.keeps_length and own.resolution == 30
    image = torch.randint(0, 256, (3, 30, 30, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "both" / "clip")(images=list(image.numpy()), return_tensors="pt").pixel_values
    ids = own.text.tokens(CAPTIONS[:3])[0]
    with torch.no_grad():
        found = theirs(input_ids=ids, pixel_values=pixels)
    ours = own.embed_images(image.permute(0, 3, 1, 2) / 127.5 - 1)
    torch.testing.assert_close(ours, found.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(own.embed_captions(CAPTIONS[:3]), found.text_embeds, rtol=0, atol=1e-5)

    context = Context(
        data=Pictures(), val=Pictures(), resolution=SIDE, seed=0, total_images=1, products={"text": Product(tmp_path / "both", "")}
    )
    prior = Prior(network=PriorTransformerConfig(head_width=8, heads=2, layers=1)).build(context)
    assert isinstance(prior, PriorFamily) and prior.shape.embedding == 20 == given.text_shape(print).embedding
    distance: Any = PerceptualClip().build(context)
    assert [tuple(one.shape[1:]) for one in distance.distance.tower.features(torch.zeros(1, 3, 20, 20))] == [(40, 3, 3)] * 2
