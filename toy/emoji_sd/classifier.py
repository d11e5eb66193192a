"""A small network that names the animal of a picture, trained on renderings only: it judges what a model draws.

    python toy/emoji_sd/classifier.py
    python toy/emoji_sd/classifier.py --seed 1 --out toy/emoji_sd/judge.safetensors    # a second opinion

Two minutes on one core.
"""

import math
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: this file is run as a script

from toy import runs
from toy.emoji_sd.render import NAMES, SIZE, caption, dataset

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
JUDGE = WEIGHTS.with_name("judge.safetensors")  # the same from another seed, for models that were trained on the first
HELD_OUT = 2**32 + 1  # seed of pictures that no training sees


class Classifier(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] to logits (B, 45), in the order of render.NAMES."""

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        for channels in (16, 32, 64, 96):
            layers += [nn.Conv2d(before, channels, 3, 2, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            layers += [nn.Conv2d(channels, channels, 3, 1, 1), nn.GroupNorm(8, channels), nn.SiLU()]
            before = channels
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, len(NAMES))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(2 * pictures - 1).amax((2, 3)))


@cache
def load(weights: Path = WEIGHTS) -> Classifier:
    net = Classifier()
    net.load_state_dict(load_file(weights))
    return net.eval().requires_grad_(False)


def to_tensor(pictures) -> Tensor:
    """uint8 pictures (N, 64, 64, 3), as render makes them, to (N, 3, 64, 64) in [0, 1]."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def classify(net: Classifier, pictures: Tensor) -> Tensor:
    """The animal numbers (N,) of pictures (N, 3, 64, 64) in [0, 1]."""
    return torch.cat([net(part).argmax(1) for part in pictures.split(256)])


def recognised(images: list, prompts: list[str], weights: Path = WEIGHTS) -> list[float]:
    """A scorer for sd_demo.py: 1 for an image (PIL) whose animal is the prompt's, else 0."""
    logits, meant = _judged(images, prompts, weights)
    return (logits.argmax(1) == meant).float().tolist()


def recognised_by_judge(images: list, prompts: list[str]) -> list[float]:
    """The same from the second network."""
    return recognised(images, prompts, JUDGE)


def log_probability(images: list, prompts: list[str]) -> list[float]:
    """A scorer for sd_demo.py: log-probability, in nats, that the classifier gives to the prompt's animal."""
    logits, meant = _judged(images, prompts, WEIGHTS)
    return logits.log_softmax(1)[torch.arange(len(meant)), meant].tolist()


@torch.no_grad()
def _judged(images: list, prompts: list[str], weights: Path) -> tuple[Tensor, Tensor]:
    """Logits (B, 45) of images and the numbers (B,) of their prompts' animals."""
    numbers = {caption(name): number for number, name in enumerate(NAMES)}
    if unknown := [prompt for prompt in prompts if prompt not in numbers]:
        raise ValueError(f"the classifier knows prompts such as 'a cat', of the 45 animals, not '{unknown[0]}'")
    pixels = np.stack([np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in images])
    return load(weights)(to_tensor(pixels)), torch.tensor([numbers[prompt] for prompt in prompts])


def train(images: int, steps: int, seed: int, batch: int = 64, lr: float = 3e-3, progress: bool = True) -> Classifier:
    """AdamW on renderings of which each was blurred, dimmed and made noisy by chance: so are a model's samples."""
    torch.manual_seed(seed)
    pictures, labels = (torch.from_numpy(array) for array in dataset(images, seed))
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, fused=True)
    for step in tqdm(range(steps), "classifier", unit=" steps", disable=not progress, mininterval=0.5):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = torch.randint(len(pictures), (batch,))
        x = to_tensor(pictures[chosen])
        blurred = nn.functional.avg_pool2d(nn.functional.pad(x, [1] * 4, mode="replicate"), 3, 1)
        x = torch.lerp(x, blurred, torch.rand(batch, 1, 1, 1))
        x = x * (1 + 0.1 * torch.randn(batch, 3, 1, 1)) + 0.05 * torch.rand(batch, 1, 1, 1) * torch.randn(x.shape)
        loss = nn.functional.cross_entropy(net(x), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def main(argv: list[str] | None = None) -> None:
    parser = runs.Parser(prog="classifier.py", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=13_500, help="renderings to train on")
    parser.add_argument("--steps", type=int, default=1_200, help="updates")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="file of the weights")
    args = parser.parse_args(argv)
    for name in ("images", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: give a positive number")
    start = time.perf_counter()
    net = train(args.images, args.steps, args.seed)
    pictures, labels = dataset(1800, HELD_OUT)
    right = (classify(net, to_tensor(pictures)) == torch.from_numpy(labels)).float().mean()
    part = args.out.with_name(args.out.name + ".part")
    save_file(net.state_dict(), part)
    part.replace(args.out)
    print(f"{right:.1%} of 1800 held-out renderings right, {time.perf_counter() - start:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
