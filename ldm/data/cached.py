"""The data set that a latent cache is (`ldm.data.cache` writes them)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.batch import MomentBatch, Text
from ldm.checkpoint import MANIFEST, Damaged, sha256, verify
from ldm.data.cache import DATA, RECORD, Read, read_plan, shard_folder
from ldm.data.dataset import draw_captions, draw_flips
from ldm.data.images import Shape
from ldm.errors import UserError

IN_MEMORY_BYTES = 2**32  # a cache up to this size is read into memory, a larger one is mapped


def _arrays(file: Path, in_memory: bool) -> dict[str, Tensor]:
    """The arrays of a safetensors file, in memory or mapped."""
    # Torch takes no read-only memory; pages of mode "c" are copied on a write, which never reaches the file.
    raw: np.ndarray = np.fromfile(file, np.uint8) if in_memory else np.memmap(file, np.uint8, mode="c")
    length = int(raw[:8].view(np.uint64)[0])
    header = json.loads(raw[8 : 8 + length].tobytes())
    kinds = {"F16": np.float16, "F32": np.float32}
    found: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = torch.from_numpy(raw[start:end].view(kinds[entry["dtype"]]).reshape(entry["shape"]))
    return found


class CachedLatents:
    """A committed cache as a data set that gives MomentBatch.

    Args:
        folder: as `write_cache` left it.
        in_memory_bytes: a cache up to this size is read into memory after its sums are checked; a larger one is mapped
            unchecked, and must not be rewritten while it is read.

    Raises:
        UserError: naming the shard that is missing, damaged or of another plan.
    """

    def __init__(self, folder: Path, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        self.folder = folder
        self.plan = read_plan(folder)
        shards = [shard_folder(folder, n) for n in range(self.plan.shards)]
        if missing := [s.name for s in shards if not (s / DATA).is_file()]:
            raise UserError(f"{folder}: {len(missing)} of {len(shards)} shards missing ({missing[0]}); encode again")
        self.bytes = sum((s / DATA).stat().st_size for s in shards)
        self.in_memory = self.bytes <= in_memory_bytes
        self._captions: list[list[str]] = []
        self._shards: list[dict[str, Tensor]] = []
        digest = hashlib.sha256(self.plan.hash.encode())
        for shard in shards:
            try:
                if self.in_memory:
                    verify(shard)
                record = json.loads((shard / RECORD).read_text(encoding="utf-8"))
                self._shards.append(_arrays(shard / DATA, self.in_memory))
                digest.update((shard / MANIFEST).read_bytes())
            except (Damaged, OSError, ValueError, KeyError) as error:
                raise UserError(f"{shard}: damaged ({error}); remove it and encode again") from None
            if record.get("plan") != self.plan.hash:
                raise UserError(f"{shard}: made for another autoencoder, data set or size; encode again")
            self._captions += record["captions"]
        self._fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self.plan.images

    @property
    def mirrors(self) -> bool:
        """As the data that was encoded."""
        return self.plan.mirrors

    def require(
        self, *, autoencoder: str | None = None, resolution: Shape | None = None, data: str | None = None
    ) -> None:
        """Check that the cache is what the caller means to train on; None: do not care.

        Raises:
            UserError: naming what differs.
        """
        wanted = {"autoencoder": autoencoder, "resolution": resolution, "data": data}
        for name, value in wanted.items():
            if value is not None and getattr(self.plan, name) != value:
                raise UserError(
                    f"{self.folder}: its latents were made with {name} {str(getattr(self.plan, name))[:12]}, "
                    f"not {str(value)[:12]}; encode again"
                )

    def require_text(self, read: Read) -> None:
        """Check that the kept states of captions are those that the caller's text encoder gives.

        Raises:
            UserError: where they are not.
        """
        kept, own = self._text(np.zeros(1, np.int64)).tokens, read(self._captions[0]).tokens.cpu()
        if kept.shape != own.shape or float((kept - own).abs().max()) > 0.01 * float(own.abs().max()):
            raise UserError(f"{self.folder}: its text states are another text encoder's; encode again with --text, or without")

    def load(
        self, index: Sequence[int], position: Sequence[int], resolution: Shape, seed: int, flip: bool
    ) -> MomentBatch:
        """As `ldm.data.dataset.Samples.load`; the crop is the stored one, flip and caption are drawn by position.

        Raises:
            UserError: if `resolution` is not the stored one, or `flip` is asked of a cache without mirrored copies.
        """
        self.require(resolution=resolution)
        flip = flip and self.mirrors
        if flip and not self.plan.flip:
            raise UserError(f"{self.folder}: has no mirrored copies; encode with flip=true or train with flip=false")
        rows = np.asarray(index, np.int64)
        mirror = np.asarray(draw_flips(seed, position, flip), bool)
        return MomentBatch(
            mean=self._gather("mean", rows, mirror),
            std=self._gather("std", rows, mirror) if "std" in self._shards[0] else None,
            caption=tuple(self.captions(index, position, seed)),
            size=self._gather("size", rows, mirror),
            text=self._text(rows) if self.plan.text else None,
            position=torch.tensor([int(p) for p in position], dtype=torch.int64),
        )

    def _text(self, rows: np.ndarray) -> Text:
        """The kept states of the samples' captions."""
        plain = np.zeros(len(rows), bool)
        pooled = self._gather("text_pooled", rows, plain) if "text_pooled" in self._shards[0] else None
        return Text(tokens=self._gather("text_tokens", rows, plain), mask=self._gather("text_mask", rows, plain).bool(), pooled=pooled)

    def _gather(self, name: str, rows: np.ndarray, mirror: np.ndarray) -> Tensor:
        """Rows of one column in float32."""
        shard, local = np.divmod(rows, self.plan.shard_images)
        places = zip(shard.tolist(), local.tolist(), mirror.tolist(), strict=True)
        # Joined from views and converted at once: three times as fast as an index array, which gathers value by value.
        found = [self._shards[s][f"mirrored_{name}" if m else name][r] for s, r, m in places]
        return torch.stack(found).float() if found else torch.empty(0, *self._shards[0][name].shape[1:])

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """As `ldm.data.dataset.Samples.captions`."""
        return draw_captions([self._captions[i] for i in index], position, seed)

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """As `ldm.data.dataset.Samples.all_captions`."""
        return [list(self._captions[i]) for i in index]

    def origin(self, index: int) -> str:
        """The shard and the row in it."""
        number, row = divmod(index, self.plan.shard_images)
        return f"{shard_folder(self.folder, number)}:{row}"

    def describe(self) -> dict[str, object]:
        """What is stored, under which plan."""
        return {
            "kind": "latents",
            "images": len(self),
            "captions": sum(map(len, self._captions)),
            "shape": list(self._shards[0]["mean"].shape[1:]),
            "bytes": self.bytes,
            "in_memory": self.in_memory,
            **{k: v for k, v in asdict(self.plan).items() if k not in ("images", "format")},
            "fingerprint": self.fingerprint(),
        }

    def fingerprint(self) -> str:
        """Hash of the plan and of the sums of every shard."""
        return self._fingerprint


def cache_hash(folder: Path) -> str:
    """Of all that a committed cache holds, by its manifest.

    Raises:
        UserError: if there is none.
    """
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: no finished latent cache here ({MANIFEST} is missing); make one by ldm data encode, or start it again")
    return sha256(folder / MANIFEST)
