"""A base model of which little learns, adapters or a new word's embedding; all else is frozen, and not in checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.batch import ImageBatch, MomentBatch
from ldm.checkpoint import write_json
from ldm.errors import UserError
from ldm.families.adapt import EMBEDDING, LORA, LowRank, TextualInversion
from ldm.families.family import Context, Family, Terms
from ldm.families.latent_diffusion import RECORD, LatentDiffusionFamily
from ldm.folder import save_part
from ldm.lora import TEXT_PREFIX, Lora, Part, inject, injected, merged_state
from ldm.lora_files import write
from ldm.optim import Player
from ldm.rng import Rng
from ldm.text_files import save_tokenizer, text_part
from ldm.words import Rows, add_word, first_embeddings, write_embedding


def adapted(adapt: LowRank | TextualInversion, inner: LatentDiffusionFamily, context: Context) -> AdaptedFamily:
    """The family of which only what `adapt` names learns.

    Raises:
        UserError: if there is no base, or naming the setting that does not suit it.
    """
    if context.init is None:
        raise UserError("diffusion.adapt: there is no model to adapt; give one by init, or leave adapt out")
    inner.requires_grad_(False)
    if isinstance(adapt, LowRank):
        return LoraFamily(adapt, inner, context)
    return InvertedFamily(adapt, inner, context)


class AdaptedFamily(Family):
    """Learned parameters, in a module tree of their own, and the frozen base model that uses them.

    Checkpoints, averages and the processes' exchange of gradients see the learned parameters alone.
    """

    def __init__(self, inner: LatentDiffusionFamily, context: Context) -> None:
        super().__init__()
        self._inner = (inner,)  # a tuple, so that it stays out of the module tree
        self.base = {"unet": "" if context.init is None else context.init.hash, "resolution": str(context.resolution)}
        self.base |= {"seed": str(context.seed), "images": str(context.total_images)}

    @property
    def inner(self) -> LatentDiffusionFamily:
        """The base model with what learns in its place."""
        return self._inner[0]

    def frozen(self) -> list[nn.Module]:
        """All of the base; the learned parameters, which it shares, move with it."""
        return [self.inner, *self.inner.frozen()]

    def compilable(self) -> list[nn.Module]:
        """The base's, with what learns in it."""
        return self.inner.compilable()

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """The base's."""
        return self.inner.loss(batch, rng)

    def averaged(self) -> list[nn.Parameter]:
        """Everything that learns."""
        return [p for player in self.players() for p in player.parameters]

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """The base's."""
        self.inner.text.forget()
        pictures = self.inner.preview(batch, seed)
        self.inner.text.forget()
        return pictures

    def metadata(self) -> dict[str, str]:
        """What files tell of their origin: the base's hash, and the names that kohya's scripts give such things."""
        base, side = self.base, self.base["resolution"]
        return {
            "ldm_base_hash": base["unet"], "ss_sd_model_hash": base["unet"], "ss_resolution": f"({side}, {side})",
            "ss_seed": base["seed"], "ss_num_train_images": base["images"], "ss_v2": "False",
            "ss_noise_offset": str(self.inner.process.offset_noise),
        }  # fmt: skip

    def save_text(self, state: dict[str, Tensor], folder: Path) -> None:
        """text_encoder/ with other weights, and tokenizer/."""
        config, _ = text_part(self.inner.text.model)
        table = next(value for name, value in state.items() if name.endswith("token_embedding.weight"))
        state = {TEXT_PREFIX + name.removeprefix(TEXT_PREFIX): value for name, value in state.items()}
        save_part({**config, "vocab_size": len(table)}, state, folder / "text_encoder", "model")
        save_tokenizer(self.inner.text.tokenizer, folder / "tokenizer")


class LoraFamily(AdaptedFamily):
    """Adapters of the UNet, and where they are asked for of the text encoder."""

    def __init__(self, config: LowRank, inner: LatentDiffusionFamily, context: Context) -> None:
        super().__init__(inner, context)
        self.config = config
        self.unet = nn.ParameterList(inject(inner.unet, config.rank, config.alpha, config.targets))
        self.text = nn.ParameterList()
        if config.text_learns:
            scaled = config.alpha * config.text_rank / config.rank
            self.text.extend(inject(inner.text.model, config.text_rank, scaled, config.text_targets))
            inner.text_learns = True

    def players(self) -> list[Player]:
        """The UNet's adapters, and the text encoder's at their own rate."""
        found = [Player(name="model", parameters=list(self.unet))]
        return found + ([Player(name="text", parameters=list(self.text), lr_scale=self.config.text_lr)] if len(self.text) else [])

    def lora(self) -> Lora:
        """What has been learned."""
        pairs = {"unet": injected(self.inner.unet)}
        if len(self.text):
            pairs["text_encoder"] = {name.removeprefix(TEXT_PREFIX): pair for name, pair in injected(self.inner.text.model).items()}
        return Lora(pairs=dict[Part, dict](pairs), metadata=self.metadata())  # type: ignore[type-arg, arg-type]

    def save(self, folder: Path) -> None:
        """The merged UNet and text encoder as a model has them, and lora/ with peft's, diffusers' and kohya's files."""
        save_part(self.inner.config.network.to_diffusers(), merged_state(self.inner.unet), folder / "unet")
        write_json(folder / RECORD, {"autoencoder": self.inner.codec.hash, **self.inner.describe(), "base": self.base["unet"]})
        if len(self.text):
            self.save_text(merged_state(self.inner.text.model), folder)
        for style in ("diffusers", "peft", "kohya"):
            write(self.lora(), folder / LORA, style, self.metadata())  # type: ignore[arg-type]


class InvertedFamily(AdaptedFamily):
    """A new word's embedding."""

    def __init__(self, config: TextualInversion, inner: LatentDiffusionFamily, context: Context) -> None:
        super().__init__(inner, context)
        self.config = config
        start = first_embeddings(inner.text, config.init, config.vectors)
        self.rows = nn.Parameter(start + start.std() * 0.01 * torch.randn_like(start) * (config.vectors > 1))
        table = add_word(inner.text, config.token, start)
        inner.text.model.requires_grad_(False)
        inner.text.model.set_input_embeddings(Rows(table, self.rows))
        inner.text_learns = True

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """The base's, of captions with the word in them."""
        return self.inner.loss(replace(batch, caption=tuple(self.captions(batch.caption, rng))), rng)

    def captions(self, captions: Sequence[str], rng: Rng) -> list[str]:
        """Captions that have the word stay; others become one of the templates, by chance."""
        config = self.config
        chosen = (rng.uniform("template") * len(config.templates)).long().tolist()
        return [
            text if config.token in text else config.templates[i].replace("{}", config.token)
            for text, i in zip(captions, chosen, strict=True)
        ]  # fmt: skip

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """Pictures of captions with the word in them."""
        texts = [text if self.config.token in text else self.config.templates[0].replace("{}", self.config.token) for text in batch.caption]
        return super().preview(replace(batch, caption=tuple(texts)), seed)

    def save(self, folder: Path) -> None:
        """The base with one word more, and embedding/ with diffusers' and A1111's files."""
        self.inner.save(folder)
        state = dict(self.inner.text.model.state_dict())
        [name] = [name for name in state if name.endswith(".table")]
        stem = name.removesuffix(".table")
        table, rows = state.pop(name), state.pop(f"{stem}.rows")
        state[f"{stem}.weight"] = torch.cat([table[: len(table) - len(rows)], rows])
        self.save_text(state, folder)
        write_embedding(folder / EMBEDDING, self.config.token, self.rows.detach(), self.metadata())
