"""Catalogue: the models, LoRAs and autoencoders that can be chosen by name, and the few models that are open."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from ldm.config.errors import UserError
from ldm.config.files import at_home
from ldm.families.draws import Draws
from ldm.sampling.prompt_tags import Tag

RUNS = Path("runs")
INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".ckpt")  # of a model or an autoencoder in one file
LORAS = (".safetensors", ".pt", ".bin")
PEFT = "adapter_model.safetensors"


@dataclass(frozen=True)
class Outfit:
    """What draws: a model by its name in the catalogue, with the LoRAs (FILE:WEIGHT, in order) and the autoencoder of an order."""

    model: str
    loras: tuple[str, ...] = ()
    vae: str = ""  # empty: the model's own


@dataclass(frozen=True)
class Opened:
    """A model that is ready to draw, and what recipes tell of its LoRAs, words and autoencoder."""

    family: Draws
    added: Mapping[str, str]
    examples: tuple[str, ...] = ()  # prompts that it knows


class Catalogue:
    """What can be chosen; folders are looked through whenever somebody asks, so that a run that ends meanwhile is there.

    Args:
        first: the name and the place of the model that the page begins with.
        open: opens an outfit, whose model is a place then; the `Opened` that is returned may draw.
        models, loras, vaes: folders that are looked through, besides the runs here.
        given: names of LoRAs that every outfit has anyway.
        kept: how many outfits stay open; the one that was not used for the longest time goes first.
    """

    def __init__(
        self,
        first: tuple[str, str],
        open: Callable[[Outfit], Opened],
        *,
        models: tuple[Path, ...] = (),
        loras: tuple[Path, ...] = (),
        vaes: tuple[Path, ...] = (),
        given: frozenset[str] = frozenset(),
        runs: Path | None = RUNS,
        kept: int = 1,
    ) -> None:
        self.first, self._open, self.kept, self._given = first, open, kept, given
        self._models, self._loras, self._vaes, self._runs = models, loras, vaes, runs
        self._lock = threading.Lock()
        self._opened: OrderedDict[Outfit, Opened] = OrderedDict()

    def models(self) -> dict[str, str]:
        """Places of the models by their names, the first one first."""
        found = dict([self.first])
        known = {_real(self.first[1])}
        for name, path in (*self._of_runs(), *(one for folder in self._models for one in _models_in(folder))):
            if _real(path) not in known:
                known.add(_real(path))
                found[_free(name, found)] = str(path)
        return found

    def loras(self) -> dict[str, Path]:
        """Files or folders of LoRAs by their names."""
        found: dict[str, Path] = {}
        for path in sorted((self._runs or Path()).glob("*/lora")) if self._runs else ():
            if any(path.glob("*.safetensors")):
                found[_free(path.parent.name, found)] = path
        for folder in self._loras:
            for path in sorted(folder.rglob("*")):
                if path.name == PEFT:
                    found[_free(path.parent.name, found)] = path.parent
                elif path.is_file() and path.suffix in LORAS:
                    found[_free(path.stem, found)] = path
        return found

    def vaes(self) -> dict[str, Path]:
        """Folders or files of autoencoders by their names."""
        found: dict[str, Path] = {}
        for folder in self._vaes:
            for path in sorted(folder.iterdir()):
                if (path.is_file() and path.suffix in WEIGHTS) or (path / "config.json").is_file():
                    found[_free(path.stem if path.is_file() else path.name, found)] = path
        return found

    def chosen(self, model: str, tags: tuple[Tag, ...], vae: str) -> Outfit:
        """The outfit that names mean.

        Args:
            model: empty: the first.
            tags: of a prompt.
            vae: empty: the model's own.

        Raises:
            UserError: for a name that is not there, with the nearest one.
        """
        models = self.models()
        name = _named("model", model or self.first[0], models)
        wanted = [tag for tag in tags if tag.name not in self._given]
        known = self.loras() if wanted else {}
        loras = tuple(f"{known[_named(f'prompt: {tag.text}', tag.name, known)]}:{tag.weight!r}" for tag in wanted)
        return Outfit(name, loras, str(self.vaes()[_named("vae", vae, self.vaes())]) if vae else "")

    def opened(self, outfit: Outfit) -> Opened:
        """The model of an outfit, ready to draw.

        Raises:
            UserError: for what is damaged or does not fit together.
        """
        with self._lock:
            if outfit not in self._opened:
                while len(self._opened) >= self.kept:
                    self._opened.popitem(last=False)
                place = self.models()[_named("model", outfit.model, self.models())]
                self._opened[outfit] = self._open(Outfit(place, outfit.loras, outfit.vae))
            self._opened.move_to_end(outfit)
            return self._opened[outfit]

    def is_open(self, outfit: Outfit) -> bool:
        """Whether it can draw at once."""
        return outfit in self._opened

    def _of_runs(self) -> Iterator[tuple[str, Path]]:
        """The models of the runs here, the newest first."""
        found = list(self._runs.glob(f"*/model/{INDEX}")) if self._runs is not None else []
        for index in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            yield index.parent.parent.name, index.parent


def fixed(name: str, opened: Opened) -> Catalogue:
    """A catalogue of one open model."""
    return Catalogue((name, name), lambda outfit: opened, runs=None)


def _models_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Models of a folder: model folders, run folders, and files of weights."""
    for path in sorted(folder.iterdir()):
        if (path / "model" / INDEX).is_file():
            yield path.name, path / "model"
        elif (path / INDEX).is_file():
            yield path.name, path
        elif path.is_file() and path.suffix in WEIGHTS:
            yield path.stem, path


def _real(path: str | Path) -> Path:
    found = at_home(path).resolve()
    return found / "model" if (found / "model" / INDEX).is_file() else found


def _free(name: str, taken: Mapping[str, object]) -> str:
    """A name that is not taken, and that a prompt's tag can have: the name itself, or with a number behind it."""
    name = re.sub(r"[<>:\r\n]", "_", name)
    made, number = name, 2
    while made in taken:
        made, number = f"{name}_{number}", number + 1
    return made


def _named(where: str, name: str, known: Mapping[str, object]) -> str:
    if name in known:
        return name
    near = get_close_matches(name, known, 1)
    hint = f"is {near[0]} meant?" if near else f"there {'is' if len(known) == 1 else 'are'} {', '.join(list(known)[:8]) or 'none'}"
    raise UserError(f"{where}: no {name[:80]!r} here; {hint}")
