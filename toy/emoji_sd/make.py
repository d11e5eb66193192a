"""Make the emoji model: a small Stable Diffusion, trained from scratch on 45 animals as emoji.

    python -m toy.emoji_sd.make

Three stages: a VAE of rendered pictures; the latents of many pictures; a UNet and its text encoder
on these latents. The work folder keeps loss.jsonl and a checkpoint every few minutes: run the same
command again to go on after a stop. In the end the whole pipeline, fp16, and its model card are in
--out.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from tqdm import tqdm

from toy.emoji_sd import models
from toy.emoji_sd.files import append_lines, write_json, write_tensors
from toy.emoji_sd.render import NAMES, caption, dataset, sprites

FOLDER = Path(__file__).parent
QUICK = {"images": 180, "vae_steps": 12, "unet_steps": 12, "batch_size": 8}
HELD_OUT = 2**32  # seed of pictures that no training sees
KL_WEIGHT = 1e-3  # per latent: keeps their code smooth, at no loss of PSNR in a trial
MIN_SNR = 5  # arXiv 2303.09556: steps with less noise than this count less

# The loss of a model on a batch that the generator draws
Loss = Callable[[nn.Module, torch.Generator], Tensor]


def parse(argv: list[str] | None) -> Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m toy.emoji_sd.make",
        usage="%(prog)s [flags]   (--help lists the flags)",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--images", type=int, default=36_000, help="pictures to train on")
    flag("--vae-steps", type=int, default=8_000, help="updates of the VAE")
    flag("--unet-steps", type=int, default=14_000, help="updates of UNet and text encoder")
    flag("--batch-size", type=int, default=48, help="latents an update; a third for the VAE")
    flag("--lr", type=float, default=1e-3, help="largest step size: warm-up, cosine to 0")
    flag("--quick", action="store_true", help="tiny nets and a few steps, to try the whole path")
    precision = "bf16" if bf16_pays() else "fp32"
    flag("--precision", choices=["bf16", "fp32"], default=precision, help="of the arithmetic")
    flag("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    flag("--checkpoint-minutes", type=float, default=3, help="between checkpoints")
    flag("--font", help="NotoColorEmoji.ttf, where it is not where Linux systems put it")
    flag("--seed", type=int, default=0, help="of everything")
    flag("--work", type=Path, help="checkpoints; runs/emoji_sd, with --quick OUT/work")
    flag("--out", type=Path, default=FOLDER, help="folder for the pipeline")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
        if args.out == FOLDER:
            parser.error("--quick makes a toy of a toy: give --out a folder of its own")
    if args.work is None:
        args.work = args.out / "work" if args.quick else Path("runs/emoji_sd")
    for name in ("images", "vae_steps", "unet_steps", "batch_size", "lr", "threads"):
        value = getattr(args, name)
        if not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: give a positive number")
    if not 0 <= args.seed < HELD_OUT:
        parser.error(f"--seed {args.seed}: give a number from 0 to 2^32 - 1")
    try:
        sprites(args.font)
        open_work(args)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    except OSError as error:
        places = f"--work {args.work} or --out {args.out}"
        parser.error(f"{places} cannot be written ({error.strerror})")
    return args


def bf16_pays() -> bool:
    """Half the time of a step on GPUs, and on CPUs with its instructions (0.34 s, not 0.66 s)."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # not in old torch
    return capabilities.get("avx512_bf16", False)


def open_work(args: Namespace) -> None:
    """Make the folders; ValueError where the work folder's checkpoints have other settings."""
    names = "images vae_steps unet_steps batch_size lr quick precision seed".split()
    settings = {name: getattr(args, name) for name in names}
    file = args.work / "config.json"
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    old = json.loads(file.read_text()) if file.exists() else settings
    if old != settings:
        changed = [f"{name} {old.get(name)}" for name in names if old.get(name) != settings[name]]
        raise ValueError(
            f"--work {args.work} holds a run with {', '.join(changed)}: "
            "give the same, or another --work folder"
        )
    write_json(file, settings)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"On {device}, {args.precision}, seed {args.seed}.")
    print(f"Checkpoints and losses: {args.work}; the model: {args.out}.")

    # Stage 1: the VAE
    torch.manual_seed(args.seed)
    vae = models.vae(args.quick).to(device)
    pictures, labels = render_all(args)
    loss = vae_loss(pictures, max(1, args.batch_size // 3))
    vae, vae_seconds = train("vae", vae, loss, steps=args.vae_steps, args=args)
    quality = psnr(vae, dataset(90 if args.quick else 450, HELD_OUT, font=args.font)[0])
    print(f"VAE: PSNR {quality:.1f} dB on held-out pictures.")

    # Stage 2: the latents
    standardise(vae, to_net(pictures[:1000], vae))
    latents = encode_all(vae, pictures, args)
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())
    latents = latents * vae.config.scaling_factor

    # Stage 3: the UNet and the text encoder
    words = models.tokenizer()
    torch.manual_seed(args.seed)
    unet = models.unet(args.quick)
    text_encoder = models.text_encoder(words, args.quick)
    # The fused attentions are slow in bf16 on CPUs: 0.49 s a step, not 0.34 s
    unet.set_attn_processor(AttnProcessor())
    text_encoder.set_attn_implementation("eager")
    nets = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder}).to(device)
    prompts = models.tokens(words, [*map(caption, NAMES), ""])
    loss = unet_loss(latents, labels, prompts, batch=args.batch_size)
    nets, unet_seconds = train("unet", nets, loss, steps=args.unet_steps, args=args)

    pipe = models.pipeline(vae.half(), nets["text_encoder"].half(), nets["unet"].half())
    pipe.save_pretrained(args.out)
    # transformers would load what is stored as fp16 as fp16, diffusers as float32: make them agree,
    # as SD 1.5 does
    file = args.out / "text_encoder" / "config.json"
    write_json(file, json.loads(file.read_text()) | {"dtype": "float32"})
    megabytes = sum(file.stat().st_size for file in args.out.glob("*/*.safetensors")) / 1e6
    minutes = {"vae": vae_seconds / 60, "unet": unet_seconds / 60}
    card = model_card(args, pipe, quality, megabytes=megabytes, minutes=minutes)
    (args.out / "README.md").write_text(card)
    print(f"{args.out}: {megabytes:.1f} MB of weights.")
    print(f"Check it: python -m toy.emoji_sd.check --model {args.out}")


def train(
    name: str, model: nn.Module, loss: Loss, steps: int, args: Namespace
) -> tuple[nn.Module, float]:
    """Train by AdamW on `steps` values of the loss, from the last checkpoint where there is one.

    Everything random comes from one CPU generator that the checkpoint keeps, so a run that was
    stopped ends with the weights of one that was not. Returns the exponential moving average of
    the model, for evaluation, and the seconds.
    """
    file = args.work / f"{name}.pt"
    log = args.work / "loss.jsonl"
    device = next(model.parameters()).device
    average = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    generator = torch.Generator().manual_seed(args.seed)
    start, seconds = 0, 0.0
    if file.exists():
        state = torch.load(file, map_location=device)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        start, seconds = state["step"], state["seconds"]
    drop_undone(log, name, start)
    saved = time.perf_counter()
    begun = saved - seconds
    losses = []
    bar = tqdm(range(start, steps), name, initial=start, total=steps, unit=" steps")
    for step in bar:
        lr = learning_rate(args.lr, step, steps)
        optimizer.param_groups[0]["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            value = loss(model, generator)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses.append(value.detach())

        done = step + 1
        now = time.perf_counter()
        if done % 50 == 0 or done == steps:
            mean = torch.stack(losses).mean().item()
            if not math.isfinite(mean):
                sys.exit(
                    f"{name}: the loss is {mean} at step {done}. "
                    "Give a lower --lr, and a new --work folder"
                )
            row = {"stage": name, "step": done, "loss": mean, "lr": lr, "seconds": now - begun}
            append_lines(log, [row])
            bar.set_postfix_str(f"loss {mean:.4f}")
            losses = []
        if now - saved >= 60 * args.checkpoint_minutes or done == steps:
            state = {
                "step": done,
                "seconds": now - begun,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
            }
            write_tensors(file, state)
            saved, seconds = now, now - begun
    return average, seconds


def learning_rate(largest: float, step: int, steps: int) -> float:
    """Warm-up over 500 steps, or a tenth of all, times half a cosine to 0."""
    warm_up = min(1, (step + 1) / min(500, steps / 10))
    return largest * warm_up * (1 + math.cos(math.pi * step / steps)) / 2


def drop_undone(log: Path, stage: str, step: int) -> None:
    """Drop the rows of steps that a stop undid, and a last line that a kill cut short."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    part = log.with_name(f"{log.name}.part")
    part.unlink(missing_ok=True)
    append_lines(part, [row for row in rows if row["stage"] != stage or row["step"] <= step])
    os.replace(part, log)


def render_all(args: Namespace) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 64, 64) uint8 and animal numbers (N,)."""
    print(f"Rendering {args.images:,} pictures ...")
    pictures, labels = dataset(args.images, args.seed, font=args.font)
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def to_net(pictures: Tensor, like: nn.Module) -> Tensor:
    """uint8 pictures as the VAE sees them: in [-1, 1], on its device."""
    return pictures.to(like.device).float() / 127.5 - 1


def vae_loss(pictures: Tensor, batch: int) -> Loss:
    """Absolute and squared error of reconstructions, and a little KL of the code."""

    def loss(vae, generator):
        chosen = torch.randint(len(pictures), (batch,), generator=generator)
        x = to_net(pictures[chosen], vae)
        code = vae.encode(x).latent_dist
        error = vae.decode(code.sample(generator)).sample.float() - x
        kl = KL_WEIGHT * code.kl().mean() / code.mean[0].numel()
        return error.abs().mean() + error.square().mean() + kl

    return loss


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures) -> float:
    """Mean over pictures (N, 64, 64, 3) uint8 of their peak signal-to-noise ratio, dB.

    The pictures are encoded and decoded.
    """
    values = []
    for part in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(50):
        x = to_net(part, vae)
        error = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1) - x
        values.append(-10 * torch.log10(error.square().mean((1, 2, 3)) / 4))
    return torch.cat(values).mean().item()


@torch.no_grad()
def standardise(vae: AutoencoderKL, x: Tensor) -> None:
    """Give each channel of the latents of x mean 0 and sd 1, as the noise has.

    The decoded pictures stay. SD's one scaling_factor cannot do that, and a channel of small spread
    would drown in noise long before the others.
    """
    code = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(100)])
    mean, sd = code.mean((0, 2, 3)), code.std((0, 2, 3))
    encoder = vae.quant_conv  # 1x1 convolution to mean and log-variance
    decoder = vae.post_quant_conv  # 1x1 convolution from the latents
    encoder.bias -= torch.cat([mean, 2 * sd.log()])
    decoder.bias += (decoder.weight[:, :, 0, 0] * mean).sum(1)
    encoder.weight[: len(mean)] /= sd[:, None, None, None]
    encoder.bias[: len(mean)] /= sd
    decoder.weight *= sd[None, :, None, None]


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Tensor, args: Namespace) -> Tensor:
    """Latents (N, 4, 16, 16) float16 of the pictures, unscaled; kept in the work folder."""
    file = args.work / "latents.pt"
    if not file.exists():
        parts = []
        for part in tqdm(pictures.split(100), "latents", unit="00 pictures", mininterval=0.5):
            with torch.autocast(vae.device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                parts.append(vae.encode(to_net(part, vae)).latent_dist.mode().half().cpu())
        write_tensors(file, {"latents": torch.cat(parts)})
    return torch.load(file)["latents"]


def unet_loss(latents: Tensor, labels: Tensor, prompts: Tensor, batch: int) -> Loss:
    """Noise prediction from latents and prompts, each step weighted by min(SNR, 5) / SNR.

    latents (N, 4, 16, 16), labels (N,): the numbers of their prompts
    prompts (46, 16): token numbers; the last prompt is empty
    """
    alpha_bars = models.scheduler().alphas_cumprod
    empty = len(prompts) - 1

    def loss(nets, generator):
        unet, encoder = nets["unet"], nets["text_encoder"]
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        x_0, label = latents[chosen].float(), labels[chosen]
        label = label.masked_fill(torch.rand(batch, generator=generator) < 0.1, empty)
        t = torch.randint(len(alpha_bars), (batch,), generator=generator)
        eps = torch.randn(x_0.shape, generator=generator)
        alpha_bar = alpha_bars[t][:, None, None, None]
        x = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
        snr = alpha_bar / (1 - alpha_bar)
        weight = snr.clamp(max=MIN_SNR) / snr

        device = unet.device
        text = encoder(prompts.to(device)).last_hidden_state  # all 46: cheaper than one a picture
        predicted = unet(x.to(device), t.to(device), text[label.to(device)]).sample.float()
        return (weight.to(device) * (predicted - eps.to(device)).square()).mean()

    return loss


def model_card(args: Namespace, pipe, quality: float, megabytes: float, minutes: dict) -> str:
    def millions(name):
        return sum(p.numel() for p in getattr(pipe, name).parameters()) / 1e6

    machine = f"{args.threads} CPU threads"
    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    flags = (" --quick" if args.quick else "") + (f" --seed {args.seed}" if args.seed else "")
    return f"""---
license: ofl-1.1
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, emoji, tiny]
---
# Stable Diffusion in miniature: 45 animals as emoji

A complete `StableDiffusionPipeline`, {megabytes:.1f} MB of fp16 weights, trained from scratch: for
laptops, and for tests of methods that fine-tune Stable Diffusion (here D3PO). It draws 64x64
pictures of 45 animals, and nothing else.

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("toy/emoji_sd")
pipe("a cat", num_inference_steps=20, guidance_scale=3, eta=1).images[0]
```

- **Data**: {args.images:,} pictures made by `render.py`: the 45 animals of the D3PO paper's
  Appendix C, drawn from the font Noto Color Emoji with random size, place, flip and background
  (plain, gradient, stripes, checks, noise). Prompts: "a cat", "an ant" and so on; one in ten is
  empty, for guidance.
- **Licence**: the font is Google's, under the SIL Open Font License 1.1; these weights, made from
  its drawings, are offered under the same licence. The code has the repository's licence.
- **Training** (minutes by the clock): `python -m toy.emoji_sd.make{flags}`, seed {args.seed},
  {args.precision}, on {machine}: VAE, {args.vae_steps:,} steps, {minutes["vae"]:.0f} minutes;
  UNet and text encoder, {args.unet_steps:,} steps of {args.batch_size} latents,
  {minutes["unet"]:.0f} minutes.
- **Parts**: VAE ({millions("vae"):.2f} M parameters; 64x64x3 to 16x16x4; PSNR {quality:.1f} dB on
  held-out pictures), UNet ({millions("unet"):.2f} M), CLIP text encoder
  ({millions("text_encoder"):.2f} M; {models.MAX_TOKENS} tokens), the scheduler of
  Stable Diffusion 1.5.
- **Limits**: one drawing of each animal is all that it knows; words other than the animals were
  never trained.
"""


if __name__ == "__main__":
    main()
