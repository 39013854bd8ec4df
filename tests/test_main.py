"""`ldm VERB` as a user meets it: mistakes answer at once, in words, with exit code 2."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ldm import __main__ as entry
from ldm.config.errors import UserError
from ldm.config.manual import fields_of
from ldm.distributed import environment

ROOT = Path(__file__).parent.parent


def ldm(*words: str, folder: Path = ROOT) -> tuple[int, str, str, set[str]]:
    """Exit code, standard output, standard error and the top-level modules that a command imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run([sys.executable, "-m", "ldm", *words], cwd=folder, env=environment, capture_output=True, text=True)
    lines = done.stderr.splitlines(keepends=True)
    modules = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    return done.returncode, done.stdout, "".join(line for line in lines if not line.startswith("import time:")), modules


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "ldm trian: no such verb; did you mean train?"),
        (["train"], "ldm train: one CONFIG file is needed, got none"),
        (["train", "configs/quikstart.yaml"], "No such file or directory; did you mean configs/quickstart.yaml?"),
        (["train", "configs/quickstart.yaml", "--pln"], "--pln: no such option; there are --extend, --plan"),
        (["train", "configs/quickstart.yaml", "seed=[1", "x..y=2"], "x..y=2: a word is written PATH=VALUE"),
        (["sample", "--stps", "3"], "ldm sample: "),
        (["sample", "x", "--n", "0"], "--n"),
        (["evaluate"], "ldm evaluate: "),
        (["report", "/nowhere"], "ldm report: "),
    ],
)
def test_mistakes_answer_at_once(words: list[str], said: str) -> None:
    code, out, err, modules = ldm(*words)
    assert code == 2 and said in err and not out and "Traceback" not in err
    assert "ldm" in modules and not modules & {"torch", "diffusers", "transformers"}


def test_a_typo_in_a_configuration_is_found_before_any_work(tmp_path: Path) -> None:
    config = ROOT / "configs" / "quickstart.yaml"
    code, out, err, _ = ldm("train", str(config), "sed=1", "stages.text.imags=3", "models.diffusion.network.kind=unett", folder=tmp_path)
    assert code == 2 and not out and "Traceback" not in err and not list(tmp_path.iterdir())
    assert len(err.splitlines()) == 3 and all(hint in err for hint in ("mean seed?", "mean images?", "models.diffusion.network"))


def test_help_of_train_prints_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    from ldm.runs.run import Run

    assert entry.main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    for path, _, _, meaning in fields_of(Run):
        # The kind that a field belongs to is said by the heading above it.
        assert f"  {path} " in said and re.sub(r"^\[\w+\] ", "", meaning) in said
    assert "--plan" in said and "key=value" in said


@pytest.mark.parametrize("verb", entry.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([verb, "--help"]) == 0
    assert "--help" in capsys.readouterr().out


def verb_that(does: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ldm doctor` stands in for a verb that does this."""

    def main(words: list[str]) -> int:
        return does()

    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setitem(sys.modules, "ldm.cli.doctor", SimpleNamespace(main=main))


MORE = "close other programs, or use a machine with more"
FULL = "No space left on device; make room and run the same command again, what is finished is kept"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("size: got 3\nseed: got x"), 2, "ldm doctor: size: got 3\nseed: got x\n"),
        (KeyboardInterrupt(), 130, "ldm doctor: interrupted\n"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), 2, "ldm doctor: x.png: No such file or directory\n"),
        (OSError(28, "No space left on device"), 2, f"ldm doctor: {FULL}\n"),
        (MemoryError("Unable to allocate 9 GiB"), 2, f"ldm doctor: too little memory (Unable to allocate 9 GiB); {MORE}\n"),
        (MemoryError(), 2, f"ldm doctor: too little memory (MemoryError); {MORE}\n"),
        (RuntimeError("CUDA out of memory. Tried\nto"), 2, f"ldm doctor: too little memory (CUDA out of memory. Tried); {MORE}\n"),
    ],
)
def test_what_escapes_a_verb(
    error: BaseException, code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    verb_that(fail, monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("grid.png").touch()  # of the same ending, and not what is meant
    assert entry.main(["doctor"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("a library's own words")])
def test_bugs_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise error

    verb_that(fail, monkeypatch)
    with pytest.raises(type(error), match=str(error)):
        entry.main(["doctor"])


def test_a_verb_gives_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    verb_that(lambda: 7, monkeypatch)
    assert entry.main(["doctor"]) == 7


def test_an_interrupt_ends_a_verb_with_130() -> None:
    command = [sys.executable, "-m", "ldm", "sample", "--model", "owner/name"]
    # A shell that starts the tests in the background has them, and so this process, ignore interrupts.
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    waiting = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    time.sleep(1.5)  # it waits for prompts on standard input
    waiting.send_signal(signal.SIGINT)
    _, err = waiting.communicate(timeout=120)
    assert waiting.returncode == 130 and err == "ldm sample: interrupted\n"


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m ldm train --help | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage:") and not done.stderr


@pytest.mark.parametrize(("script", "verb"), [("train.py", "train"), ("sample.py", "sample")])
def test_root_scripts_call_their_verb(script: str, verb: str) -> None:
    done = subprocess.run([sys.executable, script, "--nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"ldm {verb}: ")


@pytest.mark.parametrize(
    "command",
    [
        ["train.py", "configs/quickstart.yaml"],
        ["sample.py", "a blue ring"],
        ["-m", "ldm", "sample", "a blue ring"],
        ["-m", "ldm", "doctor"],
        ["-m", "ldm", "train", "--help"],
    ],
)
def test_another_python_than_the_environments_is_told_in_one_line(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True)  # -S: nothing that was installed
    assert done.returncode == 2 and not done.stdout and len(done.stderr.splitlines()) == 1
    assert f"is not installed for {sys.executable}; run `" in done.stderr


def test_a_module_of_ours_that_is_missing_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> int:
        raise ModuleNotFoundError("No module named 'ldm.nowhere'", name="ldm.nowhere")

    verb_that(fail, monkeypatch)
    with pytest.raises(ModuleNotFoundError):
        entry.main(["doctor"])


def test_the_hub_is_asked_only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], str | None]] = []
    monkeypatch.delenv("LDM_HUB", raising=False)
    verb = SimpleNamespace(main=lambda words: seen.append((words, os.environ.get("LDM_HUB"))) or 0)
    monkeypatch.setitem(sys.modules, "verb", verb)  # type: ignore[arg-type]
    monkeypatch.setitem(entry.VERBS, "sample", ("verb", "does"))
    monkeypatch.setitem(entry.VERBS, "report", ("verb", "does"))
    assert entry.main(["sample", "a", "--", "--hub"]) == 0 and entry.main(["sample", "--hub", "a"]) == 0
    monkeypatch.delenv("LDM_HUB", raising=False)
    assert entry.main(["report", "a", "--hub"]) == 0  # which opens no model, and so refuses the word
    assert seen == [(["a", "--", "--hub"], None), (["a"], "1"), (["a", "--hub"], None)] and "--hub" in entry.usage()
