"""Any bytes become an exact square of RGB or are refused with a reason."""

from __future__ import annotations

import io
import random
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from ldm.data import images
from ldm.data.file_names import FORMATS
from ldm.data.images import MAX_PIXELS, Rejected, cover, mirrored, probe, sides, to_rgb, view
from ldm.diffusion.batch import to_unit


def packed(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, so that resampling has an exact enough answer."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def png_of(width: int, height: int, bits: int, colour: int, idat: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def test_an_image_of_the_right_size_comes_out_untouched():
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    seen = view(packed(Image.fromarray(pixels)), 24)
    assert np.array_equal(seen.pixels, pixels)
    assert seen.size == (24, 24, 0, 0, 24, 24)
    tensor = to_unit(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert tensor.shape == (1, 3, 24, 24) and tensor.dtype == torch.float32
    assert torch.equal(((tensor + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(pixels[None]).permute(0, 3, 1, 2))
    assert tensor.min() >= -1 and tensor.max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"])
def test_opaque_modes_become_what_pillow_says_they_mean(mode):
    image = picture(9, 7).convert(mode)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_transparency_is_laid_over_white(mode):
    image = Image.new("LA" if mode in ("LA", "La") else "RGBA", (4, 2))
    for x, alpha in enumerate((0, 85, 170, 255)):
        for y in range(2):
            image.putpixel((x, y), (60, alpha) if image.mode == "LA" else (60, 60, 60, alpha))
    if mode != image.mode:
        image = image.convert(mode)
    expected = [255, round(60 * 85 / 255 + 170), round(60 * 170 / 255 + 85), 60]
    assert np.abs(np.asarray(to_rgb(image))[0, :, 1].astype(int) - expected).max() <= 1


def test_transparent_palette_entries_and_colours_are_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.putpixel((1, 0), 1)
    data = packed(palette, transparency=0)
    assert np.asarray(to_rgb(Image.open(io.BytesIO(data)))).tolist() == [[[255, 255, 255], [0, 0, 200]]]
    colour = packed(Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert np.asarray(to_rgb(Image.open(io.BytesIO(colour)))).tolist() == [[[255, 255, 255]]]


def test_sixteen_bit_grey_is_scaled_and_not_clipped():
    ramp = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    seen = view(packed(Image.fromarray(ramp)), 32).pixels
    assert np.array_equal(seen[..., 0], np.round(ramp / 257).astype(np.uint8))
    assert np.array_equal(seen[..., 0], seen[..., 2])


def test_float_images_survive_their_nans():
    image = Image.fromarray(np.array([[np.nan, 300.0, 12.4]], np.float32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 255, 12]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(orientation, kind):
    upright = np.zeros((20, 30, 3), np.uint8)
    upright[:10, :15], upright[:10, 15:], upright[10:, :15] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    undo = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6}
    turned = Image.fromarray(upright)
    if orientation > 1:
        steps = [
            Image.Transpose.FLIP_LEFT_RIGHT,
            Image.Transpose.ROTATE_180,
            Image.Transpose.FLIP_TOP_BOTTOM,
            Image.Transpose.TRANSPOSE,
            Image.Transpose.ROTATE_90,
            Image.Transpose.TRANSVERSE,
            Image.Transpose.ROTATE_270,
        ]
        turned = turned.transpose(steps[undo[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "PNG": {}}[kind]
    data = packed(turned, kind, exif=exif, **options)
    seen = view(data, 20)
    assert seen.size == (20, 30, 0, 5, 20, 20)
    assert np.abs(seen.pixels.astype(int) - upright[:, 5:25]).max() <= 12
    wide = view(data, (16, 24))
    assert wide.size == (20, 30, 0, 0, 16, 24) and np.abs(wide.pixels[:6, :10].astype(int) - (250, 0, 0)).max() <= 40
    assert probe(data) in ((20, 30), *(((30, 20),) if kind == "PNG" and orientation > 4 else ()))


def test_damaged_exif_does_not_lose_the_picture():
    data = packed(picture(32, 32), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert view(data, 32).pixels.shape == (32, 32, 3)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(kind):
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95, "subsampling": "4:4:4"}}.get(kind, {})
    image = picture(40, 30)
    data = packed(image, kind, **options)
    assert probe(data) == (30, 40)
    difference = np.abs(view(data, (30, 40)).pixels.astype(int) - np.asarray(image))
    assert difference.mean() <= {"GIF": 16, "JPEG": 3, "AVIF": 3}.get(kind, 0)


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "AVIF", "PNG", "WEBP"])
def test_animations_show_their_first_frame(kind):
    frames = [Image.new("RGB", (16, 16), c) for c in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    data = packed(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
    assert np.abs(view(data, 16).pixels[8, 8].astype(int) - (250, 0, 0)).max() <= 3


def test_profiles_are_ignored():
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = picture(16, 16)
    assert np.array_equal(view(packed(image, icc_profile=profile), 16).pixels, np.asarray(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1), (17, 300), (64, 64), (640, 480), (33, 32)])
@pytest.mark.parametrize("shape", [32, (24, 40), (48, 16)])
def test_every_shape_is_covered_exactly(size, shape):
    high, wide = sides(shape)
    seen = view(packed(picture(*size)), shape, at=(0.9999999, 0.9999999))
    assert seen.pixels.shape == (high, wide, 3)
    height, width, top, left, *target = seen.size
    rows, columns = cover(height, width, shape)
    assert (height, width) == size[::-1] and rows >= high and columns >= wide and (rows == high or columns == wide)
    assert (top, left) == (rows - high, columns - wide) and target == [high, wide]


@pytest.mark.parametrize("at", [(0.0, 0.0), (0.5, 0.5), (0.2, 0.999)])
@pytest.mark.parametrize("size", [(128, 64), (64, 150), (96, 96)])
@pytest.mark.parametrize("shape", [32, (24, 40), (40, 16)])
def test_a_crop_is_the_crop_of_the_resized_whole(at, size, shape):
    image = picture(*size)
    seen = view(packed(image), shape, at=at)
    _, _, top, left, high, wide = seen.size
    rows, columns = cover(size[1], size[0], shape)
    whole = np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(seen.pixels.astype(int) - whole[top : top + high, left : left + wide]).max() <= 3


def test_resizing_does_not_alias():
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(view(packed(Image.fromarray(stripes)), 32).pixels.astype(int) - 127).max() <= 5


@pytest.mark.parametrize("size", [(100, 70), (70, 100), (64, 64), (33, 40), (500, 210)])
def test_resizing_is_pillows_to_one_level(size):
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8))
    rows, columns = cover(*size, 48)
    seen = view(packed(noise), 48, at=(0.3, 0.6))
    _, _, top, left, _, _ = seen.size
    whole = np.asarray(noise.resize((columns, rows), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(seen.pixels.astype(int) - whole[top : top + 48, left : left + 48]).max() <= 1


def test_scaled_jpeg_decoding_stays_close_to_the_full_one():
    image = picture(640, 512)
    data = packed(image, "JPEG", quality=95)
    full = np.asarray(Image.open(io.BytesIO(data)).resize((40, 32), Image.Resampling.BICUBIC))[:, 4:36]
    assert np.abs(view(data, 32).pixels.astype(float) - full).mean() < 1.0


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise with the spectrum of photographs (amplitude falling with frequency) and hard edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = 1
    grey, *colours = (np.fft.ifft2(np.fft.fft2(rng.standard_normal((height, width))) / frequency**1.5).real for _ in range(4))
    pixels = np.stack([(x := grey + 0.3 * c) / x.std() for c in colours], -1) * 45 + 128
    for _ in range(8):
        top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
        pixels[top : top + rng.integers(20, height // 2), left : left + rng.integers(20, width // 2)] += rng.integers(-60, 60, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(("size", "side"), [((512, 384), 128), ((512, 384), 96), ((600, 400), 64), ((384, 512), 256), ((700, 600), 70)])
def test_photographs_at_any_scale_stay_within_a_level_and_a_half(size, side):
    data = packed(photograph(*size, seed=side), "JPEG", quality=90)
    rows, columns = cover(size[1], size[0], side)
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((columns, rows), Image.Resampling.BICUBIC)).astype(float)
    seen = view(data, side)
    _, _, top, left, _, _ = seen.size
    assert np.abs(seen.pixels - whole[top : top + side, left : left + side]).mean() <= 1.5


@pytest.mark.parametrize(("mode", "side"), [("RGB", 128), ("RGBA", 96), ("L", 300), ("P", 64)])
def test_large_pictures_are_made_smaller_band_by_band_and_stay_close(mode, side, monkeypatch):
    image = photograph(500, 420, seed=side).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(np.linspace(0, 255, 500 * 420).reshape(420, 500).astype(np.uint8)))
    data = packed(image)
    whole = view(data, side).pixels.astype(float)
    monkeypatch.setattr("ldm.data.images.LARGE", 1000)
    monkeypatch.setattr("ldm.data.images.BAND", 3000)
    assert np.abs(view(data, side).pixels - whole).mean() <= 1.5


def test_very_long_pictures_cost_no_more_than_their_crop(monkeypatch):
    monkeypatch.setattr("ldm.data.images._whole", lambda *a: pytest.fail("all of it is resized"))
    assert view(packed(picture(1, 20000)), 64).pixels.shape == (64, 64, 3)
    assert view(packed(picture(300, 100)), 64).pixels.shape == (64, 64, 3)


def test_flip_mirrors_before_the_crop_and_the_size_tells_so():
    image = picture(90, 30)
    plain, flipped = view(packed(image), 30, at=(0, 0.25)), view(packed(image), 30, at=(0, 0.25), flip=True)
    whole = np.asarray(image)[:, ::-1]
    assert np.array_equal(flipped.pixels, whole[:, flipped.size[3] : flipped.size[3] + 30])
    assert flipped.size == plain.size
    # The same crop, mirrored: as the latent cache's second copy.
    size = mirrored(torch.tensor([plain.size], dtype=torch.float32))[0].tolist()
    assert size == [30, 90, 0, 90 - 30 - plain.size[3], 30, 30]
    assert np.array_equal(plain.pixels[:, ::-1], whole[:, int(size[3]) : int(size[3]) + 30])


def test_a_bomb_is_refused_by_its_header():
    bomb = png_of(60000, 60000, 1, 0, zlib.compress(b"\0" * 1000))
    for look in (probe, lambda data: view(data, 32)):
        with pytest.raises(Rejected) as error:
            look(bomb)
        assert error.value.reason == "too many pixels"
    under_pillows_own_limit = png_of(9000, 9000, 1, 0, b"")
    with pytest.raises(Rejected, match=f"9000x9000; at most {MAX_PIXELS}"):
        probe(under_pillows_own_limit)
    assert probe(under_pillows_own_limit, max_pixels=10**8) == (9000, 9000)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "ICO", "TGA", "JPEG2000"])
def test_formats_off_the_list_never_reach_a_decoder(kind):
    with pytest.raises(Rejected) as error:
        view(packed(picture(32, 32), kind), 32)
    assert error.value.reason == "not an image"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<!DOCTYPE html><html>404</html>", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%PDF-1.7", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (b"\0" * 4096, "not an image"),
    ],
)
def test_what_is_not_an_image_has_a_reason(data, reason):
    for look in (probe, lambda d: view(d, 16)):
        with pytest.raises(Rejected) as error:
            look(data)
        assert error.value.reason in (reason, "damaged header")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_files_are_refused(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = packed(noise, kind)
    for share in (0.05, 0.3, 0.6, 0.9):
        with pytest.raises(Rejected):
            view(data[: int(len(data) * share)], 16)


@pytest.mark.parametrize("kind", FORMATS)
def test_mutated_files_are_decoded_or_refused_and_nothing_else(kind):
    rng = np.random.default_rng(2)
    good = np.frombuffer(packed(picture(40, 30), kind, **({"exif": Image.Exif()} if kind in ("JPEG", "WEBP", "AVIF") else {})), np.uint8)
    for _ in range(200):
        bad = good.copy()
        places = rng.integers(0, len(bad), rng.integers(1, 6))
        bad[places] ^= rng.integers(1, 256, len(places)).astype(np.uint8)
        if rng.random() < 0.3:
            cut = int(rng.integers(0, len(bad)))
            bad = np.concatenate([bad[:cut], bad[cut // 2 :]])
        try:
            assert view(bad.tobytes(), 16, max_pixels=2**20).pixels.shape == (16, 16, 3)
        except Rejected as error:
            assert error.reason


def test_text_bombs_in_png_are_refused():
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * (2**21), zip=True)
    with pytest.raises(Rejected):
        probe(packed(picture(8, 8), pnginfo=info))


def jpegs() -> list[bytes]:
    """Small JPEGs of every kind: samplings, progressive, grey, CMYK, restart markers, unconverted colours, turned."""

    def made(mode: str = "RGB", turned: int = 1, **words: object) -> bytes:
        exif, out = Image.Exif(), io.BytesIO()
        exif[0x0112] = turned
        coarse = np.random.default_rng(len(found)).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((161, 97), Image.Resampling.BICUBIC).convert(mode).save(out, "JPEG", exif=exif, **words)
        return out.getvalue()

    found: list[bytes] = []
    found += [made(subsampling=s, progressive=p, quality=q) for s in (0, 1, 2) for p in (False, True) for q in (30, 90)]
    found += [made("L"), made("CMYK"), made(restart_marker_blocks=4), made(keep_rgb=True, subsampling=0)]
    return found + [made(turned=turned) for turned in range(2, 9)]


def with_and_without(data: bytes, shape: int, monkeypatch: pytest.MonkeyPatch) -> tuple[object, object]:
    """What a view is with simplejpeg and without it, or why there is none."""
    found: list[object] = []
    for decoder in (images._jpeg_decoder, lambda: None):
        with monkeypatch.context() as patched:
            patched.setattr(images, "_jpeg_decoder", decoder)
            try:
                seen = view(data, shape)
                found.append((seen.size, seen.pixels.tobytes()))
            except Rejected as error:
                found.append(error.reason)
    return found[0], found[1]


def test_simplejpeg_changes_no_bit_and_no_verdict(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("simplejpeg")
    used, chance = [], random.Random(0)
    real = images._direct
    monkeypatch.setattr(images, "_direct", lambda *words: (used.append(found := real(*words)), found)[1])
    whole = jpegs()
    for data in whole:
        for shape in (12, 24, 48, 97):  # decoded at 1/4, 1/2 and as it is; 97 is its own height
            a, b = with_and_without(data, shape, monkeypatch)
            assert a == b and not isinstance(a, str)
    assert sum(found is not None for found in used) == 4 * (len(whole) - 2)  # all but grey and CMYK, with it
    for _ in range(600):
        data = bytearray(chance.choice(whole))
        if chance.random() < 0.4:
            del data[chance.randrange(2, len(data)) :]
        for _ in range(chance.randrange(3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        a, b = with_and_without(bytes(data), 24, monkeypatch)
        assert a == b
    assert not capfd.readouterr().err


def test_without_simplejpeg_pillow_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    images._jpeg_decoder.cache_clear()
    try:
        assert images._jpeg_decoder() is None and view(jpegs()[0], 24).pixels.shape == (24, 24, 3)
    finally:
        images._jpeg_decoder.cache_clear()
