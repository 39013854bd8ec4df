"""ldm plan: the order of samples at sizes that nobody has here, what a run costs there, and what is refused."""

from __future__ import annotations

import json
import re
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.data.order import ShuffledBatches
from ldm.runs import simulation
from ldm.runs.simulation import simulate
from ldm.training.throughput import card


@pytest.mark.slow
def test_two_thousand_million_samples_on_256_processes() -> None:
    found = simulate(2 * 10**9, 2048, 256)
    assert found.right and found.drawn == 1_000_000 and found.small == 50_000


def test_memory_does_not_depend_on_how_many_samples_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "DRAWN", 100_000)
    monkeypatch.setattr(simulation, "SMALL", 5_000)

    def most(samples: int) -> int:
        tracemalloc.start()
        assert simulate(samples, 256, 8).right
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert most(10**12) < 1.5 * most(10**6)


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 5), st.sampled_from([1, 2, 3, 8]), st.integers(0, 2**63))
def test_every_small_order_is_right(samples: int, share: int, processes: int, seed: int) -> None:
    found = simulate(samples, share * processes, processes, seed)
    assert found.right and found.drawn == found.small == samples


def test_what_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "SMALL", 500)
    monkeypatch.setattr(simulation, "DRAWN", 2000)
    monkeypatch.setattr(ShuffledBatches, "numbers", lambda self, position: position // 2 * 2 % self.samples)  # half of them twice
    found = simulate(10_000, 16, 4)
    assert not found.right and found.repeated > 0 and found.small_wrong == 500
    monkeypatch.setattr(ShuffledBatches, "numbers", lambda self, position: position + 9_000)
    assert simulate(10_000, 16, 4).outside > 0


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="batch: 10 images cannot be shared equally by 4 processes"):
        simulate(100, 10, 4)


@pytest.mark.slow
def test_as_a_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "DRAWN", 2000)
    monkeypatch.setattr(simulation, "SMALL", 2000)
    words = ["plan", "configs/quickstart.yaml", "--samples", "1e6", "--peak", "100", "--mfu", "0.5", "--price", "2", "--disk", "2"]
    assert main([*words, "--processes", "8"]) == 0
    said = capsys.readouterr().out
    assert "at 8 processes of 50 TFLOP/s" in said and "order of 1,000,000 samples, batch 64 on 8 processes: right" in said
    assert main([*words, "--processes", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(each["right"] and each["samples"] == 10**6 for each in found["order"])
    by_name = {stage["name"]: stage for stage in found["stages"]}
    for one in found["costs"]:
        hours = by_name[one["stage"]]["seconds"] * 8 / 3600
        assert one["device_hours"] == pytest.approx(hours) and one["price"] == pytest.approx(2 * hours)
        assert one["save_seconds"] == pytest.approx(one["checkpoint_bytes"] / 2e9) and one["data_shards"] in (0, 100)
    assert main(["plan", "configs/quickstart.yaml", "data.images=100"]) == 0  # of this launch, with the data as it is
    assert "order of 100 samples" in capsys.readouterr().out


@pytest.mark.slow
def test_a_card_that_is_not_here_gives_speed_and_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "DRAWN", 2000)
    monkeypatch.setattr(simulation, "SMALL", 2000)
    words = ["plan", "configs/quickstart.yaml", "data.images=100", "stages.text.precision=fp32", "--mfu", "0.5", "--json"]
    assert main([*words, "--device", "NVIDIA h100", "--nodes", "2", "--gpus", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    by_name = {stage["name"]: stage for stage in found["stages"]}
    assert found["processes"] == 8 and found["tflops"] == pytest.approx(0.5 * 989)
    for name, peak in (("text", 67e12), ("diffusion-low", 989e12)):
        stage = by_name[name]
        assert stage["seconds"] == pytest.approx(stage["flops"] * stage["images"] / (8 * 0.5 * peak))
        assert stage["memory_of_device"] == 80e9
    words = ["plan", "configs/quickstart.yaml", "data.images=100", "stages.diffusion-high.batch=32768"]
    assert main([*words, "--device", "t4"]) == 0
    said = capsys.readouterr().out
    assert "fits: " in said
    limit = int(re.search(r"does not fit: .* a micro_batch of (\d+) or less does", said)[1])  # type: ignore[index]
    while 32768 % limit:
        limit -= 1
    assert main([*words, f"stages.diffusion-high.micro_batch={limit}", "--device", "t4"]) == 0
    assert "does not fit" not in capsys.readouterr().out


def test_cards_of_one_number_are_told_apart() -> None:
    said = {
        "3060": 12,
        "RTX 3060 Ti": 8,
        "4070": 12,
        "geforce rtx 4070 ti super": 16,
        "4070ti": 12,
        "4070 Super": 12,
        "5090": 32,
        "5070-ti": 16,
    }
    assert {name: card(name).memory / 1e9 for name in said} == said
    assert card("4070ti").half > card("4070 super").half > card("4070").half
    assert card("NVIDIA GeForce RTX 4080").half == 97.5e12
    with pytest.raises(UserError, match="known are"):
        card("RTX 4070 Laptop GPU")


@pytest.mark.parametrize("name", ["h200", "RTX 4090", "4090", "A100-40GB", "NVIDIA A100-SXM4-80GB", "nvidia_l40s"])
def test_cards_are_known_as_people_and_drivers_call_them(name: str) -> None:
    assert card(name).memory == {"h200": 141e9, "A100-40GB": 40e9, "nvidia_l40s": 48e9}.get(name, 80e9 if "80GB" in name else 24e9)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--device", "voodoo"], "device: got 'voodoo'; known are"),
        (["--device", "h100", "--peak", "989"], "device: says how fast it is"),
        (["--nodes", "2"], "give --device"),
        (["--device", "h100", "--nodes", "2", "--processes", "2"], "in place of --processes"),
        (["--gpus", "2"], "give --nodes, too"),
        (["--samples", "many"], "samples: got 'many'"),
        (["--samples", "2.5"], "samples: got '2.5'"),
        (["--tflops", "1", "--peak", "2"], "not together"),
        (["--processes", "0"], "processes"),
        (["--processes", "3"], "cannot be shared"),
        (["stages.text.imgaes=1"], "did you mean images"),
    ],
)
def test_mistakes_are_one_line(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "configs/quickstart.yaml", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said
