"""Check the emoji model: animals that a classifier names right, JPEG sizes, and a figure.

    python -m toy.emoji_sd.check

The figure has one sample of each of the 45 animals. Beside the model's samples the table has
renderings, and renderings that went through the VAE, which no sample can surpass.
"""

import argparse
import io
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from toy.emoji_sd.classifier import classify, load, to_tensor
from toy.emoji_sd.make import HELD_OUT, psnr, to_net
from toy.emoji_sd.render import NAMES, caption, dataset

FOLDER = Path(__file__).parent


def load_pipeline(folder: Path = FOLDER) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def samples(
    pipe, count: int, seed: int = 0, steps: int = 20, guidance: float = 3.0, eta: float = 1.0
) -> np.ndarray:
    """Pictures (count, 64, 64, 3) uint8 of the animals in turn, by DDIM."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [caption(NAMES[n % len(NAMES)]) for n in range(count)]
    parts = []
    for start in range(0, count, 45):
        output = pipe(
            prompts[start : start + 45],
            generator=generator,
            num_inference_steps=steps,
            guidance_scale=guidance,
            eta=eta,
            output_type="np",
        )
        parts.append(output.images)
    return np.rint(255 * np.concatenate(parts)).astype(np.uint8)


def share_right(pictures: np.ndarray) -> Tensor:
    """For each of the 45 animals, the share (45,) of its pictures that the classifier names right.

    pictures (N, 64, 64, 3) uint8: of the animals in turn.
    """
    named = classify(load(), to_tensor(pictures))
    expected = torch.arange(len(pictures)) % len(NAMES)
    return torch.stack([(named[expected == k] == k).float().mean() for k in range(len(NAMES))])


def jpeg_kb(picture: np.ndarray) -> float:
    """Size in kB of a picture (64, 64, 3) uint8 as JPEG of quality 95."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95)
    return file.tell() / 1000


def sheet(pictures: np.ndarray, columns: int = 9) -> Image.Image:
    """Pictures (N, 64, 64, 3), row by row, in one image; N is a multiple of `columns`."""
    n, height, width, _ = pictures.shape
    rows = pictures.reshape(n // columns, columns, height, width, 3).swapaxes(1, 2)
    return Image.fromarray(rows.reshape(n // columns * height, columns * width, 3))


@torch.no_grad()
def through_vae(vae, pictures: np.ndarray) -> np.ndarray:
    """Pictures (N, 64, 64, 3) uint8 after encoding and decoding."""
    x = to_net(torch.from_numpy(pictures).permute(0, 3, 1, 2), vae)
    parts = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(50)]
    decoded = 127.5 * (torch.cat(parts).clamp(-1, 1) + 1)
    return decoded.round().byte().permute(0, 2, 3, 1).cpu().numpy()


def parse(argv: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toy.emoji_sd.check",
        usage="%(prog)s [flags]   (--help lists the flags)",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--model", type=Path, default=FOLDER, help="folder of the pipeline")
    flag("--samples", type=int, default=450, help="to draw, a multiple of 45")
    flag("--num-steps", type=int, default=20, help="T, denoising steps")
    flag("--guidance-scale", type=float, default=3.0, help="of classifier-free guidance")
    flag("--eta", type=float, default=1.0, help="DDIM's noise scale")
    flag("--seed", type=int, default=0, help="of the samples")
    figure = Path("runs/emoji_sd/animals.png")
    flag("--figure", type=Path, default=figure, help="where the picture goes")
    args = parser.parse_args(argv)
    if args.samples < 45 or args.samples % 45:
        parser.error(f"--samples {args.samples}: give a multiple of 45, one for each animal")
    if not (args.model / "model_index.json").is_file():
        parser.error(
            f"--model {args.model} is no pipeline folder: make one with python -m toy.emoji_sd.make"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pipe = load_pipeline(args.model)
    drawn = samples(
        pipe,
        args.samples,
        args.seed,
        steps=args.num_steps,
        guidance=args.guidance_scale,
        eta=args.eta,
    )
    rendered = dataset(args.samples, HELD_OUT)[0]
    sets = {
        "samples": drawn,
        "renderings": rendered,
        "renderings through VAE": through_vae(pipe.vae, rendered),
    }
    print(f"{'':26}{'right':>8}{'JPEG kB: 10 %':>15}{'median':>8}{'90 %':>8}")
    for name, pictures in sets.items():
        sizes = [jpeg_kb(picture) for picture in pictures]
        low, median, high = np.quantile(sizes, [0.1, 0.5, 0.9])
        right = share_right(pictures).mean()
        print(f"{name:26}{right:8.1%}{low:15.2f}{median:8.2f}{high:8.2f}")
    worst = sorted(zip(share_right(drawn).tolist(), NAMES, strict=True))[:5]
    print("Fewest right: " + ", ".join(f"{name} {share:.0%}" for share, name in worst))
    print(f"VAE: PSNR {psnr(pipe.vae, rendered):.1f} dB on these renderings")
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    picture = sheet(drawn[: len(NAMES)])
    picture.resize((9 * 128, 5 * 128), Image.Resampling.LANCZOS).save(args.figure)
    settings = f"T = {args.num_steps}, guidance {args.guidance_scale:g}, eta {args.eta:g}"
    print(f"{settings}, seed {args.seed}: {args.figure}")


if __name__ == "__main__":
    main()
