"""Image editing while sampling, each method a function that makes an `Edit`: img2img (SDEdit), inpainting, DDIM inversion, guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.config.errors import UserError
from ldm.diffusion.batch import Cond
from ldm.diffusion.inversion import invert
from ldm.diffusion.samplers import Denoise
from ldm.families.draws import Settings
from ldm.families.latent_diffusion.engine import Canvas, Edit, Engine
from ldm.families.latent_diffusion.prompt_schedule import shape_of
from ldm.formats.latent_codec import LatentCodec
from ldm.models.denoiser import Denoiser
from ldm.text.prompt_syntax import Prompt, literal

INVERTIBLE = ("ddim", "euler")
ROUNDS = 4  # network calls for each step of an inversion
JUDGED = 0.01  # alpha from which noisy latents are judged: of next to pure noise nothing can be told, and 1/alpha makes much of it


def from_picture(
    network: Denoiser, codec: LatentCodec, image: Tensor, mask: Tensor | None = None, strength: float | None = None
) -> tuple[Edit, ...]:
    """The edits that draw anew what `mask` shows of a picture, or all of it, and keep the other pixels to the byte.

    Args:
        image: (1 or N,H,W,3) uint8, one for all pictures of the call or one for each.
        mask: (1 or N,H,W) bool, True where new.
        strength: from 0, the autoencoder's reconstruction, to 1, drawn out of noise alone; None: 0.75, with a mask 1.

    Raises:
        UserError: if `strength` lies outside [0,1].
    """
    strength = strength_of(strength, mask is not None)
    x0 = encoded(codec, image)
    edits = [begin_from(x0, strength)]
    if mask is not None:
        edits += [fill(codec, image, mask) if wants_mask(network, codec) else blend(x0, mask, codec.factor), paste(image, mask)]
    return tuple(edits)


def strength_of(strength: float | None, masked: bool) -> float:
    """The strength that is meant.

    Raises:
        UserError: if it lies outside [0,1].
    """
    if strength is None:
        return 1.0 if masked else 0.75
    if not 0 <= strength <= 1:
        raise UserError(f"strength: got {strength}; a number from 0 (the picture as it is) to 1 (all new) is needed")
    return float(strength)


def wants_mask(network: Denoiser, codec: LatentCodec) -> bool:
    """Whether a network is made for inpainting: told, besides x, a mask and the latents of the picture without what it hides."""
    return network.config.in_channels - network.joins == 2 * codec.channels + 1


def encoded(codec: LatentCodec, image: Tensor, mask: Tensor | None = None) -> Tensor:
    """The latents (N,c,h,w) that pictures (N,H,W,3) uint8 most likely have, with grey for what a mask (N,H,W) hides.

    Each picture is encoded alone, so that none depends on the others.
    """
    values = image.permute(0, 3, 1, 2).to(codec.mean.device, codec.dtype) / 127.5 - 1
    if mask is not None:
        values = values.masked_fill(mask[:, None].to(values.device), 0)
    return torch.cat([codec.moments(one[None])[0] for one in values])


def begin_from(x0: Tensor, strength: float) -> Edit:
    """Start from latents (1 or N,c,h,w), noised as the last `strength` of the steps need (SDEdit, Meng 2021, arXiv 2108.01073)."""

    def start(x: Tensor, canvas: Canvas) -> Tensor:
        if x0.shape[2:] != x.shape[2:]:
            sides = [f"{shape[3]}x{shape[2]}" for shape in (x0.shape, x.shape)]
            raise UserError(f"init: its latents are {sides[0]}, but {sides[1]} are drawn; make the picture as large as `size`")
        return canvas.noised(canvas.own(x0), 0)

    return Edit(strength=strength, start=start if strength < 1 else None)


def from_inverted(
    engine: Engine,
    image: Tensor,
    source: Prompt,
    settings: Settings,
    strength: float = 1.0,
    on_call: Callable[[int, int], None] | None = None,
) -> Edit:
    """Start from the noise from which ddim's steps, told `source` without guidance, lead back to pictures (1 or N,H,W,3).

    Where the prompt equals what the picture shows, the result nearly does, too; a prompt that differs changes what differs
    (Mokady 2023, arXiv 2211.09794, section 3.1). That holds without guidance; guidance leads further away.

    Args:
        source: what the pictures show.
        settings: of the drawing; its sampler must be ddim or euler without added noise.
        strength: the share of the steps that is gone back.
        on_call: told network calls done and all, `ROUNDS` for each step.

    Raises:
        UserError: for a sampler that does not lead back, or a UNet made for inpainting.
    """
    if settings.sampler not in INVERTIBLE or settings.eta:
        used = f"{settings.sampler}{f' with eta {settings.eta:g}' if settings.eta else ''}"
        raise UserError(f"invert: {used} does not go back the way it came; choose {' or '.join(INVERTIBLE)}, without eta")
    if wants_mask(engine.denoiser, engine.codec):
        raise UserError("invert: this UNet is made for inpainting; give --mask, or take another model")
    x0, plain = encoded(engine.codec, image), replace(settings, guidance=1.0, rescale=0.0)

    def start(x: Tensor, canvas: Canvas) -> Tensor:
        empty, steps = literal(""), len(canvas.grid.t)
        shape = shape_of(engine.text, source, empty, steps)
        denoise = engine.guided_denoiser([source] * len(x), empty, shape, canvas, plain)
        calls = count(1)

        def told(x: Tensor, i: int) -> Tensor:
            clean = denoise(x, i)
            if on_call is not None:
                on_call(next(calls), steps * ROUNDS)
            return clean

        return invert(told, canvas.own(x0), canvas.grid.alpha, canvas.grid.sigma, ROUNDS)

    return Edit(strength=strength, start=start)


def blend(x0: Tensor, mask: Tensor, factor: int) -> Edit:
    """After every step, put latents x0 back where nothing is new, as noisy as the rest is by then.

    A latent pixel is free if any of its pixels is new (mask (1 or N,H,W) bool): `paste` restores the others.
    """
    free = F.max_pool2d(mask[:, None].float(), factor)  # (N,1,h,w)

    def after_step(x: Tensor, i: int, canvas: Canvas) -> Tensor:
        return torch.where(canvas.own(free) > 0, x, canvas.noised(canvas.own(x0), i))

    return Edit(after_step=after_step)


def fill(codec: LatentCodec, image: Tensor, mask: Tensor) -> Edit:
    """Tell an inpainting UNet the mask, and the latents of the picture with grey where it is new, in this order.

    The mask is scaled as in training: every `factor`-th pixel of it counts.
    """
    known = encoded(codec, image, mask)  # (N,c,h,w)
    small = F.interpolate(mask[:, None].to(known), size=known.shape[2:])  # (N,1,h,w)

    def condition(cond: Cond, canvas: Canvas) -> Cond:
        return replace(cond, image=torch.cat([canvas.own(small), canvas.own(known)], dim=1))

    return Edit(condition=condition)


def all_new(codec: LatentCodec, size: tuple[int, int]) -> Edit:
    """Tell an inpainting UNet that nothing of the picture is known: so it draws from the prompt alone."""
    grey, mask = torch.zeros(1, 3, *size), torch.ones(1, 1, size[0] // codec.factor, size[1] // codec.factor)
    known = codec.moments(grey.to(next(codec.network.parameters())))[0]

    def condition(cond: Cond, canvas: Canvas) -> Cond:
        return replace(cond, image=torch.cat([canvas.own(mask), canvas.own(known)], dim=1))

    return Edit(condition=condition)


def paste(image: Tensor, mask: Tensor) -> Edit:
    """Keep the bytes of pictures (1 or N,H,W,3) wherever a mask (1 or N,H,W) is not True."""

    def finish(drawn: Tensor, canvas: Canvas) -> Tensor:
        kept, new = (values[list(canvas.rows)] if len(values) > 1 else values for values in (image, mask))
        return torch.where(new[..., None], drawn, kept)

    return Edit(finish=finish)


def towards(log_likelihood: Callable[[Tensor, Tensor], Tensor], scale: float = 1.0) -> Edit:
    """Guidance by whatever judges noisy latents (Dhariwal 2021, arXiv 2105.05233, eq. 14): x0 + scale sigma^2/alpha grad log p.

    Args:
        log_likelihood: (x (B,c,h,w), t (B,)) -> (B,) log p(wish | x), differentiable in x; of each sample by itself.
        scale: 1 is Bayes' rule.
    """

    def guide(denoise: Denoise, canvas: Canvas) -> Denoise:
        def guided(x: Tensor, i: int) -> Tensor:
            x0, alpha, sigma = denoise(x, i), float(canvas.grid.alpha[i]), float(canvas.grid.sigma[i])
            if alpha < JUDGED:
                return x0
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                told = log_likelihood(leaf, canvas.grid.t[i].to(x.device).expand(len(x)))
                (gradient,) = torch.autograd.grad(told.sum(), leaf)
            return x0 + scale * sigma**2 / alpha * gradient

        return guided

    return Edit(guide=guide)
