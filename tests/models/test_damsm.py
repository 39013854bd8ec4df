"""DAMSM beside AttnGAN's equations 7 to 10, written out word by word in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.models.damsm import DamsmConfig, word_scores


def relevance(regions: Tensor, words: Tensor) -> float:
    """R(Q,D) of one picture's regions v (R,E) and one caption's words e (T,E), with gamma 1 and 2 of 5."""
    s = [[float(e @ v) for v in regions] for e in words]  # eq. 7
    normal = [[math.exp(s[i][j]) / sum(math.exp(row[j]) for row in s) for j in range(len(regions))] for i in range(len(words))]  # eq. 8
    total = 0.0
    for i, e in enumerate(words):
        alpha = [math.exp(5 * normal[i][j]) for j in range(len(regions))]
        context = sum(a / sum(alpha) * v for a, v in zip(alpha, regions, strict=True))  # eq. 9
        total += math.exp(5 * float(F.cosine_similarity(context, e, dim=0)))
    return math.log(total) / 5  # eq. 10: the logarithm of the sum's fifth root


def test_scores_are_those_of_the_equations() -> None:
    made = torch.Generator().manual_seed(0)
    places, words = (torch.randn(*shape, generator=made, dtype=torch.float64) for shape in ((3, 6, 5), (2, 4, 5)))
    said = torch.tensor([[True, True, True, False], [True, True, True, True]])
    found = word_scores(places, words, said)
    theirs = [[relevance(v, e[:many]) for e, many in zip(words, (3, 4), strict=True)] for v in places]
    assert torch.allclose(found, torch.tensor(theirs, dtype=torch.float64), rtol=1e-9)
    other = words.clone()
    other[0, 3] = 100.0  # padding counts nowhere
    assert torch.equal(word_scores(places, other, said), found)
    assert torch.autograd.gradcheck(lambda v, e: word_scores(v, e, said), (places.requires_grad_(), words.requires_grad_()))


def test_large_maps_are_pooled_and_small_ones_are_not() -> None:
    torch.manual_seed(0)
    network = DamsmConfig(embedding=8, grid=4).build(states=6, pooled=6, channels=3, embedding=10)
    small, large, whole = torch.randn(2, 3, 3, 2), torch.randn(2, 3, 8, 8), torch.randn(2, 10)
    places, pictures = network.pictures((small, whole))
    assert torch.allclose(places, network.place(small.permute(0, 2, 3, 1).reshape(2, 6, 3)))
    assert torch.allclose(pictures.norm(dim=1), torch.ones(2))
    assert torch.allclose(network.pictures((large, whole))[0], network.place(F.avg_pool2d(large, 2).flatten(2).mT))
