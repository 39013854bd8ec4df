"""The token transformer is diffusers' UVit2DModel in masked order, and in causal order its cache changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ldm.config.errors import UserError
from ldm.families.family import ParameterGroup
from ldm.models.token_transformer import Past, TokenShape, TokenTransformer, TokenTransformerConfig
from ldm.training.optim import Muon, build

SIZE = TokenTransformerConfig(width=16, layers=2, heads=2, res_blocks=2, size_channels=4)


def built(positions: int, blocks: int | None) -> TokenTransformer:
    torch.manual_seed(0)
    size = replace(SIZE, res_blocks=blocks)
    network = TokenShape.of(size, codes=20, vocabulary=21, context=24, pooled=12, positions=positions).build().double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def told() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 7, 24).double(), torch.randn(3, 12).double(), torch.tensor([[40.0, 32, 0, 0, 6]]).expand(3, 5)


@pytest.mark.parametrize("blocks", [0, 2])
def test_it_is_uvit2d_under_its_names(blocks):
    from diffusers import UVit2DModel

    network = built(0, blocks)
    said = network.shape.to_diffusers(4)
    theirs = UVit2DModel(**{name: value for name, value in said.items() if not name.startswith("_")}).double()
    theirs.load_state_dict(network.state_dict(), strict=True)
    assert {name: theirs.config[name] for name in said if not name.startswith("_")} == {k: v for k, v in said.items() if k[0] != "_"}
    codes, (states, pooled, size) = torch.randint(0, 21, (3, 4, 5)), told()
    with torch.no_grad():
        own = network(codes, network.told(states, pooled, size))
        kept = network(codes, network.remember(network.told(states, pooled, size)))
        wanted = theirs(codes, states, pooled, size).flatten(2).transpose(1, 2)
    assert (own - wanted).abs().max() < 1e-12 and torch.equal(own, kept)
    assert TokenShape.from_diffusers(said, "config.json") == network.shape


def test_places_of_a_blank_map_are_told_apart_by_the_convolutions():
    """Two of them reach two places from each edge, which is all of a 4x4 map; without them every place is the same."""
    blank, (states, pooled, size) = torch.full((3, 4, 4), 20), told()
    for blocks, differ in ((0, 1), (2, 16)):
        network = built(0, blocks)
        with torch.no_grad():
            logits = network(blank, network.told(states, pooled, size))[0]
        assert len({tuple((row * 1e6).round().tolist()) for row in logits}) == differ


def test_causal_order_sees_nothing_later_and_its_cache_changes_nothing():
    network, ids = built(20, None), torch.randint(0, 21, (3, 20))
    with torch.no_grad():
        seen = network.told(*told())
        whole = network.sequence(ids, seen)
        other = ids.clone()
        other[:, 9:] = (other[:, 9:] + 1) % 21
        assert torch.equal(network.sequence(other, seen)[:, :9], whole[:, :9])
        assert not torch.allclose(network.sequence(other, seen)[:, 9:], whole[:, 9:])
        for cuts in ([1] * 20, [5, 1, 14]):
            past = Past()
            parts = torch.cat([network.sequence(part, seen, past) for part in ids.split(cuts, 1)], 1)
            assert (parts - whole).abs().max() < 1e-12 and past.length == 20
    assert TokenShape.from_diffusers(network.shape.to_diffusers(4), "config.json") == network.shape


def test_another_network_is_refused_by_its_field():
    said = built(0, 0).shape.to_diffusers(4)
    for name, value in (("use_bias", True), ("_class_name", "Other"), ("hidden_size", 0)):
        with pytest.raises(UserError, match=f"config.json.*{name}|config.json: width"):
            TokenShape.from_diffusers({**said, name: value}, "config.json")
    with pytest.raises(UserError, match="heads 3 does not divide width 16"):
        TokenTransformerConfig(width=16, heads=3)


def test_codes_begin_as_alike_as_their_vectors() -> None:
    torch.manual_seed(0)
    wide = TokenShape.of(
        TokenTransformerConfig(width=2048, layers=1, heads=2, res_blocks=2), codes=40, vocabulary=41, context=0, pooled=0, positions=0
    )
    with torch.device("meta"):
        shell = wide.build()
    network = TokenTransformer.__new__(TokenTransformer)
    torch.nn.Module.__init__(network)
    network.shape, network.embed, network.mlm_layer = wide, shell.embed.to_empty(device="cpu"), shell.mlm_layer.to_empty(device="cpu")
    for weight in network.tables():
        torch.nn.init.normal_(weight)
    vectors = torch.randn(40, 4) * torch.tensor([1.0, 2.0, 5.0, 0.1]) + 3
    network.know(vectors)
    white = (vectors - vectors.mean(0)) / vectors.std(0)
    kernel = torch.exp(-0.5 * (torch.cdist(white, white) * 2 / 4**0.5) ** 2)  # Rahimi and Recht 2007
    features = network.embed.embeddings.weight[:40]
    assert torch.allclose(features @ features.T / 2048, kernel, atol=0.12)
    out = network.mlm_layer.conv2.weight[:, :, 0, 0]
    assert torch.allclose(torch.corrcoef(out), torch.corrcoef(features), atol=1e-4)


def test_muon_leaves_the_rows_of_codes_to_adamw() -> None:
    network = TokenShape.of(
        TokenTransformerConfig(width=32, layers=1, heads=2, res_blocks=2), codes=40, vocabulary=41, context=0, pooled=0, positions=16
    ).build()
    group = ParameterGroup("model", list(network.parameters()), tables=network.tables())
    adamw, muon = build(Muon(), [group])
    held = [p for one in muon.param_groups for p in one["params"]]
    assert len(network.tables()) == 3 and not any(p in network.tables() for p in held)
    assert network.tables() <= {p for one in adamw.param_groups for p in one["params"]}
    assert sum(p.numel() for one in (*adamw.param_groups, *muon.param_groups) for p in one["params"]) == sum(
        p.numel() for p in network.parameters()
    )
