"""Ports that add to a frozen U-Net: no bit changes at first, only what is new learns, and diffusers' pipelines draw the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finished_model import SIDE, UNET
from PIL import Image

from ldm.__main__ import main
from ldm.data.dataset import asked
from ldm.data.scenes.source import ScenesSource, prompts
from ldm.data.views import ViewKind
from ldm.diffusion.batch import Boxes, Graph
from ldm.diffusion.rng import Rng
from ldm.families.draws import Wanted
from ldm.families.family import Context, ModelConfig, Product
from ldm.families.latent_diffusion.conditions import Condition
from ldm.families.latent_diffusion.family import LatentDiffusion, LatentDiffusionFamily, load
from ldm.families.latent_diffusion.ports import Adapter, Concat, Cross, Gated, Residual, as_picture, learned_of
from ldm.families.pretrained import PretrainedAutoencoder, PretrainedText
from ldm.formats.part import load_weights
from ldm.metrics.bench import Bench
from ldm.metrics.grounding import Grounding, iou
from ldm.training.settings import Train

PORTS = {
    "residual": Condition(view="labels", port=Residual()),
    "adapter": Condition(view="edges", port=Adapter()),
    "gated": Condition(view="boxes", port=Gated(most=3)),
    "cross": Condition(view="sketch", port=Cross(side=2)),
    "cross, a graph": Condition(view="graph", port=Cross(most=2)),
}
DATA = ScenesSource(tier="one", images=8, val=4)
PROMPT = ["a red ring"] * 2


def begun(model: Path, *conditions: Condition, **fields: object) -> LatentDiffusionFamily:
    config = LatentDiffusion(network=UNET, conditions=conditions, **fields)  # type: ignore[arg-type]
    data = asked(DATA.build("train"), config.views())
    products = {name: Product(model, "") for name in ("text", "autoencoder")}
    context = Context(data=data, val=data, resolution=SIDE, seed=0, total_images=8, products=products, init=Product(model, ""))
    built = config.continued(model).build(context)
    assert isinstance(built, LatentDiffusionFamily)
    return built.eval()


def shaken(family: LatentDiffusionFamily) -> LatentDiffusionFamily:
    generator = torch.Generator().manual_seed(1)
    for weight in (p for p in family.parameters() if p.requires_grad):
        weight.data.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return family


@pytest.mark.slow
def test_fresh_ports_leave_the_base_as_it_is_to_the_bit_and_each_may_be_left_out(kl_model: Path) -> None:
    family = begun(kl_model, *PORTS.values(), learn="new")
    batch = asked(DATA.build("train"), family.config.views()).load(range(2), range(2), SIDE, 0, False)
    assert batch.views is not None
    plain = load(kl_model).sample(PROMPT, size=(SIDE, SIDE))

    def drawn(names: tuple[str, ...], **strength: float) -> torch.Tensor:
        assert batch.views is not None
        edits = family.tell({name: batch.views[name] for name in names}, strength, (SIDE, SIDE))
        return family.sample(PROMPT, size=(SIDE, SIDE), edits=edits)

    every = tuple(each.view for each in PORTS.values())
    assert torch.equal(drawn(every), plain) and torch.equal(family.sample(PROMPT, size=(SIDE, SIDE)), plain)
    shaken(family)
    assert torch.equal(family.sample(PROMPT, size=(SIDE, SIDE)), plain)  # told nothing
    alone = {name: drawn((name,)) for name in every}
    assert not any(torch.equal(found, plain) for found in alone.values())
    for name in every:
        assert torch.equal(drawn((name,), **{name: 0.0}), plain)
    assert torch.equal(drawn(("labels", "boxes"), boxes=0.0), alone["labels"])
    assert not torch.equal(drawn(every), drawn(every[1:]))


def test_only_what_is_new_learns(kl_model: Path) -> None:
    family = begun(kl_model, *PORTS.values(), learn="new").train()
    ports = [each.port for each in PORTS.values()]
    new = {id(p) for p in (*family.denoiser.networks.parameters(), *learned_of(family.base, ports))}  # type: ignore[union-attr]
    assert {id(p) for p in family.parameter_groups()[0].parameters} == new
    batch = asked(DATA.build("train"), family.config.views()).load(range(4), range(4), SIDE, 0, False)
    sum(family.loss(batch, Rng(0, range(4)))[0].values()).backward()  # type: ignore[union-attr]
    assert all(p.grad is None for p in family.parameters() if id(p) not in new)
    for name in ("labels", "edges", "sketch", "graph"):
        network = family.denoiser.networks[name]  # type: ignore[union-attr]
        assert any(bool(p.grad is not None and p.grad.any()) for p in network.parameters()), name
    gates = [p for name, p in family.base.named_parameters() if "alpha_" in name]
    assert gates and all(bool(p.grad is not None and p.grad.any()) for p in gates)


@pytest.mark.slow
@pytest.mark.parametrize("learn", ["new", "all"])
def test_a_plan_counts_what_learns(kl_model: Path, learn: str) -> None:
    family = begun(kl_model, *PORTS.values(), learn=learn)
    others: dict[str, ModelConfig] = {"text": PretrainedText(path=str(kl_model)), "autoencoder": PretrainedAutoencoder(path=str(kl_model))}
    stage = Train(model="diffusion", resolution=SIDE, images=8, batch=2)
    plan = replace(family.config, network=UNET).footprint(stage, SIDE, others, print)
    assert sum(plan.learned.values()) == sum(weight.numel() for weight in family.parameter_groups()[0].parameters)
    every = sum(weight.numel() for weight in family.denoiser.parameters())
    assert sum(plan.learned.values()) + plan.frozen.get("unet", 0) == every
    assert (plan.passed > 0) == (learn == "new")


def test_samples_that_are_not_told_boxes_learn_that_nothing_is_there(kl_model: Path) -> None:
    family = shaken(begun(kl_model, replace(PORTS["gated"], drop=1.0), learn="new")).train()
    batch = asked(DATA.build("train"), ("boxes",)).load(range(4), range(4), SIDE, 0, False)
    sum(family.loss(batch, Rng(0, range(4)))[0].values()).backward()  # type: ignore[union-attr]
    named = dict(family.base.named_parameters())
    assert named["position_net.null_position_feature"].grad.any()  # type: ignore[union-attr]


def configuration(folder: Path, model: Path, condition: str) -> Path:
    file = folder / "told.yaml"
    lines = [
        f"init: {model}",
        "data: {kind: scenes, tier: one, images: 16, val: 4}",
        f"out: {folder / 'run'}",
        "workers: 0",
        f"models: {{diffusion: {{kind: latent_diffusion, learn: new, conditions: [{condition}]}}}}",
        "stages:",
        f"  latents: {{kind: encode, resolution: {SIDE}}}",
        f"  told: {{kind: train, model: diffusion, latents: latents, resolution: {SIDE}, images: 32, batch: 8, samples: 2,"
        " optim: {kind: adamw, lr: 0.05}}",
        "  export: {kind: export}",
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def same_base(run: Path, model: Path) -> bool:
    old, new = load_weights(model / "unet"), load_weights(run / "model" / "unet")
    return all(torch.equal(new[name], value) for name, value in old.items())


def near(ours: torch.Tensor, theirs: np.ndarray) -> None:
    assert abs(theirs[0] * 255 - ours[0].numpy()).max() <= 2


@pytest.mark.slow
def test_a_controlnet_is_trained_and_draws_the_same_in_diffusers(kl_model: Path, tmp_path: Path) -> None:
    assert main(["train", str(configuration(tmp_path, kl_model, "{view: labels, port: residual}"))]) == 0
    run = tmp_path / "run"
    assert same_base(run, kl_model)
    model = load(run / "model")
    from diffusers import DDIMScheduler, StableDiffusionControlNetPipeline

    pipeline = StableDiffusionControlNetPipeline.from_pretrained(run / "model")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    labels = torch.randint(-1, 11, (1, 1, SIDE, SIDE), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    picture = (as_picture(labels, model.told["labels"])[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    noise, wanted = model.noise([0], (SIDE, SIDE)), Wanted(sampler="ddim", steps=4, guidance=3.0)
    edits = model.tell({"labels": labels}, {"labels": 0.8}, (SIDE, SIDE))
    ours = model.sample(PROMPT[:1], [0], wanted, size=(SIDE, SIDE), latents=noise, edits=edits)
    more = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
    near(ours, pipeline(PROMPT[0], image=Image.fromarray(picture), controlnet_conditioning_scale=0.8, **more).images)
    assert not torch.equal(ours, model.sample(PROMPT[:1], [0], wanted, size=(SIDE, SIDE), latents=noise))


@pytest.mark.slow
def test_gligen_is_trained_and_draws_the_same_in_diffusers(kl_model: Path, tmp_path: Path) -> None:
    assert main(["train", str(configuration(tmp_path, kl_model, "{view: boxes, port: gated}"))]) == 0
    run = tmp_path / "run"
    assert same_base(run, kl_model)
    model = load(run / "model")
    from diffusers import DDIMScheduler, StableDiffusionGLIGENPipeline

    pipeline = StableDiffusionGLIGENPipeline.from_pretrained(run / "model")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    box, phrases = [[0.1, 0.2, 0.6, 0.7], [0.5, 0.5, 0.9, 0.9]], ["a red ring", "a blue square"]
    boxes = Boxes(box=torch.tensor([box]), there=torch.ones(1, 2, dtype=torch.bool), phrases=(tuple(phrases),))
    noise, wanted = model.noise([0], (SIDE, SIDE)), Wanted(sampler="ddim", steps=4, guidance=1.0)
    ours = model.sample(PROMPT[:1], [0], wanted, size=(SIDE, SIDE), latents=noise, edits=model.tell({"boxes": boxes}, {}, (SIDE, SIDE)))
    more = {"latents": noise, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np", "gligen_scheduled_sampling_beta": 1.0}
    near(ours, pipeline(PROMPT[0], gligen_boxes=box, gligen_phrases=phrases, **more).images)


@pytest.mark.slow
def test_graphs_and_sketches_are_trained_saved_and_opened(kl_model: Path, tmp_path: Path) -> None:
    two = "{view: graph, port: cross}, {view: sketch, port: {kind: cross, side: 2}}"
    assert main(["train", str(configuration(tmp_path, kl_model, two))]) == 0
    run = tmp_path / "run"
    assert same_base(run, kl_model)
    assert {"ip_adapter", "ip_adapter_1"} <= {path.name for path in (run / "model").iterdir()}
    model = load(run / "model")

    def drawn(*triples: tuple[str, str, str]) -> torch.Tensor:
        return model.sample(PROMPT[:1], size=(SIDE, SIDE), edits=model.tell({"graph": Graph(triples=(triples,))}, {}, (SIDE, SIDE)))

    one, two_of = ("red ring", "left of", "blue cross"), ("blue cross", "left of", "red ring")
    assert not torch.equal(drawn(one), drawn(two_of)) and torch.equal(drawn(one), drawn(one))
    assert torch.isfinite(drawn().float()).all()  # an empty graph


def test_pipelines_that_cannot_tell_a_port_are_not_named() -> None:
    kind = ViewKind(form="map", channels=3)
    assert [Gated().pipeline(UNET, channels, kind) for channels in (4, 8)] == ["GLIGEN", ""]  # diffusers takes latents[:, :4]
    levels = ((True, False), (False, True))
    assert [Adapter().pipeline(replace(UNET, attention=on), 4, kind) for on in levels] == ["Adapter", ""]
    assert (Residual().pipeline(UNET, 8, kind), Concat().pipeline(UNET, 8, kind)) == ("ControlNet", "InstructPix2Pix")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("models.diffusion.conditions=[{view: boxes, port: residual}]", "view boxes is of form boxes; port residual takes map, classes"),
        ("models.diffusion.conditions=[{view: labels, port: gated}]", "view labels is of form classes; port gated takes boxes"),
        ("models.diffusion.conditions=[{view: boxes, port: gated}, {view: points, port: gated}]", "two ports gated share one set of gates"),
    ],
)
def test_what_cannot_be_is_refused(kl_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(["train", str(configuration(tmp_path, kl_model, "{view: labels, port: residual}")), words]) == 2
    assert message in capsys.readouterr().err


def test_classes_are_shown_in_their_colours() -> None:
    kind = ViewKind(form="classes", channels=2, names=("a", "b"), colours=((255, 0, 0), (0, 51, 255)))
    shown = as_picture(torch.tensor([[[[0, 1, -1]]]], dtype=torch.int16), kind)
    torch.testing.assert_close(shown[0, :, 0].T, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.2, 1.0], [0.0, 0.0, 0.0]]))


class Painter:
    """A model whose pictures are known."""

    def __init__(self, images: list[torch.Tensor]) -> None:
        self.told, self.defaults = dict.fromkeys(("boxes", "grey", "labels")), {"size": (64, 64)}
        self.images, self.given = images, []  # type: ignore[var-annotated]

    def tell(self, given: object, strength: object, size: object) -> tuple[()]:
        self.given.append(sorted(given))  # type: ignore[call-overload]
        return ()

    def settings(self, wanted: Wanted) -> Wanted:
        return wanted

    def sample(self, texts: list[str], seeds: list[int], wanted: Wanted, **more: object) -> torch.Tensor:
        self.given.append(texts[0])
        return self.images.pop(0)


def test_told_views_are_read_back_from_pictures() -> None:
    from ldm.data.scenes.render import render, to_bytes

    right, other = (prompts("T1", 12, 0, pairs).specs for pairs in ("seen", "held-out"))
    painter = Painter([torch.from_numpy(to_bytes(render(right, 64))), torch.from_numpy(to_bytes(render(right, 64)))])
    bench = Bench(painter, None, 64, 0, torch.device("cpu"), None, lambda *_: None)
    found = Grounding(tier="T1", prompts=12).run(bench)
    assert painter.given[0] == ["boxes", "labels"] and " at the " not in painter.given[1]
    assert found["seen"]["recall"] == 1 and found["seen"]["overlap"] > 0.93 and found["seen"]["labels"] > 0.93
    assert found["held_out"]["recall"] < 0.1 and found["held_out"]["labels"] < 0.2  # pictures of other scenes
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert len(other) == 12
