"""Views: pure functions of any picture, exact ones of scenes, and the same from a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.config.errors import UserError
from ldm.data.cache import CacheOptions, write_cache
from ldm.data.cached import CachedLatents
from ldm.data.dataset import asked, offered
from ldm.data.folder import FolderSource
from ldm.data.scenes.checker import reads_back
from ldm.data.scenes.source import ScenesSource
from ldm.data.views import edges, from_picture, grey, mirrored_view, sketch, small
from ldm.diffusion.batch import Boxes, Graph, ImageBatch, Points, cat, rows, taken
from ldm.diffusion.rng import Rng

NAMES = ("labels", "edges", "sketch:3", "grey", "small:4", "strokes", "depth", "style", "source", "boxes", "points", "graph")


def pictures(count: int = 3, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def scenes(tier: str = "T1", **fields: object) -> ScenesSource:
    return ScenesSource(tier=tier, images=6, val=2, **fields)  # type: ignore[arg-type]


def test_grey_and_small_are_what_pillow_and_means_give() -> None:
    image = pictures()
    for ours, rgb in zip(grey(image), image, strict=True):
        theirs = np.asarray(Image.fromarray(rgb.permute(1, 2, 0).numpy()).convert("L"), np.int32)
        assert abs(ours[0].numpy().astype(np.int32) - theirs).max() <= 1  # Pillow cuts where we round
    means = image.double().view(3, 3, 8, 4, 8, 4).mean((3, 5))
    assert (small(image, 4).double() - means).abs().max() <= 0.5
    with pytest.raises(UserError, match=r"small:5.*32x32"):
        small(image, 5)


def test_edges_are_thin_and_lie_where_a_colour_of_equal_luma_changes() -> None:
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    image[:, 0, :, :16], image[:, 1, :, 16:] = 200, int(200 * 299 / 587)
    assert (grey(image).int() - grey(image).int()[0, 0, 0, 0]).abs().max() <= 1  # no luma says where
    found = edges(image)[0, 0]
    assert torch.equal(found.sum(1), torch.full((32,), 255)) and set(found.nonzero()[:, 1].tolist()) <= {15, 16}
    assert not edges(torch.full((1, 3, 16, 16), 77, dtype=torch.uint8)).any()


def test_each_picture_is_looked_at_alone_and_sketches_are_addressed() -> None:
    image, names = pictures(), ("edges", "sketch", "grey", "small:4", "strokes")
    together = from_picture(names, image, Rng(1, [5, 6, 7]))
    alone = from_picture(names, image[1:2], Rng(1, [6]))
    assert all(torch.equal(together[name][1:2], alone[name]) for name in names)  # type: ignore[index,arg-type]
    lines = edges(torch.nn.functional.interpolate(pictures(1, 4).float(), 64).to(torch.uint8))
    assert torch.equal(sketch(lines, Rng(0, [3]), 2), sketch(lines, Rng(0, [3]), 2))
    still, unsteady = (sketch(lines, Rng(0, [3]), wobble) for wobble in (0, 4))
    near = torch.nn.functional.max_pool2d(lines.float(), 3, 1, 1)
    assert ((still > 0) <= (near > 0)).all() and not ((unsteady > 0) <= (near > 0)).all()


def test_labels_are_colours_and_tones_so_that_held_out_pairs_have_no_class_of_their_own() -> None:
    data = scenes()
    built = data.build("train")
    kind = offered(built, ["labels"])["labels"]
    assert kind.channels == 11 and kind.names == (
        "black",
        "gray",
        "white",
        "red",
        "orange",
        "yellow",
        "green",
        "cyan",
        "blue",
        "purple",
        "pink",
    )
    batch = asked(built, ["labels", "edges", "depth", "boxes"]).load(range(6), range(6), 64, 0, False)
    assert batch.views is not None
    labels, boxes, specs = batch.views["labels"], batch.views["boxes"], built.specs(range(6))
    assert isinstance(labels, Tensor) and isinstance(boxes, Boxes)
    for i in range(6):
        assert set(labels[i].unique().tolist()) == {int(specs.tone[i]), *(3 + specs.colour[i]).tolist()}
        for k, phrase in enumerate(boxes.phrases[i]):
            y, x = (labels[i, 0] == 3 + int(specs.colour[i, k])).nonzero(as_tuple=True)
            there = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1]) / 64
            torch.testing.assert_close(boxes.box[i, k], there, atol=1.5 / 64, rtol=0)
            assert phrase.split()[1] == kind.names[3 + int(specs.colour[i, k])]


def test_day_and_night_show_the_same_objects() -> None:
    night = scenes(time="night", certified=True).build("train")
    batch = asked(night, ["source", "style", "graph", "points"]).load(range(6), range(6), 32, 0, False)
    assert batch.views is not None
    specs = night.specs(range(6))
    assert (specs.tone == 0).all() and reads_back(
        specs, ((batch.image.permute(0, 2, 3, 1) + 1) * 127.5 + 0.5).to(torch.uint8).numpy()
    ).all()
    source, graph, points = (batch.views[name] for name in ("source", "graph", "points"))
    assert isinstance(source, Tensor) and source[:, :, 0].mean() > 0.7  # by day
    assert isinstance(graph, Graph) and isinstance(points, Points) and points.point.shape == (6, 8, 2)
    inverse = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    for triples in graph.triples:  # relations from both sides, or what objects without a plain one lie on
        assert all((b, inverse[relation], a) in triples if relation in inverse else b == "black background" for a, relation, b in triples)
    assert scenes().build("train").fingerprint() != night.fingerprint()


@pytest.mark.parametrize("shard", [4, 100])
def test_a_cache_gives_the_views_of_the_pictures(tmp_path: Path, shard: int) -> None:
    data = asked(scenes().build("train"), NAMES)
    plain = scenes().build("train")
    assert data.fingerprint() != plain.fingerprint() and asked(plain, ()) is plain

    def encode(image: Tensor) -> tuple[Tensor, None]:
        return torch.nn.functional.avg_pool2d(image, 8), None

    write_cache(tmp_path, data, encode, CacheOptions(autoencoder="a", resolution=32, shard_images=shard, views=NAMES), batch=2)  # type: ignore[arg-type]
    kept = CachedLatents(tmp_path).with_views(NAMES).load([4, 0, 3], [4, 0, 3], 32, 0, False).to("cpu")
    seen = data.load([4, 0, 3], [4, 0, 3], 32, 0, False)
    assert kept.views is not None and seen.views is not None
    for name in NAMES:
        ours, theirs = kept.views[name], seen.views[name]
        if isinstance(ours, Tensor):
            assert torch.equal(ours, theirs), name  # type: ignore[arg-type]
        elif isinstance(ours, Boxes):
            assert torch.equal(ours.box, theirs.box) and torch.equal(ours.there, theirs.there) and ours.phrases == theirs.phrases  # type: ignore[union-attr]
        elif isinstance(ours, Graph):
            assert ours == theirs
    assert CachedLatents(tmp_path).load([0], [0], 32, 0, False).views is None
    with pytest.raises(UserError, match=r"keeps labels, .*, but mask is asked for; encode again .*--views mask"):
        CachedLatents(tmp_path).with_views(("mask",))


def test_a_folder_gives_what_any_picture_gives_turned_with_it(tmp_path: Path) -> None:
    for i, rgb in enumerate(pictures(4)):
        Image.fromarray(rgb.permute(1, 2, 0).numpy()).save(tmp_path / f"red {i}.png")
    plain = FolderSource(path=str(tmp_path), caption="a", val_share=0.0).build("train")
    data = asked(plain, ("grey", "small:4"))
    upright, turned = (data.load([1], [p], 32, 0, True) for p in _one_of_each(plain))
    assert upright.views is not None and turned.views is not None
    for name in ("grey", "small:4"):
        torch.testing.assert_close(mirrored_view(upright.views[name]), turned.views[name])  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"view 'labels': this data does not offer it; it has edges, embedding, grey, .*as files in a folder of that name"
    ):
        asked(plain, ("labels",))
    with pytest.raises(UserError, match=r"'small:1'.*from 2 to 64"):
        asked(plain, ("small:1",))


def _one_of_each(plain: object) -> tuple[int, int]:
    from ldm.data.dataset import draw_flips

    flips = draw_flips(0, range(20), True)
    return flips.index(False), flips.index(True)


def test_batches_of_views_join_part_and_turn() -> None:
    one = Boxes(box=torch.tensor([[[0.1, 0.2, 0.3, 0.4]]]), there=torch.ones(1, 1, dtype=torch.bool), phrases=(("a",),))
    two = Boxes(box=torch.rand(1, 2, 4), there=torch.ones(1, 2, dtype=torch.bool), phrases=(("b", "c"),))
    both = cat([one, two])
    assert both.box.shape == (2, 2, 4) and both.there.tolist() == [[True, False], [True, True]] and both.phrases == (("a", ""), ("b", "c"))
    torch.testing.assert_close(mirrored_view(both).box[0], torch.tensor([[0.7, 0.2, 0.9, 0.4], [0, 0, 0, 0]]))  # type: ignore[union-attr]

    def batch(n: int, first: int) -> ImageBatch:
        maps = torch.arange(first, first + n, dtype=torch.uint8).view(n, 1, 1, 1)
        return ImageBatch(
            image=torch.zeros(n, 3, 1, 1),
            caption=("",) * n,
            size=torch.zeros(n, 6),
            position=torch.arange(n),
            views={"grey": maps, "boxes": one if n == 1 else both},
        )

    whole = cat([batch(1, 0), batch(2, 10)])
    assert whole.views is not None and whole.views["grey"].flatten().tolist() == [0, 10, 11]  # type: ignore[union-attr]
    assert rows(whole, 1, 3).views["boxes"].phrases == both.phrases  # type: ignore[index,union-attr]
    assert taken(whole, [2, 0]).views["boxes"].phrases == (("b", "c"), ("a", ""))  # type: ignore[index,union-attr]
    assert whole.to("cpu").views["grey"].flatten().tolist() == pytest.approx([0, 10 / 255, 11 / 255])  # type: ignore[index,union-attr]
    with pytest.raises(ValueError, match=r"ImageBatch.views\[grey\] is set in some parts"):
        cat(
            [
                batch(1, 0),
                ImageBatch(image=torch.zeros(1, 3, 1, 1), caption=("",), size=torch.zeros(1, 6), position=torch.zeros(1), views={}),
            ]
        )
