"""A diffusers pipeline as the policy of d3po.py: load it with a LoRA, denoise, sample, decode."""

from argparse import Namespace
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from torch import Tensor

import d3po
from sd.run_folder import Stream, generator

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LORA_TARGETS = ["to_q", "to_k", "to_v"]  # App. E
LORA_FILE = "pytorch_lora_weights.safetensors"


@contextmanager
def lora_off(unet):
    """Inside, the UNet is the model before training."""
    unet.disable_adapters()
    try:
        yield
    finally:
        unet.enable_adapters()


def make_accelerator(precision: str) -> Accelerator:
    handlers = [
        AutocastKwargs(enabled=False),  # the LoRA's layers cast for themselves
        InitProcessGroupKwargs(timeout=timedelta(days=30)),  # people take their time
    ]
    mixed = "fp16" if precision == "fp16" else "no"
    return Accelerator(mixed_precision=mixed, kwargs_handlers=handlers)


class PipelinePolicy:
    """A pipeline's UNet as a denoiser of d3po.py: guided, both halves in one call; gives epsilon.

    x (B, 4, H, W), time (B,), cond (B, 2, L, C): embeddings of the empty prompt and of the prompt.
    Returns float32 (B, 4, H, W).
    guidance_scale: at 1 the empty prompt's half has no weight, and is left out.
    reference: the model before training, which is the same UNet with the LoRA off.
    on_call: called after each pass, for a progress bar.
    """

    def __init__(
        self,
        unet,
        pipe: StableDiffusionPipeline,
        guidance_scale: float,
        *,
        reference: bool = False,
        on_call: Callable = lambda: None,
    ):
        self.unet, self.dtype, self.guidance_scale = unet, pipe.unet.dtype, guidance_scale
        self.reference, self.on_call = reference, on_call
        self.v_prediction = pipe.scheduler.config.prediction_type == "v_prediction"
        self.alpha_bars = pipe.scheduler.alphas_cumprod.to(pipe.unet.device)

    def __call__(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        halves = 1 if self.guidance_scale == 1 else 2
        states = x.to(self.dtype).repeat(halves, 1, 1, 1)
        text = cond[:, -halves:].transpose(0, 1).flatten(0, 1)
        with lora_off(self.unet) if self.reference else nullcontext():
            output = self.unet(states, time.repeat(halves), text).sample.float()
        self.on_call()
        if halves == 2:
            empty, prompted = output.chunk(2)
            output = empty + self.guidance_scale * (prompted - empty)
        if self.v_prediction:  # v = sqrt(ab) eps - sqrt(1 - ab) x_0 (arXiv 2202.00512)
            ab = self.alpha_bars[time].view(-1, 1, 1, 1)
            output = ab.sqrt() * output + (1 - ab).sqrt() * x
        return output


class Model(NamedTuple):
    """What a run trains. Made by `load_model`."""

    pipe: StableDiffusionPipeline
    policy: PipelinePolicy  # through accelerate's wrapper, which averages gradients of processes
    sampler: PipelinePolicy  # the same weights without the wrapper, for passes without gradient
    reference: PipelinePolicy  # the model before training
    schedule: d3po.Schedule
    prompts: list[str]
    text: Tensor  # (prompts + 1, L, C), on the CPU; the last is the empty prompt's
    lora: list[Tensor]  # the weights that are trained

    def log_prob(self, denoiser: PipelinePolicy, batch: "Batch") -> Tensor:
        """Log-probs (T, B) that a denoiser gives to the actions of a batch, nats, no gradient."""
        return d3po.trajectory_log_prob(denoiser, self.schedule, batch.trajectory, batch.cond)

    def save_lora(self, folder: Path) -> dict:
        """Write the LoRA as pipe.load_lora_weights reads it; return its tensors by PEFT's names."""
        lora = get_peft_model_state_dict(self.pipe.unet)
        layers, part = convert_state_dict_to_diffusers(lora), f"{LORA_FILE}.part"
        self.pipe.save_lora_weights(folder, unet_lora_layers=layers, weight_name=part)
        (folder / part).replace(folder / LORA_FILE)
        return lora

    def load_lora(self, lora: dict) -> None:
        set_peft_model_state_dict(self.pipe.unet, lora)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        config = self.pipe.unet.config
        return config.in_channels, config.sample_size, config.sample_size


def load_pipeline(name: str, precision: str) -> StableDiffusionPipeline:
    """From the hub or a folder; ValueError, in a sentence, if it is no StableDiffusionPipeline."""
    try:
        kind = StableDiffusionPipeline.load_config(name)["_class_name"]
        if kind != "StableDiffusionPipeline":
            raise ValueError(f"it is a {kind}, and this script trains a StableDiffusionPipeline")
        options = {"safety_checker": None, "requires_safety_checker": False}
        return StableDiffusionPipeline.from_pretrained(name, dtype=DTYPES[precision], **options)
    except Exception as error:  # the hub's client raises many kinds
        remedy = "it needs network access; or give a folder"
        if Path(name).exists():
            remedy = "give another folder"
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--model {name} cannot be loaded: {remedy} ({reason})") from error


def load_model(
    args: Namespace,
    prompts: list[str],
    accelerator: Accelerator,
    *,
    on_call: Callable = lambda: None,
) -> Model:
    """The pipeline of --model with a new LoRA, as policy, sampler and reference.

    Raises ValueError, in a sentence for the user, for a model that cannot be trained.
    """
    pipe = load_pipeline(args.model, args.precision)
    old = pipe.scheduler
    pipe.scheduler = DDIMScheduler.from_config(old.config, set_alpha_to_one=False)
    if type(old) is not DDIMScheduler or old.config.set_alpha_to_one:
        name = type(old).__name__
        accelerator.print(f"Scheduler: DDIM, set_alpha_to_one off, in place of the model's {name}.")
    if pipe.scheduler.config.prediction_type == "sample":
        raise ValueError(f"--model {args.model} predicts x_0: give one that predicts epsilon or v")
    pipe.scheduler.set_timesteps(args.num_steps)
    times = pipe.scheduler.timesteps
    if times.min() < 1:  # a step from time 0 would have no noise
        times = None
    schedule = d3po.make_schedule(pipe.scheduler.alphas_cumprod, args.num_steps, args.eta, times)

    pipe.to(accelerator.device)
    pipe.vae.enable_slicing()
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False)
    torch.manual_seed(args.seed)
    lora = LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules=LORA_TARGETS)
    pipe.unet.add_adapter(lora)
    cast_training_params(pipe.unet, torch.float32)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    text = [
        pipe.encode_prompt(prompt, accelerator.device, 1, do_classifier_free_guidance=False)[
            0
        ].cpu()
        for prompt in [*prompts, ""]
    ]
    pipe.text_encoder.to("cpu")
    as_policy = partial(
        PipelinePolicy, pipe=pipe, guidance_scale=args.guidance_scale, on_call=on_call
    )
    return Model(
        pipe=pipe,
        policy=as_policy(accelerator.prepare(pipe.unet)),
        sampler=as_policy(pipe.unet),
        reference=as_policy(pipe.unet, reference=True),
        schedule=schedule,
        prompts=prompts,
        text=torch.cat(text),
        lora=[p for p in pipe.unet.parameters() if p.requires_grad],
    )


class Batch(NamedTuple):
    """Groups of K images, each group from one prompt and one x_T. Made by `sample`."""

    trajectory: d3po.Trajectory  # of N K chains; chain k of group n is number n K + k
    cond: Tensor  # (N K, 2, L, C)
    prompts: list[str]  # N K
    images: list[Image.Image]  # N K
    images_per_prompt: int  # K
    files: list[str] = []  # N K names for the log, where a run keeps the images

    @property
    def groups(self) -> list[range]:
        """The chains of each group."""
        K = self.images_per_prompt
        return [range(first, first + K) for first in range(0, len(self.images), K)]


def sample(
    model: Model,
    denoiser: PipelinePolicy,
    prompts: Tensor,
    *,
    images_per_prompt: int,
    generator: torch.Generator,
) -> Batch:
    """K images from one x_T for each of the prompts, given by number (N,).   Alg. 1 lines 4-11."""
    device = model.pipe.unet.device
    x_T = torch.randn(len(prompts), *model.latent_shape, generator=generator)
    numbers = prompts.repeat_interleave(images_per_prompt)
    empty = model.text[-1:].expand(len(numbers), -1, -1)
    cond = torch.stack([empty, model.text[numbers]], 1).to(device)
    x_T = x_T.repeat_interleave(images_per_prompt, 0).to(device)
    trajectory = d3po.rollout(denoiser, model.schedule, x_T, cond, generator)
    images = decode(model.pipe, trajectory.x[-1])
    texts = [model.prompts[n] for n in numbers]
    return Batch(trajectory, cond, texts, images, images_per_prompt)


def sample_held_out(
    model: Model, denoiser: PipelinePolicy, args: Namespace, *, stream: Stream
) -> tuple[list[Image.Image], list[str]]:
    """--eval-images images of fixed prompts, in turn, and noises, whatever was trained."""
    images, prompts = [], []
    size = args.batch_size * args.images_per_prompt
    for start in range(0, args.eval_images, size):
        numbers = torch.arange(start, min(start + size, args.eval_images)) % len(model.prompts)
        noise = generator(args.seed, stream, start)
        batch = sample(model, denoiser, numbers, images_per_prompt=1, generator=noise)
        images += batch.images
        prompts += batch.prompts
    return images, prompts


def decode(pipe: StableDiffusionPipeline, x_0: Tensor) -> list[Image.Image]:
    """The images of final states (B, 4, H, W)."""
    latents = x_0.to(pipe.vae.dtype) / pipe.vae.config.scaling_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pil")
