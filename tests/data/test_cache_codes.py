"""A cache of codes holds integers, and is read by token models alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.cache import DATA, CacheOptions, write_cache
from ldm.data.cached import CachedLatents
from ldm.runs.run import Run
from tests.finished_model import Pictures

RUN: dict[str, Any] = {
    "data": {"kind": "scenes", "tier": "one"},
    "models": {"text": {"kind": "clip"}, "autoencoder": {"kind": "vq"}, "tokens": {"kind": "tokens"}},
    "stages": {
        "text": {"kind": "train", "model": "text", "resolution": 32, "images": 64},
        "autoencoder": {"kind": "train", "model": "autoencoder", "resolution": 32, "images": 64},
        "codes": {"kind": "encode", "resolution": 32, "codes": True},
        "tokens": {"kind": "train", "model": "tokens", "latents": "codes", "resolution": 32, "images": 64},
    },
}


@pytest.mark.parametrize(("entries", "bytes_each"), [(512, 2), (2**15, 2), (2**15 + 1, 4)])
def test_it_gives_back_the_numbers(tmp_path, entries, bytes_each):
    def encode(image: Tensor) -> tuple[Tensor, None]:
        return (image[:, 0, ::8, ::8].abs() * 1e6).long() % entries, None

    data = cast(Any, Pictures(6))
    data.mirrors = False
    write_cache(tmp_path, data, encode, CacheOptions(autoencoder="a", resolution=32, shard_images=4, codes=entries), batch=2)
    cache = CachedLatents(tmp_path)
    found = cache.load([5, 0, 3], [5, 0, 3], 32, 0, False)
    assert found.mean.dtype == torch.int64 and found.std is None and cache.plan.codes == entries
    assert torch.equal(found.mean, encode(data.load([5, 0, 3], [5, 0, 3], 32, 0, False).image)[0])
    assert found.mean.max() < entries and cache.load([], [], 32, 0, False).mean.shape == (0, 4, 4)
    sizes = sum(shard.stat().st_size for shard in tmp_path.glob(f"*/{DATA}"))
    assert sizes < 6 * (16 * bytes_each + 24) + 2 * 400


def test_what_reads_codes_reads_no_latents_and_the_other_way_round():
    def said(path: str, value: Any) -> str:
        run: dict[str, Any] = {name: {k: dict(v) if isinstance(v, dict) else v for k, v in part.items()} for name, part in RUN.items()}
        *where, last = path.split(".")
        place: Any = run
        for word in where:
            place = place[word]
        place[last] = value
        with pytest.raises(UserError) as error:
            build(run, Run, "run.yaml")
        return str(error.value)

    assert build(RUN, Run, "run.yaml").models["tokens"].reads_codes
    assert "stages.tokens.latents: codes holds latents, and tokens reads codes; set stages.codes.codes=true" in said(
        "stages.codes.codes", False
    )
    assert "models.tokens.autoencoder: got autoencoder, a model of kind kl, which has no codebook; use kind vq" in said(
        "models.autoencoder", {"kind": "kl"}
    )
    assert "stages.codes.codes: autoencoder has no codebook" in said("models.autoencoder", {"kind": "kl"})
    assert "holds codes, and tokens reads latents; set stages.codes.codes=false" in said("models.tokens", {"kind": "latent_diffusion"})
    assert "res_blocks: got 2; convolutions see what comes later" in said(
        "models.tokens", {"kind": "tokens", "order": "causal", "network": {"res_blocks": 2}}
    )
    assert "models.tokens: order: what reads words writes one code" in said("models.tokens", {"kind": "tokens", "reads": "words"})
    assert "res_blocks: 0 leaves masked order without anything" in said("models.tokens", {"kind": "tokens", "network": {"res_blocks": 0}})
    assert "stages.tokens.held_out" in said("stages.tokens.held_out", 64)
