"""What a run takes from elsewhere, a base model or parts of others: found, told apart by content, and made ready."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ldm.formats import atomic
from ldm.config.schema import config
from ldm.config.errors import UserError
from ldm.families.autoencoder import KL, VQ
from ldm.formats.latent_codec import KINDS, autoencoder_folder
from ldm.families.family import Product
from ldm.families.latent_diffusion.loading import defaults_of, process_of
from ldm.families.latent_diffusion.family import Defaults, LatentDiffusion
from ldm.formats.model_folder import read_record
from ldm.formats.part import PARTS, content_hash, read_config, read_json
from ldm.formats.model_folder import hub_folder, say
from ldm.models.autoencoder import KLConfig, VQConfig
from ldm.models.unet import UNetConfig
from ldm.formats.single_file import named, open_single
from ldm.text.pretrained import PretrainedText, text_folder

if TYPE_CHECKING:
    from ldm.data.cached import CachedLatents
    from ldm.runs.run import Run
    from ldm.training.settings import Train

GIVEN = "given"  # the folder in a run folder
RECORD = "given.json"
FOLLOWS = ("in_channels", "out_channels", "context_width")  # of a UNet: these the other parts decide


@config
class PretrainedAutoencoder:
    """An autoencoder that is used as it is."""

    kind: Literal["pretrained"] = "pretrained"
    path: str  # a model folder, its vae or vqvae, a file in CompVis' naming, or a name on the hub as owner/name


@dataclass(frozen=True)
class Found:
    """A part from elsewhere."""

    path: str  # as the configuration has it
    folder: Path  # where it lies now
    hash: str  # of all that its use depends on
    text: PretrainedText | None = None  # how it is read, where it is a text encoder


def roles(run: Run) -> dict[str, str]:
    """The families that no stage of the run need train first, and where each is from."""
    found = {}
    if run.init:
        found = {"text": run.init, "autoencoder": run.init, "diffusion": run.init}
    for role, part in (("text", run.text), ("autoencoder", run.autoencoder)):
        if isinstance(part, PretrainedText | PretrainedAutoencoder):
            found[role] = part.path
    return found


def find(run: Run, note: Callable[[str], None] = say) -> dict[str, Found]:
    """Every part from elsewhere, by role; files in CompVis' naming are opened on the way.

    Raises:
        UserError: naming what is missing or damaged.
    """
    found: dict[str, Found] = {}
    for role, path in roles(run).items():
        if role == "text":
            asked = run.text if isinstance(run.text, PretrainedText) else PretrainedText(path=path)
            folder = text_folder(_opened(path, note))
            said = f"{_text_hash(folder)} {asked.max_tokens} {asked.skip_last}"
            found[role] = Found(path, folder, hashlib.sha256(said.encode()).hexdigest(), asked)
        elif role == "autoencoder":
            folder = _folder(path, [f"{part}/*" for part in PARTS] + ["*"], note)
            found[role] = Found(path, folder, content_hash(autoencoder_folder(folder)))
        else:
            folder = _folder(path, [f"{part}/*" for part in PARTS] + ["model_index.json", "ldm.json"], note)
            for part in ("unet", "scheduler"):
                if not (folder / part).is_dir():
                    raise UserError(f"init: {path} has no {part}; give a whole model's folder or file")
            said = f"{content_hash(folder / 'unet')} {content_hash(folder / 'scheduler')}"
            found[role] = Found(path, folder, hashlib.sha256(said.encode()).hexdigest())
    return found


def _opened(path: str, note: Callable[[str], None]) -> str:
    """A text encoder's path, where a file was given the folder that it was opened into."""
    return str(_folder(path, [], note)) if named(path) else path


def _folder(path: str, patterns: list[str], note: Callable[[str], None]) -> Path:
    folder = Path(path).expanduser()
    if file := named(path):
        return open_single(*file, note=note)
    if not folder.is_dir():
        folder = hub_folder(path, patterns)
    whole = any((folder / part).is_dir() for part in PARTS)
    return folder / "model" if (folder / "model").is_dir() and not whole else folder


def _text_hash(folder: Path) -> str:
    if (folder / "text_encoder").is_dir():
        return content_hash(folder / "text_encoder") + content_hash(folder / "tokenizer")
    return content_hash(folder)


def make(found: Mapping[str, Found], out: Path, write: bool) -> dict[str, Product]:
    """The parts as stages read them; a text encoder is written to OUT/given/text in the form that it is used in.

    Args:
        write: whether this process writes; the others call afterwards and read.
    """
    products = {role: Product(part.folder, part.hash) for role, part in found.items()}
    if "text" in found:
        target, asked = out / GIVEN / "text", found["text"].text
        assert asked is not None
        folder = found["text"].folder
        if write and not _made(target, found["text"].hash):
            encoder = replace(asked, path=str(folder)).build()

            def save(inner: Path) -> None:
                encoder.save(inner)
                atomic.write_json(inner / RECORD, {"path": found["text"].path, "hash": found["text"].hash})

            atomic.commit(target, save)
        products["text"] = Product(target, found["text"].hash)
    return products


def _made(folder: Path, wanted: str) -> bool:
    """Whether a folder holds what an earlier start made of the same part, and is whole."""
    try:
        atomic.verify(folder)
        return bool(read_json(folder / RECORD).get("hash") == wanted)
    except (atomic.Damaged, UserError):
        return False


def based(diffusion: LatentDiffusion, base: Path) -> LatentDiffusion:
    """The configuration of a UNet that continues a base model: its network, its schedule and its target are the base's.

    What the configuration says of them must agree, but need not be said at all; offset noise is the base's where the configuration is
    silent. What else only concerns training (weights of errors, density of times, dropout, checkpointing) is the configuration's own.

    Raises:
        UserError: naming the field, both values and the fix.
    """
    network, process = UNetConfig.from_diffusers(read_config(base / "unet")), process_of(base)
    own = diffusion.network
    if own != UNetConfig():
        _agree("diffusion.network", replace(own, dropout=0.0), replace(network, dropout=0.0), FOLLOWS, base)
    usual = type(diffusion.process)()
    for name in ("schedule", "target"):
        said, theirs = getattr(diffusion.process, name), getattr(process, name)
        if said not in (getattr(usual, name), theirs):
            raise UserError(f"diffusion.process.{name}: got {_words(said)}, but the base model {base} has {_words(theirs)}; leave it out")
    record = read_record(base)
    own_offset = diffusion.process.offset_noise
    offset = process.offset_noise if own_offset is None else own_offset
    defaults = diffusion.defaults
    if defaults == Defaults():
        defaults = defaults_of(record, base)[0]
    network = replace(network, dropout=own.dropout, checkpointing=own.checkpointing, zero_start=False)
    process = replace(diffusion.process, schedule=process.schedule, target=process.target, offset_noise=offset)
    return replace(diffusion, network=network, process=process, defaults=defaults)


def based_autoencoder(own: KL | VQ, base: Path) -> KL | VQ:
    """The configuration of an autoencoder that continues a base model's: its network is the base's.

    Raises:
        UserError: naming the field, both values and the fix.
    """
    values = read_config(autoencoder_folder(base))
    kind = KLConfig if values.get("_class_name") == KINDS[0] else VQConfig
    network: KLConfig | VQConfig = kind.from_diffusers(values)
    if type(network) is not type(own.network):
        raise UserError(f"autoencoder.kind: got {own.kind}, but the base model {base} has the other kind; write that one")
    if own.network != type(own.network)():
        _agree("autoencoder.network", own.network, network, (), base)
    return replace(own, network=replace(network, checkpointing=own.network.checkpointing))  # type: ignore[arg-type]


def _agree(where: str, said: Any, theirs: Any, but: tuple[str, ...], base: Path) -> None:
    for field in fields(said):
        if field.name in but or not field.compare:
            continue
        a, b = getattr(said, field.name), getattr(theirs, field.name)
        if a != b:
            raise UserError(f"{where}.{field.name}: got {_words(a)}, but the base model {base} has {_words(b)}; leave {where} out")


def _words(value: Any) -> str:
    return str(getattr(value, "kind", None) or value)


def check_cache(cache: CachedLatents, stage: Train, products: Mapping[str, Product]) -> None:
    """Refuse a latent cache from elsewhere that was made for something else.

    Raises:
        UserError: naming what differs.
    """
    from ldm.text.encoder import TextEncoder

    cache.require(autoencoder=content_hash(autoencoder_folder(products["autoencoder"].folder)), resolution=stage.resolution)
    cache.require_shapes(stage.buckets.shapes(stage.resolution) if stage.buckets else [])
    if cache.plan.text:
        cache.require_text(TextEncoder.load(products["text"].folder).encode)


def problems(run: Run) -> Iterator[str]:
    """What cannot be, between what is given and what is trained."""
    from ldm.training.settings import Train

    given = roles(run)
    seen: set[str] = set()
    for name, stage in run.stages.items():
        if not isinstance(stage, Train):
            continue
        where = f"stages.{name}.family"
        fixed = isinstance(run.family(stage.family), PretrainedText | PretrainedAutoencoder)
        if fixed or (stage.family == "text" and "text" in given):
            yield f"{where}: {stage.family} is taken from {given[stage.family]} as it is; leave this stage out"
        if stage.family == "text" and "text" in seen:
            yield f"{where}: text is trained by an earlier stage already; give that one more images"
        seen.add(stage.family)
