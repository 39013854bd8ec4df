"""Feature extractors of pictures from weights on this machine: Inception (FID's), timm's networks, vision models of transformers."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ldm.config.errors import UserError, first_line
from ldm.config.files import at_home
from ldm.config.schema import BY_KIND, PathGiven, config
from ldm.formats.model_folder import own_clip, root_of
from ldm.formats.weights_file import read_weights
from ldm.metrics import frechet
from ldm.text.own_clip import OwnClip

BATCH = 32
INCEPTION = "weights-inception-2015-12-05-6726825d.pth, of the releases of torch-fidelity"


@dataclass(frozen=True)
class Extractor:
    """A way from pictures to features, and what must be said beside every figure made with it."""

    features: Callable[[Tensor], NDArray[np.float64]]  # (N,3,H,W) in [-1,1] to (N,D)
    protocol: dict[str, Any]  # name, hash of the weights, preprocessing


@config
class RandomFeatures:
    """Three random 3x3 convolutions, the same on every machine; figures compare models on the same data alone."""

    kind: Literal["random"] = "random"

    def check(self) -> None:
        """There is nothing to miss."""

    def load(self, device: torch.device) -> Extractor:
        """There are no weights to load."""
        return Extractor(frechet.features, {"features": "3 random 3x3 convolutions, Philox key 0", "side": frechet.SIDE})


@config
class Inception:
    """Inception v3 as FID uses it (arXiv 1706.08500), by torch-fidelity: 2048 features."""

    kind: Literal["inception"] = "inception"
    weights: Path  # torch-fidelity's weights-inception-2015-12-05-6726825d.pth

    def check(self) -> None:
        """Raises UserError if the file is not here."""
        _file(self.weights, "features", INCEPTION)

    def load(self, device: torch.device) -> Extractor:
        """The extractor on a device.

        Raises:
            UserError: if the weights or torch-fidelity are missing, or the weights are others.
        """
        file = _file(self.weights, "features", INCEPTION)
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError:
            raise UserError("features: Inception needs torch-fidelity; install the extra `metrics`") from None
        with tempfile.TemporaryDirectory() as folder:  # torch-fidelity unpickles what it is given: only what was read safely here
            clean = Path(folder) / "weights.pth"
            torch.save(_state(file), clean)
            try:
                network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(clean)).to(device)
            except RuntimeError as error:
                raise UserError(f"{file}: no weights of FID's Inception ({str(error).splitlines()[-1].strip()[:160]})") from None

        def features(images: Tensor) -> Tensor:
            return network(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))[0]

        return Extractor(_batched(features, device), {"features": "inception v3, 2048", "weights": _hash(file), "side": 299})


@config
class Timm:
    """The last features of a network of timm, before its classifier, with the preprocessing that timm has for it."""

    kind: Literal["timm"] = "timm"
    model: str  # timm's name of it, such as vit_base_patch14_dinov2
    weights: Path  # a file of its weights: .safetensors, or a pickle that is read safely

    def check(self) -> None:
        """Raises UserError if timm has no such network, or the file is not here."""
        import difflib

        import timm

        if not timm.is_model(self.model):
            near = difflib.get_close_matches(self.model, timm.list_models(), 3)
            raise UserError(f"features: timm has no {self.model!r}{'; did you mean ' + ', '.join(near) + '?' if near else ''}")
        _file(self.weights, "features", f"a file of {self.model}'s weights, from where timm has them")

    def load(self, device: torch.device) -> Extractor:
        """The extractor on a device.

        Raises:
            UserError: if timm has no such network, or the weights are missing or others.
        """
        self.check()
        import timm

        file = at_home(self.weights)
        network = timm.create_model(self.model, pretrained=False, num_classes=0).eval().requires_grad_(False).to(device)
        _fill(network, _state(file), file, ("classifier.", "head.", "fc.", "head_dist."))
        said = timm.data.resolve_model_data_config(network)
        mean, std = (torch.tensor(said[name], device=device).view(1, 3, 1, 1) for name in ("mean", "std"))
        side = said["input_size"][-2:]

        def features(images: Tensor) -> Tensor:
            return network((_resized(images, side, said["interpolation"]) - mean) / std)

        told = {"features": f"timm {self.model}", "weights": _hash(file), "side": list(side), "resampling": said["interpolation"]}
        return Extractor(_batched(features, device), told)


@config
class VisionFolder:
    """A vision model in a folder that transformers opens (CLIP, DINOv2, SigLIP, ...), with its own preprocessing.

    Its embedding is the projected one where it has one (CLIP), else the pooled state, else the first token's.
    """

    kind: Literal["transformers"] = "transformers"
    path: Path  # the folder: config.json, weights, preprocessor_config.json

    def check(self) -> None:
        """Raises UserError if the folder is none that save_pretrained wrote."""
        for name in ("config.json", "preprocessor_config.json"):
            if not (at_home(self.path) / name).is_file():
                raise UserError(f"features: {self.path} has no {name}; a folder is needed as save_pretrained writes it")

    def load(self, device: torch.device) -> Extractor:
        """The extractor on a device; nothing is fetched.

        Raises:
            UserError: if the folder is none that transformers opens, or has no preprocessor_config.json.
        """
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

        self.check()
        folder = at_home(self.path)
        try:
            architecture = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
            opened: Any = CLIPVisionModelWithProjection if architecture == "clip_vision_model" else AutoModel
            network, found = opened.from_pretrained(folder, local_files_only=True, output_loading_info=True)
            network = network.eval().requires_grad_(False).to(device)
            processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, use_fast=False)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(f"features: {folder}: cannot be read ({first_line(error)})") from None
        if wrong := sorted(str(name) for name in [*found["missing_keys"], *found["mismatched_keys"]] if "pooler" not in str(name)):
            raise UserError(f"features: {folder}: {wrong[0]} is missing or of another shape; copy the folder again")

        def features(images: Tensor) -> Tensor:
            pictures = [picture.numpy() for picture in ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu()]
            pixels = processor(images=pictures, return_tensors="pt").pixel_values.to(device)
            if architecture == "clip":  # words beside pictures: its vision tower and projection alone
                return network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)
            seen = network(pixel_values=pixels)
            for name in ("image_embeds", "pooler_output"):
                if (embedding := seen.get(name)) is not None:
                    return embedding.flatten(1)
            return seen.last_hidden_state[:, 0]

        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        told = {
            "features": f"transformers {network.config.model_type}",
            "weights": _hash(*files),
            "preprocessing": type(processor).__name__,
        }
        return Extractor(_batched(features, device), told)


@config
class OwnFeatures:
    """The image tower of the CLIP that a model's own run has trained; figures compare pictures of that run alone."""

    kind: Literal["own"] = "own"
    path: PathGiven  # a model or run folder

    def check(self) -> None:
        """Raises UserError if there is no such model, or it has no CLIP of its own."""
        self._folder()

    def _folder(self) -> Path:
        root = root_of(self.path, note=lambda text: None)
        if (folder := own_clip(root)) is None:
            raise UserError(f"features: {root} has no clip/, no CLIP of its own run; name a folder or file of features")
        return folder

    def load(self, device: torch.device) -> Extractor:
        """The extractor on a device.

        Raises:
            UserError: as `check`, or naming what is damaged.
        """
        folder = self._folder()
        clip = OwnClip.load(folder, device)
        told = {"features": "the run's own CLIP", "weights": _hash(*sorted(folder.rglob("*.safetensors"))), "side": clip.resolution}
        return Extractor(_batched(clip.embed_images, device), told)


Features = Annotated[RandomFeatures | Inception | Timm | VisionFolder | OwnFeatures, BY_KIND]


def nearest(made: NDArray, real: NDArray, many: int = 1) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of each made feature the `many` nearest real ones, nearest first (N,many), and their cosine distances, 1 - cos."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True).clip(1e-12) for x in (made, real))
    far = 1 - a @ b.T
    index = np.argsort(far, axis=1, kind="stable")[:, :many]
    return index, np.take_along_axis(far, index, 1).clip(0)


def kernel_distance(a: NDArray, b: NDArray) -> float:
    """Kernel distance, the unbiased squared MMD of the kernel (x·y / D + 1)³ (KID, arXiv 1801.01401, section 4), over all pairs."""
    return _mmd(a, b, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3)


def gaussian_distance(a: NDArray, b: NDArray, sigma: float = 10.0) -> float:
    """1000 x the squared MMD of a Gaussian kernel of features of length one (CMMD, arXiv 2401.09603, section 4)."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def kernel(x: NDArray, y: NDArray) -> NDArray:
        far = (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T
        return np.exp(-far / (2 * sigma**2))

    return 1000 * float(kernel(a, a).mean() + kernel(b, b).mean() - 2 * kernel(a, b).mean())


def precision_recall(made: NDArray, real: NDArray, neighbours: int = 3) -> tuple[float, float]:
    """Share of made features within reach of a real one, and of real ones within reach of a made one (arXiv 1904.06991).

    The reach of a feature is the distance to its `neighbours`-th nearest of its own set.

    Raises:
        ValueError: if a set has no more features than neighbours.
    """
    from scipy.spatial.distance import cdist

    if min(len(made), len(real)) <= neighbours:
        raise ValueError(f"{neighbours + 1} features at least are needed on either side")
    reach_made, reach_real = (np.partition(cdist(x, x), neighbours, axis=1)[:, neighbours] for x in (made, real))
    far = cdist(made, real)
    return float((far <= reach_real[None]).any(1).mean()), float((far <= reach_made[:, None]).any(0).mean())


def _mmd(a: NDArray, b: NDArray, kernel: Callable[[NDArray, NDArray], NDArray]) -> float:
    m, n = len(a), len(b)
    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    within = (aa.sum() - np.trace(aa)) / (m * (m - 1)) + (bb.sum() - np.trace(bb)) / (n * (n - 1))
    return float(within - 2 * ab.mean())


def _batched(features: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], NDArray[np.float64]]:
    @torch.no_grad()
    def every(images: Tensor) -> NDArray[np.float64]:
        return np.concatenate([features(part.float().to(device)).double().cpu().numpy() for part in images.split(BATCH)])

    return every


def _resized(images: Tensor, side: tuple[int, int], interpolation: str) -> Tensor:
    """(N,3,H,W) in [-1,1] as (N,3,*side) in [0,1], antialiased."""
    mode = interpolation if interpolation in ("bilinear", "bicubic") else "bicubic"
    made = torch.nn.functional.interpolate(images, tuple(side), mode=mode, antialias=True, align_corners=False)
    return ((made + 1) / 2).clamp(0, 1)


def _file(path: Path, field: str, wanted: str) -> Path:
    path = at_home(path)
    if not path.is_file():
        raise UserError(f"{field}: {path} is not here; it should be {wanted}")
    return path


def _fill(network: nn.Module, state: dict[str, Tensor], file: Path, spare: tuple[str, ...] = ()) -> None:
    """Weights into a network; names that begin with `spare` may be left over, counters of batches may be missing."""
    try:
        found = network.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise UserError(f"{file}: these are weights of another network ({str(error).splitlines()[1].strip()[:160]})") from None
    missing = [name for name in found.missing_keys if not name.endswith("num_batches_tracked")]
    left = [name for name in found.unexpected_keys if not name.startswith(spare)]
    if missing or left:
        raise UserError(f"{file}: these are weights of another network ({(missing or left)[0]} is {'missing' if missing else 'too many'})")


def _state(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle that a child process reads."""
    return read_weights(file)[0]


def _hash(*files: Path) -> str:
    return _digest(tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
