"""The data of the emoji model: the 45 animals of the paper's Appendix C, as Noto emoji.

Each stands on a random background. An image is a function of its animal and its seed; nothing is
downloaded and nothing is stored.
"""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIZE = 64  # pixels, height and width

# Noto's mouse and rat differ by little but colour at this size, so the mouse is its face.
_TABLE = """
cat 🐈 dog 🐕 horse 🐎 monkey 🐒 rabbit 🐇 zebra 🦓 spider 🕷 bird 🐦 sheep 🐑 deer 🦌 cow 🐄
goat 🐐 lion 🦁 tiger 🐅 bear 🐻 raccoon 🦝 fox 🦊 wolf 🐺 lizard 🦎 beetle 🪲 kangaroo 🦘
fish 🐟 butterfly 🦋 shark 🦈 whale 🐋 dolphin 🐬 squirrel 🐿 mouse 🐭 rat 🐀 snake 🐍 turtle 🐢
frog 🐸 chicken 🐔 duck 🦆 goose 🪿 bee 🐝 pig 🐖 turkey 🦃 fly 🪰 llama 🦙 camel 🐪 gorilla 🦍
bat 🦇 ant 🐜 hedgehog 🦔
""".split()
ANIMALS = dict(zip(_TABLE[::2], _TABLE[1::2], strict=True))  # name: character
NAMES = list(ANIMALS)
BACKGROUNDS = ("plain", "gradient", "stripes", "checks", "noise")
FONTS = [
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",  # Debian, Ubuntu
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",  # Arch
    "/usr/share/fonts/google-noto-color-emoji-fonts/NotoColorEmoji.ttf",  # Fedora
    str(Path("~/.local/share/fonts/NotoColorEmoji.ttf").expanduser()),
    str(Path("~/.fonts/NotoColorEmoji.ttf").expanduser()),
]
REMEDY = (
    "install the Debian package fonts-noto-color-emoji (or give the path of its NotoColorEmoji.ttf)"
)


@cache
def sprites(font: str | None = None) -> dict[str, Image.Image]:
    """The animals as RGBA images, cropped to what is drawn.

    FileNotFoundError or ValueError says which font to install.
    """
    places = [font] if font else FONTS
    path = next((place for place in places if Path(place).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no Noto Color Emoji font at {', '.join(places)}: {REMEDY}")
    try:
        typeface = ImageFont.truetype(path, 109)  # the one size of this bitmap font
    except OSError as error:
        raise ValueError(
            f"{path} is not the bitmap font Noto Color Emoji ({error}): {REMEDY}"
        ) from None
    found = {}
    for name, character in ANIMALS.items():
        canvas = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(canvas).text((0, 0), character, font=typeface, embedded_color=True)
        box = canvas.getbbox()
        if box is None:
            raise ValueError(f"{path} has no emoji for '{name}' (U+{ord(character):X}): {REMEDY}")
        found[name] = canvas.crop(box)
    return found


def render(
    name: str, seed, backgrounds: tuple[str, ...] = BACKGROUNDS, font: str | None = None
) -> np.ndarray:
    """One picture (64, 64, 3) uint8 of an animal: random size, place, flip and background.

    All of them are drawn from the seed, an integer or a list of integers.
    """
    rng = np.random.default_rng(seed)
    sprite = sprites(font)[name]
    scale = rng.uniform(38, 58) / max(sprite.size)
    size = [max(1, round(scale * side)) for side in sprite.size]
    sprite = sprite.resize(size, Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    room = SIZE - np.array(sprite.size)
    offset = rng.uniform(-1, 1, 2) * np.minimum(room / 2, 5)
    corner = np.rint(room / 2 + offset).astype(int)
    image = Image.fromarray(background(rng, rng.choice(backgrounds)))
    image.paste(sprite, tuple(corner.tolist()), sprite)
    return np.asarray(image)


def background(rng: np.random.Generator, kind: str) -> np.ndarray:
    """A mix (64, 64, 3) uint8 of two light colours, in the pattern that `kind` names."""
    hue = rng.random()
    saturation = rng.uniform(0.15, 0.5)
    shift = rng.uniform(-0.15, 0.15)
    one = hsv(hue, saturation, rng.uniform(0.85, 1))
    two = hsv(hue + shift, saturation * rng.uniform(0.3, 1), rng.uniform(0.6, 0.85))
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    if kind == "plain":
        mix = np.zeros((SIZE, SIZE))
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        along = np.cos(angle) * x + np.sin(angle) * y
        mix = (along - along.min()) / np.ptp(along)
    elif kind == "stripes":
        angle = rng.choice([0, 0.25, 0.5, 0.75]) * np.pi
        period = rng.choice([10, 14, 20])
        mix = square_wave(np.cos(angle) * x + np.sin(angle) * y, period, rng.random())
    elif kind == "checks":
        period = rng.choice([16, 22, 32])
        columns = square_wave(x, period, rng.random())
        rows = square_wave(y, period, rng.random())
        mix = columns + rows - 2 * columns * rows
    elif kind == "noise":
        grid = Image.fromarray(rng.random((12, 12), dtype=np.float32))
        mix = np.clip(np.asarray(grid.resize((SIZE, SIZE), Image.Resampling.BICUBIC)), 0, 1)
    else:
        raise ValueError(f"background '{kind}': choose from {', '.join(BACKGROUNDS)}")
    return np.rint(255 * (one + mix[..., None] * (two - one))).astype(np.uint8)


def square_wave(u: np.ndarray, period: float, phase: float) -> np.ndarray:
    """0 and 1 by turns along u, with edges a pixel wide; period in pixels, phase in periods."""
    wave = np.sin(2 * np.pi * (u / period + phase))
    return np.clip(0.5 + period / (2 * np.pi) * wave, 0, 1)


def hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """An RGB colour (3,) in [0, 1]; hue counts turns."""
    pure = np.clip(np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return value * (1 - saturation * (1 - pure))


def dataset(count: int, seed: int, **kwargs) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (count, 64, 64, 3) uint8 and animal numbers (count,), the animals in turn."""
    labels = np.arange(count) % len(NAMES)
    pictures = [render(NAMES[label], [seed, n], **kwargs) for n, label in enumerate(labels)]
    return np.stack(pictures), labels


def caption(name: str) -> str:
    """The prompt of an animal, such as "a cat" or "an ant"."""
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"
