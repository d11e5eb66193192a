"""What the tests of sd/ share: a tiny pipeline with random weights, and runs of it."""

import json
import math
import shlex
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict

import sd_demo
from sd import model, options, prompts, replay
from sd.seeds import seeded_generator
from toy.emoji_sd import models

PROMPTS = prompts.PROMPTS["animals"][:5]
# A rate and rank at which few updates show
FLAGS = """
    --precision fp32 --num-steps 3 --skip-last 0 --guidance-scale 3 --lr 0.005 --lora-rank 4
    --epochs 2 --prompts-per-epoch 2 --batch-size 2 --images-per-prompt 2
    --eval-images 2 --eval-every 1 --no-gradient-checkpointing
"""
MEASURED = {"seconds_sample", "seconds_train", "peak_memory_mb"}


def make_pipeline(**unet) -> StableDiffusionPipeline:
    words = models.tokenizer()
    torch.manual_seed(0)
    net = UNet2DConditionModel.from_config(models.unet(tiny=True).config, **unet)
    return models.pipeline(models.vae(tiny=True), models.text_encoder(words, tiny=True), net)


def parse(folder: Path, flags: str = "") -> Namespace:
    flags = f"--objective compressibility {FLAGS} {flags}"
    return options.parse(["--model", str(folder), *flags.split()])[1]


class Loaded:
    """A model, ready to train, without a run folder."""

    def __init__(
        self, folder: Path, flags: str = "", *, accelerator=None, prompts=PROMPTS, pipe=None
    ):
        args = parse(folder, flags)
        args.model = pipe or args.model
        accelerator = accelerator or Accelerator()
        self.model = model.load_model(args, prompts, accelerator)
        optimizer = torch.optim.AdamW(self.model.lora, args.lr, weight_decay=args.weight_decay)
        optimizer = accelerator.prepare(optimizer)
        args.out = folder  # of latents/, where nothing is kept
        self.run = sd_demo.Run(
            args=args,
            accelerator=accelerator,
            model=self.model,
            average=model.RunningAverage(self.model.lora, enabled=args.average_weights),
            optimizer=optimizer,
            feedback=None,
            memory=replay.ReplayBuffer(args, accelerator, self.model.schedule, prompts),
        )
        self.args, self.optimizer = args, optimizer

    def sample(self, prompts=(0, 1), K=2, *numbers, denoiser=None) -> model.Batch:
        return model.sample(
            self.model,
            denoiser or self.model.sampler,
            torch.as_tensor(prompts),
            images_per_prompt=K,
            generator=seeded_generator(self.args.seed, *numbers),
        )

    def update(self, batch, pairs, ref=None, steps=None) -> tuple[list, list]:
        """`sd_demo.update_batch`: losses, and for each update if it overflowed."""
        return sd_demo.update_batch(
            self.run,
            replay.LabelledBatch(batch.trajectory, batch.cond, torch.tensor(pairs).view(-1, 2)),
            ref_log_prob=self.reference_log_prob(batch) if ref is None else ref,
            steps=list(range(self.args.num_steps)) if steps is None else steps,
        )

    def log_prob(self, batch) -> torch.Tensor:
        return self.model.log_prob(self.model.sampler, batch)

    def reference_log_prob(self, batch) -> torch.Tensor:
        return self.model.log_prob(self.model.reference, batch)

    def lora(self) -> dict:
        weights = get_peft_model_state_dict(self.model.pipe.unet)
        return {name: weight.clone() for name, weight in weights.items()}


def run(folder: Path, out: Path, objective: str, flags: str = "") -> Path:
    """A run of sd_demo.py; returns its folder."""
    start = ["--model", folder, "--prompts", folder / "prompts.txt", "--objective", objective]
    sd_demo.main([*map(str, start), "--out", str(out), *FLAGS.split(), *shlex.split(flags)])
    return out


def read_rows(path: Path) -> list[dict]:
    """The lines of a file, as strict JSON: NaN is none."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def outcome(out: Path) -> tuple[list[dict], str, bytes]:
    """What a run leaves: metrics without times and memory, labels, bytes of the LoRA."""
    rows = read_rows(out / "metrics.jsonl")
    metrics = [{key: row[key] for key in row.keys() - MEASURED} for row in rows]
    lora = (out / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    return metrics, (out / "labels.jsonl").read_text(), lora


def same_lora(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_images(one: list, other: list, tolerance: int = 1) -> bool:
    """Up to a grey level: the same numbers in another order are rounded otherwise."""
    one, other = (np.stack([np.asarray(image, int) for image in side]) for side in (one, other))
    return abs(one - other).max() <= tolerance


def break_gradients(losses, overflows: set):
    """A loss function of d3po.py where the gradients of some losses, by number, are infinite.

    As a GradScaler's too large factor makes them.
    """
    count = 0

    def broken(*args, **options):
        nonlocal count
        for loss in losses(*args, **options):
            if count in overflows:
                loss.register_hook(lambda gradient: gradient * math.inf)
            count += 1
            yield loss

    return broken
