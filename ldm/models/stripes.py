"""Tiled (striped) encoding and decoding with whole-map GroupNorm statistics: no seams, in a fraction of the memory.

Tiles that are decoded one by one see statistics of their own in every GroupNorm, which couples the whole picture, and so
come out in other colours. Here one operation after the other goes over all stripes of a map, in place where it can, with
the statistics of the whole map: there is nothing to blend and no seam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.diffusion.schedules import precise
from ldm.models.blocks import CodeNorm, Downsample, ResnetBlock, Upsample, normed
from ldm.models.coder import Bottom, CoderStage, Decoder, Encoder

RowFunction = Callable[[Tensor, int], Tensor]  # rows of a map (B,C,n,w) and which is the first -> (B,C',k n,k w)


class Stripes:
    """A way through an encoder or decoder of maps with more than `places` places; smaller ones are computed at once.

    Inference only: maps are overwritten.
    """

    def __init__(self, places: int) -> None:
        self.places = places

    def encode(self, encoder: Encoder, image: Tensor) -> Tensor:
        """What `encoder(image)` gives, (B,C,H,W) -> (B,c,h,w)."""
        return self._run(encoder, image, (*encoder.down_blocks, encoder.mid_block), None)

    def decode(self, decoder: Decoder, z: Tensor, codes: Tensor | None = None) -> Tensor:
        """What `decoder(z, codes)` gives, (B,c,h,w) -> (B,C,H,W)."""
        return self._run(decoder, z, (decoder.mid_block, *decoder.up_blocks), codes)

    def _run(self, coder: Encoder | Decoder, x: Tensor, blocks: Sequence[CoderStage | Bottom], codes: Tensor | None) -> Tensor:
        x = self._map(x, lambda rows, _: coder.conv_in(rows), halo=1)
        for layer in (layer for block in blocks for layer in _layers(block)):
            x = self._layer(layer, x, codes)  # only here is the last map held, so that it goes when the next one stands
        last = self._norm(coder.conv_norm_out, x, codes)
        return self._map(x, lambda rows, top: coder.conv_out(F.silu(last(rows, top))), halo=1)

    def _large(self, x: Tensor) -> bool:
        return x.shape[2] * x.shape[3] > self.places

    def _layer(self, layer: nn.Module, x: Tensor, codes: Tensor | None) -> Tensor:
        if isinstance(layer, ResnetBlock):
            return self._resnet(layer, x, codes)
        if isinstance(layer, Downsample):
            return self._halved(layer, x)
        if isinstance(layer, Upsample):
            large = 4 * x.shape[2] * x.shape[3] > self.places
            return self._map(x, lambda rows, _: layer(rows), halo=1, scale=2) if large else layer(x)
        return layer(x, codes)  # attention, where every place sees every other

    def _resnet(self, block: ResnetBlock, x: Tensor, codes: Tensor | None) -> Tensor:
        if not self._large(x):
            return block(x, None, codes)
        first = self._norm(block.norm1, x, codes)
        h = self._map(x, lambda rows, top: block.conv1(F.silu(first(rows, top))), halo=1)
        second = self._norm(block.norm2, h, codes)

        def rest(rows: Tensor, top: int) -> Tensor:
            beside = x[:, :, top : top + rows.shape[2]]
            beside = beside if block.conv_shortcut is None else block.conv_shortcut(beside)
            return beside + block.conv2(F.silu(second(rows, top)))

        return self._map(h, rest, halo=1, out=h)

    def _halved(self, layer: Downsample, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if not self._large(x):
            return layer(x)
        step = max(2, self.places // 4 // width // 2 * 2)
        parts = []
        for top in range(0, height - 1, step):
            rows = x[:, :, top : min(top + step + 1, height)]  # the places below and to the right are padding at the end
            parts.append(layer.conv(F.pad(rows, (0, 1, 0, 1) if top + step >= height else (0, 1, 0, 0))))
        return torch.cat(parts, dim=2)

    def _map(self, x: Tensor, run: RowFunction, *, halo: int, scale: int = 1, out: Tensor | None = None) -> Tensor:
        """`run` on all rows of a map, with `halo` rows around each stripe; into `out`, which may be `x` itself."""
        height, width = x.shape[2:]
        if scale == 1 and not self._large(x):
            return run(x, 0)
        step = max(1, self.places // 4 // (width * scale * scale))
        above = x[:, :, :0]  # rows before the stripe, as they were
        for top in range(0, height, step):
            end = min(top + step, height)
            rows = torch.cat([above, x[:, :, top : min(end + halo, height)]], dim=2)
            made = run(rows, top - above.shape[2])[:, :, above.shape[2] * scale :][:, :, : (end - top) * scale]
            above = x[:, :, max(end - halo, 0) : end].clone()
            if out is None:
                layout = torch.channels_last if made.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
                shape = (len(x), made.shape[1], height * scale, width * scale)
                out = torch.empty(shape, dtype=made.dtype, device=x.device, memory_format=layout)
            out[:, :, top * scale : end * scale] = made
        assert out is not None
        return out

    def _norm(self, layer: nn.Module, x: Tensor, codes: Tensor | None) -> RowFunction:
        """A norm that knows the statistics of all of `x`, for rows of it."""
        if not self._large(x):
            return lambda rows, top: normed(layer, rows, codes)
        group = layer.norm_layer if isinstance(layer, CodeNorm) else layer
        assert isinstance(group, nn.GroupNorm)
        mean, variance = self._statistics(x, group.num_groups)
        factor = group.weight.view(group.num_groups, -1) * (variance + group.eps).rsqrt()[..., None]  # (B,G,C/G)
        offset = group.bias.view(group.num_groups, -1) - mean[..., None] * factor
        a, b = (y.flatten(1)[..., None, None].to(x.dtype) for y in (factor, offset))
        if not isinstance(layer, CodeNorm):
            return lambda rows, top: torch.addcmul(b, rows, a)
        assert codes is not None
        scale, shift = layer.conv_y(codes), layer.conv_b(codes)
        height, width = x.shape[2:]

        def told(rows: Tensor, top: int) -> Tensor:
            # The rows and columns that nearest enlargement takes.
            i = torch.arange(top, top + rows.shape[2], device=x.device) * codes.shape[2] // height
            j = torch.arange(width, device=x.device) * codes.shape[3] // width
            return torch.addcmul(b, rows, a) * scale[:, :, i][..., j] + shift[:, :, i][..., j]

        return told

    def _statistics(self, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of each group of channels, (B,G) each, in float32 at least."""
        step = max(1, self.places // 4 // x.shape[3])
        kind = torch.promote_types(x.dtype, torch.float32)
        fine = precise(x.device)
        means, spreads, counts = [], [], []
        for rows in x.split(step, dim=2):
            variance, mean = torch.var_mean(rows.unflatten(1, (groups, -1)).to(kind), dim=(2, 3, 4), correction=0)
            means.append(mean.to(fine))
            spreads.append(variance.to(fine))
            counts.append(rows.shape[2])
        share = torch.tensor(counts, dtype=fine, device=x.device)[:, None, None] / x.shape[2]
        mean = (share * torch.stack(means)).sum(0)
        variance = (share * (torch.stack(spreads) + (torch.stack(means) - mean).square())).sum(0)
        return mean.to(kind), variance.to(kind)


def _layers(block: CoderStage | Bottom) -> Iterator[nn.Module]:
    """What a block does, in order."""
    if isinstance(block, Bottom):
        yield from (block.resnets[0], *block.attentions, block.resnets[1])
        return
    for i, resnet in enumerate(block.resnets):
        yield resnet
        if block.attentions is not None:
            yield block.attentions[i]
    for scales in (block.downsamplers, block.upsamplers):
        if scales is not None:
            yield scales[0]
