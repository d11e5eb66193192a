"""Images of a user: where they are, and as a viewer shows them (upright, 8 bits, on white).

Gray of 16 or 32 bits and floats are scaled to 0 ... 255 by the range of their mode: the smallest of
RANGES that holds their largest value, else that value. Of an animation, or a file of several pages,
the first image counts that is not all of one colour; where all are, the last.
"""

import functools
import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unicodedata import normalize

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from sd import UserError, files

RANGES = {
    **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), (65535,)),
    "I": (255, 65535, 2**31 - 1),
    "F": (1, 255, 65535),
}


def open_image(source: Path | bytes, size: tuple[int, int]) -> Image.Image:
    """An image in RGB, resized and cropped in the centre. Raises UserError for a damaged one."""
    with opened(source) as image:
        return ImageOps.fit(first_frame(image), size)


def image_format(source: Path | bytes) -> str:
    """Such as "png". Raises UserError where the image cannot be read to its end."""
    with opened(source) as image:
        image.draft("L", (1, 1))  # of a JPEG an eighth is enough, which is quicker
        image.load()
        return image.format.lower()


@contextmanager
def opened(source: Path | bytes) -> Iterator[Image.Image]:
    name = "An image" if isinstance(source, bytes) else source
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            yield image
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{name} is no image that can be read ({error}): take it out") from error


def first_frame(image: Image.Image) -> Image.Image:
    for frame in ImageSequence.Iterator(image):
        rgb = to_rgb(ImageOps.exif_transpose(frame))
        if any(low < high for low, high in rgb.getextrema()):
            break
    return rgb


def to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in RANGES:
        image = scale_gray(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def scale_gray(image: Image.Image) -> Image.Image:
    """8 bits of gray, from a mode of RANGES."""
    values = np.nan_to_num(np.asarray(image).astype(float), posinf=0, neginf=0)
    peak = values.max()
    white = next((value for value in RANGES[image.mode] if value >= peak), peak)
    gray = values.clip(0) * 255 / white
    gray[values == image.info.get("transparency")] = 255
    return Image.fromarray(gray.round().astype(np.uint8))


class ImageStore:
    """Where the images of a label file are, and which of them cannot be used."""

    def __init__(self, root: Path, cache: Path | None):
        self.root = root  # the folder that names are relative to
        self.cache = cache  # where bytes of images are stored, if at all
        self.paths: dict[str, Path] = {}
        self.usable: dict[Path, bool] = {}
        self.missing: list[Path] = []
        self.unreadable: list[str] = []

    def add(self, image: str | bytes, where: str) -> str:
        """The name of an image; where: the place of its bytes, which are stored once."""
        if isinstance(image, str):
            return image
        name = hashlib.sha256(image).hexdigest()[:32]
        if name not in self.paths:
            suffix = self.check(image, f"{where}, image {name}")
            path = self.paths[name] = (self.cache or self.root) / f"{name}.{suffix}"
            self.usable[path] = suffix is not None
            if suffix and self.cache:
                self.cache.mkdir(parents=True, exist_ok=True)
                files.replace(path, lambda part: part.write_bytes(image))
        return name

    def find(self, name: str) -> Path:
        """The path of an image, in the spelling that the disk has."""
        if name not in self.paths:
            places = [self.root / spelling for spelling in spellings(name)]
            # Path.is_file fails on a name that is too long
            self.paths[name] = next(filter(os.path.isfile, places), places[0])
        return self.paths[name]

    def is_usable(self, image: Path) -> bool:
        if image not in self.usable:
            is_file = os.path.isfile(image)
            self.missing += [] if is_file else [image]
            self.usable[image] = is_file and self.check(image, str(image)) is not None
        return self.usable[image]

    def check(self, image: Path | bytes, name: str) -> str | None:
        """The format of an image, such as png; None where it cannot be read."""
        try:
            return image_format(image)
        except UserError as error:
            self.unreadable.append(f"{name}: {error.__cause__}")


def spellings(name: str) -> dict[str, None]:
    """A name as it stands, then with letters composed or decomposed, then without backslashes."""
    forms = [name, *(normalize(form, name) for form in ("NFC", "NFD"))]
    return dict.fromkeys([*forms, *(form.replace("\\", "/") for form in forms)])


@functools.cache
def image_suffixes() -> set[str]:
    """Suffixes of the images that Pillow can read."""
    formats = Image.registered_extensions()
    return {suffix for suffix, name in formats.items() if name in Image.OPEN}
