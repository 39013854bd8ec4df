"""What a file or an environment holds and nobody may be told: control codes, secrets, and where a run was made."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.__main__ import main
from ldm.config.secrets import cleaned, redacted, secrets, unplaced
from ldm.config.terminal import CONTROL, Guarded, guarded, raw, shown
from ldm.training.log import LOG, Log
from tests.ends_soon import ends_soon

ESCAPES = "\x1b]0;pwn\x07\x1b[2J\x9b31m\u202eabc\r\ud800"

# Control codes


def test_control_codes_are_shown() -> None:
    assert shown(f"a\tb\n{ESCAPES}é") == "a\tb\n\\u001b]0;pwn\\u0007\\u001b[2J\\u009b31m\\u202eabc\\u000d\\ud800é"
    assert shown("a\r\nb") == "a\nb"
    assert json.loads(shown(json.dumps(ESCAPES, ensure_ascii=False))) == ESCAPES


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_nothing_shown_is_obeyed(text: str) -> None:
    assert not CONTROL.search(shown(text))
    shown(text).encode()


def test_a_bar_stays_in_its_line_and_rich_goes_past(monkeypatch: pytest.MonkeyPatch) -> None:
    behind = io.StringIO()
    stream: Any = Guarded(behind)
    print("\r 10%|#", ESCAPES[:3], end="", file=stream)
    stream.writelines(["a\x1b"])
    assert behind.getvalue() == "\r 10%|# \\u001b]0a\\u001b" and raw(stream) is behind and raw(behind) is behind
    from rich.console import Console

    monkeypatch.setattr(sys, "stderr", stream)
    Console(stderr=True, force_terminal=True, color_system="standard", no_color=False).print("[red]x[/red]")
    assert "\x1b[31mx" in behind.getvalue()
    with guarded():
        assert sys.stderr is stream  # not twice


def test_every_verb_shows_what_files_say(tmp_path: Path, kl_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image, PngImagePlugin
    from safetensors.torch import save_file

    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("parameters", f"a ring{ESCAPES[:-1]}\nSteps: 3, Seed: 1, Size: 32x32, Model: \x1b[31mM")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png", pnginfo=texts)
    save_file({f"{ESCAPES[:-1]}.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    (tmp_path / "a.yaml").write_text('"\\e]0;pwn\\a\\e[2J": 1')
    draw = ["sample", "--model", str(kl_model), "--out", str(tmp_path / "out"), "--steps", "1"]
    for words in (
        ["info", str(tmp_path / "a.png")],
        ["info", str(tmp_path / "a.png"), "--json"],
        [*draw, "--from", str(tmp_path / "a.png"), "--sampler", "ddim"],
        [*draw, "x", "--lora", str(tmp_path / "a.safetensors")],
        ["sample", "x", "--model", str(tmp_path / "a.safetensors")],
        ["train", str(tmp_path / "a.yaml"), "--plan"],
        [f"ver{ESCAPES}"],
        ["data", "check", str(tmp_path / f"no{ESCAPES[:-1]}")],
    ):
        main(words)
        said = "".join(capsys.readouterr())
        assert said and not CONTROL.search(said.replace("\r", "")), words
        if "--json" in words:
            json.loads(said)
    assert not isinstance(sys.stdout, Guarded)


def test_a_terminal_that_lacks_a_character(tmp_path: Path) -> None:
    name = "é\ud800".encode("utf-8", "surrogatepass")
    words = [sys.executable, "-m", "ldm", "train", os.fsdecode(name)]
    done = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii:strict"}, timeout=120)
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"ldm train: " in done.stderr


# Secrets

NAMES = {
    "GITHUB_PAT": True,
    "PGPASSWORD": True,
    "SLACK_WEBHOOK": True,
    "SLACK_WEBHOOK_URL": True,
    "SENTRY_DSN": True,
    "SMTP_PASS": True,
    "GHTOKEN": True,
    "SSH_PASSPHRASE": True,
    "AZURE_STORAGE_CONNECTION_STRING": True,
    "MY_API_KEYS": True,
    "WANDB_API_KEY": True,
    "PATH_X": False,
    "COMPASS": False,
    "MONKEY": False,
    "PATIENCE": False,
    "TOKENIZERS_PARALLELISM": False,
    "AUTHOR": False,
    "KEYBOARD": False,
}
VALUE = 'p@ss w/ö+rd"\\x&=%41'


@pytest.mark.parametrize("name", NAMES)
def test_names_that_are_secret(name: str) -> None:
    assert secrets({name: "marked-value"}) == (["marked-value"] if NAMES[name] else [])


def test_passwords_of_addresses_in_any_variable() -> None:
    environment = {"DATABASE_URL": "postgres://user:marked-word@host/db", "OTHER": "http://host/marked"}
    assert redacted("login with marked-word failed", environment) == "login with *** failed"


@pytest.mark.parametrize(
    "spelt",
    [
        VALUE,
        quote(VALUE),
        quote(VALUE, safe=""),
        quote_plus(VALUE),
        quote(VALUE, safe="").lower(),
        json.dumps(VALUE)[1:-1],
        json.dumps(VALUE, ensure_ascii=False)[1:-1],
        repr(VALUE)[1:-1],
    ],
)
def test_a_secret_in_any_spelling(spelt: str) -> None:
    assert redacted(f"GET /x?q={spelt};", {"GITHUB_PAT": VALUE}) == "GET /x?q=***;"


def test_redaction_takes_linear_time() -> None:
    for text in ("a" * 1_000_000, "a://" * 250_000, "?token" * 170_000, "a:b@" * 250_000, "/a" * 500_000):
        with ends_soon():
            unplaced(redacted(text, {"GITHUB_PAT": "aaaaaaaaab"}))


def test_a_plan_refuses_a_secret_and_tells_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_PAT", "marked-value")
    for words in (["plan", "configs/quickstart.yaml"], ["train", "configs/quickstart.yaml", "--plan"]):
        assert main([*words, "name=marked-value"]) == 2
        said = "".join(capsys.readouterr())
        assert "name: holds a password" in said and "marked" not in said
        assert main([*words, "data.tier=marked-value"]) == 2
        assert "marked" not in "".join(capsys.readouterr())


# Where a run was made

HOST = "named-machine"


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A home folder with a blank in its name, on a machine with a name."""
    home = tmp_path / "al ice"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    return home


def test_paths_and_machines(place: Path) -> None:
    told = {
        f"reading {place}/pics/a.png on {HOST}": "reading ~/pics/a.png on ***",
        f"{HOST}.local, un{HOST}": f"***.local, un{HOST}",
        "/data/secret dir/x.png": "…/secret dir/x.png",
        "'/mnt/disk/set/00000.tar': damaged": "'…/00000.tar': damaged",
        "C:\\Users\\al\\x.png": "…/x.png",
        "https://host/a/b.png 3/4 a/b runs/x/model and/or /data": "https://host/a/b.png 3/4 a/b runs/x/model and/or /data",
        "12,000 images/s, ~/x": "12,000 images/s, ~/x",
    }
    assert {text: unplaced(text) for text in told} == told
    assert cleaned({"note": ["/a/b/c"]}) == {"note": ["…/c"]}
    for text in told.values():
        assert unplaced(text) == text


def test_log_report_and_trackers_do_not_tell(place: Path) -> None:
    from ldm.runs.report import report

    folder = place / "runs" / "one"
    log = Log(folder, tracker="tensorboard")
    log.note(f"data: {place}/pics with 3 images, read on {HOST}; half a character: \ud800")
    log.record({"failed": f"{place}/pics/a.png: gone"})
    with log.stage("tune", 8, 0) as stage:
        stage.step(step=1, images=8, terms={"loss": 1.0}, gauges={}, lr=1e-3)
        stage.pictures(folder / "stages" / "tune" / "samples" / "8.png")
    log.close()
    (folder / "config.yaml").write_text(f"data: {{kind: folder, path: '{place}/pics'}}\nstages: {{tune: {{kind: train, model: m}}}}\n")
    report(folder)
    assert '"pictures": "stages/tune/samples/8.png"' in (folder / LOG).read_text()
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "config.yaml"]
    assert {"report.html", LOG} < {file.name for file in files} and len(files) > 2
    for file in files:
        for word in (str(place), place.name, HOST):
            assert word.encode() not in file.read_bytes() and word not in file.name, (file, word)
    assert np.all([file.stat().st_size for file in files])
