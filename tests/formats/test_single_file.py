"""Single files under CompVis' names open as the models they were made of; what is no model is named."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from finished_model import finished_model
from safetensors.torch import save_file
from torch import Tensor

from ldm.config.errors import UserError
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import load
from ldm.formats.compvis import PREFIX, text_config, to_compvis, unet_config, vae_config
from ldm.formats.model_folder import open_model
from ldm.formats.part import load_part, read_json
from ldm.formats.single_file import CheckpointChoices, open_single, read_file
from ldm.formats.text_folder import PREFIX as TEXT
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.unet import UNetConfig

UNET = UNetConfig(channels=(32, 64), layers=2, attention=(True, False), heads=8, context_width=64)
SD2 = UNetConfig(channels=(64, 128), layers=1, attention=(True, True), heads=(1, 2), depth=(1, 1), context_width=64, linear_projection=True)
INPAINT = UNetConfig(channels=(32, 64, 64), layers=1, in_channels=9, attention=(True, True, False), heads=8, context_width=64)
XL = UNetConfig(
    channels=(64, 128, 128),
    layers=1,
    attention=(False, True, True),
    heads=(1, 2, 2),
    depth=(1, 1, 2),
    context_width=64,
    linear_projection=True,
    size_channels=256,
    pooled_channels=80,
)
KL = KLConfig(channels=(32, 64), layers=1, latent_channels=4, scaling_factor=0.18215)
VQ = VQConfig(channels=(32, 32, 64), layers=2, latent_channels=3, code_channels=4, codes=16, attention=(False, False, True))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def clip_state(layers: int = 2, vocabulary: int = 49408, width: int = 64) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(2)
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=width,
    )
    state = {TEXT + n.removeprefix(TEXT): v for n, v in CLIPTextModel(config).state_dict().items() if not n.endswith("position_ids")}
    return config.to_dict(), state


def checkpoint(unet: UNetConfig = UNET, vae: KLConfig | VQConfig = KL) -> dict[str, Tensor]:
    """A whole model under CompVis' names, with what such files hold besides."""
    torch.manual_seed(0)
    config, text = clip_state()
    state = to_compvis("unet", unet, unet.build().state_dict())
    state |= to_compvis("vae", vae, vae.build().state_dict())
    state |= to_compvis("text", config, text)
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state |= {"betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square(), "logvar": torch.zeros(1000)}
    return {name: value.detach().contiguous() for name, value in state.items()}


def written(state: Mapping[str, Tensor], file: Path, **said: str) -> Path:
    save_file(dict(state), file, metadata=said or None)
    return file


def quiet(text: str) -> None:
    pass


@pytest.mark.parametrize(("unet", "vae"), [(UNET, KL), (SD2, VQ), (INPAINT, KL), (XL, KL)])
def test_shapes_tell_what_a_network_is(unet: UNetConfig, vae: KLConfig | VQConfig) -> None:
    from ldm.formats.compvis import inner

    state = checkpoint(unet, vae)
    found = unet_config(inner("unet", state))
    assert found.to_diffusers() | {"sample_size": None} == _spelt(unet).to_diffusers() | {"sample_size": None}
    told = vae_config(inner("vae", state), vae.scaling_factor).to_diffusers()
    assert told | {"force_upcast": True} == vae.to_diffusers() | {"force_upcast": True}


def _spelt(unet: UNetConfig) -> UNetConfig:
    """With numbers for each level, as shapes tell them."""
    from dataclasses import replace

    return replace(unet, depth=unet.level_depth, heads=unet.heads)


def test_a_whole_file_is_the_model_it_was_made_of(tmp_path: Path) -> None:
    state = checkpoint()
    notes: list[str] = []
    folder = open_single(written(state, tmp_path / "model.safetensors"), note=notes.append)
    assert open_model(folder).parts == ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
    for part, config in (("unet", UNET), ("vae", KL)):
        found = load_part(folder / part)[1]
        again = to_compvis(part, config, found)  # type: ignore[arg-type]
        assert all(torch.equal(again[name], state[name]) for name in again) and len(again) == len(found)
    text = load_part(folder / "text_encoder")[1]
    name = "embeddings.token_embedding.weight"
    assert torch.equal(text[TEXT + name], state[PREFIX["text"] + name])
    assert len(notes) == 1 and "epsilon is assumed" in notes[0]
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    assert abs(scheduler["beta_start"] - 0.00085) < 1e-8 and scheduler["beta_schedule"] == "scaled_linear"
    family = load(tmp_path / "model.safetensors")
    picture = family.sample(["a cat!"], settings=Wanted(steps=1), size=(16, 16))
    assert picture.shape == (1, 16, 16, 3) and family.text.max_tokens == 77
    # The second opening reads what the first one wrote.
    assert open_single(tmp_path / "model.safetensors", note=notes.append) == folder and len(notes) == 1


@pytest.mark.slow
def test_what_a_file_predicts_comes_from_beside_it(tmp_path: Path) -> None:
    state = checkpoint()
    said = open_single(written(state, tmp_path / "a.safetensors", **{"modelspec.prediction_type": "v"}), note=quiet)
    assert read_json(said / "scheduler" / "scheduler_config.json")["prediction_type"] == "v_prediction"
    written(state, tmp_path / "b.safetensors")
    (tmp_path / "b.yaml").write_text("model: {params: {parameterization: v, linear_start: 0.001, linear_end: 0.02, scale_factor: 0.5}}")
    folder = open_single(tmp_path / "b.safetensors", note=quiet)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    assert (scheduler["prediction_type"], scheduler["beta_start"], scheduler["beta_end"]) == ("v_prediction", 0.001, 0.02)
    assert read_json(folder / "vae" / "config.json")["scaling_factor"] == 0.5
    chosen = open_single(tmp_path / "b.safetensors", CheckpointChoices(prediction="epsilon"), note=quiet)
    assert read_json(chosen / "scheduler" / "scheduler_config.json")["prediction_type"] == "epsilon"
    with pytest.raises(UserError, match="prediction: got 'vv'"):
        open_single(tmp_path / "b.safetensors", CheckpointChoices(prediction="vv"))
    marked = written(state | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, tmp_path / "c.safetensors")  # as files of XL say it
    scheduler, told = read_json(open_single(marked, note=(notes := []).append) / "scheduler" / "scheduler_config.json"), notes
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"], told) == ("v_prediction", True, [])
    with pytest.raises(UserError, match="edm_mean marks a network of EDM's noise levels"):
        open_single(written(state | {"edm_mean": torch.zeros(4)}, tmp_path / "d.safetensors"), note=quiet)
    (tmp_path / "b.yaml").write_text("model: 3")
    with pytest.raises(UserError, match=r"b\.yaml: no YAML of a CompVis model"):
        open_single(tmp_path / "b.safetensors", note=quiet)


@pytest.mark.slow
def test_averaged_weights_are_a_choice(tmp_path: Path) -> None:
    state = checkpoint()
    own = {name: value for name, value in state.items() if name.startswith(PREFIX["unet"])}
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1 for name, value in own.items()}
    file = written(state | averaged | {"model_ema.decay": torch.tensor(0.9999)}, tmp_path / "both.safetensors")
    notes: list[str] = []
    name = "conv_in.weight"
    last = load_part(open_single(file, CheckpointChoices(ema=False), note=notes.append) / "unet")[1][name]
    mean = load_part(open_single(file, note=notes.append) / "unet")[1][name]
    assert torch.equal(mean, last + 1) and sum("averaged weights" in note for note in notes) == 2
    del averaged[next(iter(averaged))]
    with pytest.raises(UserError, match=r"averaged weights, but none for model\.diffusion_model\."):
        open_single(written(state | averaged, tmp_path / "half.safetensors"), note=quiet)


@pytest.mark.slow
def test_a_choice_stands_behind_the_name(tmp_path: Path) -> None:
    state = checkpoint()
    own = {name: value for name, value in state.items() if name.startswith(PREFIX["unet"])}
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): value + 1 for name, value in own.items()}
    file = written(state | averaged, tmp_path / "both.safetensors")
    last, mean = (load(f"{file}::ema={said},prediction=v") for said in ("no", "yes"))
    assert torch.equal(mean.denoiser.conv_in.weight, last.denoiser.conv_in.weight + 1) and last.process.target == "v"
    assert load(str(file)).process.target == "epsilon"
    with pytest.raises(UserError, match=r"'ema=maybe' is not known; behind :: stand ema=yes"):
        open_model(f"{file}::ema=maybe")
    with pytest.raises(UserError, match="no such folder"):
        open_model(f"{tmp_path / 'none.ckpt'}::ema=no")


def test_a_part_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = to_compvis("vae", KL, KL.build().state_dict())
    bare = {name.removeprefix(PREFIX["vae"]): value.contiguous() for name, value in state.items()}
    folder = open_single(written(bare | {"loss.logvar": torch.zeros(1)}, tmp_path / "vae.safetensors"), note=quiet)
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["vae"]
    with pytest.raises(UserError, match="holds vae alone; unet, scheduler, text_encoder, tokenizer missing; give a whole checkpoint"):
        open_model(tmp_path / "vae.safetensors", note=quiet)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.slow
def test_old_checkpoints_are_read_by_a_child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = checkpoint()
    straight = open_single(written(state, tmp_path / "a.safetensors"), note=quiet)
    trainer = types.ModuleType("pytorch_lightning")
    trainer.Callback = type("Callback", (), {"__module__": "pytorch_lightning"})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", trainer)
    torch.save({"state_dict": state, "global_step": 7, "callbacks": {trainer.Callback: {"best": 1.0}}}, tmp_path / "a.ckpt")
    monkeypatch.delitem(sys.modules, "pytorch_lightning")
    folder = open_single(tmp_path / "a.ckpt", note=quiet)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = load_part(folder / part)[1], load_part(straight / part)[1]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_file(tmp_path / "a.ckpt")[1]["global_step"] == "7"


def test_only_a_pickle_needs_room_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "file" / "cache"))  # no folder can be made there
    save_file({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "w.ckpt")
    assert torch.equal(read_file(tmp_path / "w.safetensors")[0]["w"], torch.ones(2))
    with pytest.raises(UserError, match=r"cache: no room to convert w\.ckpt in"):
        read_file(tmp_path / "w.ckpt")


@pytest.mark.slow
def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    torch.save({"state_dict": {"w": torch.zeros(1)}, "x": Evil(mark)}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt: would call [\w.]+, which may run code, and was not read"):
        open_single(tmp_path / "evil.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"x": Evil(mark)}))
    with pytest.raises(UserError, match=r"plain\.ckpt: "):
        open_single(tmp_path / "plain.ckpt")
    (tmp_path / "noise.ckpt").write_bytes(bytes(range(256)) * 40)
    with pytest.raises(UserError, match=r"noise\.ckpt: truncated or not a safetensors file"):
        open_single(tmp_path / "noise.ckpt")
    assert not mark.exists()


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    lora = {"lora_unet_down_blocks_0.lora_down.weight": torch.zeros(4, 8), "lora_unet_down_blocks_0.alpha": torch.ones(1)}
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "lora": (lora, r"lora\.safetensors: an adapter \(LoRA: lora_unet_down_blocks_0"),
        "words": ({"<cat>": torch.zeros(1, 768)}, r"words\.safetensors: learned words \(textual inversion: <cat>\)"),
        "folder": ({f"down_blocks.{i}.weight": torch.zeros(1, 1, 1) for i in range(3)}, r"no names of CompVis' checkpoints"),
    }
    for name, (state, said) in cases.items():
        with pytest.raises(UserError, match=said):
            open_single(written(state, tmp_path / f"{name}.safetensors"))
    page = tmp_path / "page.safetensors"
    page.write_text("<!DOCTYPE html><html>please log in</html>")
    with pytest.raises(UserError, match=r"page\.safetensors: a web page, not weights"):
        open_single(page)
    whole = written(checkpoint(), tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.safetensors: truncated or not a safetensors file"):
        open_single(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="no such file"):
        open_single(tmp_path / "none.safetensors")


def test_one_weight_too_few_too_many_or_of_another_shape(tmp_path: Path, own_cache: Path) -> None:
    state = checkpoint()
    key = PREFIX["unet"] + "middle_block.0.in_layers.2.weight"
    damaged: dict[str, tuple[dict[str, Tensor], str]] = {
        "few": ({n: v for n, v in state.items() if n != key}, r"few\.safetensors: .*missing: mid_block\.resnets\.0\.conv1\.weight"),
        "many": (state | {PREFIX["vae"] + "encoder.extra.weight": torch.zeros(1)}, r"left over: encoder\.extra\.weight"),
        "shape": (state | {key: state[key][:-1]}, r"mid_block\.resnets\.0\.conv1\.weight has shape"),
    }
    for name, (weights, said) in damaged.items():
        with pytest.raises(UserError, match=said):
            open_single(written({n: v.contiguous() for n, v in weights.items()}, tmp_path / f"{name}.safetensors"), note=quiet)
    assert not list((own_cache / "models").glob("*"))  # nothing half opened is kept


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "vq"])
@pytest.mark.parametrize("form", ["single-file", "compvis-ckpt"])
def test_what_ldm_exports_draws_the_same(tmp_path: Path, kind: Any, form: str) -> None:
    from ldm.__main__ import main

    model = finished_model(tmp_path / "made", kind)
    out = tmp_path / f"out.{'safetensors' if form == 'single-file' else 'ckpt'}"
    assert main(["export", str(model), "--to", form, "--out", str(out)]) == 0
    ours, back = load(model), load(out)
    assert back.defaults == ours.defaults and back.process == ours.process
    words = ["a small red circle", "a large blue ring"]
    assert torch.equal(back.sample(words), ours.sample(words))


def test_text_configurations_follow_shapes() -> None:
    config, state = clip_state(layers=3)
    weights = {name.removeprefix(TEXT): value for name, value in state.items()}
    told = text_config(weights, "text")
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "hidden_act"):
        assert told[name] == config[name], name
    with pytest.raises(UserError, match=r"embeddings\.token_embedding\.weight is missing"):
        text_config({}, "text")


@pytest.mark.slow
def test_averages_alone_are_the_unet(tmp_path: Path) -> None:
    """A checkpoint pruned to its averages, whose names have no dots: the same U-Net under its own names."""
    state = checkpoint()
    own = {name: value for name, value in state.items() if name.startswith("model.diffusion_model.")}
    rest = {name: value for name, value in state.items() if name not in own}
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): value for name, value in own.items()}
    file = written(rest | averaged | {"model_ema.decay": torch.tensor(0.9999)}, tmp_path / "averages.safetensors")
    notes: list[str] = []
    found = load_part(open_single(file, note=notes.append) / "unet")[1]
    whole = load_part(open_single(written(state, tmp_path / "whole.safetensors"), note=notes.append) / "unet")[1]
    assert found.keys() == whole.keys() and all(torch.equal(found[name], value) for name, value in whole.items())
    assert any("averaged weights of its unet alone; they are used" in note for note in notes)
    with pytest.raises(UserError, match="leave ema=no out"):
        open_single(file, CheckpointChoices(ema=False), note=notes.append)
    assert not any("changes nothing" in note for note in notes)
    open_single(tmp_path / "whole.safetensors", CheckpointChoices(ema=False), note=notes.append)
    assert "ema=no changes nothing" in " ".join(notes)


def test_every_name_of_a_unet_comes_back_from_its_average() -> None:
    from ldm.formats.compvis import to_compvis, with_dots

    for config in (UNetConfig(), UNetConfig(channels=(32, 64, 64), attention=(False, True, True), depth=(1, 2, 10), size_channels=8)):
        with torch.device("meta"):
            names = to_compvis("unet", config, config.build().state_dict())
        inside = [name.removeprefix("model.diffusion_model.") for name in names]
        assert inside == [with_dots(name.replace(".", "")) for name in inside]


@pytest.mark.parametrize(
    ("kept", "words"), [("first_stage_model.", "holds vae alone"), ("model.diffusion_model.", "holds (scheduler, )?unet")]
)
def test_a_file_that_lacks_a_part_is_named(tmp_path: Path, kept: str, words: str) -> None:
    state = {name: value for name, value in checkpoint().items() if name.startswith(kept)}
    file = written(state, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=f"part.safetensors: {words}.*missing; give a whole checkpoint"):
        open_model(str(file))


def test_weights_of_odd_shapes_are_one_line(tmp_path: Path) -> None:
    state = checkpoint()
    changes: dict[str, dict[str, torch.Tensor | None]] = {
        "no middle": {"model.diffusion_model.middle_block.1.proj_in.weight": None},
        "no side": {"model.diffusion_model.input_blocks.0.0.weight": torch.tensor(1.0)},
        "nothing": {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(0, 4, 3, 3)},
        "far": {"first_stage_model.encoder.down.999999999.block.0.conv1.weight": torch.zeros(1)},
        "digits": {f"first_stage_model.encoder.down.{'9' * 5000}.block.0.conv1.weight": torch.zeros(1)},
        "table": {"cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.zeros(3)},
    }
    for number, change in enumerate(changes.values()):
        odd = {name: value for name, value in (state | change).items() if value is not None}
        file = written(odd, tmp_path / f"odd{number}.safetensors")
        with pytest.raises(UserError, match=rf"odd{number}\.safetensors: ") as caught:
            open_single(file, note=lambda text: None)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_text_names_without_text_model_open_as_the_usual_ones(tmp_path: Path) -> None:
    """NovelAI's layout, and of files merged from it some names of each kind."""
    state = checkpoint()
    usual, short = PREFIX["text"], PREFIX["text"].removesuffix("text_model.")
    renamed = {short + name.removeprefix(usual) if name.startswith(usual) else name: value for name, value in state.items()}
    first = next(name for name in state if name.startswith(usual))
    folders = []
    for name, content in (("plain", state), ("nai", renamed), ("merged", {**renamed, first: state[first]})):
        save_file({key: value.contiguous().clone() for key, value in content.items()}, tmp_path / f"{name}.safetensors")
        folders.append(open_single(tmp_path / f"{name}.safetensors", note=lambda text: None))
    config, weights = load_part(folders[0] / "text_encoder")
    for folder in folders[1:]:
        found, same = load_part(folder / "text_encoder")
        assert found == config and same.keys() == weights.keys() and all(torch.equal(same[key], weights[key]) for key in weights)


@pytest.mark.slow
def test_weights_of_no_part_are_told(tmp_path: Path) -> None:
    """Such as the second network of a ControlNet's checkpoint, without which another picture is drawn."""
    notes: list[str] = []
    open_single(written(checkpoint(), tmp_path / "plain.safetensors"), note=notes.append)
    assert not any("of no part" in note for note in notes)
    more = {"control_model.zero_convs.0.0.weight": torch.zeros(2, 2), "control_model.zero_convs.0.0.bias": torch.zeros(2)}
    open_single(written(checkpoint() | more, tmp_path / "more.safetensors"), note=notes.append)
    assert sum("2 weights are of no part that is read here, such as control_model.zero_convs.0.0.bias" in note for note in notes) == 1
