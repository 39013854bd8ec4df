"""What lies in a folder of pictures and is not learned from is counted, and what only looks like a picture to learn from is told."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.captions import MAX_CHARACTERS, prompt_marks
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
        picture(tmp_path / f"{number}_gt.png", number + 6)
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
        picture(tmp_path / (f"{number}_gt.png" if own else f"{number}-2.png"), number + 6)
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


def notes(root: Path, **more: object) -> list[str]:
    """What is told of a folder besides counts."""
    return FolderSource(path=str(root), val_share=0, max_bad=1.0, **more).build("train").describe()["notes"]  # type: ignore[arg-type, return-value]


def captioned(root: Path, count: int = 6) -> None:
    """Numbered pictures with a text file each."""
    pictures(root, count=count)
    for number in range(count):
        (root / f"{number}.txt").write_text(f"thing {number}")


def test_the_same_file_twice_is_told(tmp_path: Path) -> None:
    captioned(tmp_path)
    assert notes(tmp_path) == []
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "copy.png").write_bytes((tmp_path / "3.png").read_bytes())
    (tmp_path / "sub" / "copy.txt").write_text("another caption")
    assert notes(tmp_path) == ["1 picture is the same file as another, such as sub/copy.png and 3.png; each is learned from"]


def test_text_files_that_nothing_reads_are_told(tmp_path: Path) -> None:
    captioned(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n2.png,of the table\n")
    (tmp_path / "lost.txt").write_text("a picture that went away")
    (tmp_path / "README.txt").write_text("about these pictures")
    assert notes(tmp_path) == [
        "1 picture has a caption in a table and a text file, such as 2.png; the table is read, the file is not",
        "1 text file belongs to no picture here, such as lost.txt",
    ]
    assert notes(tmp_path, captions="txt") == ["1 text file belongs to no picture here, such as lost.txt"]
    assert notes(tmp_path, caption="a thing") == []  # none is asked for


def test_pictures_that_share_a_text_file_are_told(tmp_path: Path) -> None:
    captioned(tmp_path)
    Image.new("RGB", (32, 32)).save(tmp_path / "4.jpg")
    assert notes(tmp_path) == ["1 text file is that of several pictures that differ by their ending alone, such as 4.txt of 4.jpg, 4.png"]


@pytest.mark.parametrize("ending", [".mp4", ".webm", ".MOV"])
def test_films_are_counted(ending: str, tmp_path: Path) -> None:
    captioned(tmp_path)
    (tmp_path / f"film{ending}").write_bytes(b"anything")
    assert reasons(tmp_path) == {f"film{ending}": "format not supported"}


MARKED = ["a <lora:sty:0.8> dog", "a (red:1.3) dog", "a {red|blue} dog", "a __colour__ dog"]


@pytest.mark.parametrize("caption", MARKED)
def test_marks_of_prompts_in_captions_are_told(caption: str) -> None:
    assert "1 caption has marks of prompts, such as " in prompt_marks(["a plain dog", caption])


def test_plain_captions_have_no_marks() -> None:
    assert not prompt_marks(["a dog (red), 2:3", "<3 hearts", "a {cat}", "a|b", "snake_case __x", "a (big) [dog]", ":(", "(ratio 16:9)"])
    assert not prompt_marks(["<" * 9999 + "(" * 9999 + "{" * 9999 + "_" * 9999])
