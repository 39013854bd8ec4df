"""Users' case: LoCon, LoHa, LoKr, DoRA and whole differences under peft's, kohya's and LyCORIS' keys, against their own merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import pipeline_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.families.latent_diffusion.family import LatentDiffusionFamily, load
from ldm.formats.lora_files import read, write
from ldm.formats.lora_keys import sgm_names
from ldm.models.lora import Lora, Merged, Pair, weighted_modules

HEAD = "lora_unet_mid_block_a"


def network(layer: nn.Module) -> nn.Module:
    made = nn.Module()
    made.mid_block = nn.Module()
    made.mid_block.a = layer
    return made


def layer_of(kind: str) -> Any:
    torch.manual_seed(0)
    return {"linear": lambda: nn.Linear(12, 8), "conv": lambda: nn.Conv2d(12, 8, 3), "square": lambda: nn.Conv2d(8, 8, 3)}[kind]()


LYCORIS: dict[str, tuple[str, dict[str, Any]]] = {
    "locon": ("locon", {}),
    "locon rs": ("locon", {"rs_lora": True}),
    "locon cp": ("locon", {"use_tucker": True}),
    "dora": ("locon", {"weight_decompose": True}),
    "dora by inputs": ("locon", {"weight_decompose": True, "wd_on_out": False}),
    "loha": ("loha", {}),
    "loha cp": ("loha", {"use_tucker": True}),
    "loha dora": ("loha", {"weight_decompose": True}),
    "lokr": ("lokr", {"lora_dim": 2}),
    "lokr cp": ("lokr", {"use_tucker": True, "lora_dim": 1}),
    "lokr of two pairs": ("lokr", {"decompose_both": True, "lora_dim": 1, "factor": 4}),
    "lokr whole": ("lokr", {"full_matrix": True}),
    "lokr dora": ("lokr", {"weight_decompose": True, "lora_dim": 1}),
    "full": ("full", {}),
}


@pytest.mark.parametrize("kind", ["linear", "conv", "square"])
@pytest.mark.parametrize("case", LYCORIS)
def test_lycoris_merges_the_same(case: str, kind: str, tmp_path: Path) -> None:
    from lycoris.modules import full, locon, loha, lokr

    algorithm, said = LYCORIS[case]
    if kind == "linear" and said.get("use_tucker"):
        pytest.skip("kernels are of convolutions")
    layer = layer_of(kind)
    made_by = {"locon": locon.LoConModule, "loha": loha.LohaModule, "lokr": lokr.LokrModule, "full": full.FullModule}[algorithm]
    theirs: Any = made_by("lora", layer, **{"lora_dim": 4, "alpha": 2.0, **said})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 if "dora" not in name else parameter * (1 + 0.5 * torch.rand_like(parameter)))
        state = {"diff": theirs.weight, "diff_b": theirs.bias} if algorithm == "full" else dict(theirs.custom_state_dict())
    state = {f"{HEAD}.{name}": value.detach().clone().contiguous() for name, value in state.items()}
    save_file(state, tmp_path / "x.safetensors")
    own = network(layer_of(kind))
    Merged({"unet": own}, [(read(tmp_path / "x.safetensors"), 1.0)])
    with torch.no_grad():  # as it is trained: LyCORIS' get_merged_weight multiplies LoHa and LoKr by their scale twice
        x = torch.randn(5, layer.weight.shape[1], *([7, 7] if layer.weight.ndim == 4 else []))
        plain = layer(x)
        theirs.apply_to()
        right = layer(x)
        torch.testing.assert_close(own.mid_block.a(x), right, atol=1e-5, rtol=1e-5)
    assert (right - plain).abs().max() > 0.01


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("loha", {"use_effective_conv2d": True}),
        ("loha", {"use_effective_conv2d": False, "rank_pattern": {"b": 3}, "alpha_pattern": {"^mid.b": 5}}),
        ("lokr", {"use_effective_conv2d": True, "r": 1}),
        ("lokr", {"decompose_both": True, "decompose_factor": 4, "r": 1}),
        ("lokr", {"r": 9, "alpha": 3}),
    ],
)
def test_peft_merges_the_same(kind: str, said: dict[str, Any], tmp_path: Path) -> None:
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mid = nn.ModuleDict({"a": nn.Linear(12, 8), "b": nn.Conv2d(12, 8, 3), "c": nn.Conv2d(8, 8, 1)})

        def forward(self) -> None: ...

    config = {"loha": LoHaConfig, "lokr": LoKrConfig}[kind](
        **{"r": 2, "alpha": 4, "target_modules": ["a", "b", "c"], "init_weights": False, **said}  # type: ignore[arg-type]
    )
    made: Any = get_peft_model(Small(), config)  # type: ignore[arg-type]
    made.save_pretrained(tmp_path)
    right, own = made.merge_and_unload().state_dict(), Small()
    Merged({"unet": own}, [(read(tmp_path), 1.0)])
    assert all(torch.allclose(value, right[name], atol=1e-6) for name, value in own.state_dict().items())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_folder(tmp_path_factory.mktemp("base"))


def weights_of(family: LatentDiffusionFamily, file: Path) -> dict[str, Tensor]:
    family.adapt([(read(file), 1.0)], [])
    return dict(family.denoiser.state_dict())


def test_layers_under_the_names_of_sgm(base: Path, tmp_path: Path) -> None:
    family = load(base)
    names = sgm_names(family.denoiser.config, weighted_modules(family.denoiser))
    ours = {layer: theirs for theirs, layer in names.items()}
    assert ours["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] == "middle_block_1_transformer_blocks_0_attn1_to_q"
    assert ours["down_blocks.0.resnets.0.conv1"] == "input_blocks_1_0_in_layers_2" and ours["conv_out"] == "out_2"
    assert ours["down_blocks.0.downsamplers.0.conv"] == "input_blocks_2_0_op" and ours["time_embedding.linear_1"] == "time_embed_0"
    assert ours.keys() == weighted_modules(family.denoiser).keys()
    states: list[dict[str, Tensor]] = [{}, {}, {}]
    for seed, layer in enumerate(("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.0.resnets.1.conv2", "conv_out")):
        weight = family.denoiser.get_submodule(layer).weight
        torch.manual_seed(seed)
        parts: Any = {"lora_down": torch.randn(2, *weight.shape[1:]), "lora_up": torch.randn(len(weight), 2, *[1] * (weight.ndim - 2))}
        for state, head in zip(
            states, (f"lora_unet_{layer.replace('.', '_')}", f"lora_unet_{ours[layer]}", f"diffusion_model.{ours[layer]}"), strict=True
        ):
            state.update({f"{head}.{name}.weight": value for name, value in parts.items()})
    dotted = {k.replace(ours["conv_out"], "out.2"): v for k, v in states[2].items() if "out_2" in k}
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file, state in zip(files, (*states[:2], dotted), strict=True):
        save_file(state, file)
    right, sgm = (weights_of(load(base), file) for file in files[:2])
    plain = family.denoiser.state_dict()
    assert all(torch.equal(value, sgm[name]) for name, value in right.items())
    assert {name for name, value in right.items() if not torch.equal(value, plain[name])} == {
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
        "up_blocks.0.resnets.1.conv2.weight",
        "conv_out.weight",
    }
    assert torch.equal(weights_of(load(base), files[2])["conv_out.weight"], right["conv_out.weight"])


def test_a_bundle_brings_its_words_and_a_pickle_is_read_as_a_safetensors_file(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ldm.formats import pickles

    # The child itself has a test in test_embedding_files.py.
    monkeypatch.setattr(
        "ldm.formats.weights_file.convert", lambda source, target: save_file(pickles.weights(pickles.read(source))[0], target)
    )
    head = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {f"{head}.lora_down.weight": torch.ones(2, 16), f"{head}.lora_up.weight": torch.ones(16, 2)}
    torch.save(state, tmp_path / "old.pt")
    save_file(state, tmp_path / "new.safetensors")
    old, new = read(tmp_path / "old.pt"), read(tmp_path / "new.safetensors")
    assert all(torch.equal(a.up, b.up) for a, b in zip(old.pairs["unet"].values(), new.pairs["unet"].values(), strict=True))  # type: ignore[attr-defined]
    for word, key in (("my-word", "string_to_param.*"), ("red", "string_to_param")):
        rows = torch.randn(2, 32)
        save_file(state | {f"bundle_emb.{word}.{key}": rows}, tmp_path / "bundle.safetensors")
        family = load(base)
        before = family.text.encode([f"a {word}", "a reddish predator"])
        weights_of(family, tmp_path / "bundle.safetensors")
        after = family.text.encode([f"a {word}", "a reddish predator"])
        assert not torch.equal(before.tokens[0], after.tokens[0])
        assert word != "red" or torch.equal(before.tokens[1], after.tokens[1])
        table = family.text.model.get_input_embeddings().weight
        found = [i for i in family.text.words(f"a {word}") if bool((table[i] == rows).all(1).any())]
        assert len(found) == 2


def test_a_transformer_s_layers_are_its_own(tmp_path: Path) -> None:
    names = ("transformer_blocks.0.attn.to_q", "pos_embed.proj", "blocks.1.attn.to_k")
    pairs: Any = {name: Pair(torch.randn(2, 6), torch.randn(4, 2), 2.0) for name in names}
    lora = Lora(pairs={"unet": pairs}, network="transformer")
    [diffusers_file] = write(lora, tmp_path, "diffusers")
    assert {key.split(".")[0] for key in load_file(diffusers_file)} == {"transformer"}
    [peft_file] = write(lora, tmp_path, "peft")
    assert peft_file.parent.name == "transformer"
    (tmp_path / "anywhere").mkdir()
    for path in (diffusers_file, peft_file, peft_file.rename(tmp_path / "anywhere" / "x.safetensors")):
        if path.exists():
            assert read(path).pairs.keys() == {"unet"} and read(path).pairs["unet"].keys() == set(names)


def test_an_alpha_of_the_header_alone_is_told(tmp_path: Path) -> None:
    state = {f"{HEAD}.lora_down.weight": torch.ones(2, 4), f"{HEAD}.lora_up.weight": torch.ones(4, 2)}
    save_file(state, tmp_path / "x.safetensors", metadata={"ss_network_alpha": "1.0", "ss_network_dim": "2"})
    assert "its header tells alpha 1.0, but its weights none" in read(tmp_path / "x.safetensors").notes[0]
    save_file(state | {f"{HEAD}.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors", metadata={"ss_network_alpha": "1.0"})
    assert not read(tmp_path / "x.safetensors").notes
