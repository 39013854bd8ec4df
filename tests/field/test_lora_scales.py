"""Users' case: every scale that a LoRA file or folder states is applied or refused; peft's and diffusers' own merges are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.formats.lora_files import read
from ldm.models.lora import Lora, Merged, continue_with
from ldm.sampling.adapters import weighted

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class Small(nn.Module):
    """A network whose layers are called as a U-Net's and as a text encoder's are; `text` puts them under text_model, as transformers 4."""

    def __init__(self, names: tuple[str, ...], text: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            place: nn.Module = self
            for word in f"{'text_model.' if text else ''}{name}".split(".")[:-1]:
                if not hasattr(place, word):
                    place.add_module(word, nn.Module())
                place = getattr(place, word)
            place.add_module(name.split(".")[-1], nn.Linear(6, 8))

    def forward(self) -> None: ...


UNET = ("down_blocks.0.attn1.to_q", "down_blocks.0.attn1.to_v", "down_blocks.0.attn2.to_q", "mid_block.attn1.to_q")
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.v_proj", "encoder.layers.1.self_attn.q_proj")


def learned(network: nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)


def by_peft(made: Any) -> dict[str, Tensor]:
    """The weights that peft merges, by layer without the text model's prefix."""
    state = made.merge_and_unload().state_dict()
    return {name.removeprefix("text_model.").removesuffix(".weight"): value for name, value in state.items() if name.endswith(".weight")}


def by_us(lora: Lora, names: tuple[str, ...], part: Any) -> dict[str, Tensor]:
    plain = Small(names)
    Merged({part: plain}, [(lora, 1.0)])
    return {name.removesuffix(".weight"): value for name, value in plain.state_dict().items() if name.endswith(".weight")}


CONFIGS: dict[str, tuple[tuple[str, ...], bool, dict[str, Any]]] = {
    "rslora": (UNET, False, {"use_rslora": True, "target_modules": ["to_q", "to_v"]}),
    "rslora by ranks": (UNET, False, {"use_rslora": True, "target_modules": ["to_q", "to_v"], "rank_pattern": {"attn1.to_q": 3}}),
    "alphas": (UNET, False, {"target_modules": ["to_q", "to_v"], "alpha_pattern": {"attn1.to_q": 16, "mid_block.attn1.to_q": 5}}),
    "whole names": (UNET, False, {"target_modules": ["to_q"], "alpha_pattern": {"^mid_block.attn1.to_q": 12, r"^down_blocks\.0\..*": 3}}),
    "expressions": (
        UNET,
        False,
        {
            "target_modules": r".*attn[12]\.to_(q|v)",
            "rank_pattern": {r".*attn2\.to_q": 2},
            "alpha_pattern": {r"(down|up)_blocks\.\d+\.attn1\.to_[qv]": 7},
        },
    ),
    "text": (TEXT, False, {"target_modules": ["q_proj", "v_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 12}}),
    "text_model": (
        TEXT,
        True,
        {
            "target_modules": ["q_proj", "v_proj"],
            "alpha_pattern": {"text_model.encoder.layers.0.self_attn.q_proj": 16},
            "rank_pattern": {"text_model.encoder.layers.1.self_attn.q_proj": 2},
        },
    ),
    "text_model anchored": (
        TEXT,
        True,
        {"target_modules": ["q_proj"], "alpha_pattern": {r"^text_model\.encoder.layers.[0-1].self_attn.q_proj": 16}},
    ),
    "dora": (UNET, False, {"use_dora": True, "target_modules": ["to_q"]}),
    "bias": (UNET, False, {"lora_bias": True, "target_modules": ["to_q"]}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_of_peft_and_a_header_of_diffusers_merge_as_peft_does(case: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    names, text, said = CONFIGS[case]
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **said)
    made: Any = get_peft_model(Small(names, text), config)
    learned(made)
    made.save_pretrained(tmp_path)
    part = "text_encoder" if names is TEXT else "unet"
    state = {name.replace("base_model.model.", f"{part}."): value.contiguous() for name, value in get_peft_model_state_dict(made).items()}
    values = {f"{part}.{k}": sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    header = json.dumps(values, default=str).replace('"PeftType.LORA"', '"LORA"')
    save_file(state, tmp_path / "header.safetensors", metadata={"lora_adapter_metadata": header})
    right = by_peft(made)
    for path in (tmp_path / "adapter_model.safetensors", tmp_path / "header.safetensors"):
        own = by_us(read(path), names, part)
        assert own.keys() == right.keys()
        for name, value in own.items():
            torch.testing.assert_close(value, right[name], atol=1e-6, rtol=1e-5, msg=f"{case} {path.name} {name}")


def plain(tmp_path: Path, metadata: dict[str, str] | None = None, config: Any = None, rank: int = 4, **more: Tensor) -> Path:
    key = "base_model.model.mid_block.attn1.to_q"
    file = tmp_path / "adapter_model.safetensors"
    save_file({f"{key}.lora_A.weight": torch.ones(rank, 6), f"{key}.lora_B.weight": torch.ones(8, rank), **more}, file, metadata=metadata)
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return file


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"r": 8}, "its rank is 4, but .* says rank 8"),
        ({"r": 4, "rank_pattern": {"to_q": 2}}, "says rank 2"),
        ({"r": 4, "lora_alpha": "8"}, "lora_alpha: got '8'; a finite number"),
        ({"r": 4, "lora_alpha": float("inf")}, "a finite number"),
        ({"r": 4, "alpha_pattern": {"to_q": None}}, "alpha_pattern: to_q: got 'None'"),
        ({"r": 4, "alpha_pattern": ["to_q"]}, "patterns with a number each"),
        ({"r": 4, "use_rslora": "no"}, "use_rslora: got 'no'; true or false"),
        ({"r": 4, "init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"r": 4, "init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"r": 4, "layer_replication": [[0, 4]]}, "layer_replication"),
        ({"r": 4, "use_qalora": True}, "use_qalora"),
        ({"r": 4, "bias": "all"}, "bias is 'all'"),
        ({"r": 4, "use_dora": True}, "describes DoRA, but there is no magnitude"),
        ({"peft_type": "VERA"}, "describes VERA"),
    ],
)
def test_scales_that_cannot_be_applied_are_refused(tmp_path: Path, said: dict[str, Any], words: str) -> None:
    header = plain(tmp_path, {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in said.items()})})
    with pytest.raises(UserError, match=words):
        read(header)
    with pytest.raises(UserError, match=words):
        read(plain(tmp_path, config=said))


def test_a_header_that_is_none_is_refused_and_an_alpha_among_the_weights_counts_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lora_adapter_metadata is no JSON object"):
        read(plain(tmp_path, {"lora_adapter_metadata": "{"}))
    alpha = {"base_model.model.mid_block.attn1.to_q.alpha": torch.tensor(2.0)}
    [pair] = (
        read(plain(tmp_path, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 16, "unet.r": 4})}, **alpha)).pairs["unet"].values()
    )
    assert pair.scale == 0.5


HEAD = "lora_unet_mid_block_attn1_to_q"
FACTORS: dict[str, dict[str, tuple[int, ...]]] = {
    "lora": {"lora_down.weight": (2, 6), "lora_up.weight": (8, 2)},
    "loha": {"hada_w1_a": (8, 2), "hada_w1_b": (2, 6), "hada_w2_a": (8, 2), "hada_w2_b": (2, 6)},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 3)},
}


def of_kind(folder: Path, kind: str, alpha: float, zero: str = "", **more: Tensor) -> Lora:
    weights = {f"{HEAD}.{end}": torch.full(shape, 0.0 if end == zero else 1.0) for end, shape in FACTORS[kind].items()}
    save_file({**weights, f"{HEAD}.alpha": torch.tensor(alpha), **more}, folder / "x.safetensors")
    return read(folder / "x.safetensors")


@pytest.mark.parametrize("kind", FACTORS)
def test_a_file_that_changes_nothing_is_told(kind: str, tmp_path: Path) -> None:
    for alpha, zero in ((0.0, ""), (2.0, list(FACTORS[kind])[-1])):
        lora = of_kind(tmp_path, kind, alpha, zero)
        assert "changes nothing" in " ".join(lora.notes)
        assert all(torch.equal(value, Small(UNET).state_dict()[f"{name}.weight"]) for name, value in by_us(lora, UNET, "unet").items())
    assert of_kind(tmp_path, kind, 2.0).notes == ()


def test_layers_of_no_scale_beside_others_are_counted_and_what_changes_a_bias_or_a_magnitude_is_no_idle_file(tmp_path: Path) -> None:
    other = {f"lora_unet_mid_block_attn1_to_v.{end}": torch.ones(shape) for end, shape in FACTORS["lora"].items()}
    assert "1 of its 2 layers has the alpha 0" in " ".join(of_kind(tmp_path, "lora", 0.0, **other).notes)
    assert "changes nothing" not in " ".join(
        of_kind(tmp_path, "lora", 2.0, "lora_up.weight", **{f"{HEAD}.dora_scale": torch.ones(8, 1)}).notes
    )
    save_file({f"{HEAD}.diff_b": torch.zeros(8)}, tmp_path / "x.safetensors")
    assert "changes nothing" in " ".join(read(tmp_path / "x.safetensors").notes)
    save_file({f"{HEAD}.diff_b": torch.ones(8)}, tmp_path / "x.safetensors")
    assert read(tmp_path / "x.safetensors").notes == ()


def test_an_alpha_of_zero_is_not_continued_and_matrices_that_do_not_fit_together_are_damage(tmp_path: Path) -> None:
    lora = of_kind(tmp_path, "lora", 0.0)
    with pytest.raises(UserError, match=r"alpha of mid_block\.attn1\.to_q is 0"):
        continue_with(Small(UNET), {"mid_block.attn1.to_q": lora.pairs["unet"]["mid_block_attn1_to_q"]})
    odd = {f"{HEAD}.lora_down.weight": torch.ones(3, 6), f"{HEAD}.lora_up.weight": torch.ones(8, 2)}
    save_file(odd, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"to_q: its matrices do not fit together; the file is damaged"):
        Merged({"unet": Small(UNET)}, [(read(tmp_path / "x.safetensors"), 1.0)])


@pytest.mark.parametrize("word", ["x:nan", "x:inf", "x:1e7", ":1", "x:-1e30"])
def test_weights_of_no_size_are_refused_as_they_are_given(word: str) -> None:
    with pytest.raises(UserError, match=r"lora: got .*at most 1e\+06"):
        weighted(word)
