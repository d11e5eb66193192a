"""Images of other people's files, as RGB of the model's size."""

from pathlib import Path

from PIL import Image, ImageOps

from sd import UserError


def open_image(file: Path, size: tuple[int, int]) -> Image.Image:
    """An image resized and centre-cropped. Raises UserError where it cannot be read."""
    try:
        with Image.open(file) as image:
            return ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), size)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{file} is no image that can be read ({error}): take it out") from error
