"""Every command of README and of the pages runs, in the order of its page, beside a cut-down quickstart.

A page runs in a folder that looks like a clone with what a reader has: `runs/quickstart`, and the reader's own `pictures/` and
`laion/`. Commands of ldm run in this process, the others in bash; trainings are cut down to a few pictures. What cannot run here
says why in the page's source, in a comment above the block (`<!-- not run: gpu -->`), and is listed as skipped (`pytest -rs`).
"""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ELSEWHERE = {"development.md"}  # runs in test_development_page.py
REASONS = {
    "gpu": "needs GPUs, or a network of published size",
    "cluster": "needs several machines",
    "network": "fetches something",
    "installs": "changes the environment",
    "processes": "starts several processes: see tests/system/test_distributed.py",
    "minutes": "an experiment of minutes or hours",
    "page": "asks a page that is open: see tests/demo/test_api.py",
    "size": "counts networks of published size: see test_docs_figures.py",
}
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^>]*?) -->\n\n?)?^```(?P<language>bash|python)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
FEW = {"--images": "32", "--frames": "6"}  # options that make work, in small
TINY = [
    "models.text.text.width=32",
    "models.autoencoder.network.channels=[8,8,8,8]",
    "models.diffusion.network.channels=[32,32,32]",
    "models.diffusion.network.heads=1",
    "models.diffusion.defaults.steps=2",
    "models.tokens.network.width=32",
    "models.tokens.defaults.steps=2",
]


@dataclass(frozen=True)
class Block:
    """A block of commands or of Python in a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in its order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("language")) + 1, found["language"], found["text"], found["reason"])
        for found in BLOCK.finditer(text)
    ]


ALL = [block for page in PAGES for block in blocks(page)]


def commands(text: str) -> Iterator[str]:
    """The commands of a block: lines, with what they go on in, and texts that are written into a file."""
    waiting = iter(text.splitlines(keepends=True))
    for line in waiting:
        command = line
        while command.endswith("\\\n"):
            command += next(waiting)
        if ending := re.search(r"<<'?(\w+)'?", command):
            for line in waiting:
                command += line
                if line.strip() == ending[1]:
                    break
        if command.strip() and not command.startswith("#"):
            yield command.strip()


def ours(command: str) -> list[str] | None:
    """The words behind `ldm` of a command that is ldm's; None: another program's."""
    if "<<" in command:
        return None
    words = shlex.split(command, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[:1] == ["ldm"]:
        return words[1:]
    if words[:1] != ["python"]:
        return None
    if words[1:3] == ["-m", "ldm"]:
        return words[3:]
    return [Path(words[1]).stem, *words[2:]] if words[1] in ("train.py", "sample.py") else None


def smaller(words: list[str]) -> list[str]:
    """Words that cut a training down to a few pictures."""
    from ldm.config.schema import read

    files = [word for word in words if "=" not in word and not word.startswith("-")]
    values = read(Path(files[0]), [word for word in words if "=" in word])
    cut = []
    if values.get("data", {}).get("kind") == "scenes":
        cut += [f"data.images={min(32, values['data']['images'])}", "data.val=8"]
    if values.get("prior_preservation"):
        cut += ["prior_preservation.images=2"]
    if not values.get("init"):
        cut += [word for word in TINY if word.split(".")[1] in values["models"]]
    for name, stage in values["stages"].items():
        if stage and stage["kind"] == "train":
            cut += [f"stages.{name}.{field}" for field in ("batch=8", "samples=2")]
            longer = "--extend" in words and any(word.startswith(f"stages.{name}.images=") for word in words)
            cut += [f"stages.{name}.images={32 if longer else 16}"]
        elif stage and stage["kind"] == "evaluate":
            cut += [f"stages.{name}=null"]
    return cut


def run(command: str, folder: Path) -> None:
    """Run a command of a page in a folder; it must succeed."""
    from ldm.__main__ import main

    words = ours(command)
    if words is None:
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return
    if words[:1] == ["demo"]:  # a server, which does not end: its own tests start it
        words = ["demo", "--help"]
    words = [FEW.get(words[i - 1], word) if i else word for i, word in enumerate(words)]
    if words[:1] == ["evaluate"]:
        words = [word if words[i - 1] != "--n" else "4" for i, word in enumerate(words)] + ["--images", "4"]
    if words[:1] == ["train"] and not {"--plan", "--help"} & set(words):
        words += smaller(words[1:])
    assert main(words) == 0, command


def pictures(folder: Path) -> None:
    """A reader's pictures, with captions beside them."""
    from PIL import Image

    folder.mkdir()
    draw = random.Random(0)
    for number in range(16):
        noise = Image.frombytes("RGB", (9, 7), draw.randbytes(189)).resize((96 + 8 * (number % 3), 80))
        noise.save(folder / f"photo_{number}.jpg")
        (folder / f"photo_{number}.txt").write_text(
            f"a photo of a {['harbour', 'hill', 'garden', 'street'][number % 4]}\n", encoding="utf-8"
        )


def laion(folder: Path) -> None:
    """A table of links."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    rows = range(8)
    columns = {
        "URL": [f"http://example.org/{row}.jpg" for row in rows],
        "TEXT": [f"picture {row}" for row in rows],
        "WIDTH": [640] * 8,
        "HEIGHT": [512 + row for row in rows],
        "punsafe": [0.1] * 8,
        "pwatermark": [0.2] * 8,
        "aesthetic": [5.5] * 8,
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "part-0.parquet")


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's clone after the quickstart: made once, for all processes of a test run."""
    from filelock import FileLock

    shared = tmp_path_factory.getbasetemp()
    shared = (shared.parent if os.environ.get("PYTEST_XDIST_WORKER") else shared) / "reader"
    with FileLock(f"{shared}.lock"):
        if not shared.exists():
            making = shared.with_name("reader.making")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            for name in ("configs", "docs", "ldm", "train.py", "sample.py"):
                (making / name).symlink_to(ROOT / name)
            pictures(making / "pictures")
            laion(making / "laion")
            before = Path.cwd()
            os.chdir(making)
            try:
                run("python train.py configs/quickstart.yaml", making)
            finally:
                os.chdir(before)
            making.rename(shared)
    return shared


# Two minutes of one core with the model that they share; the others take a quarter of a minute and more each (`make test-soak`).
NORMAL = {"README.md", "python.md", "conditions.md", "data.md", "demo.md", "export.md", "gallery.md", "models.md", "tokens.md"}
RUN = [
    pytest.param(page, id=page.name, marks=pytest.mark.slow if page.name in NORMAL else pytest.mark.soak)
    for page in PAGES
    if page.name not in ELSEWHERE and any(block.reason is None for block in blocks(page))
]


@pytest.mark.parametrize("page", RUN)
def test_the_page_runs_as_it_is_written(page: Path, reader: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "clone"
    shutil.copytree(reader, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LDM_HUB", raising=False)
    known: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), known)
            continue
        for command in commands(block.text):
            if not command.startswith("source "):  # the environment is this one
                run(command, folder)


@pytest.mark.parametrize("block", [block for block in ALL if block.reason is not None], ids=str)
def test_what_is_not_run_says_why(block: Block) -> None:
    assert block.reason in REASONS, f"{block}: not run: {block.reason}; known are {', '.join(REASONS)}"
    pytest.skip(f"{block}: {REASONS[block.reason]}")


FILES = {"grid": ("--out",), "animate": ("--out",), "sample": ("--grid",), "export": ("--out",), "classifier": ("--out",)}
OURS = [
    (block, words, block.page.name == "README.md")
    for block in ALL
    if block.language == "bash" and block.page.name not in ELSEWHERE
    for command in commands(block.text)
    if (words := ours(command))
]


def test_no_page_writes_a_file_that_another_one_wrote() -> None:
    """Who reads on in the same folder: what writes a file refuses one that is there."""
    files = [
        (word, str(block))
        for block, words, _ in OURS
        for before, word in zip(words, words[1:], strict=False)
        if before in FILES.get(words[0], ())
    ]
    twice = {file: places for file, _ in files if len(places := [place for name, place in files if name == file]) > 1}
    assert files and twice == {}


def test_pages_name_the_model_that_they_draw_with() -> None:
    """Who reads on has trained other models since the quickstart, and the newest is drawn with unless one is named."""
    unnamed = [
        (str(block), " ".join(words))
        for block, words, first in OURS
        if words[0] in ("sample", "grid", "animate", "classifier") and not first and "--model" not in words
    ]
    assert unnamed == []


PAIR = re.compile(r"\b(red|green|blue|yellow|pink|cyan|orange|purple) (circle|square|triangle|diamond|cross|ring)\b")
TAUGHT_THERE = {"cyan cross": "configs/finetune-lora.yaml", "red cross": "configs/finetune-lora.yaml"} | {
    "cyan circle": "configs/finetune-dreambooth.yaml"
}


def test_examples_ask_for_what_the_model_was_taught() -> None:
    from ldm.data.scenes.spec import SEEN, pairs_of

    said = {str(block): "\n".join(commands(block.text)) for block in ALL if block.page.name not in ELSEWHERE}
    said |= {str(file): file.read_text(encoding="utf-8") for file in [ROOT / "sample.py", ROOT / "ldm" / "__main__.py"]}
    said |= {
        str(file): file.read_text(encoding="utf-8")
        for file in [*(ROOT / "ldm" / "cli").glob("*.py"), *(ROOT / "ldm" / "sampling").glob("*.py")]
    }
    withheld = [
        (where, pair[0])
        for where, text in said.items()
        for pair in PAIR.finditer(text)
        if pair[0] not in TAUGHT_THERE and pairs_of([pair[0]])[0] not in SEEN
    ]
    assert withheld == []
    prose = {page.name: len(re.findall("red circle", page.read_text(encoding="utf-8"))) for page in PAGES}
    assert prose["README.md"] == 1 and not any(
        count for name, count in prose.items() if name not in ("README.md", "finetune.md", "gallery.md")
    )
