"""Image tower of a small CLIP: a convolutional network that sees where things are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.config.foreign import typed
from ldm.config.schema import Depth, Width, config
from ldm.models.diffusers_config import require_buildable


@config
class ImageTowerConfig:
    """Strided convolutions, then one linear layer over a 4x4 map, so that places are not averaged away."""

    kind: Literal["conv"] = "conv"
    channels: tuple[Width, ...] = (32, 64, 128)  # per stage; each stage halves height and width
    embedding: Width = 128  # width of the space shared with text
    grid: Depth = 4  # the last map is pooled to grid x grid

    @property
    def step(self) -> int:
        """Sides of pictures in training are multiples of this; any will do."""
        return 1

    @property
    def width(self) -> int:
        """Channels of the last of its maps."""
        return self.channels[-1]

    def places(self, side: int) -> int:
        """Of the last map, for a picture of `side` x `side` px."""
        return (side >> len(self.channels)) ** 2

    def shape(self, side: int) -> ImageTowerConfig:
        """The network for pictures of `side` x `side` px: itself, for any."""
        return self

    def fresh(self, side: int) -> ImageTower:
        """The network to learn from pictures of `side` x `side` px."""
        return self.build()

    def build(self) -> ImageTower:
        """The network, freshly initialised."""
        return ImageTower(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str) -> ImageTowerConfig:
        """What a part's config.json, the file `where`, says.

        Raises:
            UserError: naming the field that makes no sense.
        """
        said = {name: values.get(name) for name in ("channels", "embedding", "grid")}
        found = typed(said, ImageTowerConfig, where)
        require_buildable(found.channels, 1)
        return found

    def to_dict(self) -> dict[str, Any]:
        """The content of the part's config.json."""
        return {"_class_name": "ImageTower", "channels": list(self.channels), "embedding": self.embedding, "grid": self.grid}


class ImageTower(nn.Module):
    """Images to one embedding each, or to the feature maps on the way there."""

    def __init__(self, config: ImageTowerConfig) -> None:
        super().__init__()
        self.config = config
        widths = (3, *config.channels)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(1, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1), nn.SiLU())
            for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.head = nn.Linear(widths[-1] * config.grid**2, config.embedding)

    def features(self, image: Tensor) -> list[Tensor]:
        """The map after every stage, [(B,C,H/2,W/2), ...], for an image (B,3,H,W) in [-1,1]."""
        maps, x = [], image
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Tensor:
        """Unit-length embeddings of images (B,3,H,W) in [-1,1]."""
        return self.seen(image)[1]

    def seen(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The last of the `features` (B,C,h,w) and the unit-length embedding (B,E) of images."""
        last = self.features(image)[-1]
        x = F.adaptive_avg_pool2d(last, self.config.grid)  # (B,C,g,g)
        return last, F.normalize(self.head(x.flatten(1)).float(), dim=-1)  # (B,E)
