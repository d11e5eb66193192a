"""A small network that names the animal of a picture: it judges what a model draws.

    python -m toy.emoji_sd.classifier
    python -m toy.emoji_sd.classifier --seed 1 --out toy/emoji_sd/judge.safetensors

It is trained on renderings only; two minutes on one core. The second
command makes a second opinion.
"""

import argparse
import math
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from toy.emoji_sd.render import NAMES, SIZE, caption, dataset

WEIGHTS = Path(__file__).with_name("classifier.safetensors")
JUDGE = Path(__file__).with_name("judge.safetensors")  # another seed: for models trained on WEIGHTS
HELD_OUT = 2**32 + 1  # seed of pictures that no training sees


class Classifier(nn.Module):
    """Pictures (B, 3, 64, 64) in [0, 1] to logits (B, 45), in the order of render.NAMES."""

    def __init__(self):
        super().__init__()
        layers, before = [], 3
        for channels in (16, 32, 64, 96):
            for channels_in, stride in ((before, 2), (channels, 1)):
                layers += [
                    nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1),
                    nn.GroupNorm(8, channels),
                    nn.SiLU(),
                ]
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
    logits, expected = _judge(images, prompts, weights)
    return (logits.argmax(1) == expected).float().tolist()


def recognised_by_judge(images: list, prompts: list[str]) -> list[float]:
    """The same from the second network."""
    return recognised(images, prompts, JUDGE)


def log_probability(images: list, prompts: list[str], weights: Path = WEIGHTS) -> list[float]:
    """A scorer for sd_demo.py: the classifier's log-probability of the prompt's animal, nats."""
    logits, expected = _judge(images, prompts, weights)
    return logits.log_softmax(1)[torch.arange(len(expected)), expected].tolist()


@torch.no_grad()
def _judge(images: list, prompts: list[str], weights: Path) -> tuple[Tensor, Tensor]:
    """Logits (B, 45) of images and the numbers (B,) of their prompts' animals."""
    numbers = {caption(name): number for number, name in enumerate(NAMES)}
    unknown = [prompt for prompt in prompts if prompt not in numbers]
    if unknown:
        raise ValueError(
            f"the classifier knows prompts such as 'a cat', of the 45 animals, not '{unknown[0]}'"
        )
    pixels = np.stack([np.asarray(image.convert("RGB").resize((SIZE, SIZE))) for image in images])
    return load(weights)(to_tensor(pixels)), torch.tensor([numbers[prompt] for prompt in prompts])


def train(images: int, steps: int, seed: int, batch: int = 64, lr: float = 3e-3) -> Classifier:
    """AdamW on renderings that were distorted at random, as a model's samples are."""
    torch.manual_seed(seed)
    pictures, labels = (torch.from_numpy(array) for array in dataset(images, seed))
    net = Classifier()
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01, fused=True)
    for step in tqdm(range(steps), "classifier", unit=" steps", mininterval=0.5):
        warm_up = min(1, (step + 1) / 100)
        cosine = 1 + math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * warm_up * cosine / 2
        chosen = torch.randint(len(pictures), (batch,))
        x = distort(to_tensor(pictures[chosen]))
        loss = nn.functional.cross_entropy(net(x), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def distort(x: Tensor) -> Tensor:
    """Blur, tint and noise of random strength for each of the pictures x (B, 3, 64, 64)."""
    padded = nn.functional.pad(x, [1] * 4, mode="replicate")
    blurred = nn.functional.avg_pool2d(padded, 3, stride=1)
    x = torch.lerp(x, blurred, torch.rand(len(x), 1, 1, 1))
    tint = 1 + 0.1 * torch.randn(len(x), 3, 1, 1)
    noise = 0.05 * torch.rand(len(x), 1, 1, 1) * torch.randn(x.shape)
    return x * tint + noise


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m toy.emoji_sd.classifier",
        usage="%(prog)s [flags]   (--help lists the flags)",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
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
    part = args.out.with_name(f"{args.out.name}.part")
    save_file(net.state_dict(), part)
    part.replace(args.out)
    seconds = time.perf_counter() - start
    print(f"{right:.1%} of 1800 held-out renderings right, {seconds:.0f} s: {args.out}")


if __name__ == "__main__":
    main()
