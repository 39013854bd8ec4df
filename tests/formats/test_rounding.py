"""Rounding loses digits only, and what comes back from disk is compared without mercy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldm.config.errors import UserError
from ldm.formats.rounding import DTYPES, compared, mapped, rounded, size_text


def weights() -> dict[str, torch.Tensor]:
    spread = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 4, 4000)
    return {"a": spread, "b": torch.tensor([1.0, 2.0, 0.5, 0.0]), "ids": torch.arange(3)}


@pytest.mark.parametrize("name", DTYPES)
def test_rounding_to_the_nearest_is_within_the_bound_and_no_more(name: str) -> None:
    source = weights()
    found = rounded("unet", source, name)
    assert found["a"].dtype == DTYPES[name] and found["ids"].dtype == torch.int64
    told = compared("unet", source, found, name, "here")
    assert told.max_error == (source["a"] - found["a"].float()).abs().max().item()
    assert (told.max_error == 0) == (name == "fp32")
    assert told.tensors == 3 and told.bytes == 4004 * DTYPES[name].itemsize + 24
    # One step to the next number of that precision is found anywhere, large or subnormal.
    for place in (0, 1000, 2000, 3999):
        next_one = {**found, "a": found["a"].clone()}
        next_one["a"].view(torch.int32 if name == "fp32" else torch.int16)[place] += 1
        with pytest.raises(UserError, match=r"here: unet: a came back different by .*export again"):
            compared("unet", source, next_one, name, "here")


def test_what_is_missing_left_over_of_another_shape_or_type_is_named() -> None:
    source = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(UserError, match="b is missing or left over"):
        compared("vae", source, {"a": torch.ones(2)}, "fp32", "file")
    with pytest.raises(UserError, match=r"b came back as float32 \[1, 2\], not float32 \[2\]"):
        compared("vae", source, {"a": torch.ones(2), "b": torch.ones(1, 2)}, "fp32", "file")
    with pytest.raises(UserError, match=r"a came back as float32 \[2\], not float16 \[2\]"):
        compared("vae", source, source, "fp16", "file")
    with pytest.raises(UserError, match="b came back different by nan"):
        compared("vae", source, {"a": torch.ones(2), "b": torch.full((2,), torch.nan)}, "fp32", "file")


def test_too_large_for_half_precision_and_not_finite_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="unet: a reaches 70000, but fp16 ends at 65504; export it with --dtype bf16 or fp32"):
        rounded("unet", {"a": torch.tensor([1.0, -70000.0])}, "fp16")
    assert rounded("unet", {"a": torch.tensor([70000.0])}, "bf16")["a"].isfinite().all()
    with pytest.raises(UserError, match="unet: a holds values that are not finite"):
        rounded("unet", {"a": torch.tensor([torch.nan])}, "fp32")


def test_a_file_that_cannot_be_read_back_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x10" + bytes(40))
    with pytest.raises(UserError, match=r"a.safetensors: cannot be read back .*export again"):
        mapped([tmp_path / "a.safetensors"])


def test_bytes_for_people() -> None:
    assert [size_text(n) for n in (12, 1234, 999_900, 3_438_000_000)] == ["12 bytes", "1.23 kB", "1000 kB", "3.44 GB"]


def test_the_pickle_is_the_only_one() -> None:
    """No other file of the package writes one, but for weights that were read safely, on their way to torch-fidelity alone."""
    package = Path(__file__).parents[2] / "ldm"
    writers = {file.name for file in package.rglob("*.py") if "torch.save(" in file.read_text() or "pickle.dump" in file.read_text()}
    assert writers == {"extractors.py", "pickles.py"}
