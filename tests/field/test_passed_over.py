"""What lies in a folder of pictures and is not learned from is counted, and what only looks like a picture to learn from is told."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.captions import MAX_CHARACTERS
from ldm.data.check import check
from ldm.data.folder import FolderSource
from ldm.data.folder_scan import Listing
from ldm.data.images import mask_view, view
from ldm.data.photos import left_out
from ldm.data.shards import ShardsSource
from ldm.data.unpaired import UnpairedSource
from ldm.runs.execution import data_lines


def picture(path: Path, number: int = 0) -> None:
    """A small picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (number * 20 % 256, 90, 40)).save(path)


def pictures(folder: Path, ending: str = ".png", count: int = 6) -> None:
    """Numbered pictures."""
    for number in range(count):
        picture(folder / f"{number}{ending}", number)


def reasons(root: Path, **more: object) -> dict[str, str]:
    """By name why a file is left out."""
    return {one.name: one.reason for one in FolderSource(path=str(root), caption="a thing", max_bad=1.0, **more).build("train").rejected}  # type: ignore[arg-type]


def test_links_and_special_files_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "1.txt")  # never opened
    (tmp_path / "again").symlink_to(".")  # a folder is walked through once
    found = reasons(tmp_path)
    assert found == {
        "gone.png": "link leads nowhere",
        "circle.png": "link leads nowhere",
        "pipe.png": "unreadable file",
        "1.txt": "unreadable file",
    }


def test_a_folder_that_may_not_be_read_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path)
    pictures(tmp_path / "locked")
    listed = os.scandir

    def refusing(path: str) -> object:
        if str(path).rstrip("/").endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert reasons(tmp_path) == {"locked": "unreadable folder"}


@pytest.mark.parametrize("ending", [".jfif", ".jpe", ".JFIF"])
def test_jpegs_of_other_endings_are_read(ending: str, tmp_path: Path) -> None:
    pictures(tmp_path, ".jpg")
    for path in tmp_path.glob("*.jpg"):
        path.rename(path.with_suffix(ending))
    assert len(FolderSource(path=str(tmp_path), caption="a thing").build("train")) == 5


@pytest.mark.parametrize("ending", [".tga", ".ppm", ".exr", ".CR2", ".ico", ".heif", ".jxl"])
def test_pictures_that_no_decoder_reads_are_counted(ending: str, tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / f"other{ending}").write_bytes(b"anything")
    assert reasons(tmp_path) == {f"other{ending}": "format not supported"}


def test_texts_may_keep_the_picture_s_ending(tmp_path: Path) -> None:
    pictures(tmp_path)
    for number in range(6):
        (tmp_path / f"{number}.png.txt").write_text(f"thing {number}")
    (tmp_path / "3.txt").write_text("its own")  # comes first
    data = FolderSource(path=str(tmp_path), val_share=0).build("train")
    assert [said for (said,) in data.all_captions(range(6))] == ["thing 0", "thing 1", "thing 2", "its own", "thing 4", "thing 5"]
    listing = Listing(tmp_path)
    listing.sort()
    assert listing.text_of("4.png") == "4.png.txt"  # where ldm caption writes, too


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("{}_alpha.png", "mask"),
        ("mask_{}.png", "mask"),
        ("{}-mask1.png", "mask"),
        ("{}_mask_inv.png", "condition"),  # white where it does not count
        ("{}_trimap.png", "condition"),
        ("{}.masked.png", "condition"),
        ("{}_edges.png", "condition"),
        ("conditioning_data/{}.png", "condition"),
        ("thumbnails/{}.jpg", "condition"),
        ("mattes/{}.png", "mask"),
    ],
)
def test_side_pictures_of_more_names(name: str, kind: str, tmp_path: Path) -> None:
    pictures(tmp_path)
    for number in range(6):
        picture(tmp_path / name.format(number))
    data = FolderSource(path=str(tmp_path), caption="a thing", val_share=0).build("train")
    assert len(data) == 6 and {one.detail.partition(" of ")[0] for one in data.rejected} == {f"a {kind}"}


def test_names_that_look_like_side_pictures_are_told_and_learned(tmp_path: Path) -> None:
    pictures(tmp_path)
    for number in range(6):
        picture(tmp_path / f"{number}_gt.png")
    data = FolderSource(path=str(tmp_path), caption="a thing", val_share=0).build("train")
    told = [line for line in data_lines(data.describe()) if line.startswith("warning")]
    assert (
        len(data) == 12 and len(told) == 1 and "6 pictures are named like others with _gt behind it, such as 0_gt.png and 0.png" in told[0]
    )
    found, _ = check(FolderSource(path=str(tmp_path), caption="a thing"), decode=0)
    assert any("with _gt behind it" in note for note in found.notes)


@pytest.mark.parametrize("own", [True, False])
def test_series_and_captioned_pictures_are_not_told(own: bool, tmp_path: Path) -> None:
    pictures(tmp_path)
    for number in range(6):
        picture(tmp_path / (f"{number}_gt.png" if own else f"{number}-2.png"))
        if own:
            (tmp_path / f"{number}_gt.txt").write_text("of its own")
    assert not FolderSource(path=str(tmp_path), caption="a thing").build("train").describe()["notes"]


@pytest.mark.parametrize("most", [255, 200])
def test_bytes_written_as_wider_numbers_are_no_black_picture(most: int, tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, most, 64).round().astype(np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    assert Image.open(tmp_path / "wide.png").mode == "I;16"
    seen = view((tmp_path / "wide.png").read_bytes(), 64)
    assert np.abs(seen.pixels[..., 0].astype(int) - ramp.astype(int)).max() == 0
    assert np.abs(mask_view((tmp_path / "wide.png").read_bytes(), seen, False, alpha=False).astype(int) - ramp.astype(int)).max() == 0
    Image.fromarray((ramp.astype(int) * 257).astype(np.uint16)).save(tmp_path / "deep.png")  # all sixteen bits
    assert np.abs(view((tmp_path / "deep.png").read_bytes(), 64).pixels[..., 0].astype(int) - ramp.astype(int)).max() <= 1


def test_captions_cut_by_characters_are_counted(tmp_path: Path) -> None:
    from ldm.data.captions import cut_at_most

    pictures(tmp_path)
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text("word " * (MAX_CHARACTERS if number < 2 else 3))
    data = FolderSource(path=str(tmp_path), val_share=0).build("train")
    assert cut_at_most(text for texts in data.all_captions(range(6)) for text in texts) == "2 captions are cut at 2,000 characters"
    assert cut_at_most(["a" * (MAX_CHARACTERS - 2)]) == ""


def test_what_both_domains_leave_out_is_told(tmp_path: Path) -> None:
    for name in ("trainA", "trainB", "testA", "testB"):
        pictures(tmp_path / name)
    (tmp_path / "trainB/x.heic").write_bytes(b"x")
    (tmp_path / "trainA/gone.png").symlink_to("nowhere.png")
    said = UnpairedSource(path=str(tmp_path)).build("train").describe()
    lines = list(data_lines(said))
    assert left_out([said])["rejected"] == {"link leads nowhere": 1, "format not supported": 1}
    assert any("1 link leads nowhere" in line for line in lines) and any("x.heic" in line for line in lines)


def test_of_two_text_files_the_one_that_is_read_is_told(tmp_path: Path) -> None:
    pictures(tmp_path)
    for number in range(6):
        (tmp_path / f"{number}.caption").write_text("a caption")
        if number < 2:
            (tmp_path / f"{number}.txt").write_text("tags")
    data = FolderSource(path=str(tmp_path), val_share=0).build("train")
    assert [said for (said,) in data.all_captions(range(3))] == ["tags", "tags", "a caption"]
    assert data.describe()["notes"] == ["2 pictures have .txt and .caption files, such as 0; .txt is read, .caption is not"]
    assert FolderSource(path=str(tmp_path), caption="x").build("train").describe()["notes"] == []


@pytest.mark.parametrize("first", [".txt", ".caption"])
def test_shards_read_the_same_one_in_any_order(first: str, tmp_path: Path) -> None:
    picture(tmp_path / "p.png")
    with tarfile.open(tmp_path / "0.tar", "w") as shard:
        for number in range(3):
            for ending in (".png", *sorted((".txt", ".caption"), key=lambda one: one != first)):
                data = (tmp_path / "p.png").read_bytes() if ending == ".png" else ending[1:].encode()
                member = tarfile.TarInfo(f"{number}{ending}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    assert ShardsSource(path=str(tmp_path), val_share=0).build("train").all_captions([0, 1, 2]) == [["txt"]] * 3
