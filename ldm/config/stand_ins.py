"""Stand-ins for torch and its like: the configuration, whose classes stand beside networks, is read and explained without loading them."""

from __future__ import annotations

import dataclasses
import gc
import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

HEAVY = ("torch", "torchvision", "numpy", "PIL", "safetensors", "transformers", "tokenizers", "scipy", "accelerate", "huggingface_hub")


def told(work: Callable[[], str]) -> str:
    """What `work` returns, found in a child process in which the heavy packages are stand-ins.

    It is found in this process where torch is loaded already, where there is no fork, and where the work needs more than the names
    of those packages: so it is always what the packages themselves would give.

    Raises:
        UserError: what `work` raised.
    """
    from ldm.config.errors import UserError

    if "torch" in sys.modules or not hasattr(os, "fork"):
        return work()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        _answer(work, writing)
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    if not answer:
        return work()
    mistake, said = json.loads(answer)
    if mistake:
        raise UserError(said)
    return str(said)


def _answer(work: Callable[[], str], writing: int) -> None:
    """In the child: do the work and write what came of it; nothing where only the packages themselves can do it. Never returns."""
    from ldm.config.errors import UserError

    try:
        gc.disable()  # this process ends before it would pay
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # whatever is said in passing will be said by who does the work in earnest
        sys.meta_path.insert(0, _Finder())
        _postpone_methods()
        try:
            answer = [False, work()]
        except UserError as error:
            answer = [True, str(error)]
        with open(writing, "w", encoding="utf-8") as pipe:
            json.dump(answer, pipe)
    finally:
        os._exit(0)


def _postpone_methods() -> None:
    """From now on a dataclass's methods are compiled when they are first called: most classes of a configuration never are.

    That is a quarter of the time of a mistake's answer. Python 3.13 and later compile a class's methods at once: none is postponed there.
    """
    create = getattr(dataclasses, "_create_fn", None)
    if create is None:
        return

    def postponed(name: str, *words: Any, **named: Any) -> Callable[..., Any]:
        made: list[Callable[..., Any]] = []

        def method(*given: Any, **given_by_name: Any) -> Any:
            if not made:
                made.append(create(name, *words, **named))
            return made[0](*given, **given_by_name)

        method.__name__ = name
        return method

    dataclasses._create_fn = postponed  # type: ignore[attr-defined]


class Needed(BaseException):
    """Work that a stand-in cannot do; no `except Exception` takes it for a mistake of the user."""


class _Finder:
    """Finds and loads a stand-in for every module of the heavy packages; importlib.abc itself takes 20 ms to import."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> Any:
        """As the import system asks."""
        loader: Any = self
        return importlib.machinery.ModuleSpec(fullname, loader, is_package=True) if fullname.partition(".")[0] in HEAVY else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """As the import system asks."""
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """As the import system asks."""


class _Module(types.ModuleType):
    """A module of which every name is a stand-in."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _usable()


class _StandIn:
    """What a module may do with a name while it is imported: inherit from it, annotate and decorate with it, count with it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _usable()

    def __call__(self, *words: Any, **named: Any) -> Any:
        made = _usable()
        return words[0] if len(words) == 1 and not named and isinstance(words[0], types.FunctionType | type) else made

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[()]:
        return ()

    def __iter__(self) -> Iterator[Any]:
        _usable()
        return iter(())

    def _same(self, *_: Any) -> Any:
        return _usable()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __pow__ = __rpow__ = __neg__ = _same
    __matmul__ = __mod__ = __floordiv__ = __and__ = __or__ = __ror__ = __xor__ = __invert__ = __lshift__ = __rshift__ = _same
    __lt__ = __le__ = __gt__ = __ge__ = __getitem__ = _same

    def __bool__(self) -> bool:
        return self._same() is self


_ONE = _StandIn()


def _usable() -> _StandIn:
    """The stand-in, while a module is imported.

    Raises:
        Needed: at any other time.
    """
    frame: Any = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    if frame is None:
        raise Needed
    return _ONE
