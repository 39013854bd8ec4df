"""Figures in the pages are those that the commands compute."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ldm.config.schema import load
from ldm.runs.estimate import estimate
from ldm.runs.plan import make
from ldm.runs.run import Run, place
from ldm.training.settings import Train
from ldm.training.throughput import card, peak

ROOT = Path(__file__).parents[1]
PRESETS = sorted((ROOT / "configs" / "presets").glob("*lora-*gb.yaml"))
MFU = 0.35  # what `ldm plan` and docs/hardware.md take


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, header included."""
    lines = text.split(f"\n## {heading}\n")[1].splitlines()
    table = [line for line in lines[next(i for i, line in enumerate(lines) if line.startswith("|")) :]]
    end = next((i for i, line in enumerate(table) if not line.startswith("|")), len(table))
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[:end] if "|---" not in line]


def test_times_of_cards_follow_from_operations_and_peaks() -> None:
    header, *body = rows(page("hardware"), "Time for 1,000 pictures")
    cards = {"RTX 3090": 71, "RTX 4090": 165, "A100": 312, "H100": 989, "H200": 989}
    assert all(peak(f"NVIDIA {card}", "bf16") == told * 1e12 for card, told in cards.items())
    assert [int(re.findall(r"\((\d+)", cell)[0]) for cell in header[2:]] == [71, 165, 312, 989]
    for _, work, *seconds in body:
        wanted = [float(work.replace(",", "")) / (tflops * MFU) for tflops in (71, 165, 312, 989)]  # GFLOP · 1000 / (TFLOP/s)
        assert [float(cell) for cell in seconds] == [pytest.approx(value, rel=0.02) for value in wanted]
    counted = {row[0].strip("`"): row[-1] for row in rows(page("presets"), "Memory")}
    assert [row[1] for row in body[1:]] == [counted["sd1"], counted["sdxl"]]


def test_cards_by_name_are_those_that_plan_knows() -> None:
    work = [(1950, 2.8), (2407, 18.5), (20231, 59.4)]  # GFLOP a picture and GiB, as the tables above have them
    body = rows(page("hardware"), "Cards by name")[1:]
    assert len(body) > 20
    for name, memory, tflops, *seconds in body:
        found = card(name.strip("`"))
        assert (f"{found.memory / 1e9:.0f}", f"{found.half / 1e12:g}") == (memory, tflops), name
        for told, (gflop, needed) in zip(seconds, work, strict=True):
            if needed > 0.9 * found.memory / 2**30:
                assert told == "-", name
            else:
                assert float(told) == pytest.approx(gflop / (found.half / 1e12 * MFU), rel=0.05), name


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_memory_and_operations_of_lora(file: Path) -> None:
    run = load(file, [], Run)
    stage = run.stages["lora"]
    assert isinstance(stage, Train)
    needs = estimate(run).training(stage)
    memory = f"{sum(needs.memory(stage.micro_batch).values()) / 2**30:.1f} GiB"
    assert f"| `{file.stem}` " in page("finetune") and re.search(rf"`{file.stem}` \|[^|]*\| {re.escape(memory)} \|", page("finetune"))
    assert re.search(rf"{file.stem}\.yaml` \| {re.escape(memory)} \|", page("hardware"))
    if file.stem == "lora-6gb":
        found = make(place(run, file)[0], Path("runs/none"), tflops=100)
        [flops] = [one.flops for one in found.stages if one.name == "lora"]
        assert f"| {flops / 1e9:,.0f} |" in page("hardware")


def test_memory_of_all_weights_offloaded() -> None:
    for words, name in (([], "presets/full-6gb"), ([], "presets/full-10gb"), (["stages.tune.offload=true"], "finetune-sdxl-full")):
        run = load(ROOT / "configs" / f"{name}.yaml", words, Run)
        stage = run.stages["tune"]
        assert isinstance(stage, Train)
        needs = estimate(run).training(stage)
        device, machine = sum(needs.memory(stage.micro_batch or stage.batch).values()) / 2**30, needs.host_bytes / 2**30
        assert re.search(rf"configs/{name}\.yaml`[^|]*\| {device:.1f} GiB, and {machine:.0f} GiB", page("hardware")), (
            name,
            device,
            machine,
        )


@pytest.mark.slow
def test_the_plan_of_stable_diffusion_says_what_the_page_says() -> None:
    file = ROOT / "configs" / "sd1.yaml"
    run, out = place(load(file, ["data.path=pictures"], Run), file)
    found = make(run, out, processes=256, tflops=989 * MFU, samples=2_000_000_000)
    work = [stage for stage in found.stages if stage.kind in ("train", "encode")]
    hours = sum(stage.seconds for stage in found.stages) / 3600
    device = sum(stage.seconds for stage in work) * 256 / 3600
    checkpoint = max(stage.checkpoint_bytes for stage in work) / 2**30
    told = f"For the command above: {hours:.1f} hours, {device:,.0f} device hours, checkpoints of {checkpoint:.1f} GiB."
    assert told in " ".join(page("presets").split())
