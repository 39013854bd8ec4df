"""Fields of a run's configuration that nothing reads: refused, or told before the work begins."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ldm.config.errors import UserError
from ldm.data.folder import FolderSource
from ldm.data.scenes.source import ScenesSource
from ldm.data.tags import Tags
from ldm.families.autoencoder import KL
from ldm.families.clip import Clip
from ldm.families.latent_diffusion.family import LatentDiffusion
from ldm.families.latent_diffusion.fine_tuning import LowRank
from ldm.families.pretrained import PretrainedAutoencoder
from ldm.runs.launch_checks import idle
from ldm.runs.prior_preservation import PriorPreservation
from ldm.runs.run import Run
from ldm.training.library_optimisers import Lion
from ldm.training.optim import AdamW
from ldm.training.settings import Train


def stage(model: str = "diffusion", **fields: object) -> Train:
    return Train(**{"model": model, "images": 64, "resolution": 64, **fields})  # type: ignore[arg-type]


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "decay_from": (lambda: AdamW(decay_from=0.5), "decay_from: 0.5 has no effect with schedule constant"),
    "final_lr": (lambda: Lion(final_lr=0.1), "final_lr: 0.1 has no effect with schedule constant"),
    "keep": (lambda: Tags(keep=2), "keep: 2 has no effect where tags stay as they are"),
    "separator": (lambda: Tags(separator=";"), "separator: ';' has no effect"),
    "captions": (lambda: FolderSource(path="x", caption="a dog", captions="filename"), "captions: 'filename' has no effect beside caption"),
    "images": (lambda: PriorPreservation(path="x", images=30), "images: 30 has no effect with path"),
    "text_lr": (lambda: LowRank(text_lr=0.1).check(), "text_lr: 0.1 has no effect where the text encoder learns nothing"),
    "text_targets": (lambda: LowRank(text_targets=("q_proj",)).check(), r"text_targets: \['q_proj'\] has no effect"),
    "prompts": (
        lambda: Run(data=ScenesSource(), models={"a": KL()}, stages={"one": stage("a", prompts=("x",))}),
        "stages.one.prompts: a model of kind kl draws nothing of prompts",
    ),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_another_one_silences_is_refused(field: str) -> None:
    make, said = REFUSED[field]
    with pytest.raises(UserError, match=said):
        make()


def test_what_is_read_is_taken() -> None:
    AdamW(schedule="linear", decay_from=0.5, final_lr=0.1)
    Tags(dropout=0.1, keep=2, separator=";")
    FolderSource(path="x", caption="a dog", captions="kohya")  # whose folders say how often
    stage(samples=0, sample_every_images=8)  # switched off
    LowRank(text_rank=2, text_lr=0.1, text_targets=("q_proj",)).check()


def test_models_that_nobody_reads_are_told() -> None:
    models = {"diffusion": LatentDiffusion(), "vae": PretrainedAutoencoder(path="better"), "text": Clip(vocabulary=1000)}
    told = list(idle(Run(data=FolderSource(path="x"), init="base", models=models, stages={"tune": stage()})))
    assert told == [
        "models.vae: no stage of this run trains it or reads it, so it changes nothing",
        "models.text: the base model base brings its own, which is read in its place; leave it out, or give it a path",
    ]
    models = {"diffusion": LatentDiffusion(autoencoder="vae"), "vae": PretrainedAutoencoder(path="better")}
    assert not list(idle(Run(data=FolderSource(path="x"), init="base", models=models, stages={"tune": stage()})))


def test_a_warm_up_beyond_the_stage_and_a_flip_that_scenes_do_not_take_are_told() -> None:
    models = {"a": KL()}
    run = Run(data=ScenesSource(), models=models, stages={"one": stage("a", flip=True, optim=AdamW(warmup_images=64))})
    warm, flip = idle(run)
    assert warm == "stages.one.optim.warmup_images: 64 of 64 images, so the rate never reaches lr" and "stages.one.flip" in flip
    run = Run(data=FolderSource(path="x"), models=models, stages={"one": stage("a", flip=True, optim=AdamW(warmup_images=63))})
    assert not list(idle(run))
