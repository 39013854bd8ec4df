"""CLIP's image tower as a vision transformer: the network of transformers' CLIPVisionModelWithProjection under its parameter names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config.errors import UserError
from ldm.config.foreign import typed
from ldm.config.schema import BY_KIND, Depth, PositiveFloat, Width, config, plain
from ldm.models.image_tower import ImageTower, ImageTowerConfig
from ldm.models.text_tower import Activation, Stack

Three: TypeAlias = tuple[float, float, float]  # of red, green and blue
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of pixels in [0,1], as OpenAI's CLIP takes them
BICUBIC = 3  # by Pillow's number
PATCHES = 2**10  # along a side, at most


@config
class Pixels:
    """What preprocessor_config.json says of pixels in [0,1], with the published CLIP's values for what it does not."""

    image_mean: Three = MEAN
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = STD

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str) -> Pixels:
        """What the file `where` says.

        Raises:
            UserError: naming the field that makes no sense.
        """
        return typed({f.name: values[f.name] for f in fields(Pixels) if f.name in values}, Pixels, where)


AS_THEY_ARE = Pixels(image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))  # in [-1,1]


@config
class VisionShape:
    """What a CLIPVisionModelWithProjection's config.json says, with transformers' defaults for what it does not, and of its pixels."""

    hidden_size: Width = 768
    intermediate_size: Width = 3072
    projection_dim: Width = 512
    num_hidden_layers: Depth = 12
    num_attention_heads: Width = 12
    image_size: Width = 224
    patch_size: Width = 32
    num_channels: Literal[3] = 3
    hidden_act: Activation = "quick_gelu"
    layer_norm_eps: PositiveFloat = 1e-5
    pixels: Pixels = Pixels()

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise UserError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {self.num_attention_heads}")
        if self.image_size < self.patch_size:
            raise UserError(f"image_size {self.image_size} is less than one patch of {self.patch_size} (patch_size)")
        if self.grid > PATCHES:
            raise UserError(f"image_size {self.image_size} is more than {PATCHES} patches of {self.patch_size} px (patch_size)")

    @staticmethod
    def from_dict(values: Mapping[str, Any], pixels: Pixels, where: str) -> VisionShape:
        """What config.json, the file `where`, says of vision.

        Raises:
            UserError: naming the field that makes no sense.
        """
        said = {f.name: values[f.name] for f in fields(VisionShape) if f.name in values}
        return typed({**said, "pixels": pixels}, VisionShape, where)

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it."""
        said = {name: value for name, value in plain(self).items() if name != "pixels"}
        return {**said, "model_type": "clip_vision_model"}

    def preprocessing(self) -> dict[str, Any]:
        """The content of preprocessor_config.json, by which CLIPImageProcessor prepares pictures as they are prepared here."""
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": self.image_size},
            "resample": BICUBIC,
            "do_center_crop": True,
            "crop_size": {"height": self.image_size, "width": self.image_size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            **plain(self.pixels),
        }

    @property
    def embedding(self) -> int:
        """Width of the space shared with text."""
        return self.projection_dim

    @property
    def width(self) -> int:
        """Channels of the last of its maps."""
        return self.hidden_size

    @property
    def grid(self) -> int:
        """Patches along a side of the pictures that it has learned from."""
        return self.image_size // self.patch_size

    def places(self, side: int) -> int:
        """Of the last map, for a picture of `side` x `side` px."""
        return max(self.grid, round(side / self.patch_size)) ** 2

    def build(self) -> VisionTower:
        """The network, freshly initialised."""
        return VisionTower(self)


@config
class VisionTowerConfig:
    """A vision transformer (Dosovitskiy 2020, arXiv 2010.11929), with which the whole CLIP opens as transformers' CLIPModel."""

    kind: Literal["vit"] = "vit"
    patch: Width = 4  # px, height and width of a patch; a divisor of the stage's resolution
    width: Width = 128  # of its states, and of the space shared with text
    layers: Depth = 4  # transformer blocks
    heads: Width = 4  # attention heads; a divisor of width

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"heads {self.heads} does not divide width {self.width}")

    @property
    def step(self) -> int:
        """Sides of pictures in training are multiples of this."""
        return self.patch

    @property
    def embedding(self) -> int:
        """Width of the space shared with text."""
        return self.width

    def shape(self, side: int) -> VisionShape:
        """The network for pictures of `side` x `side` px."""
        return VisionShape(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            projection_dim=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            image_size=max(side, self.patch),
            patch_size=self.patch,
            pixels=AS_THEY_ARE,
        )

    def fresh(self, side: int) -> VisionTower:
        """The network to learn from pictures of `side` x `side` px."""
        return self.shape(side).build().begin()


TowerConfig: TypeAlias = Annotated[ImageTowerConfig | VisionTowerConfig, BY_KIND]  # what a run says of its CLIP's image tower
TowerShape: TypeAlias = ImageTowerConfig | VisionShape  # what builds one


class PatchEmbeddings(nn.Module):
    """Of patches, of their places, and of the token that stands for the whole picture."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.shape = shape
        width, patch = shape.hidden_size, shape.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(shape.grid**2 + 1, width)

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,H,W) to (B,1+N,D), row by row behind the class token; positions are interpolated for another grid."""
        maps = self.patch_embedding(image)  # (B,D,h,w)
        first = self.class_embedding.to(maps).expand(len(maps), 1, -1)
        x = torch.cat([first, maps.flatten(2).transpose(1, 2)], 1)
        places, grid = self.position_embedding.weight, self.shape.grid
        if maps.shape[-2:] != (grid, grid):
            square = places[1:].T.unflatten(1, (grid, grid))[None]
            other = F.interpolate(square, maps.shape[-2:], mode="bicubic", align_corners=False)[0].flatten(1).T
            places = torch.cat([places[:1], other])
        return x + places.to(x)


class VisionStack(nn.Module):
    """The network before its projection."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        width, eps = shape.hidden_size, shape.layer_norm_eps
        self.embeddings = PatchEmbeddings(shape)
        self.pre_layrnorm = nn.LayerNorm(width, eps=eps)  # spelt as in the files
        self.encoder = Stack(shape, causal=False)
        self.post_layernorm = nn.LayerNorm(width, eps=eps)


class VisionTower(nn.Module):
    """Images to one embedding each, or to the feature maps on the way there, by a vision transformer.

    Pictures that are smaller than those it has learned from are enlarged; of larger ones there are more patches.
    """

    def __init__(self, config: VisionShape) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionStack(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def begin(self) -> VisionTower:
        """Itself with weights to learn from, drawn as CLIP's are (Radford 2021), and a last layer that keeps lengths.

        The last norm has no weights and the projection is the identity, and stay so: what is lost is a linear map of a space that is
        learned anyway, and every embedding has the length sqrt(E) before it is made a unit long. Decoders that are told embeddings
        elsewhere, where none makes them a unit long, are told the same.
        """
        layers, width = self.config.num_hidden_layers, self.config.hidden_size
        inner = (2 * layers * width) ** -0.5
        spread = {"q_proj": inner, "k_proj": inner, "v_proj": inner, "out_proj": width**-0.5, "fc1": (2 * width) ** -0.5, "fc2": inner}
        with torch.no_grad():
            embeddings = self.vision_model.embeddings
            embeddings.class_embedding.normal_(0, width**-0.5)
            for layer in (embeddings.patch_embedding, embeddings.position_embedding):
                layer.weight.normal_(0, 0.02)
            for name, module in self.vision_model.encoder.named_modules():
                if isinstance(module, nn.Linear):
                    module.weight.normal_(0, spread[name.rpartition(".")[2]])
                    module.bias.zero_()
            self.visual_projection.weight.copy_(torch.eye(self.config.projection_dim, width))
        self.vision_model.post_layernorm.requires_grad_(False)
        self.visual_projection.requires_grad_(False)
        return self

    @property
    def keeps_length(self) -> bool:
        """Whether every embedding has the length sqrt(E) before it is made a unit long: the last layer is as `begin` leaves it."""
        norm, weight = self.vision_model.post_layernorm, self.visual_projection.weight
        square = weight.shape[0] == weight.shape[1] and torch.equal(weight, torch.eye(len(weight)).to(weight))
        return square and bool((norm.weight == 1).all()) and not bool(norm.bias.any())

    def features(self, image: Tensor) -> list[Tensor]:
        """What every block reads of places, [(B,D,h,w), ...], for an image (B,3,H,W) in [-1,1]."""
        return self._through(image)[0]

    def forward(self, image: Tensor) -> Tensor:
        """Unit-length embeddings of images (B,3,H,W) in [-1,1]."""
        return self.seen(image)[1]

    def seen(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The last of the `features` (B,D,h,w) and the unit-length embedding (B,E) of images.

        What the last block makes of places is read by nothing in training, so the map before it is the last one.
        """
        maps, x = self._through(image)
        found = self.visual_projection(self.vision_model.post_layernorm(x[:, 0]))
        return maps[-1], F.normalize(found.to(torch.promote_types(found.dtype, torch.float32)), dim=-1)

    def _through(self, image: Tensor) -> tuple[list[Tensor], Tensor]:
        """What every block reads of places, and the states (B,1+N,D) after the last one."""
        image = self._fitted(image)
        grid = [length // self.config.patch_size for length in image.shape[-2:]]
        x, maps = self.vision_model.pre_layrnorm(self.vision_model.embeddings(image)), []
        for layer in self.vision_model.encoder.layers:
            maps.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))
            x = layer(x)
        return maps, x

    def _fitted(self, image: Tensor) -> Tensor:
        """Pictures of a side that is known or larger, in whole patches, under the mean and deviation that were learned from."""
        side, patch, shape = self.config.image_size, self.config.patch_size, image.shape[-2:]
        if shape != (side, side):
            grow = max(1.0, side / min(shape))
            wanted = [max(1, round(length * grow / patch)) * patch for length in shape]
            image = image if wanted == list(shape) else F.interpolate(image, wanted, mode="bicubic", antialias=True)
        pixels = self.config.pixels
        if pixels == AS_THEY_ARE:
            return image
        mean, std = (image.new_tensor(one).view(3, 1, 1) for one in (pixels.image_mean, pixels.image_std))
        return ((image + 1) / 2 - mean) / std


TowerNetwork: TypeAlias = ImageTower | VisionTower


class Tower(nn.Module):
    """A frozen image tower, and the resolution in px that it learned at."""

    def __init__(self, network: TowerNetwork, resolution: int) -> None:
        super().__init__()
        self.network, self.resolution = network, resolution

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The last map (B,C,h,w) and the embedding (B,D) of pictures (B,3,H,W) in [-1,1], seen at that resolution."""
        size = (self.resolution, self.resolution)
        image = image if image.shape[2:] == size else F.interpolate(image, size, mode="bicubic", antialias=True)
        return self.network.seen(image)
