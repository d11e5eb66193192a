"""What the tests of sd/ share: a tiny pipeline with random weights, and runs of it."""

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import get_peft_model_state_dict

import sd_demo
from sd import model, options, prompts, replay
from sd.files import ROOT
from sd.run import load, make_run
from sd.seeds import seeded_generator
from toy.emoji_sd import models

PROMPTS = prompts.PROMPTS["animals"][:5]
# A rate and rank at which few updates show
FLAGS = """
    --precision fp32 --num-steps 3 --skip-last 0 --guidance-scale 3 --lr 0.005 --lora-rank 4
    --epochs 2 --prompts-per-epoch 2 --batch-size 2 --images-per-prompt 2
    --eval-images 2 --eval-every 1 --no-gradient-checkpointing
    --loss eq14 --beta 0.05 --replay 0 --no-average-weights --warm-up 1 --max-kl 1e6
"""
# Of processes that a test starts
ENVIRONMENT = os.environ | {
    **{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "sd")]),
}
MEASURED = {"seconds_sample", "seconds_train", "peak_memory_mb"}


# Less than the emoji model's: what takes time in a tiny network is the number of its layers
UNET = {
    "block_out_channels": (16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}


def make_pipeline(**unet) -> StableDiffusionPipeline:
    words = models.tokenizer()
    torch.manual_seed(0)
    net = UNet2DConditionModel.from_config(models.unet(tiny=True).config, **UNET | unet)
    for name, weight in net.named_parameters():
        if name.endswith("to_out.0.weight"):  # so that prompts count, and what the LoRA learns
            weight.data.mul_(3)
    return models.pipeline(models.vae(tiny=True), models.text_encoder(words, tiny=True), net)


def noises(*numbers, groups: int, K: int) -> list[torch.Generator]:
    """Of image k of group n: its numbers are n, and k where a group has several."""
    places = [(n, k) if K > 1 else (n,) for n in range(groups) for k in range(K)]
    return [seeded_generator(*numbers, *place) for place in places]


def typed(flags: str) -> dict:
    """Flags as `sd_demo.run` takes them."""
    return vars(options.build_parser().parse_args(shlex.split(flags)))


def parse(folder: Path, flags: str = "", **settings) -> options.Settings:
    new = {"model": folder, "objective": "compressibility"}
    return options.make_settings(**new | typed(f"{FLAGS} {flags}") | settings)


class Loaded:
    """What a run trains, and its parts, without a folder."""

    def __init__(self, folder: Path, flags: str = "", **settings):
        quiet = {"prompts": PROMPTS, "dry_run": True}  # without a progress bar
        setup = load(parse(folder, flags, **quiet | settings))
        self.run = make_run(setup, Path(folder))
        self.args, self.model, self.optimizer = setup.args, setup.model, self.run.optimizer

    def sample(self, prompts=(0, 1), K=2, *purpose, denoiser=None) -> model.Batch:
        return model.sample(
            self.model,
            denoiser or self.model.sampler,
            torch.as_tensor(prompts),
            images_per_prompt=K,
            generators=noises(self.args.seed, *purpose, groups=len(prompts), K=K),
        )

    def update(self, batch, pairs, steps=None, scores=None) -> tuple[list, list]:
        """`sd_demo.learn`, in this order of steps: losses, and for each update if it overflowed."""
        pairs = torch.as_tensor(pairs).view(-1, 2)
        labelled = replay.LabelledBatch(batch.trajectory, batch.cond, pairs, scores)
        self.run.losses, self.run.overflows = [], []
        with mock.patch("torch.randperm", lambda count, **_: torch.tensor(steps or range(count))):
            sd_demo.learn(self.run, labelled)
        return self.run.losses, self.run.overflows

    def gradients(self) -> list[list[torch.Tensor]]:
        """The gradients of each update from now on, in place of its step."""
        gradients = []
        self.optimizer.step = lambda: gradients.append([w.grad.clone() for w in self.model.lora])
        return gradients

    def log_prob(self, batch) -> torch.Tensor:
        return self.model.log_prob(self.model.sampler, batch)

    def reference_log_prob(self, batch) -> torch.Tensor:
        return self.model.log_prob(self.model.reference, batch)

    def lora(self) -> dict:
        weights = get_peft_model_state_dict(self.model.pipe.unet)
        return {name: weight.clone() for name, weight in weights.items()}


def run(folder: Path, out: Path, objective, flags: str = "", **settings) -> Path:
    """`sd_demo.run` with these settings; returns its folder."""
    new = {"model": folder, "prompts": folder / "prompts.txt", "objective": objective, "out": out}
    return sd_demo.run(**new | typed(f"{FLAGS} {flags}") | settings)


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
    """A loss function where the gradients of some losses, by number, are infinite.

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


def start_python(argv: list, folder: Path, **environment) -> str:
    """Run Python in a process of its own, which must succeed; returns what it wrote."""
    with (folder / "log").open("w+") as log:
        command = [sys.executable, *map(str, argv)]
        options = {"env": ENVIRONMENT | environment, "stdout": log, "stderr": log}
        code = subprocess.run(command, **options, timeout=600).returncode
        log.seek(0)
        output = log.read()
    assert code == 0, output[-3000:]
    return output
