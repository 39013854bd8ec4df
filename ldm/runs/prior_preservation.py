"""Prior preservation (DreamBooth, Ruiz 2022, arXiv 2208.12242): pictures of the base's kind, learned beside the new ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ldm.config.counts import plural
from ldm.config.errors import UserError
from ldm.config.schema import PathText, Positive, PositiveFloat, config, refuse_unread
from ldm.data.concatenation import Mixture
from ldm.data.dataset import DataSet
from ldm.data.folder import FolderSource

PRIOR = "prior_preservation"  # the folder in a run's folder of what is given
CHUNK = 8  # pictures between two looks at the progress


@config
class PriorPreservation:
    """What the base model is to go on knowing: pictures of it are drawn once, or lie in a folder."""

    prompts: tuple[str, ...] = ()  # what the base draws, in turn; such as "a photo of a dog"
    images: Positive = 200  # how many it draws
    weight: PositiveFloat = 1.0  # of their loss beside that of the new pictures; their share of a batch is weight / (1 + weight)
    path: PathText = ""  # a folder of captioned pictures instead

    def __post_init__(self) -> None:
        if bool(self.prompts) == bool(self.path):
            raise UserError("prompts and path: give one of them, what the base draws or a folder of pictures")
        if self.path:
            refuse_unread(self, ("images",), "with path, all of whose pictures are learned; leave it out")

    @property
    def share(self) -> float:
        """Of a batch, so that both losses are means and theirs counts `weight` times (eq. 2)."""
        return self.weight / (1 + self.weight)

    def mixed(self, data: DataSet, drawn: Path) -> Mixture:
        """The run's data with that of its kind.

        Args:
            drawn: the folder that `draw` filled.

        Raises:
            UserError: as `FolderSource.build`.
        """
        kind = FolderSource(path=self.path or str(drawn), max_bad=0.1).build("train")
        return Mixture(data, kind, self.share)


def draw(prior: PriorPreservation, base: str, folder: Path, device: str, note: Callable[[str], None]) -> None:
    """Draw what is missing of a prior's pictures, each a function of its number: a start after a kill goes on.

    Args:
        base: the model, as `init` names it.
        folder: gets NUMBER.png and NUMBER.txt.
    """
    from PIL import Image

    from ldm.families.registry import load

    folder.mkdir(parents=True, exist_ok=True)
    wanted = {number: prior.prompts[number % len(prior.prompts)] for number in range(prior.images)}
    missing = [number for number, prompt in wanted.items() if not _there(folder, number, prompt)]
    if not missing:
        return
    note(f"prior preservation: drawing {len(missing)} of {plural(prior.images, 'picture')} with {base}")
    model = load(base, device)
    for start in range(0, len(missing), CHUNK):
        part = missing[start : start + CHUNK]
        for number, pixels in zip(part, model.sample([wanted[number] for number in part], part).cpu().numpy(), strict=True):
            (folder / f"{number:05}.txt").write_text(wanted[number], encoding="utf-8")
            partial = folder / f".{number:05}.png"
            Image.fromarray(pixels).save(partial)
            partial.replace(folder / f"{number:05}.png")
    note(f"prior preservation: {plural(prior.images, 'picture')} in {folder}")


def _there(folder: Path, number: int, prompt: str) -> bool:
    caption = folder / f"{number:05}.txt"
    return (folder / f"{number:05}.png").is_file() and caption.is_file() and caption.read_text(encoding="utf-8") == prompt
