"""Look at the emoji model: the share of samples whose animal the classifier names, their JPEG size, and a figure.

    python toy/emoji_sd/check.py

The figure has one sample of each of the 45 animals. Beside the model's samples the table has renderings, and renderings
that went through the VAE, which no sample can surpass.
"""

import io
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository: this file is run as a script

from toy import runs
from toy.emoji_sd.classifier import classify, load, to_tensor
from toy.emoji_sd.make import HELD_OUT, psnr, to_net
from toy.emoji_sd.render import NAMES, caption, dataset

FOLDER = Path(__file__).parent


def load_pipeline(folder: Path = FOLDER) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


def samples(pipe, count: int, seed: int = 0, steps: int = 20, guidance: float = 3.0, eta: float = 1.0) -> np.ndarray:
    """Pictures (count, 64, 64, 3) uint8 of the animals in turn, by DDIM."""
    generator, parts = torch.Generator().manual_seed(seed), []
    prompts = [caption(NAMES[n % len(NAMES)]) for n in range(count)]
    settings = {"num_inference_steps": steps, "guidance_scale": guidance, "eta": eta, "output_type": "np"}
    for start in range(0, count, 45):
        parts.append(pipe(prompts[start : start + 45], generator=generator, **settings).images)
    return np.rint(255 * np.concatenate(parts)).astype(np.uint8)


def share_right(pictures: np.ndarray) -> Tensor:
    """For each of the 45 animals, the share (45,) of its pictures that the classifier names right."""
    named, meant = classify(load(), to_tensor(pictures)), torch.arange(len(pictures)) % len(NAMES)
    return torch.stack([(named[meant == k] == k).float().mean() for k in range(len(NAMES))])


def jpeg_kb(picture: np.ndarray) -> float:
    """Size in kB of a picture (64, 64, 3) uint8 as JPEG of quality 95, DDPO's measure of compressibility."""
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
    x = to_net(torch.from_numpy(pictures).permute(0, 3, 1, 2), vae)
    decoded = [vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(50)]
    return (127.5 * (torch.cat(decoded).clamp(-1, 1) + 1)).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def parse(argv: list[str] | None) -> Namespace:
    parser = runs.Parser(prog="check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=FOLDER, help="folder of the pipeline")
    parser.add_argument("--samples", type=int, default=450, help="to draw, a multiple of 45")
    parser.add_argument("--num-steps", type=int, default=20, help="T, denoising steps")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="of classifier-free guidance")
    parser.add_argument("--eta", type=float, default=1.0, help="DDIM's noise scale")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--figure", type=Path, default=Path("runs/emoji_sd/animals.png"), help="where the picture goes")
    args = parser.parse_args(argv)
    if args.samples < 45 or args.samples % 45:
        parser.error(f"--samples {args.samples}: give a multiple of 45, one for each animal")
    if not (args.model / "model_index.json").is_file():
        parser.error(f"--model {args.model} is no pipeline folder: make one with python toy/emoji_sd/make.py")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    pipe = load_pipeline(args.model)
    drawn = samples(pipe, args.samples, args.seed, args.num_steps, args.guidance_scale, args.eta)
    rendered = dataset(args.samples, HELD_OUT)[0]
    decoded = through_vae(pipe.vae, rendered)
    print(f"{'':26}{'right':>8}{'JPEG kB: 10 %':>15}{'median':>8}{'90 %':>8}")
    for name, pictures in (("samples", drawn), ("renderings", rendered), ("renderings through VAE", decoded)):
        sizes = np.quantile([jpeg_kb(picture) for picture in pictures], [0.1, 0.5, 0.9])
        print(f"{name:26}{share_right(pictures).mean():8.1%}{sizes[0]:15.2f}{sizes[1]:8.2f}{sizes[2]:8.2f}")
    worst = sorted(zip(share_right(drawn).tolist(), NAMES, strict=True))[:5]
    print("Fewest right: " + ", ".join(f"{name} {share:.0%}" for share, name in worst))
    print(f"VAE: PSNR {psnr(pipe.vae, rendered):.1f} dB on these renderings")
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    sheet(drawn[: len(NAMES)]).resize((9 * 128, 5 * 128), Image.Resampling.LANCZOS).save(args.figure)
    print(f"T = {args.num_steps}, guidance {args.guidance_scale:g}, eta {args.eta:g}, seed {args.seed}: {args.figure}")


if __name__ == "__main__":
    main()
