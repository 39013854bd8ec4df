"""Token models: one transformer that reads a text, a picture or nothing, and writes a picture's codes, a caption or a scene."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.config.schema import config, plain
from ldm.data.pictures import finished
from ldm.data.views import ViewKind, kind_of
from ldm.diffusion.batch import ImageBatch, MomentBatch, Views, sent
from ldm.diffusion.rng import Rng
from ldm.families.chain import within
from ldm.families.draws import AFTER, OWN, SMALL, Running, SamplingCall, Settings, Wanted
from ldm.families.family import Context, Family, ParameterGroup, Product, Terms
from ldm.families.prompted import Prompted
from ldm.families.tokens.configuration import TokensConfig
from ldm.families.tokens.drawing import Known, causal, first_step, masked, own_rows, pieces_of, settings_of
from ldm.families.tokens.folder import PART, SMALL_CODEC, assemble, assemble_writer, codec_of
from ldm.families.tokens.writing import Writing, WritingFamily
from ldm.families.translator import Shown, shown_of
from ldm.formats.atomic import write_json
from ldm.formats.clip_folder import load_own_tower
from ldm.formats.latent_codec import LatentCodec, autoencoder_folder, load_codec
from ldm.formats.model_folder import OWN_CLIP, RECORD, read_record
from ldm.formats.part import content_hash, load_module, load_weights, read_config, save_part
from ldm.formats.text_folder import TEXT_PARTS
from ldm.models.embeddings import COORDINATES
from ldm.models.token_transformer import AESTHETIC, Past, TokenShape, TokenTransformer, Told
from ldm.models.token_transformer import NUMBERS as SIZES
from ldm.models.vision_tower import TowerNetwork
from ldm.text.encoder import TextEncoder
from ldm.text.lengths import CutCaptions, cut_captions
from ldm.text.penultimate import PenultimateText
from ldm.text.prompt_syntax import Piece, Prompt
from ldm.text.weighted import encode

WORDS = 1 / 8  # share of the words in the loss of a sequence of words and codes (Ramesh 2021, arXiv 2102.12092)
PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@config
class Tokens(TokensConfig):
    """A transformer that draws the codes of a VQ autoencoder, told by the frozen text encoder what to draw; or that writes words."""

    def build(self, context: Context) -> TokensFamily | WritingFamily:
        """The family, ready to train, on the earlier products; an earlier stage's network is continued."""
        codec = load_codec(autoencoder_folder(context.products["autoencoder"].folder)) if "autoencoder" in context.products else None
        if codec is not None and not codec.codes:
            raise UserError(f"models.{self.autoencoder}: a {type(codec.network).__name__} has no codebook; tokens need a VQ autoencoder")
        folder = context.products["text"].folder if "text" in context.products else None
        text = None if folder is None else PenultimateText.of_encoder(TextEncoder.load(folder))
        tower = load_own_tower(folder)[0] if self.reads == "image" and folder is not None else None
        words = (0, 0) if text is None else (text.max_tokens, len(text.tokenizer))
        states, pooled = (0, 0) if text is None else (text.width, text.pooled_width)
        if tower is not None:
            states, pooled = tower.config.width + COORDINATES, tower.config.embedding
        codes, places = (0, 0) if codec is None else (codec.codes, (context.resolution // codec.factor) ** 2)
        small, told = self._small_codec(autoencoder_folder(context.products[SMALL].folder) if self.enlarges else None), (0, 1)
        if small is not None and codec is not None:
            told = small.codes, self.spread(codec.factor, small.factor)
        shape = self.shape(codes, places, states, pooled, words, told)
        network = shape.build() if context.init is None else _continued(context.init, shape, codec, small)
        if context.init is None and codec is not None and self.reads_codes:
            network.know(codec.vectors.float(), None if small is None else small.vectors.float())
        return self._family(network, codec, text, tower, context.resolution, small)

    def _small_codec(self, folder: Path | None) -> LatentCodec | None:
        """The autoencoder of the smaller picture.

        Raises:
            UserError: where it has no codes.
        """
        found = None if folder is None else load_codec(folder)
        if found is not None and not found.codes:
            raise UserError(f"models.{self.small}: a {type(found.network).__name__} has no codebook; smaller codes need a VQ autoencoder")
        return found

    def _family(
        self,
        network: TokenTransformer,
        codec: LatentCodec | None,
        text: TextEncoder | None,
        tower: TowerNetwork | None,
        side: int,
        small: LatentCodec | None = None,
    ) -> TokensFamily | WritingFamily:
        if self.writes == "codes":
            assert codec is not None
            return TokensFamily(self, network, codec, text, side, small)
        said = Writing(
            reads=self.reads,
            writes=self.writes,
            usual=self.usual,
            chunk=self.defaults.chunk,
            caption_dropout=self.caption_dropout,
            label_smoothing=self.label_smoothing,
            resolution=side,
            able=self.answers,
        )
        return WritingFamily(said, network, text, codec, tower)

    def assemble(self, products: Mapping[str, Product], target: Path, story: Mapping[str, Any]) -> None:
        """A model folder, in masked order with a CLIP one that diffusers' AmusedPipeline opens."""
        folders = {role: product.folder for role, product in products.items()}
        if self.writes != "codes":
            keep = {"image": (OWN_CLIP, *TEXT_PARTS), "codes": TEXT_PARTS}.get(self.reads, TEXT_PARTS)
            return assemble_writer(folders, target, {"kind": self.kind, "config": plain(self), "story": dict(story)}, keep)
        chain = products.get(AFTER)

        def before(folder: Path) -> None:
            assert chain is not None and chain.config is not None
            chain.config.assemble(within(products), folder, story)

        said = {"kind": self.kind, "config": plain(self), "story": dict(story)}
        assemble(folders, target, said, None if chain is None or chain.config is None else before)

    def opened(self, folder: Path) -> TokensFamily | WritingFamily:
        """The family with the weights of a model folder."""
        text = PenultimateText.of_encoder(TextEncoder.load(folder)) if "text" in self.inputs() else None
        network = _load(folder)
        size = read_record(folder).get("defaults", {}).get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**16 for side in size)):
            raise UserError(f"{folder / RECORD}: defaults.size: got {size!r}, not [height, width] in px; copy the whole folder again")
        small = self._small_codec(folder / SMALL_CODEC if self.enlarges else None)
        codec = None if not self.reads_codes else codec_of(folder) if self.writes == "codes" else load_codec(autoencoder_folder(folder))
        family = self._family(network, codec, text, load_own_tower(folder)[0] if self.reads == "image" else None, size[0], small)
        family.content_hash = content_hash(folder)
        return family


def _load(folder: Path) -> TokenTransformer:
    part = folder / PART
    shape = TokenShape.from_diffusers(read_config(part), str(part / "config.json"))
    return load_module(shape.build, load_weights(part), part)


def _continued(init: Product, shape: TokenShape, codec: LatentCodec | None, small: LatentCodec | None) -> TokenTransformer:
    said = read_record(init.folder)
    if any(one is not None and said.get(name) != one.hash for name, one in (("autoencoder", codec), (SMALL, small))):
        raise UserError(f"{init.folder}: these weights were trained on the codes of another autoencoder; train it anew or bring that one")
    network = _load(init.folder)
    if network.shape != shape:
        raise UserError(f"{init.folder}: the transformer to continue has another shape than network says; make them equal")
    return network


class TokensFamily(Family, Prompted):
    """A token transformer with its autoencoder and text encoder: it learns by `loss` and draws by `sample`.

    Args:
        small: the autoencoder of the smaller picture whose codes it is told; None: it is told none.
    """

    kind = "tokens"
    redraws = True

    def __init__(
        self,
        config: Tokens,
        network: TokenTransformer,
        codec: LatentCodec,
        text: TextEncoder | None,
        resolution: int,
        small: LatentCodec | None = None,
    ) -> None:
        super().__init__()
        self.config, self.network, self.resolution = config, network, resolution
        self.reader, self.reads_prompts, self.able = text, config.reads_prompts, config.answers
        self._frozen = (codec, *(() if small is None else (small,)))  # a tuple, so that they stay out of the module tree
        self.hidden = codec.codes  # the number that stands for a code that is not known, and before the first one

    @property
    def codec(self) -> LatentCodec:
        """The frozen autoencoder."""
        return self._frozen[0]

    @property
    def factor(self) -> int:
        """Sides of pictures are multiples of it, px."""
        return self.codec.factor

    @property
    def defaults(self) -> dict[str, Any]:
        """size (height, width) in px, and how it is sampled."""
        return {"size": (self.resolution, self.resolution), **plain(self.config.defaults), **self.config.usual, "steps": self.steps}

    @property
    def steps(self) -> int:
        """Network calls of a picture."""
        codes = (self.resolution // self.factor) ** 2
        return codes if self.config.order == "causal" else min(codes, self.config.defaults.steps)

    def frozen(self) -> list[nn.Module]:
        """The autoencoders and the text encoder, if it reads by one."""
        return [*self._frozen, *(() if self.reader is None else (self.reader.model,))]

    # Training

    def compilable(self) -> list[nn.Module]:
        """The transformer's layers."""
        return list(self.network.transformer_layers)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The transformer."""
        return [ParameterGroup("model", list(self.network.parameters()), tables=self.network.tables())]

    def codes_of(self, batch: ImageBatch | MomentBatch) -> Tensor:
        """Numbers (B,h,w) of a batch's codes."""
        return batch.mean if isinstance(batch, MomentBatch) else self.codec.encode_codes(batch.image)

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """Cross-entropy of codes, those that are hidden in masked order, all of them in causal order.

        Masked: of u ~ U(0,1) the share cos(u pi/2) of a picture's codes, rounded up, is hidden (MaskGIT, section 3.1); the sum over hidden
        codes (eq. 2 there) is divided by the number of all codes. Words in the sequence have an eighth of the weight (DALL-E, section 2.2).
        """
        codes = self.codes_of(batch)  # (B,h,w)
        drop = rng.uniform("caption_dropout") < self.config.caption_dropout
        captions = ["" if one else caption for one, caption in zip(drop.tolist(), batch.caption, strict=True)]
        told, terms = self._told_captions(captions, batch), {}
        flat = codes.flatten(1)  # (B,L)
        if self.config.order == "causal":
            hidden = torch.ones_like(flat, dtype=torch.bool)
            start, said = self._start(captions)
            logits = _full(self.network.sequence(torch.cat([start, flat[:, :-1]], 1), told))
            if said.any():
                words = F.cross_entropy(
                    logits[:, : said.shape[1], self.hidden + 1 :].transpose(1, 2), start[:, 1:] - self.hidden - 1, reduction="none"
                )
                terms["words"] = WORDS * ((words * said).sum(1) / said.sum(1)).mean()
            logits = logits[:, said.shape[1] :, : self.hidden]
        else:
            length = flat.shape[1]
            share = (rng.uniform("mask_share") * math.pi / 2).cos()
            rank = rng.uniform("mask", (length,)).argsort(1).argsort(1)
            hidden = sent(rank < (share * length).ceil()[:, None], flat.device)
            logits = _full(self.network(codes.masked_fill(hidden.view_as(codes), self.hidden), told))
        error = F.cross_entropy(logits.transpose(1, 2), flat, reduction="none", label_smoothing=self.config.label_smoothing)  # (B,L)
        with torch.no_grad():
            right = ((logits.argmax(-1) == flat) & hidden).sum() / hidden.sum()
        terms["codes"] = (1 - WORDS if self.config.reads == "words" else 1) * (error * hidden).mean()
        return terms, {"codes_right": right}

    def _start(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What stands before the codes (B,1+W): the start and, where it reads words, these; which of them are no padding (B,W)."""
        start = torch.full((len(captions), 1), self.hidden, device=self.device)
        if self.config.reads != "words":
            return start, torch.zeros(len(captions), 0, dtype=torch.bool, device=self.device)
        words, said = self.text.tokens(captions)
        return torch.cat([start, words.to(self.device) + self.hidden + 1], 1), said.to(self.device)

    def _told_captions(self, captions: list[str], batch: ImageBatch | MomentBatch) -> Told:
        text = self.text.encode(captions) if self.config.reads == "text" else None
        size = batch.size.to(self.device, torch.float32)
        # The size that it comes out in, as is told when drawing: what it was cut out of says nothing of a picture that is drawn.
        numbers = torch.stack([size[:, 5], size[:, 4], *(torch.full_like(size[:, 0], value) for value in (0, 0, AESTHETIC))], 1)
        small = None
        if self.config.enlarges:
            view = (batch.views or {})[self.config.views()[0]]
            assert isinstance(view, Tensor)
            small = self._small_codes(2 * view.to(self.device).float() - 1)
        return self.network.told(None if text is None else text.tokens, None if text is None else text.pooled, numbers, small)

    def _small_codes(self, image: Tensor) -> Tensor:
        """Codes (B,h,w) of smaller pictures (B,3,H,W) in [-1,1], the same in training under autocast and in drawing without it."""
        with torch.autocast(image.device.type, enabled=False):
            return self._frozen[1].encode_codes(image)

    def cut_captions(self, captions: Sequence[str]) -> CutCaptions | None:
        """Those longer than the text encoder reads."""
        return cut_captions(captions, lambda: self.text.tokenizer, self.text.room) if self.reader is not None else None

    preview_by_sample = True

    def preview(self, batch: ImageBatch | MomentBatch, seed: int) -> Tensor:
        """One picture for each of the batch's captions, with the default settings."""
        captions = list(batch.caption)
        edits = self.tell(batch.views or {}, {}, (self.resolution, self.resolution)) if self.told else ()
        images = self.sample(captions, list(range(seed, seed + len(captions))), edits=edits)
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1

    def save(self, folder: Path) -> None:
        """transformer/ under diffusers' names and ldm.json, which remembers the autoencoder and the size."""
        side = self.resolution // self.factor
        save_part(self.network.shape.to_diffusers(side), dict(self.network.state_dict()), folder / PART)
        small = {"small": self._frozen[1].hash} if self.config.enlarges else {}
        write_json(folder / RECORD, {"autoencoder": self.codec.hash, **small, "defaults": {"size": [self.resolution, self.resolution]}})

    # Sampling

    def reconstruct(self, image: Tensor) -> Tensor:
        """The autoencoder's picture of images (B,3,H,W) in [-1,1]."""
        return self.codec.reconstruct(image)

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """The numbers of a sampling call, the model's defaults where none are asked for."""
        return settings_of(self, wanted, {"steps": self.steps, **self.config.usual}, self.config.order == "causal")

    def edits(self, image: Tensor, mask: Tensor | None = None, strength: float | None = None) -> tuple[Known, ...]:
        """Inpainting and image-to-image: codes are drawn where `mask` shows a pixel of theirs, or a random part of them; others stay."""
        strength = (0.75 if mask is None else 1.0) if strength is None else strength
        if not 0 <= strength <= 1:
            raise UserError(f"strength: got {strength}; a number from 0 (the picture as it is) to 1 (all new) is needed")
        values = image.permute(0, 3, 1, 2).to(next(self.codec.network.parameters())) / 127.5 - 1
        codes = torch.cat([self.codec.encode_codes(one[None]) for one in values])
        new = torch.ones_like(codes, dtype=torch.bool)
        if mask is not None:
            new = F.max_pool2d(mask[:, None].float(), self.factor)[:, 0].bool().to(codes.device)
        return (Known(codes, new, float(strength), image, mask),)

    @property
    def told(self) -> Mapping[str, ViewKind]:
        """The smaller picture, if it reads one."""
        return {name: kind_of({}, name) for name in self.config.views()}

    def tell(self, given: Views, strength: Mapping[str, float], size: tuple[int, int]) -> tuple[Any, ...]:
        """As `ldm.families.draws.Draws.tell`."""
        return shown_of(self, given, strength)

    def _told_small(self, edits: Sequence[Any], size: tuple[int, int]) -> Tensor | None:
        """Codes (1 or N,h,w) of the smaller pictures that a call is told, for pictures of `size`; None: it is told none.

        Raises:
            UserError: where there is none, or it has another size.
        """
        if not self.config.enlarges:
            return None
        view, by = self.config.views()[0], self.config.enlarges
        shown = next((edit.value for edit in reversed(edits) if isinstance(edit, Shown)), None)
        if shown is None:
            self.refuse("given", f"makes a smaller picture larger; give one by --given {view}=FILE, or export it after the model before")
        if tuple(shown.shape[2:]) != (size[0] // by, size[1] // by):
            got, wanted = ("x".join(map(str, reversed(sides))) for sides in (shown.shape[2:], (size[0] // by, size[1] // by)))
            self.refuse(f"given: {view} has {got} px", f"draws {size[1]}x{size[0]} of {wanted}; make them fit")
        return torch.cat([self._small_codes(one[None].to(self.device)) for one in shown])

    @torch.no_grad()
    def draw(self, call: SamplingCall) -> Tensor:
        """One picture for each (prompt, seed), uint8 (N,H,W,3).

        The networks always see `defaults["chunk"]` pictures, padded where fewer are asked for, so that no picture depends on the others.

        Raises:
            UserError: on settings that it has not, or a size that is no multiple of `factor`.
        """
        (height, width), many = call.size, len(call.prompts)
        if height % self.factor or width % self.factor or min(height, width) < self.factor:
            raise UserError(f"size: got {width}x{height}; both must be multiples of {self.factor}")
        places = (height // self.factor, width // self.factor)
        chosen, chunk = self.settings(call.settings), self.config.defaults.chunk
        if self.config.order == "causal" and places[0] * places[1] != self.steps:
            raise UserError(f"size: got {width}x{height}; causal order has positions for {self.resolution}x{self.resolution} alone")
        if chosen.steps > (most := places[0] * places[1]):
            why = f"a picture of {width}x{height} px has {most} codes, and each step writes one at least; give no more"
            raise UserError(f"steps: got {chosen.steps}; {why}")
        asked, avoided = [self._pieces(prompt, chosen.steps) for prompt in call.prompts], self._pieces(call.negative, chosen.steps)
        # A second pass of hires takes the first one's place.
        known = next((edit for edit in reversed(call.edits) if isinstance(edit, Known)), None)
        small = self._told_small(call.edits, (height, width))
        if known is not None and known.codes.shape[1:] != places:
            raise UserError(f"init: has {tuple(known.codes.shape[1:])} codes, but {places} are drawn; make the picture as large as size")
        image = torch.empty(many, height, width, 3, dtype=torch.uint8)
        was_training = self.network.training
        self.network.eval()
        starts, kind = range(0, many, chunk), PRECISION[chosen.precision]
        try:
            for number, start in enumerate(starts):
                rows = list(range(start, min(start + chunk, many)))
                padded = (*rows, *[rows[-1]] * (chunk - len(rows)))
                rng = Rng(0, [call.seeds[row] for row in padded])
                report = _offset(call.on_step, number * chosen.steps, len(starts) * chosen.steps)
                with torch.autocast(self.device.type, kind, enabled=kind != torch.float32):
                    told, before = self._told(
                        [asked[row] for row in padded], avoided, chosen, (height, width), None if small is None else own_rows(small, padded)
                    )
                    blank = torch.full((chunk, places[0] * places[1]), self.hidden, device=self.device)
                    codes, new = (blank, blank == self.hidden) if known is None else known.rows(padded, rng)
                    first = first_step(chosen, known)
                    codes = self._draw(told, before, codes.unflatten(1, places), new, chosen, first, rng, report)
                    made = finished(self.codec.decode_codes(codes.unflatten(1, places)))
                image[rows] = (made if known is None else known.paste(made, padded))[: len(rows)]
        finally:
            self.network.train(was_training)
        return image

    def _pieces(self, prompt: str | Prompt, steps: int) -> tuple[Piece, ...]:
        """The weighted words of a prompt."""
        return pieces_of(self, prompt, steps, self.config.reads == "text")

    def _told(
        self,
        prompts: list[tuple[Piece, ...]],
        negative: tuple[Piece, ...],
        chosen: Settings,
        size: tuple[int, int],
        small: Tensor | None = None,
    ) -> tuple[Told, Tensor]:
        """What the network is told of a chunk of pictures, and what stands before their codes; with guidance also without their prompts.

        Args:
            small: codes (B,h,w) of smaller pictures.
        """
        every = prompts + [negative] * len(prompts) if chosen.guidance != 1 else prompts
        numbers = torch.tensor([[size[1], size[0], 0, 0, AESTHETIC]]).expand(len(every), SIZES).to(self.device)
        before, _ = self._start(["".join(piece.text for piece in pieces) for pieces in every])
        if self.config.reads != "text":
            return self.network.remember(self.network.told(None, None, numbers)), before
        text = encode(self.text, every)
        twice = None if small is None else small.repeat(len(every) // len(prompts), 1, 1)
        return self.network.remember(self.network.told(text.tokens, text.pooled, numbers, twice)), before

    def _draw(
        self, told: Told, before: Tensor, codes: Tensor, new: Tensor, chosen: Settings, first: int, rng: Rng, report: Callable[[int], None]
    ) -> Tensor:
        """Codes (B,L) of a chunk of pictures, of which `codes` (B,h,w) are known where `new` (B,L) does not say otherwise."""
        past, twice, places = Past(), 1 + (chosen.guidance != 1), codes.shape[1:]

        def guided(ids: Tensor, i: int) -> Tensor:
            if self.config.order == "causal":
                latest = before if i == 0 else ids[:, None].repeat(twice, 1)
                logits = self.network.sequence(latest, told, past)[:, -1, : self.hidden]
            else:
                logits = self.network(ids.unflatten(1, places).repeat(twice, 1, 1), told)
            report(i + 1)
            if twice == 1:
                return logits
            with_prompt, without = logits.chunk(2)
            return without + chosen.guidance_at(i, chosen.steps) * (with_prompt - without)

        if self.config.order == "causal":
            return causal(guided, codes.flatten(1), new, self.hidden, chosen, rng)
        return masked(guided, codes.flatten(1), new, self.hidden, chosen, self.config.defaults.noise, first, rng)

    def ready(self, folder: Path, running: Running, precision: str) -> None:
        """Decode large pictures in stripes as `running` says."""
        super().ready(folder, running, precision)
        self.codec.tile = running.tile


def _full(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _offset(on_step: Callable[[int, int], None] | None, done: int, total: int) -> Callable[[int], None]:
    return (lambda step: None) if on_step is None else (lambda step: on_step(done + step, total))
