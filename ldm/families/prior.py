"""Prior of unCLIP (DALL-E 2, arXiv 2204.06125, section 2.2): the CLIP embedding of a picture by diffusion, told a caption."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.schema import Fraction, config, plain
from ldm.config.version import __version__
from ldm.data.views import EMBEDDING
from ldm.diffusion.batch import Cond, ImageBatch, MomentBatch, Text
from ldm.diffusion.guidance import guided
from ldm.diffusion.process import Process
from ldm.diffusion.rng import Rng
from ldm.diffusion.samplers import SAMPLERS
from ldm.diffusion.schedules import Cosine
from ldm.families.chain import BEFORE
from ldm.families.draws import DIRECT, OWN, Draws, SamplingCall, Settings, Wanted
from ldm.families.family import Context, Family, Footprint, ModelConfig, Product, Terms, TrainingStage
from ldm.families.latent_diffusion.engine import Defaults, choose
from ldm.formats import atomic
from ldm.formats.clip_folder import save_vision
from ldm.formats.model_folder import INDEX, OWN_CLIP, RECORD, own_clip, read_record
from ldm.formats.part import content_hash, load_module, load_weights, read_config, read_json, save_part
from ldm.formats.text_folder import save_text_model
from ldm.formats.tokenizer_files import save_tokenizer
from ldm.models import cost
from ldm.models.cost import IMAGES
from ldm.models.prior_transformer import STOCK, PriorShape, PriorTransformer, PriorTransformerConfig
from ldm.models.vision_tower import VisionTower
from ldm.text.lengths import CutCaptions, cut_captions
from ldm.text.own_clip import OwnClip
from ldm.text.prompt_syntax import Prompt, literal

PART, SCHEDULER = "prior", "prior_scheduler"  # in a model folder, as StableUnCLIPPipeline names them
CHOSEN = ("steps", "guidance", "guidance_from", "guidance_to", "guidance_curve", "sampler", "spacing", "eta", "rescale", "precision")
SCHEDULING, NOISING, NORMALISER = "scheduler_config.json", "image_noising_scheduler", "StableUnCLIPImageNormalizer"
DECODER = [["diffusers", "UNet2DConditionModel"], ["diffusers", "AutoencoderKL"], ["transformers", "CLIPTextModel"]]
PICTURES = 200  # held-out ones whose embeddings are drawn when training ends


@config
class Prior(ModelConfig):
    """A transformer that draws what a CLIP would make of a picture, told a caption; a decoder behind it (`after`) draws the picture."""

    kind: Literal["prior"] = "prior"
    text: str = "text"  # the CLIP, by its name in models: both of its sides are read
    network: PriorTransformerConfig = PriorTransformerConfig()
    process: Process = Process(schedule=Cosine(), target="x0")  # how embeddings become noise; unCLIP predicts the clean one (x0)
    caption_dropout: Fraction = 0.1  # share of captions replaced by the empty prompt, for guidance
    defaults: Defaults = Defaults(steps=25, guidance=1.0, sampler="ddpm")  # how embeddings are drawn

    refuses: ClassVar[Mapping[str, str]] = {
        name: why for name, why in ModelConfig.refuses.items() if name not in ("latents", "caption_dropout", "tags")
    }
    requires: ClassVar[Mapping[str, str]] = {"text": "has_tower"}
    reads_latents = False
    exports = True
    hands = EMBEDDING

    def inputs(self) -> dict[str, str]:
        """The CLIP."""
        return {"text": self.text}

    def views(self) -> tuple[str, ...]:
        """The picture that is embedded."""
        return (EMBEDDING,)

    def for_stage(self, stage: TrainingStage) -> Prior:
        """With what the stage says of caption dropout."""
        return self if stage.caption_dropout is None else replace(self, caption_dropout=stage.caption_dropout)

    def identity(self) -> dict[str, Any]:
        """All but names and defaults of sampling."""
        return {name: value for name, value in plain(self).items() if name not in ("defaults", "text")}

    def shown(self) -> dict[str, Any]:
        """How the finished model is sampled."""
        return {"defaults": plain(self.defaults)}

    def shape(self, embedding: int, states: int, tokens: int) -> PriorShape:
        """The network that its CLIP makes."""
        size = self.network
        return PriorShape(
            head_width=size.head_width,
            heads=size.heads,
            layers=size.layers,
            dropout=size.dropout,
            embedding=embedding,
            states=states,
            tokens=tokens,
        )

    def parameters(self, others: Mapping[str, ModelConfig], note: Callable[[str], None], width: int = 768) -> int:
        """Of the transformer."""
        text = others["text"].text_shape(note, width)
        with torch.device("meta"):
            return cost.count(self.shape(text.embedding or 1, text.states, text.tokens).build())

    def footprint(self, stage: TrainingStage, side: int, others: Mapping[str, ModelConfig], note: Callable[[str], None]) -> Footprint:
        """The transformer; the CLIP is frozen."""
        text = others["text"].text_shape(note)
        shape = self.shape(text.embedding or 1, text.states, text.tokens)
        with torch.device("meta"):
            network, x = shape.build(), torch.empty(IMAGES, shape.embedding)
            states, mask = torch.empty(IMAGES, text.tokens, text.states), torch.ones(IMAGES, text.tokens, dtype=torch.bool)
            told = Text(tokens=states, mask=mask, pooled=x)
            spent = cost.measure(network, lambda: network(x, torch.zeros(IMAGES), told))
        return Footprint(learned={PART: cost.count(network)}, frozen={"text encoder": text.parameters}, cost=spent, extra=text.cost.forward)

    def build(self, context: Context) -> PriorFamily:
        """The family, ready to train, on an earlier product."""
        folder = own_clip(context.products["text"].folder)
        if folder is None:
            raise UserError(f"models.{self.text}: has no image side, whose embeddings a prior draws; use kind clip")
        return PriorFamily(self, None, OwnClip.load(folder), context.resolution)

    def assemble(self, products: Mapping[str, Product], target: Path, story: Mapping[str, Any]) -> None:
        """prior/ and prior_scheduler/ as StableUnCLIPPipeline reads them, and clip/."""
        clip, product = own_clip(products["text"].folder), products["model"].folder
        assert clip is not None

        def write(folder: Path) -> None:
            for part in (PART, SCHEDULER):
                shutil.copytree(product / part, folder / part)
            shutil.copytree(clip, folder / OWN_CLIP)
            said = {"kind": self.kind, "config": plain(self), "story": dict(story), "ldm_version": __version__}
            atomic.write_json(folder / RECORD, {**read_record(product), **said})

        atomic.commit(target, write)

    def lead_in(self, folder: Path) -> None:
        """What StableUnCLIPPipeline reads besides the decoder's own parts, where it knows these; and StableUnCLIPImg2ImgPipeline.

        The latter takes embeddings as the image tower leaves them, and so a tower is asked for that keeps their length.
        """
        index, before = read_json(folder / INDEX), folder / BEFORE
        shape = PriorShape.from_diffusers(read_config(before / PART), PART)
        known = [index.get(part) for part in ("unet", "vae", "text_encoder")]
        alone = len(read_record(folder).get("conditions", ())) == 1
        if known != DECODER or not (alone and shape.stock) or "beta_schedule" not in read_json(folder / "scheduler" / SCHEDULING):
            return
        for part in (PART, SCHEDULER):
            shutil.copytree(before / part, folder / part)
        clip = OwnClip.load(before / OWN_CLIP)
        save_text_model(clip.text.model, folder / "prior_text_encoder", clip.projection)
        save_tokenizer(clip.text.tokenizer, folder / "prior_tokenizer")
        (folder / NOISING).mkdir()
        atomic.write_json(folder / NOISING / SCHEDULING, _noising(read_json(folder / "scheduler" / SCHEDULING)))
        usual = {"mean": torch.zeros(1, shape.embedding), "std": torch.ones(1, shape.embedding)}
        save_part({"_class_name": NORMALISER, "embedding_dim": shape.embedding}, usual, folder / "image_normalizer")
        parts = ("scheduler", "text_encoder", "tokenizer", "unet", "vae", "_diffusers_version")
        seeing = {}
        if isinstance(clip.tower, VisionTower) and clip.tower.keeps_length:
            save_vision(clip.tower, folder / "image_encoder", folder / "feature_extractor")
            seeing = {
                "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
                "feature_extractor": ["transformers", "CLIPImageProcessor"],
            }
        atomic.write_json(
            folder / INDEX,
            {name: index[name] for name in parts}
            | {
                "_class_name": "StableUnCLIPPipeline",
                "prior_tokenizer": index["tokenizer"],
                "prior_text_encoder": ["transformers", "CLIPTextModelWithProjection"],
                "prior": ["diffusers", STOCK],
                "prior_scheduler": ["diffusers", "DDPMScheduler"],
                "image_normalizer": ["stable_diffusion", NORMALISER],
                NOISING: ["diffusers", "DDPMScheduler"],
                **seeing,
            },
        )

    def opened(self, folder: Path) -> PriorFamily:
        """The family with the weights of a model folder."""
        part = folder / PART
        shape = PriorShape.from_diffusers(read_config(part), str(part / "config.json"))
        size = read_record(folder).get("defaults", {}).get("size")
        if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and 0 < side < 2**16 for side in size)):
            raise UserError(f"{folder / RECORD}: defaults.size: got {size!r}, not [height, width] in px; copy the whole folder again")
        family = PriorFamily(self, load_module(shape.build, load_weights(part), part), OwnClip.load(folder / OWN_CLIP), size[0])
        family.content_hash = content_hash(folder)
        return family


class PriorFamily(Family, Draws):
    """A prior's transformer with its CLIP: it learns by `loss` and draws embeddings by `handed`.

    Embeddings lie on a sphere of radius sqrt(E), so that their values have unit variance.
    """

    able = frozenset[str]()  # no metric asks for an embedding
    kind = "prior"
    hands = EMBEDDING
    draws_pictures = False

    def __init__(self, config: Prior, network: PriorTransformer | None, clip: OwnClip, resolution: int) -> None:
        super().__init__()
        self.config, self.clip, self.resolution = config, clip, resolution
        self.shape = config.shape(clip.embedding, clip.text.width, clip.text.max_tokens)
        self.network = network or self.shape.build()
        if self.network.shape != replace(self.shape, dropout=self.network.shape.dropout):
            raise UserError(
                f"{PART}: {self.network.shape} was not made for this CLIP, which makes {self.shape}; copy the whole folder again"
            )

    @property
    def defaults(self) -> dict[str, Any]:
        """size (height, width) in px of the pictures that it has learned from, and how it is sampled."""
        return {"size": (self.resolution, self.resolution), **plain(self.config.defaults)}

    def frozen(self) -> list[nn.Module]:
        """The CLIP."""
        return self.clip.networks()

    # Training

    def compilable(self) -> list[nn.Module]:
        """The network."""
        return [self.network]

    def embedded(self, batch: ImageBatch | MomentBatch) -> Tensor:
        """Embeddings (B,E) of a batch's pictures."""
        view = None if batch.views is None else batch.views.get(EMBEDDING)
        if not isinstance(view, Tensor):
            raise UserError(f"prior: these samples have no view {EMBEDDING}; encode latents again for this model")
        return self.clip.embedded(2 * view.to(self.device, torch.float32) - 1)

    def loss(self, batch: ImageBatch | MomentBatch, rng: Rng) -> tuple[Terms, Terms]:
        """Weighted squared error of the prediction, mean over an embedding's values."""
        x0 = self.embedded(batch)
        drop = rng.uniform("caption_dropout") < self.config.caption_dropout
        text = self.clip.read(["" if one else caption for one, caption in zip(drop.tolist(), batch.caption, strict=True)])
        noised = self.config.process.noise(x0, rng)
        error = (self._answer(noised.x, noised.t, text) - noised.target).square().mean(1)
        with torch.no_grad():
            cosine = F.cosine_similarity(x0, text.pooled.to(x0)).mean()  # type: ignore[union-attr]
        return {"denoising": (noised.weight * error).mean()}, {"text_cosine": cosine}

    def _answer(self, x: Tensor, t: Tensor, text: Text) -> Tensor:
        found: Tensor = self.network(x, t, text)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def cut_captions(self, captions: Sequence[str]) -> CutCaptions | None:
        """Those longer than the text side reads."""
        return cut_captions(captions, lambda: self.clip.text.tokenizer, self.clip.text.room)

    @torch.no_grad()
    def finish(self, context: Context) -> dict[str, Any]:
        """Of held-out pairs: cosines of the true embedding with the drawn one, with the text's, and with another caption's drawn one."""
        count = min(PICTURES, len(context.val))
        if not count:
            return {}
        index = list(range(count))
        batch = context.val.load(index, index, context.resolution, context.seed, False).to(context.device)
        true, captions = self.embedded(batch), list(batch.caption)
        drawn = self.hand(SamplingCall(prompts=captions, seeds=index, size=self.defaults["size"]))
        words = self.clip.read(captions).pooled
        assert words is not None
        found = {"cosine": drawn, "text_cosine": words, "other_cosine": drawn.roll(1, 0)}
        return {name: float(F.cosine_similarity(true, one.to(true)).mean()) for name, one in found.items()} | {"cosine_of": count}

    def save(self, folder: Path) -> None:
        """prior/ and prior_scheduler/ in diffusers' layout and ldm.json, which remembers the size."""
        save_part(self.network.shape.to_diffusers(), dict(self.network.state_dict()), folder / PART)
        (folder / SCHEDULER).mkdir()
        atomic.write_json(folder / SCHEDULER / SCHEDULING, self.scheduling())
        atomic.write_json(folder / RECORD, {"defaults": {"size": [self.resolution, self.resolution]}})

    def scheduling(self) -> dict[str, Any]:
        """scheduler_config.json of diffusers' ancestral sampling."""
        said = self.config.process.scheduler_config()
        return {**said, "_class_name": "DDPMScheduler", "variance_type": "fixed_small"} if "beta_schedule" in said else said

    # Drawing

    def settings(self, wanted: Wanted = OWN) -> Settings:
        """The numbers of a sampling call, the model's defaults where none are asked for."""
        chosen = choose(self.config.defaults, wanted)
        for name in vars(DIRECT):
            if name not in CHOSEN and getattr(chosen, name) != getattr(DIRECT, name):
                self.refuse(f"{name}: got {getattr(chosen, name)!r}", "draws embeddings and has no such setting; leave it out")
        return chosen

    def draw(self, call: SamplingCall) -> Tensor:
        """It draws none."""
        self.refuse("sample", "draws embeddings, which no eye can see; export a model that has it as `after`, and draw with that")

    @torch.no_grad()
    def hand(self, call: SamplingCall) -> Tensor:
        """Embeddings (N,E) of the pictures that the prompts describe, each a function of its own prompt and seed.

        Words of a prompt count alike, as they stand at the first step.
        """
        chosen, chunk, many = self.settings(call.settings), self.config.defaults.chunk, len(call.prompts)
        grid, entry = self.config.process.grid(chosen.steps, chosen.spacing), SAMPLERS[chosen.sampler]
        times, words, without = grid.t.to(self.device), [_words(prompt) for prompt in call.prompts], _words(call.negative)
        found = torch.empty(many, self.shape.embedding)
        was_training = self.network.training
        self.network.eval()
        starts = range(0, many, chunk)
        try:
            for number, start in enumerate(starts):
                rows = list(range(start, min(start + chunk, many)))
                padded = (*rows, *[rows[-1]] * (chunk - len(rows)))
                cond, uncond = (Cond(text=self.clip.read(said)) for said in ([words[row] for row in padded], [without] * chunk))
                rng = Rng(0, [call.seeds[row] for row in padded])

                def denoise(x: Tensor, i: int, cond: Cond = cond, uncond: Cond = uncond, number: int = number) -> Tensor:
                    if call.on_step is not None:
                        call.on_step(number * chosen.steps + i + 1, len(starts) * chosen.steps)
                    scale = chosen.guidance_at(i, chosen.steps)
                    return guided(predict, cond, uncond, scale, chosen.rescale)(x, i)

                def predict(x: Tensor, i: int, cond: Cond) -> Tensor:
                    assert cond.text is not None
                    t = times[i].expand(len(x))
                    return self.config.process.x0_from(self._answer(x, t, cond.text), x, t)

                noise = rng.normal("prior", (self.shape.embedding,)).to(self.device)
                made = entry.run(denoise, entry.start(noise, grid), grid.alpha, grid.sigma, rng, eta=chosen.eta)
                found[rows] = made[: len(rows)].float().cpu()
        finally:
            self.network.train(was_training)
        return found


def _noising(values: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json of the noise in embeddings, of a decoder's own: level 0 is none at all, as it is told here."""
    from diffusers import DDPMScheduler

    betas = DDPMScheduler.from_config({**values, "_class_name": "DDPMScheduler"}).betas.double()
    kept = (1 - betas).cumprod(0)
    return {**values, "_class_name": "DDPMScheduler", "trained_betas": [0.0, float(1 - kept[1]), *betas[2:].tolist()]}


def _words(prompt: str | Prompt) -> str:
    """The words of a prompt at its first step, without weights."""
    read = literal(prompt) if isinstance(prompt, str) else prompt
    return "".join(piece.text for part in read.parts for piece in part.at(0, 1))
