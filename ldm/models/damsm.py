"""DAMSM of AttnGAN (Xu 2018, arXiv 1711.10485, section 3.2): how well the places of a picture match the words of a caption."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.schema import Depth, Width, config

SHARP_PLACES = 5.0  # gamma 1: how much a word attends to the places that match it best
SHARP_WORDS = 5.0  # gamma 2: how much the words that match best count
EPS = 1e-8


@config
class DamsmConfig:
    """Linear maps of words, places, sentences and pictures, as frozen networks see them, into one space."""

    embedding: Width = 128  # of that space
    grid: Depth = 8  # the image tower's last map is pooled to grid x grid places where it has more

    def build(self, states: int, pooled: int, channels: int, embedding: int) -> Damsm:
        """Freshly initialised.

        Args:
            states: width of a word's state.
            pooled: width of a sentence's.
            channels: of the image tower's last map.
            embedding: width of what the image tower makes of a whole picture.
        """
        return Damsm(self, states, pooled, channels, embedding)


class Damsm(nn.Module):
    """The maps; what they make of pictures and captions is compared by `word_scores` and by cosines."""

    def __init__(self, config: DamsmConfig, states: int, pooled: int, channels: int, embedding: int) -> None:
        super().__init__()
        e, self.grid = config.embedding, config.grid
        self.word, self.place = nn.Linear(states, e, bias=False), nn.Linear(channels, e, bias=False)
        self.sentence, self.picture = nn.Linear(pooled, e, bias=False), nn.Linear(embedding, e, bias=False)

    def pictures(self, seen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Places (B,R,E) and unit vectors (B,E) of what an image tower sees: its last map (B,C,h,w) and its embedding (B,D)."""
        places, whole = seen
        height, width = (min(side, self.grid) for side in places.shape[2:])
        places = F.adaptive_avg_pool2d(places, (height, width))  # itself where it is no larger
        return self.place(places.flatten(2).transpose(1, 2)), F.normalize(self.picture(whole.to(self.picture.weight)), dim=1)

    def captions(self, states: Tensor, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """Words (B,T,E) and unit vectors (B,E) of words' states (B,T,D) and sentences (B,P)."""
        return self.word(states), F.normalize(self.sentence(sentence), dim=1)


def word_scores(places: Tensor, words: Tensor, said: Tensor) -> Tensor:
    """How well every picture matches every caption, R (N,M) of equation 10.

    A word's context is the mean of the places, weighted by how much they attend to it among the caption's words (eq. 7-9); its relevance
    is the cosine of both. Contexts are never made: their products with words and their lengths follow from those of places.

    Args:
        places: (N,R,E) of pictures.
        words: (M,T,E) of captions.
        said: (M,T) bool, False on padding; at least one word of each caption is none.
    """
    product = torch.einsum("nre,mte->nmtr", places, words)  # eq. 7
    share = product.masked_fill(~said[None, :, :, None], -torch.inf).softmax(2)  # eq. 8, over the words
    attention = (SHARP_PLACES * share).softmax(3)  # eq. 9, over the places
    length = torch.einsum("nmtr,nrq,nmtq->nmt", attention, places @ places.transpose(1, 2), attention).clamp_min(EPS).sqrt()
    relevance = (attention * product).sum(3) / (length * words.norm(dim=2).clamp_min(EPS))
    return (SHARP_WORDS * relevance).masked_fill(~said, -torch.inf).logsumexp(2) / SHARP_WORDS
