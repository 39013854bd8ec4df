"""Form and order: what a user fills in, checked, as nothing that comes over a network can be trusted."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ldm.config.errors import UserError
from ldm.data.images import Rejected, probe
from ldm.demo.catalogue import Catalogue
from ldm.demo.studio import DrawOrder
from ldm.demo.view_inputs import ViewInput
from ldm.families.draws import Draws, Settings, Wanted
from ldm.sampling.adapters import OPTIONS, differ, remembered, told_shortly, weighted
from ldm.sampling.foreign_recipe import ForeignRecipe
from ldm.sampling.given import Files
from ldm.sampling.prompt_files import Asked
from ldm.sampling.prompt_tags import Tag, parted
from ldm.sampling.recipe import Recipe, writable
from ldm.sampling.recipe_values import LIMITS
from ldm.sampling.request import STRENGTH, Base, Choice, Editing, Following, NamedAdapters, PromptOptions, Request, SamplerOptions, Views
from ldm.sampling.requested import init_image_for, recipes_of
from ldm.sampling.unheard import in_lines

MAX_PROMPT = 10_000  # characters
MAX_PICTURES = 64  # of one order
MAX_BYTES = 2**25  # of an uploaded picture
MAX_PIXELS = 2**24  # of one, before it is resized
BOUNDS = LIMITS | {"pictures": (1, MAX_PICTURES), "variations": (0, MAX_PICTURES), "variation_strength": LIMITS["variation"]}
MAX_LINES = 100_000  # characters of a file of prompts
# Numbers that the page leaves as they are: what a network of XL's is told of sizes, always those that are drawn.
TOLD = ("original_size", "crop", "target_size")
FOREIGN = (
    "variation",
    "to",
    "outpaint",
    "invert",
    "cross_replace",
    "self_replace",
    "watermark",
    "backend",
    *TOLD,
)  # fields of a recipe that the page has no place for


@dataclass(frozen=True, kw_only=True)
class Form(Settings):
    """What can be chosen for one order; the numbers mean what the options of `ldm sample` mean, a spacing of "" the sampler's own."""

    prompt: str = ""
    negative: str = ""
    seed: int = 0  # of the first picture; picture k has seed + k
    pictures: int = 1
    width: int  # px
    height: int  # px
    notation: bool = True
    hires: float = 1.0
    hires_strength: float = 0.5
    strength: float = STRENGTH  # with a picture to start from
    variations: int = 0  # of every picture, in its place
    variation_strength: float = 0.2
    model: str = ""  # a name of the catalogue; empty: the first
    vae: str = ""  # the same; empty: the model's own
    lines: str = ""  # prompts, one a line, in place of `prompt`

    def request(self, files: Mapping[str, Path], given: tuple[str, ...] = ()) -> Request:
        """What `ldm sample` would be told.

        Args:
            files: picture files by `init` and `mask`, and a file of `prompts`.
            given: VIEW=FILE@WEIGHT.
        """
        second: dict[str, Any] = {"hires": self.hires, "hires_strength": self.hires_strength} if self.hires != 1 else {}
        strength: dict[str, Any] = {"strength": self.strength} if "init" in files else {}
        near: dict[str, Any] = {"variation_strength": self.variation_strength} if self.variations else {}
        return Request(
            prompts=PromptOptions(prompts=files["prompts"]) if "prompts" in files else PromptOptions(prompt=(self.prompt,)),
            base=Base(model=self.model, seed=self.seed, negative=self.negative, size=f"{self.width}x{self.height}"),
            following=Following(literal=not self.notation),
            choice=Choice(n=self.pictures, variations=self.variations, **near),
            sampler=SamplerOptions(**asdict(self.wanted())),
            editing=Editing(init=files.get("init"), mask=files.get("mask"), **strength, **second),
            views=Views(given=given),
            adapters=NamedAdapters(vae=Path(self.vae) if self.vae else None),
        )


NAMES = tuple(f.name for f in fields(Form) if f.name not in TOLD)


def blank(family: Draws, precision: str = "") -> Form:
    """The model's own defaults."""
    own, (height, width) = family.settings(Wanted(precision=precision)), family.defaults["size"]
    return Form(width=width, height=height, **{**asdict(own), "spacing": ""})


def read_form(values: Mapping[str, Any], largest: int, form: Form) -> Form:
    """A form with what a client sent: numbers within their bounds, texts of some length.

    Args:
        largest: px, of a side.
        form: what counts where nothing was sent.

    Raises:
        UserError: naming the field, the value and what is needed.
    """
    found: dict[str, Any] = {}
    for f in (f for f in fields(Form) if f.name in NAMES):
        value = values.get(f.name)
        if value is None:
            continue
        kind = {"str": str, "int": int, "float": float, "bool": bool}[str(f.type)]
        low, high = (1, largest) if f.name in ("width", "height") else BOUNDS.get(f.name, (0, math.inf))
        if kind is str and isinstance(value, str):
            if len(value) > (most := MAX_LINES if f.name == "lines" else MAX_PROMPT):
                raise UserError(f"{f.name}: {len(value)} characters; at most {most}")
            found[f.name] = writable(value).replace("\0", " ").replace("\r\n", "\n")
            continue
        if kind is bool and isinstance(value, bool):
            found[f.name] = value
            continue
        fits = kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not fits or (kind is int and value != int(value)):
            needed = f"a {'whole ' * (kind is int)}number from {low:g} to {high:g}" if kind in (int, float) else f"a {kind.__name__}"
            raise UserError(f"{f.name}: got {str(value)[:40]!r}; {needed} is needed")
        found[f.name] = kind(value)
    return replace(form, **found)


def order_of(catalogue: Catalogue, request: Request, largest: int) -> DrawOrder:
    """An order by the same way that `ldm sample` makes its recipes; LoRAs and autoencoders are names of the catalogue.

    Args:
        largest: px, of a side.

    Raises:
        UserError: as `ldm sample` has it, and for more pictures or pixels than are drawn here.
    """
    notes: list[str] = []
    tell = notes.append
    old = request.following.old(request.parts, tell)
    literal = request.following.literal
    asked, tags = _untagged(request.prompts.read(old.get("prompt")), literal)
    tags += tuple(Tag(f"<lora:{name}>", "lora", name, weight) for name, weight in map(weighted, request.adapters.lora))
    if not tags:
        tags = _told_tags(old)
    many = len(asked) * len(request.choice.listed(request.base.seed) or range(request.choice.n)) * max(1, request.choice.variations)
    if many > MAX_PICTURES:
        raise UserError(f"n: {many} pictures; at most {MAX_PICTURES} at once")
    for said in in_lines(request, asked):
        tell(said)
    outfit = catalogue.chosen(request.base.model, tags, str(request.adapters.vae or _told_vae(old)))
    own = {name: value for name, value in old.items() if name not in OPTIONS}  # files that a client's picture names are not opened
    rest = request.fields(own)
    opened = catalogue.opened(outfit)
    family = opened.family
    rest |= {**opened.added, "model": outfit.model, "model_hash": family.content_hash}
    given = Files(family.told, family.unheard, kept=True)
    added = {**opened.added, "given": given.field(request.views.given, {}, tell)}
    rest["given"] = added["given"]
    if request.following.recipe is not None:
        request.following.compare(own, outfit.model, family.content_hash, tell)
        if old.get("backend"):
            tell(f"computed by {old['backend']}, and here by torch: the same to rounding")
        if differ(old, added):
            tell(f"drawn with {', '.join(told_shortly(added)) or 'no LoRAs or new words'}, the picture was not: it will differ")
    if (size := request.base.shape(own)) is not None and max(size) > largest:
        raise UserError(f"size: got {size[1]}x{size[0]}; at most {largest} px a side here")
    init_image = init_image_for(request, asked, family, own, tell)
    if init_image is not None:
        rest |= {"init": init_image.init_hash, "mask": init_image.mask_hash}
    made = recipes_of(request, asked, family, own, rest, init_image, tell)
    if (side := max(max(one.width, one.height) for one in made)) > largest:
        raise UserError(f"size: got {side} px; at most {largest} px a side here")
    room = int(family.defaults["chunk"])
    return DrawOrder(tuple(made), init_image, given, lambda: catalogue.opened(outfit).family, room, tuple(dict.fromkeys(notes)))


def _untagged(asked: Sequence[Asked], literal: bool) -> tuple[list[Asked], tuple[Tag, ...]]:
    """Prompts without their tags, and the tags, which must be the same ones everywhere: one model draws an order."""
    if literal:
        return list(asked), ()
    found = [parted(one.prompt) for one in asked]
    for _, tags in found:
        if [(tag.name, tag.weight) for tag in tags] != [(tag.name, tag.weight) for tag in found[0][1]]:
            raise UserError("prompts: some name other LoRAs than the first; draw them one after the other")
        for tag in tags:
            if tag.kind == "hypernet":
                raise UserError(f"prompt: {tag.text}: no hypernetworks are applied here; leave it out")
    return [replace(one, prompt=words) for one, (words, _) in zip(asked, found, strict=True)], found[0][1]


def _told_tags(old: Mapping[str, Any]) -> tuple[Tag, ...]:
    """The LoRAs of a picture that is followed, as tags."""
    told = [(Path(one["file"]).stem, float(one["weight"])) for one in remembered(old, "loras")]
    return tuple(Tag(f"<lora:{name}:{weight:g}>", "lora", name, weight) for name, weight in told)


def _told_vae(old: Mapping[str, Any]) -> str:
    return "".join(Path(one["file"]).stem for one in remembered(old, "vae"))


def order_of_form(
    catalogue: Catalogue, form: Form, largest: int, init: bytes | None = None, mask: bytes | None = None, views: Sequence[ViewInput] = ()
) -> DrawOrder:
    """The order of a form, and of picture files and views that were sent with it.

    Raises:
        UserError: as `order_of`; for what is too large or no picture.
    """
    with tempfile.TemporaryDirectory(prefix="ldm-demo-") as folder:
        paths: dict[str, Path] = {}
        for name, data in (("init", init), ("mask", mask)):
            if data is not None:
                check_upload(name, data)
                paths[name] = Path(folder) / f"{name}.png"
                paths[name].write_bytes(data)
        if form.lines.strip():
            paths["prompts"] = Path(folder) / "prompts"
            paths["prompts"].write_text(form.lines, encoding="utf-8")
        given = tuple(view_word(one, Path(folder)) for one in views)
        with without_place(folder):
            made = order_of(catalogue, form.request(paths, given), largest)
        return replace(made, notes=tuple(note.replace(f"{folder}/", "") for note in made.notes))


def view_word(one: ViewInput, folder: Path) -> str:
    """VIEW=FILE@WEIGHT of what a client sent, written into a folder.

    Raises:
        UserError: for what is too large, or neither a picture nor JSON.
    """
    if one.data[:1] not in (b"[", b"{"):
        check_upload(one.view, one.data)
    elif len(one.data) > MAX_BYTES:
        raise UserError(f"{one.view}: {len(one.data) / 2**20:.0f} MB; at most {MAX_BYTES >> 20} MB")
    return one.word(folder)


@contextmanager
def without_place(folder: str) -> Iterator[None]:
    """Errors say nothing of a folder of this machine.

    Raises:
        UserError: those that are raised inside.
    """
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}/", "")) from None


def check_upload(name: str, data: bytes) -> None:
    """Refuse what is too large or no picture, by its length and its header alone.

    Raises:
        UserError: saying so.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"{name}: {len(data) / 2**20:.0f} MB; at most {MAX_BYTES >> 20} MB")
    try:
        probe(data, MAX_PIXELS)
    except Rejected as error:
        raise UserError(f"{name}: {error}") from None


def fill_in(
    form: Form, found: Recipe | ForeignRecipe, catalogue: Catalogue, model_hash: str, largest: int, added: Mapping[str, str] | None = None
) -> tuple[Form, list[str]]:
    """A form with the settings of a picture, and what should be known of those that it could not take.

    Args:
        found: as `ldm.sampling.recipe.read_recipe` gives it.
        catalogue: where its model, LoRAs and autoencoder are looked for.
        model_hash: of the model at hand.
        added: what recipes tell of the LoRAs and words that every picture is drawn with.
    """
    told: dict[str, Any] = asdict(found) if isinstance(found, Recipe) else {"notation": True, **found.fields}
    notes = [] if isinstance(found, Recipe) else [f"Settings of {found.program}: a picture alike, not the same."]
    notes += [] if isinstance(found, Recipe) else [f"Not followed: {lost}." for lost in found.unfollowed]
    if not model_hash.startswith(str(told.get("model_hash", ""))):
        if told.get("model") in catalogue.models():
            form = replace(form, model=told["model"])
        else:
            notes.append(f"It was made by the model {told.get('model', '?')}, which is not here: the picture will differ.")
    if told.get("init"):
        notes.append(f"It was drawn out of another picture (SHA-256 {told['init'][:12]}…): load that one below to repeat it.")
    own = {f.name: f.default for f in fields(Recipe)}
    if isinstance(found, Recipe) and differ(told, added or {}):
        tags, known = _told_tags(told), catalogue.loras()
        named = [tag for tag in tags if tag.name in known]
        told["prompt"] = " ".join([told["prompt"], *(tag.text for tag in named)])
        form = replace(form, vae=name if (name := _told_vae(told)) in catalogue.vaes() else "")
        here = {"vae": told["vae"] if form.vae else "", "loras": told["loras"] if len(named) == len(tags) else ""}
        if differ(told, {**(added or {}), **{name: text for name, text in here.items() if text}}):
            lost = ", ".join(told_shortly({name: told[name] for name in OPTIONS if told[name] and not here.get(name)}))
            notes.append(
                f"It was drawn with {lost or 'no LoRAs or new words'}, and this page draws with others or none: the picture will differ."
            )
    if other := [name for name in FOREIGN if told.get(name, own[name]) != own[name]]:
        notes.append(f"It also used {', '.join(other)}, which this page does not have; `ldm sample --from` does.")
    wanted = {name: told[name] for name in NAMES if name in told and (name != "strength" or told.get("init"))}
    filled = form
    for name, value in wanted.items():  # one by one: other programs' numbers may lie outside of ours
        try:
            filled = read_form({name: value}, largest, filled)
        except UserError as error:
            notes.append(f"Left out: {error}.")
    return replace(filled, pictures=1), notes
