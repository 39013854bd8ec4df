"""Registry of denoising networks: the union behind `network: {kind: unet, ...}`, and dispatch of a config.json by class name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, cast

from ldm.config.errors import UserError
from ldm.config.foreign import short
from ldm.config.introspection import members_of, without_annotation
from ldm.config.schema import BY_KIND
from ldm.models.backbone import Denoiser, DenoiserConfig
from ldm.models.dit import DiTConfig
from ldm.models.mmdit import MMDiTConfig
from ldm.models.unet import UNetConfig

__all__ = ["DEFAULT", "FOLDERS", "Denoiser", "DenoiserConfig", "Network", "config_of", "members"]

# Fields are annotated `denoiser.Network`, so that the name is looked up when a configuration is read.
Network: TypeAlias = Annotated[UNetConfig | DiTConfig | MMDiTConfig, BY_KIND]
DEFAULT = UNetConfig()  # Stable Diffusion 1.x
FOLDERS = ("unet", "transformer")  # where a pipeline folder may keep it


def members() -> tuple[type[DenoiserConfig], ...]:
    """The configurations of all networks."""
    return tuple(members_of(without_annotation(Network)).values())


def config_of(values: Mapping[str, Any], where: str = "config.json") -> Network:
    """The configuration behind a config.json, the file `where`, by its `_class_name`; without one it is the first member's.

    Raises:
        UserError: for a class that is no denoising network here, or a field whose value that network does not have.
    """
    known = {name: member for member in members() for name in member.class_names}
    name = values.get("_class_name", next(iter(known)))
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{where}: _class_name is {short(name)}; a denoising network is one of {', '.join(known)}")
    try:
        made: Network = known[name].from_diffusers(values)  # type: ignore[assignment]
    except UserError as error:
        raise UserError(str(error).replace("config.json", where, 1)) from None
    return made


def continued(own: Network, base: Network) -> Network:
    """A base model's network, with what concerns training alone as `own` has it, where both are of one kind."""
    return cast("Network", own.continuing(cast("Any", base))) if own.kind == base.kind else base
