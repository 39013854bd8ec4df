"""Presets by name: their published sizes, what may be written beside a name, and where the files are found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config.errors import UserError
from ldm.config.introspection import preset_names
from ldm.config.schema import build, dump, load, named
from ldm.families.autoencoder import KL, VQ
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.families.registry import Model
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.dit import DiTConfig
from ldm.models.mmdit import MMDiTConfig
from ldm.models.unet import UNetConfig

# Published by, or counted from the configurations of, CompVis/latent-diffusion, CompVis/stable-diffusion, runwayml and Stability AI.
UNETS = {
    "sd1": 859_520_964,
    "sd1-inpaint": 859_535_364,
    "sd2": 865_910_724,
    "sdxl": 2_567_463_684,
    "ldm-text2img-1.45B": 872_300_484,
    "ldm-text2img-256": 403_623_939,
    "ldm-cin256": 400_920_579,
}
TRANSFORMERS = {"pixart-alpha": 610_837_648, "sd3-medium": 2_028_328_000, "sd3.5-medium": 2_243_171_520, "sd3.5-large": 8_056_627_520}
KLS = {"kl-f4": 55_312_063, "kl-f8": 83_653_863, "kl-f8-16ch": 83_819_683, "kl-f16": 69_610_963, "kl-f32": 103_880_131}
VQS: dict[str, int | None] = {"vq-f4": 55_298_206, "vq-f8": 67_651_759, "vq-f16": None}  # without the codebook


def preset(kind: Any, word: Any) -> Any:
    owner = {UNetConfig: LatentDiffusion, KLConfig: KL, VQConfig: VQ}[kind]
    return build({"network": word}, owner, "test").network


def parameters(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def test_every_shipped_preset_is_in_the_tables() -> None:
    assert (
        set(preset_names(UNetConfig)) == set(UNETS) and set(preset_names(KLConfig)) == set(KLS) and set(preset_names(VQConfig)) == set(VQS)
    )
    files = {p.stem for p in (Path(__file__).parents[2] / "configs" / "models").glob("*.yaml")}
    assert set(preset_names(DiTConfig)) | set(preset_names(MMDiTConfig)) == set(TRANSFORMERS)
    assert files == {*UNETS, *TRANSFORMERS, *KLS, *VQS}


@pytest.mark.parametrize("name", UNETS)
def test_unets_have_the_published_number_of_parameters_and_diffusers_counts_the_same(name: str) -> None:
    from diffusers import UNet2DConditionModel

    made = preset(UNetConfig, name)
    with torch.device("meta"):
        assert parameters(made.build()) == UNETS[name]
        assert parameters(UNet2DConditionModel.from_config(made.to_diffusers())) == UNETS[name]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_have_the_published_number_of_parameters_and_diffusers_counts_the_same(name: str) -> None:
    import diffusers

    made = build({"network": name}, LatentDiffusion, "test").network
    said = made.to_diffusers()
    with torch.device("meta"):
        assert parameters(made.build()) == TRANSFORMERS[name]
        assert parameters(getattr(diffusers, said["_class_name"]).from_config(said)) == TRANSFORMERS[name]


@pytest.mark.parametrize("name", KLS)
def test_kl_autoencoders_have_the_published_number_of_parameters_and_diffusers_counts_the_same(name: str) -> None:
    from diffusers import AutoencoderKL

    made = preset(KLConfig, name)
    with torch.device("meta"):
        ours = made.build()
        assert parameters(ours) == KLS[name]
        assert parameters(AutoencoderKL.from_config(made.to_diffusers())) == KLS[name]
    assert ours.factor == int(name.split("-f")[1].split("-")[0])


@pytest.mark.parametrize("name", VQS)
def test_vq_autoencoders_have_the_published_number_of_parameters_and_diffusers_counts_the_same(name: str) -> None:
    from diffusers import VQModel

    made = preset(VQConfig, name)
    with torch.device("meta"):
        ours = made.build()
        theirs = VQModel.from_config(made.to_diffusers())
    assert parameters(ours) == parameters(theirs)
    assert VQS[name] in (None, parameters(ours) - made.codes * made.code_width)
    assert ours.factor == int(name.split("-f")[1])


def test_parts_of_kl_f8_are_as_published() -> None:
    with torch.device("meta"):
        network = preset(KLConfig, "kl-f8").build()
    assert parameters(network.encoder) == 34_163_592 and parameters(network.decoder) == 49_490_179
    assert parameters(network.quant_conv) + parameters(network.post_quant_conv) == 92


# Names


def test_a_word_names_a_preset_and_fields_may_stand_beside_it() -> None:
    assert preset(UNetConfig, "sd1") == UNetConfig()
    assert preset(UNetConfig, {"preset": "sd1", "dropout": 0.1}) == UNetConfig(dropout=0.1)
    assert preset(UNetConfig, "sd1-inpaint").in_channels == 9


def run_file(tmp_path: Path, text: str, *words: str) -> Any:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, words, LatentDiffusion)


def test_words_lay_fields_over_a_preset_in_any_order(tmp_path: Path) -> None:
    wanted = UNetConfig(dropout=0.1, heads=4)
    assert run_file(tmp_path, "network: sd1", "network.dropout=0.1", "network.heads=4").network == wanted
    assert run_file(tmp_path, "{}", "network=sd1", "network.dropout=0.1", "network.heads=4").network == wanted
    assert run_file(tmp_path, "network: {preset: sd2, dropout: 0.1, heads: 4}", "network.preset=sd1").network == wanted
    assert run_file(tmp_path, "network: {channels: [32, 32]}", "network=sd1").network == UNetConfig()


def test_the_resolved_configuration_holds_values_not_the_name(tmp_path: Path) -> None:
    made = run_file(tmp_path, "network: sd2")
    text = dump(made)
    assert "sd2" not in text and "linear_projection: true" in text
    assert run_file(tmp_path, text) == made


def test_a_changed_kind_of_autoencoder_takes_its_own_preset(tmp_path: Path) -> None:
    made: Any = build({"kind": "kl", "network": "kl-f16"}, Model, "test")  # type: ignore[arg-type]
    assert isinstance(made, KL) and made.network.latent_channels == 16
    made = build({"kind": "vq", "network": "vq-f4"}, Model, "test")  # type: ignore[arg-type]
    assert isinstance(made, VQ) and made.network.codes == 8192


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("sd3", "run.yaml: network: got 'sd3'; did you mean sd"),
        ("{preset: sd9}", "network.preset: got 'sd9'"),
        ("kl-f8", "network: got 'kl-f8'"),
        ("../models/sd1", "network: got '../models/sd1'"),
        ("7", "network: got 7; it should be a mapping of fields"),
        ("{preset: sd1, drop: 0.1}", "network.drop: unknown field; did you mean dropout?"),
    ],
)
def test_a_name_that_is_none_is_told_with_those_that_are(tmp_path: Path, value: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        run_file(tmp_path, f"network: {value}")
    assert said in str(error.value) and "\n" not in str(error.value)
    if "sd9" in value or "kl-f8" in value:
        assert "ldm-text2img-1.45B" in str(error.value) and "kl-f16" not in str(error.value)


def test_mistakes_beside_a_wrong_name_are_told_too(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        run_file(tmp_path, "{network: sd0, caption_dropout: 2}")
    assert "caption_dropout" in str(error.value) and "sd0" in str(error.value)


def test_a_class_without_presets_takes_no_word() -> None:
    @named("nothing has this")
    class Bare:
        pass

    assert preset_names(Bare) == {} and preset_names(LatentDiffusion) == {} and preset_names(int) == {}


def test_wheels_carry_the_files_where_the_package_looks_for_them() -> None:
    import tomllib

    from ldm.config.introspection import CONFIGS, PACKAGE

    root = PACKAGE.parent
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included["configs"] == "ldm/configs" and root / "configs" == CONFIGS


def test_the_page_tells_the_same_counts() -> None:
    page = (Path(__file__).parents[2] / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    told = {row[0].strip("`"): row[1:] for row in rows if len(row) == 10}
    assert set(told) == {*UNETS, *KLS, *VQS}
    for name, (said, full, half, state, *_) in told.items():
        count = int(said.replace(",", ""))
        assert any(row[0] == f"`{name}`" and row[1] == said for row in rows if len(row) in (4, 5))
        assert count == (UNETS | KLS).get(name, count)
        assert [full, half, state] == [f"{4 * count / 2**30:.2f}", f"{2 * count / 2**30:.2f}", f"{20 * count / 2**30:.1f}"]
