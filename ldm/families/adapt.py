"""What alone of a base model learns when it is fine-tuned: low-rank adapters beside its layers, or the embedding of a new word."""

from __future__ import annotations

from typing import Annotated, Literal

from ldm.config import BY_KIND, Count, NonNegative, Positive, PositiveFloat, config
from ldm.errors import UserError
from ldm.lora import TEXT_TARGETS, UNET_TARGETS

LORA, EMBEDDING = "lora", "embedding"  # folders in a product, beside the model's parts
KEPT = (LORA, EMBEDDING)  # what an export puts beside the model, too


@config
class LowRank:
    """LoRA (Hu 2021, arXiv 2106.09685): small matrices beside the base's frozen ones learn, and are merged in the product."""

    kind: Literal["lora"] = "lora"
    rank: Positive = 8  # of the UNet's adapters
    alpha: PositiveFloat = 8.0  # adapters are scaled by alpha / rank
    targets: tuple[str, ...] = UNET_TARGETS  # ends of the names of the UNet's layers that get one: to_q, attn2.to_k, conv1
    text_rank: Count = 0  # of the text encoder's adapters, of the same alpha / rank; 0: the text encoder stays as it is
    text_targets: tuple[str, ...] = TEXT_TARGETS  # its layers
    text_lr: NonNegative = 0.5  # their learning rate, as a share of the stage's

    @property
    def text_learns(self) -> bool:
        """Whether captions are encoded anew at every step."""
        return self.text_rank > 0


@config
class TextualInversion:
    """Textual inversion (Gal 2022, arXiv 2208.01618): the base's weights stay; a new word's embedding learns what its pictures share."""

    kind: Literal["textual_inversion"] = "textual_inversion"
    token: str  # the new word, such as <thing>
    init: str  # what it means at first, in words that the base knows
    vectors: Positive = 1  # how many embeddings it has; prompts have room for fewer words the more they are
    templates: tuple[str, ...] = ("a picture of {}", "{}", "a {}")  # captions of pictures whose own has not the word; {}: the word

    @property
    def text_learns(self) -> bool:
        """Whether captions are encoded anew at every step."""
        return True

    def __post_init__(self) -> None:
        if len(self.token) < 3 or any(c.isspace() or c in "()[]:" for c in self.token):
            raise UserError(f"token: got {self.token!r}; one word of three characters or more without brackets or colons, such as <thing>")
        if not self.init.strip():
            raise UserError("init: empty; say what the new word means at first, in words the base knows, such as 'ball'")
        if not self.templates or any(text.count("{}") != 1 for text in self.templates):
            raise UserError(f"templates: got {list(self.templates)}; each needs {{}} once, where the word stands")


Adapt = Annotated[LowRank | TextualInversion, BY_KIND]
