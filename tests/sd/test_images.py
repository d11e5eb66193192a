"""Images of a user come out as a viewer shows them, or are refused in a sentence."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd import UserError
from sd.images import image_format, open_image

SIDE = 64
RAMP = np.tile(np.linspace(0, 1, SIDE), (SIDE, 1))  # black to white, from left to right
GRAY = Image.fromarray((RAMP * 255).round().astype(np.uint8))
RGB = Image.fromarray(np.stack([RAMP * 255, RAMP.T * 255, 255 - RAMP * 255], -1).astype(np.uint8))
DISC = np.hypot(*np.mgrid[-31.5:32, -31.5:32]) < 20
WHITE = Image.new("RGB", (SIDE, SIDE), "white")


def difference(source: Path | bytes, wanted: Image.Image) -> float:
    """The largest difference of an opened image, of 255."""
    image = np.asarray(open_image(source, wanted.size), int)
    return abs(image - np.asarray(wanted.convert("RGB"), int)).max()


def sticker(alpha: float = 1) -> Image.Image:
    """A red disc, and noise that is hidden around it."""
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 4), np.uint8)
    pixels[DISC] = (220, 30, 30, round(255 * alpha))
    pixels[~DISC, 3] = 0
    return Image.fromarray(pixels)


def shown(alpha: float = 1) -> Image.Image:
    """The sticker on white."""
    pixels = np.full((SIDE, SIDE, 3), 255.0)
    pixels[DISC] = alpha * np.array([220, 30, 30]) + (1 - alpha) * 255
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("alpha", [1, 0.4])
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_what_is_transparent_is_white(tmp_path, suffix, alpha):
    options = {"webp": {"lossless": True, "exact": True}}.get(suffix, {})
    sticker(alpha).save(tmp_path / f"x.{suffix}", **options)
    assert difference(tmp_path / f"x.{suffix}", shown(alpha)) <= 1


def test_transparency_of_palettes_and_gray(tmp_path):
    black = Image.new("RGB", (SIDE, SIDE))
    black.paste((220, 30, 30), mask=Image.fromarray(DISC))
    palette = black.convert("P", palette=Image.Palette.ADAPTIVE)
    for suffix in ("png", "gif"):
        palette.save(tmp_path / f"p.{suffix}", transparency=palette.getpixel((0, 0)))
        assert difference(tmp_path / f"p.{suffix}", shown()) <= 1
    gray = GRAY.copy()
    gray.putalpha(Image.fromarray(DISC.astype(np.uint8) * 255))
    gray.save(tmp_path / "la.png")
    on_white = np.where(DISC, np.asarray(GRAY), 255).astype(np.uint8)
    assert difference(tmp_path / "la.png", Image.fromarray(on_white)) <= 1
    deep = Image.fromarray((RAMP * 65535).astype(np.uint16))
    deep.save(tmp_path / "deep.png", transparency=0)  # what is black is not there
    on_white = np.where(RAMP == 0, 255, np.asarray(GRAY)).astype(np.uint8)
    assert difference(tmp_path / "deep.png", Image.fromarray(on_white)) <= 1


@pytest.mark.parametrize(
    "kind, largest, suffix",
    [
        (np.uint16, 65535, "png"),
        (">u2", 65535, "tif"),
        (np.int32, 65535, "tif"),
        (np.float32, 1, "tif"),
        (np.float32, 1e6, "tif"),
    ],
)
def test_gray_of_many_bits_is_scaled_by_its_range(tmp_path, kind, largest, suffix):
    file = tmp_path / f"x.{suffix}"
    Image.fromarray((RAMP * largest).astype(kind)).save(file)
    assert difference(file, GRAY) <= 1


def test_a_dark_image_of_many_bits_stays_dark(tmp_path):
    for name, kind, largest in (("i", np.uint16, 65535), ("f", np.float32, 1)):
        file = tmp_path / f"{name}.tif"
        Image.fromarray((RAMP * largest / 4).astype(kind)).save(file)
        assert difference(file, GRAY.point(lambda value: value / 4)) <= 1
    values = RAMP.astype(np.float32)
    values[0, :3] = np.nan, np.inf, -1  # no number, which is black
    Image.fromarray(values).save(tmp_path / "nan.tif")
    assert difference(tmp_path / "nan.tif", GRAY) <= 255 * 2 / 63 + 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_counts_that_is_not_empty(tmp_path, suffix):
    clear = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
    frames = [Image.new("RGBA", (SIDE, SIDE), "black"), clear]
    frames += [image.convert("RGBA") for image in (shown(), GRAY)]
    file = tmp_path / f"x.{suffix}"
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(file, save_all=True, append_images=frames[1:], **options)
    assert difference(file, shown()) <= 2
    WHITE.save(file, save_all=True, append_images=[WHITE])
    assert difference(file, WHITE) == 0


@pytest.mark.parametrize("turn", [5, 6, 8])
def test_images_are_upright(tmp_path, turn):
    exif = Image.Exif()
    exif[274] = turn
    RGB.save(tmp_path / "x.png", exif=exif)
    upright = {5: RGB.transpose(Image.Transpose.TRANSPOSE), 6: RGB.rotate(-90), 8: RGB.rotate(90)}
    assert difference(tmp_path / "x.png", upright[turn]) == 0


def test_other_modes_and_formats(tmp_path):
    RGB.convert("CMYK").save(tmp_path / "cmyk.tif")
    assert difference(tmp_path / "cmyk.tif", RGB) <= 1
    bits = GRAY.convert("1")
    bits.save(tmp_path / "bits.png")
    assert difference(tmp_path / "bits.png", bits) == 0
    RGB.save(tmp_path / "x.avif", quality=100)
    assert difference(tmp_path / "x.avif", RGB) <= 8
    wide = Image.new("RGB", (4 * SIDE, SIDE), "red")
    wide.paste(RGB, (SIDE * 3 // 2, 0))
    wide.save(tmp_path / "wide.png")  # its middle is wanted
    assert difference((tmp_path / "wide.png").read_bytes(), RGB) == 0


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_that_are_cut_short_are_refused(tmp_path, kind):
    stream = io.BytesIO()
    Image.effect_noise((96, 96), 60).convert("RGB").save(stream, kind)
    whole = stream.getvalue()
    assert image_format(whole) == kind.lower()
    file = tmp_path / "x"
    for share in (0, 0.5, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        for read in (image_format, lambda file: open_image(file, (8, 8))):
            with pytest.raises(UserError, match=f"^{file} is no image that can be read"):
                read(file)
    with pytest.raises(UserError, match="^An image is no image that can be read"):
        image_format(whole[: len(whole) // 2])
