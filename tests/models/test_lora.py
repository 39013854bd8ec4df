"""LoRA: three key styles both ways, diffusers' and peft's opinion of each, merging and taking out again to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipelines import NEGATIVE, PROMPTS, SIDE, pipeline_folder, start_noise
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.config.errors import UserError
from ldm.families.draws import Wanted
from ldm.families.latent_diffusion.family import LatentDiffusionFamily, load
from ldm.formats.lora_files import Style, read, write
from ldm.formats.tensor_file import read_texts
from ldm.models.lora import TEXT_PREFIX, TEXT_TARGETS, Lora, Merged, Pair, flat, inject, injected, matched

RANK, ALPHA = 3, 6.0
STYLES: tuple[Style, ...] = ("diffusers", "peft", "kohya")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder(tmp_path_factory.mktemp("lora"))


@pytest.fixture
def family(folder: Path) -> LatentDiffusionFamily:
    return load(folder)


def networks(family: LatentDiffusionFamily) -> dict[Any, Any]:
    return {"unet": family.denoiser, "text_encoder": family.text.model}


def trained(family: LatentDiffusionFamily, rank: int = RANK, alpha: float = ALPHA, seed: int = 0) -> Lora:
    """A LoRA on U-Net and text encoder whose every weight has an effect."""
    torch.manual_seed(seed)
    learned = inject(family.denoiser, rank, alpha, (*family.denoiser.lora_targets, "ff.net.0.proj", "proj_in", "conv1"))
    learned += inject(family.text.model, rank, alpha, TEXT_TARGETS)
    with torch.no_grad():
        for weight in learned:
            weight.normal_(std=0.2)
    return Lora(pairs={"unet": injected(family.denoiser), "text_encoder": injected(family.text.model)})


def latents(family: LatentDiffusionFamily) -> Tensor:
    """Clean latents that the family draws of the usual prompts."""
    with torch.no_grad():
        settings = family.settings(Wanted(steps=4, sampler="ddim", guidance=3.0))
        return family.engine().draw(PROMPTS, [7, 8], settings, (SIDE, SIDE), negative=NEGATIVE, latents=start_noise(torch.float32))[1]


def theirs(pipeline: Any) -> Tensor:
    """The same by a diffusers pipeline."""
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(
        {**pipeline.scheduler.config, "timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    )
    images = pipeline(
        PROMPTS,
        negative_prompt=[NEGATIVE] * 2,
        num_inference_steps=4,
        guidance_scale=3.0,
        output_type="latent",
        latents=start_noise(torch.float32),
    ).images
    return images


@pytest.mark.parametrize("style", STYLES)
def test_files_read_back(folder: Path, tmp_path: Path, style: Style) -> None:
    source = load(folder)
    lora = trained(source)
    files = write(lora, tmp_path, style)
    found = [read(file.parent if style == "peft" else file) for file in files]
    pairs = {part: values for one in found for part, values in one.pairs.items()}
    fresh = networks(load(folder))
    back: dict[str, dict[str, Pair]] = {}  # by the layer's dotted name: a kohya file has only flat ones
    for (part, name), pair in matched(Lora(pairs=pairs), fresh).items():
        back.setdefault(part, {})[name.removeprefix(TEXT_PREFIX)] = pair
    assert {part: set(values) for part, values in back.items()} == {part: set(values) for part, values in lora.pairs.items()}
    for part, values in lora.pairs.items():
        for name, pair in values.items():
            other = back[part][name]
            assert torch.equal(other.down, pair.down)
            assert torch.equal(other.up * other.scale, pair.up * pair.scale)


def test_diffusers_draws_the_same_picture(folder: Path, family: LatentDiffusionFamily, tmp_path: Path) -> None:
    plain = latents(family)
    lora = trained(load(folder))
    for style in ("diffusers", "kohya"):
        (file,) = write(lora, tmp_path / style, style)  # type: ignore[arg-type]
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
        pipeline.load_lora_weights(file.parent, weight_name=file.name)
        merged = Merged(networks(family), [(read(file), 1.0)])
        family.text.forget()
        ours = latents(family)
        merged.undo()
        family.text.forget()
        assert (ours - plain).abs().max() > 0.1
        assert torch.allclose(ours, theirs(pipeline), atol=2e-4), style
    assert torch.equal(latents(family), plain)


def test_injected_and_merged_are_the_same_function(folder: Path, family: LatentDiffusionFamily) -> None:
    source = load(folder)
    lora = trained(source)
    Merged(networks(family), [(lora, 1.0)])
    assert torch.allclose(latents(source), latents(family), atol=2e-4)


def test_peft_loads_it(folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    lora = trained(load(folder))
    write(lora, tmp_path, "peft")
    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    made: Any = PeftModel.from_pretrained(unet, str(tmp_path / "unet")).merge_and_unload()
    family = load(folder)
    Merged(networks(family), [(lora, 1.0)])
    state, own = made.state_dict(), family.denoiser.state_dict()
    assert all(torch.allclose(state[name], own[name], atol=1e-6) for name in own)


def test_what_peft_saves_is_read(folder: Path, tmp_path: Path) -> None:
    """Ranks and alphas that differ from layer to layer, and rank-stabilised scaling."""
    from peft import LoraConfig, get_peft_model

    unet: Any = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    config: Any = LoraConfig(
        r=4,
        lora_alpha=2,
        target_modules=["to_q", "to_v"],
        rank_pattern={"attn2.to_q": 2},
        alpha_pattern={"attn1.to_v": 5},
        use_rslora=True,
        init_lora_weights=False,
    )
    made: Any = get_peft_model(unet, config)
    made.save_pretrained(tmp_path)
    family = load(folder)
    Merged(networks(family), [(read(tmp_path), 1.0)])
    state, own = made.merge_and_unload().state_dict(), family.denoiser.state_dict()
    assert all(torch.allclose(state[name], own[name], atol=1e-6) for name in own)


def test_what_diffusers_saves_is_read(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipeline: Any = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
    config: Any = LoraConfig(r=4, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config)
    pipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(pipeline.unet), unet_lora_adapter_metadata=config.to_dict()
    )
    family = load(folder)
    Merged(networks(family), [(read(tmp_path), 1.0)])
    assert torch.allclose(latents(family), theirs(pipeline), atol=2e-4)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".lora_A.weight", ".lora.down.weight"),
        (".lora_A.weight", ".lora_linear_layer.down.weight"),
        (".to_q.lora_A.weight", ".processor.to_q_lora.down.weight"),
        (".lora_A.weight", ".lora_A.default.weight"),
    ],
)
def test_older_spellings(family: LatentDiffusionFamily, tmp_path: Path, old: str, new: str) -> None:
    inject(family.denoiser, 2, 2, ["to_q"])
    (file,) = write(Lora(pairs={"unet": injected(family.denoiser)}), tmp_path)
    up = new.replace("down", "up").replace("lora_A", "lora_B"), old.replace("lora_A", "lora_B")
    state = {key.replace(old, new).replace(up[1], up[0]): value for key, value in load_file(file).items()}
    assert not any(old in key for key in state)
    save_file(state, tmp_path / "old.safetensors")
    assert {flat(name) for name in read(tmp_path / "old.safetensors").pairs["unet"]} == {flat(n) for n in read(file).pairs["unet"]}


def test_several_add_up_and_undo_restores_the_bits(folder: Path, family: LatentDiffusionFamily) -> None:
    first, second = trained(load(folder), seed=1), trained(load(folder), seed=2, rank=2)
    before = {part: {k: v.clone() for k, v in net.state_dict().items()} for part, net in networks(family).items()}
    merged = Merged(networks(family), [(first, 0.7), (second, -1.3)])
    for part, net in networks(family).items():
        for name, pair in first.pairs[part].items():
            own = net.get_submodule(name).weight
            expected = before[part][f"{name}.weight"].double()
            for lora, weight in ((first, 0.7), (second, -1.3)):
                other = lora.pairs[part][name]
                delta = other.up.double().flatten(1) @ other.down.double().flatten(1) * other.alpha / other.rank
                expected = expected + weight * delta.view(own.shape)
            assert torch.allclose(own.double(), expected, atol=1e-5), pair
    merged.undo()
    for part, net in networks(family).items():
        assert all(torch.equal(v, before[part][k]) for k, v in net.state_dict().items())


def test_a_half_type_is_restored_too(folder: Path, family: LatentDiffusionFamily) -> None:
    lora = trained(load(folder))
    family.denoiser.half()
    before = {k: v.clone() for k, v in family.denoiser.state_dict().items()}
    merged = Merged(networks(family), [(lora, 1.0)])
    assert any(not torch.equal(v, before[k]) for k, v in family.denoiser.state_dict().items())
    merged.undo()
    assert all(torch.equal(v, before[k]) for k, v in family.denoiser.state_dict().items())


def test_what_matches_nothing_is_refused_and_changes_nothing(family: LatentDiffusionFamily) -> None:
    pair = Pair(torch.zeros(1, 8), torch.zeros(8, 1), 1.0)
    good = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    before = {k: v.clone() for k, v in family.denoiser.state_dict().items()}
    for names, said in (
        (("nowhere.to_q",), "none of its 1 layer is in this model: unet.nowhere.to_q"),
        ((good, "nowhere.to_q"), "1 of its 2 layers is not in this model: unet.nowhere.to_q"),
    ):
        lora = Lora(pairs={"unet": dict.fromkeys(names, pair)}, name="x.safetensors")
        if "2 layers" in said:
            said = "nowhere.to_q"
        with pytest.raises(UserError, match=said):
            Merged(networks(family), [(lora, 1.0)])
    with pytest.raises(UserError, match="not a single LoRA weight"):
        Merged(networks(family), [(Lora(pairs={}), 1.0)])
    wide = Pair(torch.zeros(1, 9), torch.zeros(8, 1), 1.0)
    with pytest.raises(UserError, match=r"another size: unet\.down_blocks\.0\.attentions\.0"):
        Merged(networks(family), [(Lora(pairs={"unet": {good: wide}}), 1.0)])
    assert all(torch.equal(v, before[k]) for k, v in family.denoiser.state_dict().items())


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"lora_unet_a.hada_w1_a": (2, 2)}, "a with hada_w1_a alone: no weights of an adapter"),
        ({"unet.a.lora_A.weight": (2, 2)}, "a with down alone"),
        ({"unet.a.lora_A.weight": (2, 2), "unet.a.lora_B.weight": (2, 2), "unet.a.oft_blocks": (2, 2, 2)}, "oft_blocks"),
        ({"conv_in.weight": (2, 2)}, "conv_in.weight"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, state: dict[str, tuple[int, ...]], said: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        read(tmp_path / "x.safetensors")


def test_no_file_and_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="no safetensors file"):
        read(tmp_path)
    (tmp_path / "x.safetensors").write_bytes(b"12345")
    with pytest.raises(UserError, match="not weights"):
        read(tmp_path)
    (tmp_path / "y.safetensors").write_bytes(b"12345")
    with pytest.raises(UserError, match="2 safetensors files"):
        read(tmp_path)


def test_an_adapter_config_of_another_kind(tmp_path: Path) -> None:
    save_file(
        {"base_model.model.a.lora_A.weight": torch.zeros(1, 2), "base_model.model.a.lora_B.weight": torch.zeros(2, 1)},
        tmp_path / "adapter_model.safetensors",
    )
    for values, said in (({"peft_type": "OFT"}, "OFT"), ({"use_dora": True}, "no magnitude of this layer")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=said):
            read(tmp_path)


def test_kohya_header_and_names(folder: Path, tmp_path: Path) -> None:
    lora = trained(load(folder))
    (file,) = write(lora, tmp_path, "kohya", {"modelspec.title": "Tiny"})
    told = read_texts(file)
    assert told["ss_network_module"] == "networks.lora" and told["ss_network_dim"] == "3" and told["ss_network_alpha"] == "6"
    assert told["modelspec.title"] == "Tiny"
    keys = set(load_file(file))
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0.lora_down.weight" in keys
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in keys


def test_targets_that_are_nowhere(family: LatentDiffusionFamily) -> None:
    with pytest.raises(UserError, match=r"no layer's name ends with 'to_x'; there are .*to_q"):
        inject(family.denoiser, 2, 2, ["to_x"])
