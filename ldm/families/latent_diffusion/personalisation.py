"""Personalisation by what a word makes of cross-attention: Custom Diffusion, a rank-one edit, and the union of all that adapts a base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import BY_KIND, NonNegative, Positive, PositiveFloat, config
from ldm.families.family import Context, ParameterGroup
from ldm.families.latent_diffusion.fine_tuning import (
    CUSTOM,
    Adaptable,
    AdaptConfig,
    AdaptedFamily,
    InvertedFamily,
    LoraFamily,
    LowRank,
    TextualInversion,
    check_word,
    new_word,
    save_word,
)
from ldm.formats.lora_files import write_custom
from ldm.models.cost import TextShape
from ldm.models.denoiser import Denoiser
from ldm.models.layer_adapters import Whole
from ldm.models.lora import ADAPTER, Lora, inject, targeted
from ldm.text.encoder import TextEncoder

if TYPE_CHECKING:
    from pathlib import Path

KEYS_VALUES = ("attn2.to_k", "attn2.to_v")  # of the text, in every block


def adapted(adapt: Adapt, inner: Adaptable, context: Context) -> AdaptedFamily:
    """The family of which only what `adapt` names learns.

    Raises:
        UserError: if there is no base, or naming the setting that does not suit it.
    """
    if context.init is None:
        raise UserError("models.diffusion.adapt: there is no model to adapt; give one by init, or leave adapt out")
    inner.requires_grad_(False)
    if isinstance(adapt, LowRank):
        return LoraFamily(adapt, inner, context)
    if isinstance(adapt, RankOne):
        return RankOneFamily(adapt, inner, context)
    if isinstance(adapt, CustomDiffusion):
        return CustomFamily(adapt, inner, context)
    return InvertedFamily(adapt, inner, context)


class CustomFamily(AdaptedFamily):
    """Keys and values of the text, whole, and a new word's embedding."""

    def __init__(self, config: CustomDiffusion, inner: Adaptable, context: Context) -> None:
        super().__init__(inner, context)
        self.config = config
        self.rows = new_word(inner, config)
        self.weights = nn.ParameterList(layer.weight.requires_grad_() for layer in targeted(inner.denoiser, KEYS_VALUES).values())

    def parameter_groups(self) -> list[ParameterGroup]:
        """The network's weights, and the word at its own rate."""
        word = ParameterGroup(name="word", parameters=[self.rows], lr_scale=self.config.word_lr)
        return [ParameterGroup(name="model", parameters=list(self.weights)), word]

    def save(self, folder: Path) -> None:
        """The base with these weights and one word more, and custom/ with diffusers' files of both."""
        layers = targeted(self.inner.denoiser, KEYS_VALUES)
        learned = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        state = dict((self.inner.base_denoiser() or self.inner.denoiser).state_dict())
        self.inner.save_denoiser(state | {f"{name}.weight": weight for name, weight in learned.items()}, folder)
        lora = Lora(pairs={"unet": {name: Whole(weight) for name, weight in learned.items()}})
        write_custom(lora, folder / CUSTOM, self.metadata())
        save_word(self, self.config.token, self.rows, folder, CUSTOM)


@config
class CustomDiffusion(AdaptConfig):
    """Custom Diffusion (Kumari 2022, arXiv 2212.04488): cross-attention's keys and values of the text learn, with a new word's embedding.

    The word stands in the captions of its pictures, `a <thing> dog`, and not in those of the prior (`prior_preservation`).
    """

    kind: Literal["custom"] = "custom"
    token: str  # the new word, such as <thing>, as captions have it
    init: str  # what it means at first, in words that the base knows
    vectors: Positive = 1  # how many embeddings it has
    word_lr: NonNegative = 1.0  # their learning rate, as a share of the stage's

    @property
    def text_learns(self) -> bool:
        """Whether captions are encoded anew at every step."""
        return True

    def suits(self, denoiser: Denoiser) -> None:
        """Refuse a network without attention to the text alone.

        Raises:
            UserError: saying so.
        """
        find_keys_values(denoiser, "custom")

    def count(self, denoiser: Denoiser, text: TextShape) -> dict[str, int]:
        """Parameters that learn."""
        weights = sum(layer.weight.numel() for layer in find_keys_values(denoiser, "custom").values())
        return {"keys and values": weights, "word": self.vectors * text.states}

    def __post_init__(self) -> None:
        check_word(self)


class RankOneFamily(LoraFamily):
    """What keys and values become for one word: a LoRA of rank one whose inward half is that word's key, and fixed."""

    def __init__(self, config: RankOne, inner: Adaptable, context: Context) -> None:
        AdaptedFamily.__init__(self, inner, context)
        self.text_lr, self.text = 0.0, nn.ParameterList()
        states, own = states_of(inner.text, config, context)
        key = inward(states, own, config.ridge)
        inject(inner.denoiser, 1, 1.0, list(find_keys_values(inner.denoiser, "rank_one")))
        self.unet = nn.ParameterList()
        for layer in inner.denoiser.modules():
            if hasattr(layer, "lora_A") and ADAPTER in layer.lora_A:  # type: ignore[operator]
                down, up = (getattr(layer, name)[ADAPTER].weight for name in ("lora_A", "lora_B"))
                down.data.copy_(key)
                down.requires_grad_(False)
                up.data.zero_()
                self.unet.append(up)


def states_of(encoder: TextEncoder, config: RankOne, context: Context) -> tuple[Tensor, Tensor]:
    """Of the data's captions: states (N,D) of all tokens but the word, and the word's own mean state (D,).

    Raises:
        UserError: if no caption has the word.
    """
    many = len(context.data)
    index = range(0, many, max(1, many // config.captions))
    texts = list(dict.fromkeys(context.data.captions(index, index, context.seed)))
    piece = encoder.words(config.token)
    others, own = [], []
    for text in texts:
        found, words = encoder.encode([text]), encoder.words(text)[: encoder.room]
        at = [encoder.words_start + i + len(piece) - 1 for i in range(len(words)) if words[i : i + len(piece)] == piece]
        real = found.mask[0].clone()
        real[at] = False
        own += [found.tokens[0, k] for k in at]
        others.append(found.tokens[0][real])
    if not own:
        shown = f"{len(texts)} captions, such as {texts[0][:60]!r}" if texts else "captions"
        raise UserError(f"models.diffusion.adapt.token: {config.token!r} is in none of the data's {shown}; write it there")
    return torch.cat(others).float(), torch.stack(own).float().mean(0)


def inward(states: Tensor, own: Tensor, ridge: float) -> Tensor:
    """The direction (1,D) to which a word's state (D,) answers with 1, and other states (N,D) with as little as can be in squares.

    C^-1 k / (k^T C^-1 k) (Meng 2022, arXiv 2202.05262, eq. 2; Chen 2023, DemoCaricature, arXiv 2312.04364), with C the states' uncentred
    covariance and `ridge` times its mean diagonal added.
    """
    wide = states.double()
    covariance = wide.T @ wide / len(wide)
    covariance += ridge * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=wide.dtype, device=wide.device)
    found = torch.linalg.solve(covariance, own.double())
    return (found / (own.double() @ found)).float()[None]


@config
class RankOne(AdaptConfig):
    """Rank-one edit (Chen 2023, DemoCaricature, arXiv 2312.04364, after ROME): what one word's key gives in cross-attention is learned.

    In keys and values of the text W becomes W + v k', where k' answers to the word's state with 1 and hardly to any other; v learns. No
    embedding is new: the word is one that captions have, best one that means little, such as sks.
    """

    kind: Literal["rank_one"] = "rank_one"
    token: str  # the word, as captions have it
    captions: Positive = 256  # of the data, whose other words it is told from
    ridge: PositiveFloat = 0.01  # what is added to the covariance of their states, as a share of its mean diagonal; more: a broader edit

    def suits(self, denoiser: Denoiser) -> None:
        """Refuse a network without attention to the text alone.

        Raises:
            UserError: saying so.
        """
        find_keys_values(denoiser, "rank_one")

    def count(self, denoiser: Denoiser, text: TextShape) -> dict[str, int]:
        """Parameters that learn."""
        return {"values of the word": sum(len(layer.weight) for layer in find_keys_values(denoiser, "rank_one").values())}

    def __post_init__(self) -> None:
        if not self.token.strip():
            raise UserError("token: empty; say which word of the captions means your thing, such as sks")


def find_keys_values(denoiser: nn.Module, kind: str) -> dict[str, Any]:
    """The layers of a network that make keys and values of the text.

    Raises:
        UserError: if it has none.
    """
    try:
        return targeted(denoiser, KEYS_VALUES)
    except UserError:
        raise UserError(f"kind: {kind} changes keys and values of the text, which this network does not have; choose lora") from None


Adapt = Annotated[LowRank | TextualInversion | CustomDiffusion | RankOne, BY_KIND]
