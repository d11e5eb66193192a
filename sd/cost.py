"""What a run will cost, before it starts: passes of the UNet, labels, and memory."""

import math
import sys
from argparse import Namespace
from contextlib import contextmanager
from typing import NamedTuple

import torch
from diffusers import StableDiffusionPipeline

from sd.families import PRESETS
from sd.label_files import EPOCH_GROUPS, passes_over_given
from sd.labels import pairs_of_group
from sd.model import Model

# Calls of the network in a step of a loss, with gradient and without; others have one with
CALLS = {"chain": (1, 1), "sft": (2, 1), "dpok": (2, 1), "diffusion-dpo": (1, 1)}
# What autograd holds in SD 1.5's UNet, in maps of its first block, by gradient checkpointing
ACTIVATION_MAPS = {False: 362, True: 90}


class Cost(NamedTuple):
    """Made by `estimate`. Rows are images in a batch of the UNet: a guided image has two."""

    labels: int  # of an epoch, as are the next five
    rows_sampled: int
    rows_without_gradient: int  # to train: at most
    rows_with_gradient: int
    calls: int  # of the UNet on one device
    calls_given: int  # of an epoch on the images of --labels, at most
    calls_eval: int  # of an evaluation of the held-out noises
    lora_weights: int
    memory_gb: float  # of weights, optimizer and what autograd holds
    memory_known: bool  # False: without what autograd holds


def steps_of_batch(args: Namespace) -> int:
    """How many steps a batch is trained on."""
    if args.loss == "eq12":
        return 1
    return max(1, round(args.step_fraction * (args.num_steps - args.skip_last)))


def estimate(model: Model, args: Namespace, processes: int) -> Cost:
    """Count what an epoch of a run takes."""
    network, K, T = model.network, args.images_per_prompt, args.num_steps
    across = args.batch_size * processes
    groups, batches = args.prompts_per_epoch, args.prompts_per_epoch // across
    batches_given = math.ceil(min(args.groups_given, EPOCH_GROUPS) / across)
    per_step = CALLS.get(args.loss, (1, 0))
    if args.loss == "sft" and not args.beta:
        per_step = (1, 0)
    with_gradient, without_gradient = (calls * steps_of_batch(args) for calls in per_step)
    of_reference = T if args.reference == "initial" else 0
    measured = T - of_reference  # passes of the initial model for metrics

    of_group = K * model.conditioning.halves
    chains = {"sft": K - 1, "diffusion-dpo": K * (K - 1)}.get(args.loss, K)  # a group's in a step
    groups_trained = groups + args.replay * across
    rows_step = groups_trained * chains * model.conditioning.halves
    calls_batch = of_reference + without_gradient + with_gradient
    lora = sum(p.numel() for p in model.lora)
    weights = sum(
        p.numel() * p.element_size()
        for part in (network, model.pipe.vae)
        for p in part.parameters()
    )
    memory = weights + 12 * lora
    known = isinstance(model.pipe, StableDiffusionPipeline)
    if known:
        first_map = math.prod(model.latent_shape[1:]) * network.config.block_out_channels[0]
        maps = ACTIVATION_MAPS[args.gradient_checkpointing] * args.batch_size * of_group
        memory += maps * first_map * network.dtype.itemsize

    return Cost(
        labels=groups * labels_of_group(args.objective, K),
        rows_sampled=groups * of_group * T,
        rows_without_gradient=(
            groups_trained * of_group * of_reference + rows_step * without_gradient
        ),
        rows_with_gradient=rows_step * with_gradient,
        calls=batches * (T + measured) + (batches + args.replay) * calls_batch,
        calls_given=batches_given * (T + calls_batch),
        calls_eval=math.ceil(args.eval_images / (args.batch_size * K)) * T,
        lora_weights=lora,
        memory_gb=memory / 1e9,
        memory_known=known,
    )


@contextmanager
def memory_is_enough():
    """What needs more memory than there is ends the program in a sentence."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # on the CPU, PyTorch's has no class of its own
        if "allocate memory" not in str(error) and not isinstance(
            error, MemoryError | torch.OutOfMemoryError
        ):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        sys.exit(
            f"The memory is not enough ({reason:.200}). Start with a smaller "
            "--batch-size, --images-per-prompt, --height and --width or --lora-rank, or with "
            "--gradient-checkpointing; where another program took it, --resume goes on."
        )


def labels_of_group(objective: str | None, K: int) -> int:
    """Questions about a group of K images, or comparisons of its scores."""
    if objective == "tags":
        return 1
    return len(pairs_of_group(range(K))) if objective == "human" else K * (K - 1) // 2


def describe(cost: Cost, model: Model, args: Namespace) -> str:
    """The start-up lines of a run: model, objective, cost, and what beta means."""
    device = str(model.network.device)
    if not torch.cuda.is_available():
        device += ", as there is no CUDA GPU"
    D = math.prod(model.latent_shape)
    kind = type(model.pipe).__name__
    preset = ""
    if kind in PRESETS:
        flags, source = PRESETS[kind]
        preset = (
            f"{kind}: the default {flags} is from {source}.\n"
            "Its --num-steps, --skip-last and --beta are those of SD 1.5; none is measured here.\n"
        )
    epoch = ""
    if args.groups_given:
        passes = passes_over_given(args)
        epoch = (
            f"Passes over the {args.groups_given} groups of --labels: {passes}; their images are "
            "resized and centre-cropped to the model's size.\n"
        )
    if args.evaluate:
        epoch = (
            f"Initial and tuned model draw from {args.eval_images} noises, compared by "
            f'{args.objective}; then at the pipeline\'s own settings, which is "stock".\n'
        )
    elif args.objective:
        again = f", and {args.replay} batches of earlier ones" if args.replay else ""
        epoch += (
            f"Objective {args.objective}. An epoch: {args.prompts_per_epoch} groups of "
            f"{args.images_per_prompt} images, {cost.labels} labels{again};\n"
            f"Evaluations of the network: {cost.rows_sampled:,} to sample, "
            f"{cost.rows_without_gradient:,} without and {cost.rows_with_gradient:,} with gradient "
            "to train.\n"
        )
    first = " ".join(model.prompts[0].split())
    beside = "" if cost.memory_known else " of weights; what training adds is not known here"
    strength = "" if args.evaluate else f"--loss {args.loss}.\n"
    if strength and args.loss in ("eq14", "eq12", "chain"):
        strength = (
            f"beta {args.beta:.3g} per nat of a step's log-ratio, a sum over {D:,} latent elements;"
            f"\nas {args.beta * D:.3g} for their mean, which the released code takes. "
        )
    return (
        f"{args.model} on {device}; {args.precision}; "
        f"LoRA rank {args.lora_rank}: {cost.lora_weights / 1e6:.2f} M weights.\n"
        f"Prompts of {args.prompts or args.labels}: {len(model.prompts)}, first: {first:.80}\n"
        f"{preset}{epoch}{strength}"
        f"Memory: about {cost.memory_gb:.1f} GB{beside}."
    )
