"""Tiny models with random weights, put together as a run does it but without any training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ldm.diffusion.batch import ImageBatch
from ldm.diffusion.process import Process
from ldm.families.autoencoder import measure
from ldm.families.clip import Clip
from ldm.families.family import Context
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.engine import Defaults
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily
from ldm.formats.assembly import assemble
from ldm.formats.latent_codec import autoencoder_folder, load_codec, save_codec
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.image_tower import ImageTowerConfig
from ldm.models.unet import UNetConfig
from ldm.text.encoder import SmallText, TextEncoder, small_clip_text, train_tokenizer

Kind = Literal["kl", "vq"]
SIDE = 32  # px, of the pictures that the models draw
CAPTIONS = tuple(
    f"a {size} {colour} {shape}"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square", "ring")
)
TEXT = SmallText(width=32, layers=2, heads=2, max_tokens=16)
KL = KLConfig(channels=(8, 8, 8, 16), layers=1, norm_groups=4, latent_channels=4)  # f8
VQ = VQConfig(channels=(8, 8, 16), layers=1, norm_groups=4, latent_channels=3, codes=32)  # f4
UNET = UNetConfig(channels=(16, 32), layers=1, attention=(False, True), heads=2, norm_groups=8, context_width=TEXT.width)
STORY: dict[str, Any] = {"name": "Tiny", "data": "nothing", "stages": {"text": "none"}, "prompt": "a small red circle"}


class Pictures:
    """A data set of smooth random pictures with captions."""

    def __init__(self, count: int = 12) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def load(self, index: Sequence[int], position: Sequence[int], resolution: int, seed: int, flip: bool) -> ImageBatch:
        """Picture i is the same wherever it is asked for."""
        coarse = torch.stack([torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(i)) * 2 - 1 for i in index])
        size = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * len(index)).float()
        return ImageBatch(
            image=torch.nn.functional.interpolate(coarse, (resolution, resolution), mode="bilinear"),
            caption=tuple(self.captions(index, position, seed)),
            size=size,
            position=torch.tensor(position),
        )

    def captions(self, index: Sequence[int], position: Sequence[int], seed: int) -> list[str]:
        """One caption for each picture, all different."""
        return [CAPTIONS[i % len(CAPTIONS)] for i in index]

    def all_captions(self, index: Sequence[int]) -> list[list[str]]:
        """The same as a list of one."""
        return [[caption] for caption in self.captions(index, index, 0)]

    def origin(self, index: int) -> str:
        """Its number."""
        return f"picture {index}"

    def describe(self) -> dict[str, object]:
        """How many there are."""
        return {"images": self.count}

    def fingerprint(self) -> str:
        """The number is all they depend on."""
        return str(self.count)


def text_product(folder: Path, seed: int = 0) -> Path:
    """A random text tower with a tokenizer learned from the captions."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CAPTIONS, 560, TEXT.max_tokens)
    TextEncoder(small_clip_text(TEXT, tokenizer), tokenizer).save(folder)
    return folder


def t5_folder(folder: Path, prompts: Sequence[str] = CAPTIONS) -> Any:
    """A random T5 with a tokenizer of its kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    pieces = Tokenizer(models.Unigram())
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False)
    pieces.train_from_iterator(list(prompts) * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**values, "tokenizer_class": "T5TokenizerFast"}))
    torch.manual_seed(0)
    made = T5Config(vocab_size=200, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    model = T5ForConditionalGeneration(made).eval()
    model.save_pretrained(folder)
    return model


def clip_product(folder: Path, seed: int = 0) -> Path:
    """A random CLIP of both towers."""
    torch.manual_seed(seed)
    tower = ImageTowerConfig(channels=(8, 16), embedding=24, grid=2)
    context = Context(data=Pictures(), val=Pictures(), resolution=SIDE, seed=0, total_images=1)
    Clip(text=TEXT, tower=tower, vocabulary=560).build(context).save(folder)
    return folder


def autoencoder_product(folder: Path, kind: Kind = "kl", seed: int = 0) -> Path:
    """A random autoencoder with the statistics of its latents."""
    torch.manual_seed(seed)
    network = (KL if kind == "kl" else VQ).build().eval()
    if kind == "vq":
        with torch.no_grad():
            network.codebook.normal_()
    statistics = measure(network, Pictures(), SIDE, 0, torch.device("cpu"))
    save_codec(folder / ("vae" if kind == "kl" else "vqvae"), network, statistics)
    return folder


def diffusion_product(folder: Path, text: Path, autoencoder: Path, process: Process, network: UNetConfig = UNET, **fields: Any) -> Path:
    """A random UNet on the other products."""
    torch.manual_seed(0)
    codec = load_codec(autoencoder_folder(autoencoder))
    network = replace(network, in_channels=codec.channels, out_channels=codec.channels)
    config = LatentDiffusion(network=network, process=process, defaults=Defaults(**{"steps": 4, "chunk": 2, **fields}))
    family = LatentDiffusionFamily(config, network.build(), codec, TextEncoder.load(text))
    family.resolution = SIDE
    family.save(folder)
    return folder


def finished_model(root: Path, kind: Kind = "kl", process: Process | None = None, network: UNetConfig = UNET, **defaults: Any) -> Path:
    """A whole model folder, root/model, beside the products it was made of."""
    text, autoencoder = text_product(root / "text"), autoencoder_product(root / "autoencoder", kind)
    diffusion = diffusion_product(root / "diffusion", text, autoencoder, process or Process(), network, **defaults)
    assemble(text, autoencoder, diffusion, root / "model", STORY)
    return root / "model"


def own_clip_model(root: Path) -> Path:
    """A whole model folder, root/model, whose text encoder is of a CLIP that lies beside it."""
    text, autoencoder = clip_product(root / "text"), autoencoder_product(root / "autoencoder")
    diffusion = diffusion_product(root / "diffusion", text, autoencoder, Process())
    assemble(text, autoencoder, diffusion, root / "model", STORY)
    return root / "model"


def told_model(base: Path, conditions: tuple[Condition, ...], root: Path) -> Path:
    """A whole model folder, root/model, of `base` with conditions on views of the scenes, with weights that listen to them."""
    from ldm.data.dataset import asked
    from ldm.data.scenes.source import ScenesSource
    from ldm.families.family import Product
    from ldm.models.conditioned import base_of

    config = LatentDiffusion(network=UNET, conditions=conditions).continued(base)
    data = asked(ScenesSource(tier="one", images=4, val=2).build("train"), config.views())
    products = {name: Product(base, "") for name in ("text", "autoencoder")}
    context = Context(data=data, val=data, resolution=SIDE, seed=0, total_images=4, products=products, init=Product(base, ""))
    torch.manual_seed(0)
    family = config.build(context)
    assert isinstance(family, LatentDiffusionFamily)
    with torch.no_grad():
        base_of(family.denoiser).get_submodule("conv_in").weight.normal_(0, 0.1)
        for name, weight in family.denoiser.named_parameters():
            if "alpha" in name or "zero" in name:
                weight.fill_(0.5)
    family.save(root / "learned")
    config.assemble({"model": Product(root / "learned", ""), **products}, root / "model", {"name": "told"})
    return root / "model"


def token_model(root: Path) -> Path:
    """A whole model folder, root/model, that draws codes of a VQ autoencoder."""
    from ldm.families.family import Product
    from ldm.families.tokens.configuration import TokenDefaults
    from ldm.families.tokens.family import Tokens
    from ldm.models.token_transformer import TokenTransformerConfig

    folders = {"text": text_product(root / "text"), "autoencoder": autoencoder_product(root / "autoencoder", "vq")}
    products = {name: Product(folder, name) for name, folder in folders.items()}
    network = TokenTransformerConfig(width=16, layers=1, heads=2, size_channels=4)
    config = Tokens(network=network, defaults=TokenDefaults(steps=3, chunk=2))
    torch.manual_seed(0)
    config.build(Context(data=Pictures(), val=Pictures(), resolution=SIDE, seed=0, total_images=1, products=products)).save(
        root / "product"
    )
    config.assemble({**products, "model": Product(root / "product", "")}, root / "model", STORY)
    return root / "model"
