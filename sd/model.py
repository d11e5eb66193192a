"""A pipeline's network as the policy of d3po.py: epsilon, v and rectified flow alike.

A rectified flow, x_s = (1 - s) x_0 + s eps with v = eps - x_0, is an epsilon model in the
coordinate x = x_s / r with r^2 = (1 - s)^2 + s^2:

    sqrt(alpha_bar) = (1 - s) / r        sqrt(1 - alpha_bar) = s / r        eps = x_s + (1 - s) v

At eta = 0 DDIM's step there is Euler's step, and log-ratios are those of the flow's coordinates.
"""

import itertools
import os
from collections.abc import Callable
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    SchedulerMixin,
)
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import d3po
from sd import UserError, files
from sd.files import LORA_FILE
from sd.options import Settings
from sd.pipeline import (
    NETWORKS,
    Conditioning,
    as_ddim,
    decode,
    fuse_lora,
    load_pipeline,
    prediction_of,
)
from sd.seeds import RandomPurpose, seeded_generator

LORA_TARGETS = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"]  # App. E
STOCK_IMAGES = 16  # a stock call takes 50 steps, guided
# Latent elements of a pass without gradient: 16 rows of SD 1.5 at 512 pixels, whose activations
# take 1 GB in fp16, less than an update's; a CPU is as fast from 8 rows of the emoji model on
ELEMENTS_WITHOUT_GRADIENT = 2**18
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")
# Beyond these, float32 log-ratios lose their meaning
MIN_ALPHA_BAR = 1e-6
MIN_SIGMA, MAX_SIGMA = 0.005, 0.999  # of a flow


@contextmanager
def lora_off(network: nn.Module):
    """Inside, the network is the model before training."""
    network.disable_adapters()
    try:
        yield
    finally:
        network.enable_adapters()


def make_accelerator(precision: str, device: str = "auto") -> Accelerator:
    """On this device, by default the best one that there is.

    Settings of accelerate's own that would change the training do not count. Raises UserError for
    a launcher that shards the model, or whose processes would not find each other: each would take
    itself for the only one.
    """
    for name in SHARDED:
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise UserError(f"{name} is set, but a LoRA needs no sharding: launch with --multi_gpu")
    settings = {
        "mixed_precision": "fp16" if precision == "fp16" else "no",
        "dynamo_backend": "no",
        "kwargs_handlers": [
            AutocastKwargs(enabled=False),  # the LoRA's layers cast for themselves
            InitProcessGroupKwargs(timeout=timedelta(days=30)),  # people take their time
        ],
    }
    try:
        accelerator = Accelerator(cpu=device == "cpu", **settings)
    except ValueError as error:
        remedy = "on CPUs use torchrun and --device cpu, on GPUs accelerate launch"
        raise UserError(f"The processes do not find each other ({error}): {remedy}") from error
    accelerator.gradient_accumulation_steps = 1
    for name in WORLD_SIZES:
        size = os.environ.get(name, "1")
        if size not in ("1", str(accelerator.num_processes)):
            processes = f"this is 1 process of {accelerator.num_processes}"
            remedy = f"on CPUs use torchrun and --device cpu, else unset {name}"
            raise UserError(f"{name} is {size}, but {processes}: {remedy}")
    # On CUDA what is float32 beside fp16, such as SDXL's VAE, may be rounded like it; fp32 is exact
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    return accelerator


class LoraMatrix(nn.Linear):
    """One of a LoRA's: float32 for the optimizer, in the network's precision for a pass."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def add_lora(network: nn.Module, rank: int) -> None:
    """Give a network a LoRA, which is all of it that is trained."""
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS))
    cast_training_params(network, torch.float32)
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = False
            for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
                matrix.__class__ = LoraMatrix


class RunningAverage:
    """The average of weights after the epochs so far: less noise, and fewer bad places on the way.

    Epoch n enters with weight 10 / (n + 9) (Shamir & Zhang 2013), so it is about the last tenth of
    the epochs. enabled=False: the weights themselves.
    """

    def __init__(self, weights: list[Tensor], *, enabled: bool):
        self.weights, self.enabled = weights, enabled
        self.values = None  # before the first epoch

    def update(self, epoch: int) -> None:
        if self.enabled:
            own = [weight.detach() for weight in self.weights]
            mean = self.values or own
            pace = 10 / (epoch + 9)
            self.values = [m.lerp(w, pace) for m, w in zip(mean, own, strict=True)]

    @contextmanager
    def applied(self):
        """Inside, the model has the average; after it, the weights that are trained."""
        own = [weight.detach().clone() for weight in self.weights]
        set_weights(self.weights, self.values or own)
        try:
            yield
        finally:
            set_weights(self.weights, own)


@torch.no_grad()
def set_weights(weights: list[Tensor], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


class PipelinePolicy:
    """A pipeline's network as a denoiser of d3po.py: guided, both halves in one call, epsilon.

    x (B, *D), time (B,), cond (B,): numbers of prompts. Returns float32 (B, *D).
    alpha_bars: by model time. prediction: epsilon, v_prediction or flow.
    reference: the model before training, which is the same network with the LoRA off.
    on_call: called after each pass, for a progress bar.
    """

    def __init__(
        self,
        network: nn.Module,
        conditioning: Conditioning,
        guidance_scale: float,
        *,
        alpha_bars: Tensor,
        prediction: str,
        reference: bool = False,
        on_call: Callable = lambda: None,
    ):
        self.network, self.conditioning = network, conditioning
        self.guidance_scale, self.prediction = guidance_scale, prediction
        self.alpha_bars, self.reference, self.on_call = alpha_bars, reference, on_call
        self.is_applied = False

    @contextmanager
    def applied(self):
        """Inside, the network is this denoiser's: a switch takes longer than a layer, 27 ms."""
        if self.is_applied or not self.reference:
            yield
            return
        self.is_applied = True
        try:
            with lora_off(self.network):
                yield
        finally:
            self.is_applied = False

    def __call__(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        conditioning, halves = self.conditioning, self.conditioning.halves
        alpha_bar = self.alpha_bars[time].view(-1, *[1] * (x.ndim - 1))
        a, b = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        states = x
        if self.prediction == "flow":
            states, time = x / (a + b), 1000 * (b / (a + b)).flatten()
        states = states.to(conditioning.dtype).repeat(halves, *[1] * (x.ndim - 1))
        inputs = conditioning.batch(cond)
        inputs["timestep"] = (conditioning.time_unit * time).repeat(halves)
        with self.applied():
            output = self.network(states, **inputs)[0].float()
        self.on_call()
        if halves == 2:
            empty, prompted = output.chunk(2)
            output = empty + self.guidance_scale * (prompted - empty)
        if self.prediction == "v_prediction":  # v = a eps - b x_0 (arXiv 2202.00512)
            output = a * output + b * x
        if self.prediction == "flow":  # eps = x_s + (1 - s) v
            output = (x + a * output) / (a + b)
        return output


class Model(NamedTuple):
    """What a run trains. Made by `load_model`."""

    pipe: DiffusionPipeline
    stock_scheduler: SchedulerMixin  # that the pipeline came with
    network: nn.Module  # the pipeline's, with the LoRA
    conditioning: Conditioning
    policy: PipelinePolicy  # through accelerate's wrapper, which averages gradients of processes
    sampler: PipelinePolicy  # the same weights without the wrapper, for passes without gradient
    reference: PipelinePolicy  # the model before training
    schedule: d3po.Schedule
    prompts: list[str]
    eval_prompts: Tensor  # (E,) numbers of those that held-out noises have, in turn
    lora: list[Tensor]  # the weights that are trained

    def release(self) -> None:
        """Give the pipeline back as it came: without the LoRA, with its own scheduler."""
        self.network.unload_lora()
        self.network.requires_grad_(True)
        self.network.disable_gradient_checkpointing()
        self.pipe.scheduler = self.stock_scheduler
        self.pipe.set_progress_bar_config()
        self.conditioning.move_text_encoders(self.conditioning.device)

    def log_prob(self, denoiser: PipelinePolicy, batch: "Batch") -> Tensor:
        """Log-probs (T, B) that a denoiser gives to the actions of a batch, nats, no gradient."""
        size = self.images_without_gradient
        x, log_prob = (tensor.split(size, 1) for tensor in batch.trajectory)
        trajectories = map(d3po.Trajectory, x, log_prob)
        with denoiser.applied():
            parts = [
                d3po.trajectory_log_prob(denoiser, self.schedule, trajectory, cond)
                for trajectory, cond in zip(trajectories, batch.cond.split(size), strict=True)
            ]
        return torch.cat(parts, 1)

    @contextmanager
    def in_float32(self):
        """Inside, the network computes in float32, with the weights that its precision has."""
        conditioning, dtype = self.conditioning, self.conditioning.dtype
        tensors = itertools.chain(self.network.parameters(), self.network.buffers())
        rounded = [tensor for tensor in tensors if tensor.dtype == dtype]

        def change(to: torch.dtype) -> None:
            conditioning.dtype, conditioning.last_numbers = to, None
            for tensor in rounded:
                tensor.data = tensor.data.to(to)

        change(torch.float32)
        try:
            yield
        finally:
            change(dtype)

    @torch.no_grad()
    def rounding_kl(self, batch: "Batch", steps: int) -> float:
        """KL to the reference, nats, that rounding alone adds in half precision; 0 in float32.

            mean over the chains of sum over the first steps of |d - d'|^2 / (2 sigma^2)

        with d = mu - mu_ref as the run computes it, and d' the same weights in float32.
        """
        differences = self.mean_differences(batch, steps)
        with self.in_float32():
            exact = self.mean_differences(batch, steps)
        return (differences - exact).square().flatten(2).sum((0, 2)).mean().item() / 2

    def mean_differences(self, batch: "Batch", steps: int) -> Tensor:
        """(mu - mu_ref) / sigma at the states of a batch: (steps, B, *D)."""
        means = []
        for denoiser in (self.sampler, self.reference):
            with denoiser.applied():
                of_steps = [
                    d3po.policy_mean(denoiser, self.schedule, i, batch.trajectory.x[i], batch.cond)
                    / self.schedule.sigma[i]
                    for i in range(steps)
                ]
            means.append(torch.stack(of_steps))
        return means[0] - means[1]

    def save_lora(self, folder: Path) -> None:
        """Write the LoRA as pipe.load_lora_weights reads it."""
        lora = {name: weight.cpu() for name, weight in self.lora_state().items()}
        layers = {f"{NETWORKS[type(self.pipe)]}_lora_layers": lora}

        def write(part: Path) -> None:
            self.pipe.save_lora_weights(folder, weight_name=part.name, **layers)

        files.replace(folder / LORA_FILE, write)

    def lora_state(self) -> dict:
        """The LoRA's tensors by PEFT's names; they follow the training."""
        return get_peft_model_state_dict(self.network)

    def load_lora(self, lora: dict) -> None:
        """Load tensors by PEFT's names; ValueError where they are of other layers or ranks."""
        own = self.lora_state()
        if {name: own[name].shape for name in own} != {name: lora[name].shape for name in lora}:
            raise ValueError("its layers or their rank are not those of this run")
        set_peft_model_state_dict(self.network, lora)

    def read_lora(self, file: Path) -> None:
        """Load what `save_lora` wrote."""
        prefix = f"{NETWORKS[type(self.pipe)]}."
        lora = load_file(file)
        self.load_lora({name.removeprefix(prefix): lora[name] for name in lora})

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return tuple(self.conditioning.latents.shape[1:])

    @property
    def images_without_gradient(self) -> int:
        """How many images go through the network together where no gradient is wanted."""
        return max(1, ELEMENTS_WITHOUT_GRADIENT // self.conditioning.latents.numel())


def make_levels(pipe: DiffusionPipeline, args: Settings, prediction: str) -> tuple:
    """The schedule on the stock pipeline's own levels, and alpha-bar (N,) by model time."""
    if prediction == "flow":  # the sigmas of the recorded call have its shift
        sigmas = pipe.scheduler.sigmas.cpu().double().flip(0).clamp(MIN_SIGMA, MAX_SIGMA)
        alpha_bars, times = (1 - sigmas) ** 2 / ((1 - sigmas) ** 2 + sigmas**2), None
    else:
        alpha_bars = pipe.scheduler.alphas_cumprod.cpu()
        if alpha_bars.min() < MIN_ALPHA_BAR:  # zero terminal SNR
            floor = MIN_ALPHA_BAR * torch.linspace(2, 1, len(alpha_bars))
            alpha_bars = torch.maximum(alpha_bars, floor)
        times = pipe.scheduler.timesteps.cpu().clamp(min=1)  # a step from time 0 has no noise
    try:
        schedule = d3po.make_schedule(alpha_bars, args.num_steps, args.eta, times)
    except ValueError as error:
        flags = f"--num-steps {args.num_steps} --eta {args.eta}"
        raise UserError(f"{flags} cannot be sampled with: {error}") from error
    return schedule, alpha_bars.float()


def load_model(
    args: Settings,
    prompts: list[str],
    accelerator: Accelerator,
    *,
    numbered: list[str] | None = None,
    eval_prompts: list[str] | None = None,
    on_call: Callable = lambda: None,
) -> Model:
    """The pipeline of --model with a LoRA, as policy, sampler and reference.

    numbered: the prompts, which are sampled from, and after them others that have a number too.
    eval_prompts: of held-out noises; by default the prompts.

    Raises UserError for a model that cannot be trained.
    """
    pipe = load_pipeline(args.model, args.precision)
    prediction, stock_scheduler = prediction_of(pipe), pipe.scheduler
    if args.init_lora:
        if pipe is args.model:
            raise UserError("--init-lora goes with a model's name: fuse it into the pipeline")
        fuse_lora(pipe, args.init_lora)
    if prediction != "flow":
        pipe.scheduler = as_ddim(stock_scheduler)
        if type(stock_scheduler) is not DDIMScheduler or stock_scheduler.config.set_alpha_to_one:
            name = type(stock_scheduler).__name__
            accelerator.print(f"Scheduler: DDIM, set_alpha_to_one off, in place of its {name}.")
    pipe.to(accelerator.device)
    pipe.set_progress_bar_config(disable=True)
    with suppress(NotImplementedError):  # not all can
        pipe.vae.enable_slicing()
    call = {"num_inference_steps": args.num_steps, "guidance_scale": args.guidance_scale}
    size = {"height": args.height, "width": args.width}
    numbered = numbered or prompts
    conditioning = Conditioning(pipe, numbered, **call, **size)
    schedule, alpha_bars = make_levels(pipe, args, prediction)

    network = conditioning.network
    torch.manual_seed(args.seed)
    add_lora(network, args.lora_rank)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    as_policy = partial(
        PipelinePolicy,
        conditioning=conditioning,
        guidance_scale=args.guidance_scale,
        alpha_bars=alpha_bars.to(accelerator.device),
        prediction=prediction,
        on_call=on_call,
    )
    wrapped = accelerator.prepare(network)
    vars(network).pop("forward", None)  # accelerate's, whose output is float32, unlike stock's
    return Model(
        pipe=pipe,
        stock_scheduler=stock_scheduler,
        network=network,
        conditioning=conditioning,
        policy=as_policy(wrapped),
        sampler=as_policy(network),
        reference=as_policy(network, reference=True),
        schedule=schedule._replace(timesteps=schedule.timesteps.to(accelerator.device)),
        prompts=prompts,
        eval_prompts=torch.tensor([numbered.index(prompt) for prompt in eval_prompts or prompts]),
        lora=[p for p in network.parameters() if p.requires_grad],
    )


class Batch(NamedTuple):
    """Groups of K images, each group from one prompt and one x_T. Made by `sample`."""

    trajectory: d3po.Trajectory  # of N K chains; chain k of group n is number n K + k
    cond: Tensor  # (N K,) numbers of prompts
    prompts: list[str]  # N K
    images: list[Image.Image]  # N K
    images_per_prompt: int  # K
    files: list[str] = []  # N K names for the log, where a run keeps the images

    @property
    def groups(self) -> list[range]:
        """The chains of each group."""
        K = self.images_per_prompt
        return [range(first, first + K) for first in range(0, len(self.images), K)]

    def split(self, groups: int) -> list["Batch"]:
        """Batches of so many groups."""
        size = groups * self.images_per_prompt
        x, log_prob = (tensor.split(size, 1) for tensor in self.trajectory)
        return [
            self._replace(
                trajectory=d3po.Trajectory(x[n], log_prob[n]),
                cond=cond,
                prompts=self.prompts[n * size :][:size],
                images=self.images[n * size :][:size],
                files=self.files[n * size :][:size],
            )
            for n, cond in enumerate(self.cond.split(size))
        ]


def sample(
    model: Model,
    denoiser: PipelinePolicy,
    prompts: Tensor,
    *,
    images_per_prompt: int,
    generators: list[torch.Generator],
    trajectory: d3po.Trajectory | None = None,
) -> Batch:
    """K images from one x_T for each of the prompts, given by number (N,).   Alg. 1 lines 4-11.

    generators: one for each of the N K images, so that noise belongs to the image, whatever others
    are sampled with it; the first one of a group draws x_T too.
    trajectory: of these images, where they were sampled before.
    Raises UserError where an image is not finite.
    """
    K, size, device = images_per_prompt, model.images_without_gradient, model.network.device
    cond = prompts.repeat_interleave(K).to(device)
    if trajectory is None:
        x_T = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators[::K]])
        x_T = x_T.repeat_interleave(K, 0).to(device)
        starts = range(0, len(cond), size)
        with denoiser.applied():
            parts = [
                d3po.rollout(denoiser, model.schedule, x, numbers, generators[start : start + size])
                for start, x, numbers in zip(starts, x_T.split(size), cond.split(size), strict=True)
            ]
        trajectory = join_chains(parts)
    texts, images = [model.conditioning.prompts[number] for number in cond.tolist()], []
    for start, x_0 in zip(range(0, len(texts), size), trajectory.x[-1].split(size), strict=True):
        names = texts[start : start + size]
        images += decode(model.pipe, x_0, model.conditioning, names=names)
    return Batch(trajectory, cond, texts, images, images_per_prompt)


def join_chains(parts: list[d3po.Trajectory]) -> d3po.Trajectory:
    """The chains of several batches as one."""
    return d3po.Trajectory(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))


def sample_held_out(
    model: Model, denoiser: PipelinePolicy, args: Settings, *, purpose: RandomPurpose
) -> tuple[list[Image.Image], list[str], float | None]:
    """--eval-images images of the evaluation's prompts, in turn, whatever was trained.

    Noise belongs to the image: number n has the same, however many are sampled together. Returns
    images, prompts, and with --max-kl the KL to the initial model in the steps trained.
    """
    numbers = model.eval_prompts[torch.arange(args.eval_images) % len(model.eval_prompts)]
    noises = [seeded_generator(args.seed, purpose, n) for n in range(args.eval_images)]
    batch = sample(model, denoiser, numbers, images_per_prompt=1, generators=noises)
    if not args.max_kl or denoiser.reference:
        return batch.images, batch.prompts, None
    log_ratio = batch.trajectory.log_prob - model.log_prob(model.reference, batch)
    return batch.images, batch.prompts, log_ratio[: args.trained_steps].sum(0).mean().item()


def sample_stock(
    model: Model, denoiser: PipelinePolicy, args: Settings
) -> tuple[list[Image.Image], list[str]]:
    """Images as `pipe(prompt)` draws them: its own scheduler, steps and guidance.

    The first STOCK_IMAGES of --eval-images prompts, each from its own noise. Returns the prompts
    too.
    """
    pipe, own = model.pipe, model.pipe.scheduler
    N, size = min(args.eval_images, STOCK_IMAGES), {"height": args.height, "width": args.width}
    numbers = model.eval_prompts[torch.arange(N) % len(model.eval_prompts)].tolist()
    prompts = [model.conditioning.prompts[number] for number in numbers]
    images = []
    model.conditioning.move_text_encoders(model.network.device)
    pipe.scheduler = model.stock_scheduler
    try:
        with denoiser.applied():
            for part in torch.arange(N).split(model.images_without_gradient):
                noises = [
                    seeded_generator(args.seed, RandomPurpose.STOCK, n) for n in part.tolist()
                ]
                images += pipe([prompts[n] for n in part], generator=noises, **size).images
    finally:
        pipe.scheduler = own
        model.conditioning.move_text_encoders("cpu")
    return images, prompts
