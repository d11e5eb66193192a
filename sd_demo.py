"""D3PO on Stable Diffusion: the losses of d3po.py, LoRA on the UNet, labels from a score of the images or from people.

    python sd_demo.py --objective compressibility              # SD 1.5 with a CUDA GPU, else the bundled emoji model
    python sd_demo.py --objective human                        # a page asks you which of two images is better
    accelerate launch sd_demo.py --objective compressibility   # several GPUs

`main` is Alg. 1: sample groups of images, each from one x_T (lines 3-11); label them (12-22, feedback.py); train on the
pairs (23-36, d3po.py). A run folder has config.json, metrics.jsonl, labels.jsonl, images/, figures, lora/ (for
pipe.load_lora_weights) and checkpoint/ (for --resume).
"""

import json
import math
import os
import re
import shlex
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, InitProcessGroupKwargs, broadcast_object_list, gather_object
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from tqdm import tqdm

import d3po
import feedback
from toy import plots, runs

EMOJI, SD15 = runs.ROOT / "toy" / "emoji_sd", "stable-diffusion-v1-5/stable-diffusion-v1-5"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# What measured best on the emoji model, where it differs from the flags' defaults
EMOJI_DEFAULTS = {
    "epochs": 24, "pairs_per_epoch": 4, "batch_size": 4, "images_per_prompt": 8, "num_steps": 10, "guidance_scale": 1.0,
    "lr": 1.5e-3, "beta": 0.06, "gradient_checkpointing": False, "eval_images": 90, "eval_every": 4,
    "watch": f"{EMOJI / 'classifier.py'}:recognised",
}  # fmt: skip
# Table 2 and Sec. 5.1 (4 GPUs, 2 batches of 10 pairs each), and what the released code adds; beta is 0.1 / D
PAPER_RECIPE = {
    "epochs": 400, "pairs_per_epoch": 80, "batch_size": 10, "images_per_prompt": 2, "num_steps": 20, "eta": 1.0,
    "guidance_scale": 5.0, "loss": "eq14", "beta": None, "clip": 0.1, "reference": "initial",
    "update_every": "trajectory", "lr": 3e-5, "weight_decay": 1e-4, "max_grad_norm": 1.0, "skip_last": 0,
}  # fmt: skip
TRAINING, STEPS, PROMPTS, HELD_OUT, EVALUATION = range(5)  # streams of random numbers, apart from each other
HELD = {False: 362, True: 90}  # by checkpointing: what autograd holds in SD 1.5's UNet, in maps of its first block
SHOWN, MAX_SKIPPED = 8, 10  # held-out images in the figures; updates in a row whose gradient overflowed
OF_ONE_START = {"out", "resume", "evaluate", "dry_run", "port"}  # flags that a run does not keep
POSITIVE = ("epochs", "pairs_per_epoch", "batch_size", "num_steps", "eta", "guidance_scale", "beta", "clip", "lr",
            "max_grad_norm", "lora_rank", "eval_images", "eval_every", "annotators")  # fmt: skip


# Command line

def parse(argv: list[str] | None) -> tuple[runs.Parser, Namespace]:
    parser = runs.Parser(prog="sd_demo.py", description=__doc__.splitlines()[0])
    parser.set_defaults(command=shlex.join(["python", "sd_demo.py", *(sys.argv[1:] if argv is None else argv)]))
    feedback.add_flags(parser)
    add = parser.add_argument_group("sampling").add_argument
    add("--model", help="hub id or folder of a StableDiffusionPipeline; SD 1.5 with CUDA, else the emoji model")
    add("--epochs", type=int, default=50)
    add("--pairs-per-epoch", type=int, default=8, help="groups of images, each of one prompt and one x_T")
    add("--images-per-prompt", type=int, default=4, metavar="K", help="size of a group: 2 for pairs; K(K-1)/2 labels")
    add("--batch-size", type=int, default=1, help="groups at a time on each device, and in an update")
    add("--num-steps", type=int, default=20, help="T, denoising steps")
    add("--eta", type=float, default=1.0, help="DDIM's noise scale, above 0 and at most 1")
    add("--guidance-scale", type=float, default=5.0, help="of classifier-free guidance")
    add = parser.add_argument_group("the method").add_argument
    add("--recipe", choices=["default", "paper"], default="default", help="paper: defaults of Table 2 and the release")
    add("--loss", choices=["eq14", "eq12", "chain"], default="eq14", help="Eq. 14, Eq. 12, or Eq. 5 on whole chains")
    add("--beta", type=float, default=0.05, help="strength of the KL, per nat of a summed log-prob")
    add("--clip", type=float, help="clamp pi_theta / pi_ref to 1 +- this")
    add("--reference", choices=["initial", "previous"], default="initial", help="initial model, or that which sampled")
    add("--skip-last", type=int, default=2, metavar="N", help="do not train the last N steps: they see a tiny sigma")
    add("--update-every", choices=["timestep", "trajectory"], default="timestep")
    add("--lr", type=float, default=3e-4, help="step size of AdamW at the start; it falls to 0 as a cosine")
    add("--weight-decay", type=float, default=1e-4)
    add("--max-grad-norm", type=float, default=1.0)
    add("--lora-rank", type=int, default=16)
    add = parser.add_argument_group("the machine").add_argument
    cuda = torch.cuda.is_available()
    add("--precision", choices=DTYPES, default="fp16" if cuda else "fp32", help="of all but the LoRA and log-probs")
    add("--gradient-checkpointing", action=BooleanOptionalAction, default=True, help="less memory, a third more time")
    add = parser.add_argument_group("the run").add_argument
    add("--eval-images", type=int, default=45, help="held-out noises, the prompts in turn")
    add("--eval-every", type=int, default=5, help="epochs from one look at them to the next")
    add("--seed", type=int, default=0, help="of everything")
    add("--out", type=Path, help="run folder, a new one; by default runs/OBJECTIVE-1, -2, ...")
    add("--resume", type=Path, metavar="RUN", help="go on with a run, from its last whole epoch")
    add("--evaluate", type=Path, metavar="RUN", help="tuned against initial model on noises that no training saw")
    add("--dry-run", action="store_true", help="check everything, print the plan, train nothing")
    args = parser.parse_args(argv)

    if folder := args.resume or args.evaluate:
        saved = runs.settings_of(parser, folder, vars(args).keys() - OF_ONE_START)
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        fixed = saved.keys() - {"epochs"} if args.resume else ("model", "lora_rank")
        if changed := [f"--{n.replace('_', '-')} {saved[n]}" for n in sorted(fixed) if getattr(args, n) != saved[n]]:
            parser.error(f"{folder} was started with {', '.join(changed)}: give the same, or a new run")
        args.out = folder
    else:
        model = args.model or (SD15 if cuda else str(EMOJI))
        parser.set_defaults(model=model, **(EMOJI_DEFAULTS if Path(model).resolve() == EMOJI else {}))
        parser.set_defaults(**({} if args.prompts == "animals" else {"watch": None}))  # its classifier knows no other
        parser.set_defaults(**feedback.PEOPLE.get(args.objective, {}))
        parser.set_defaults(**(PAPER_RECIPE if args.recipe == "paper" else {}))
        args = parser.parse_args(argv)
    runs.refuse_unless_positive(parser, args, *POSITIVE)
    refuse = [
        (not args.objective, "--objective: say what to learn, such as --objective compressibility"),
        (args.images_per_prompt < 2, f"--images-per-prompt {args.images_per_prompt}: a preference needs 2 or more"),
        (not 0 <= args.skip_last < args.num_steps, f"--skip-last {args.skip_last}: some of the --num-steps "
         f"{args.num_steps} must be left to train"),
        (args.clip and args.clip >= 1, f"--clip {args.clip}: give a number below 1"),
        (args.loss == "chain" and (args.clip or args.update_every == "timestep"),
         "--loss chain has one loss for a chain: give --update-every trajectory, and no --clip"),
        (args.precision == "fp16" and not cuda, "--precision fp16 needs a CUDA GPU: give fp32 or bf16"),
        (not 0 <= args.seed < 2**63, f"--seed {args.seed}: give a number from 0 to 2^63 - 1"),
        (args.out and not folder and args.out.exists(), f"--out {args.out} exists: give a new folder, or --resume it"),
    ]  # fmt: skip
    for message in (message for wrong, message in refuse if wrong):
        parser.error(message)
    return parser, args


# The pipeline as a policy

class Guided:
    """A UNet as the denoiser of d3po.py: guided, in one call for both halves; epsilon also where it predicts v.

    x (B, 4, H, W), time (B,), cond (B, 2, L, C): embeddings of the empty prompt and of the prompt. Returns float32.
    lora=False: the model before training, which is the same UNet with the LoRA off.
    """

    def __init__(self, unet, pipe: StableDiffusionPipeline, scale: float, tick=lambda: None, lora: bool = True):
        self.unet, self.dtype, self.scale, self.tick, self.lora = unet, pipe.unet.dtype, scale, tick, lora
        self.v_prediction = pipe.scheduler.config.prediction_type == "v_prediction"
        self.alpha_bars = pipe.scheduler.alphas_cumprod.to(pipe.unet.device)

    def __call__(self, x: Tensor, time: Tensor, cond: Tensor) -> Tensor:
        parts = 1 if self.scale == 1 else 2  # at scale 1 the empty prompt's half has no weight
        new = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if not torch.is_grad_enabled():  # the chains of a group start from one x_T: one pass is enough for all of them
            new[1:] = torch.stack([(v[1:] != v[:-1]).flatten(1).any(1) for v in (x, time[:, None], cond)]).any(0)
        states, text = x[new].to(self.dtype).repeat(parts, 1, 1, 1), cond[new, -parts:].transpose(0, 1).flatten(0, 1)
        if not self.lora:
            self.unet.disable_adapters()
        empty, *rest = self.unet(states, time[new].repeat(parts), text).sample.float().chunk(parts)
        if not self.lora:
            self.unet.enable_adapters()
        self.tick()
        out = (empty + self.scale * (rest[0] - empty) if rest else empty)[new.cumsum(0) - 1]
        if self.v_prediction:  # v = sqrt(ab) eps - sqrt(1 - ab) x_0 (arXiv 2202.00512)
            ab = self.alpha_bars[time].view(-1, 1, 1, 1)
            out = ab.sqrt() * out + (1 - ab).sqrt() * x
        return out


class Model(NamedTuple):
    pipe: StableDiffusionPipeline
    policy: Guided  # through accelerate's wrapper, which averages the gradients of several processes
    sampler: Guided  # the same weights without the wrapper, for passes without gradient
    initial: Guided  # the model before training
    schedule: d3po.Schedule
    prompts: list[str]
    text: Tensor  # (prompts + 1, L, C), on the CPU; the last is the empty prompt's


def load_pipeline(name: str, precision: str) -> StableDiffusionPipeline:
    """From the hub or a folder; ValueError, in a sentence for the user, where that is no StableDiffusionPipeline."""
    try:
        if (kind := StableDiffusionPipeline.load_config(name)["_class_name"]) != "StableDiffusionPipeline":
            raise ValueError(f"it is a {kind}, and this script trains a StableDiffusionPipeline")
        options = {"dtype": DTYPES[precision], "safety_checker": None, "requires_safety_checker": False}
        return StableDiffusionPipeline.from_pretrained(name, **options)
    except Exception as error:  # the hub's client raises many kinds
        remedy = "give another folder" if Path(name).exists() else "it needs network access; or give a folder"
        raise ValueError(f"--model {name} cannot be loaded: {remedy} ({str(error).partition(chr(10))[0]})") from error


def load_model(args: Namespace, accelerator: Accelerator, tick) -> Model:
    pipe = load_pipeline(args.model, args.precision)
    old, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    if type(old) is not DDIMScheduler or old.config.set_alpha_to_one:
        accelerator.print(f"Scheduler: DDIM with set_alpha_to_one off, in place of the model's {type(old).__name__}.")
    if pipe.scheduler.config.prediction_type == "sample":
        raise ValueError(f"--model {args.model} predicts x_0: give one that predicts epsilon or v")
    pipe.scheduler.set_timesteps(args.num_steps)
    times = times if (times := pipe.scheduler.timesteps).min() >= 1 else None  # a step from time 0 would have no noise
    schedule = d3po.make_schedule(pipe.scheduler.alphas_cumprod, args.num_steps, args.eta, times)

    pipe.to(accelerator.device)
    pipe.vae.enable_slicing()
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False)
    torch.manual_seed(args.seed)
    rank, targets = args.lora_rank, ["to_q", "to_k", "to_v"]  # App. E
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    cast_training_params(pipe.unet, torch.float32)
    if args.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    prompts = feedback.load_prompts(args.prompts)
    text = [pipe.encode_prompt(prompt, accelerator.device, 1, False)[0].cpu() for prompt in [*prompts, ""]]
    pipe.text_encoder.to("cpu")
    guided = partial(Guided, pipe=pipe, scale=args.guidance_scale, tick=tick)
    denoisers = guided(accelerator.prepare(pipe.unet)), guided(pipe.unet), guided(pipe.unet, lora=False)
    return Model(pipe, *denoisers, schedule, prompts, torch.cat(text))


# Alg. 1

class Batch(NamedTuple):
    chains: d3po.Trajectory  # of N K chains
    cond: Tensor  # (N K, 2, L, C)
    prompts: list[str]  # N K
    images: list  # N K, PIL's


def sample(model: Model, denoiser: Guided, args: Namespace, prompts: Tensor, K: int, *numbers: int) -> Batch:
    """K images from one x_T for each of the prompts, given by number (N,).   Paper: Alg. 1 lines 4-11."""
    vae, unet, noise = model.pipe.vae, model.pipe.unet, runs.generator(args.seed, *numbers)
    device, side = unet.device, unet.config.sample_size
    x_T = torch.randn(len(prompts), unet.config.in_channels, side, side, generator=noise)
    rows = prompts.repeat_interleave(K)
    cond = torch.stack([model.text[-1:].expand(len(rows), -1, -1), model.text[rows]], 1).to(device)
    chains = d3po.rollout(denoiser, model.schedule, x_T.repeat_interleave(K, 0).to(device), cond, noise)
    latents = chains.x[-1].to(vae.dtype) / vae.config.scaling_factor
    images = model.pipe.image_processor.postprocess(vae.decode(latents).sample, output_type="pil")
    return Batch(chains, cond, [model.prompts[n] for n in rows], images)


def train(model: Model, args: Namespace, accelerator: Accelerator, optimizer, batch: Batch, pairs: Tensor,
          ref_log_prob: Tensor, steps: list[int]) -> list[tuple[float, bool | None]]:
    """Alg. 1 lines 24-35 on one batch. Returns each loss, and whether its update was skipped (None: there was none).

    Gradients are those of the mean over the pairs of all processes; one without pairs takes part with weight 0.
    """
    total = accelerator.reduce(torch.tensor(float(len(pairs)), device=accelerator.device))
    if total == 0:
        return []
    weight = len(pairs) * accelerator.num_processes / total.item()
    pairs = pairs if len(pairs) else pairs.new_zeros(1, 2)
    steps, chain = [0] if args.loss == "eq12" else steps, args.loss == "chain"
    given = model.policy, model.schedule, batch.chains, pairs, args.beta, ref_log_prob, batch.cond, steps
    losses = d3po.chain_dpo_losses(*given) if chain else d3po.d3po_losses(*given, args.clip)
    weights, told = [p for p in model.pipe.unet.parameters() if p.requires_grad], []
    for k, loss in enumerate(losses):
        accelerator.backward(weight * loss)
        skipped = None
        if args.update_every == "timestep" or k == len(steps) - 1:
            norm = accelerator.clip_grad_norm_(weights, args.max_grad_norm)
            if finite := accelerator.scaler is not None or norm.isfinite().item():
                optimizer.step()  # a GradScaler looks at the gradient itself
            skipped = not finite or optimizer.step_was_skipped
            optimizer.zero_grad()
        told.append(((len(steps) if chain else 1) * weight * loss.item(), skipped))  # a chain's loss comes in pieces
    return told


# What a run leaves, and what it says

def held_out(model: Model, denoiser: Guided, args: Namespace, judge, stream: int, epoch: int | None = None):
    """A look at images of fixed prompts and noises, whatever was trained; some are kept where an epoch is given."""
    size, images, prompts = args.batch_size * args.images_per_prompt, [], []
    for start in range(0, args.eval_images, size):
        numbers = torch.arange(start, min(start + size, args.eval_images)) % len(model.prompts)
        batch = sample(model, denoiser, args, numbers, 1, stream, start)
        images, prompts = images + batch.images, prompts + batch.prompts
    for n, image in enumerate(images[: SHOWN if epoch is not None else 0]):
        image.save(args.out / f"images/held_out_e{epoch:03}_{n}.png")
    return judge.look(images, prompts)


def evaluate(model: Model, args: Namespace, judge: feedback.Judge, done: int) -> None:
    before, after = (held_out(model, d, args, judge, EVALUATION) for d in (model.initial, model.sampler))
    found = feedback.blind_test(args, judge, after, before, done) if judge.asks else feedback.versus(after, before)
    runs.save_json(args.out / "evaluation.json", result := {"objective": args.objective, **found})
    print(json.dumps(result, indent=2))
    print(plots.draw_pairs(before.images, after.images, args.out / "evaluation.png"))


def open_folder(parser: runs.Parser, args: Namespace, accelerator: Accelerator, model: Model, optimizer) -> int:
    """Make the run folder, or go back to the last checkpoint of the one to resume; return the epochs already done."""
    epoch, keeps = 0, accelerator.is_main_process and not args.evaluate
    if keeps and not args.resume:
        name = re.sub(r"\W+", "-", Path(args.objective).name)
        args.out = args.out or next(p for n in range(1, sys.maxsize) if not (p := Path(f"runs/{name}-{n}")).exists())
        runs.open_run(parser, vars(args))
    for name in ("images", "lora", "checkpoint") if keeps else ():
        (args.out / name).mkdir(exist_ok=True)  # also on --resume: a kill may have come before
    (args.out,) = broadcast_object_list([args.out])
    if (file := args.out / "checkpoint" / "state.pt").exists():
        state = torch.load(file, map_location=accelerator.device)
        set_peft_model_state_dict(model.pipe.unet, state["lora"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        epoch = state["epoch"]
    if keeps:
        for name in ("metrics.jsonl", *(() if args.objective in feedback.PEOPLE else ("labels.jsonl",))):
            runs.keep_rows(args.out / name, lambda row: row["epoch"] <= epoch)  # drops an epoch that was not finished
    return epoch


def save(model: Model, args: Namespace, accelerator: Accelerator, optimizer, epoch: int) -> None:
    """checkpoint/ for --resume and lora/ for pipe.load_lora_weights: each file is the old one or the new one."""
    lora = get_peft_model_state_dict(model.pipe.unet)
    state = {"epoch": epoch, "lora": lora, "optimizer": optimizer.state_dict()}
    state["scaler"] = accelerator.scaler and accelerator.scaler.state_dict()
    part, name = args.out / "checkpoint", "pytorch_lora_weights.safetensors"
    StableDiffusionPipeline.save_lora_weights(part, unet_lora_layers=convert_state_dict_to_diffusers(lora))
    os.replace(part / name, args.out / "lora" / name)
    title = f"LoRA for {args.model}, objective {args.objective}, {epoch} epochs of D3PO (arXiv 2311.13231)"
    card = f"# {title}\n\n    {args.command}\n\nUse: `pipe.load_lora_weights('lora')`.\n\n![](reward_curve.png)\n"
    runs.save_text(args.out / "README.md", card + "![](before_after.png)\n")
    runs.save_tensors(args.out / "checkpoint" / "state.pt", state)


def plan(model: Model, args: Namespace, processes: int) -> tuple[str, int, int]:
    """What a run costs and what beta means, in words; UNet calls an epoch, and a look. Sets the paper's beta."""
    unet, config, K, T = model.pipe.unet, model.pipe.unet.config, args.images_per_prompt, args.num_steps
    if (groups := args.pairs_per_epoch) % (across := args.batch_size * processes):
        raise ValueError(f"--pairs-per-epoch {groups}: give a multiple of {across}, as many as are trained on together")
    D = config.in_channels * config.sample_size**2
    args.beta = 0.1 / D if args.beta is None else args.beta
    trained = 1 if args.loss == "eq12" else T - args.skip_last
    passes = [T] * (args.reference == "initial") + [trained] * (args.loss == "chain")  # without gradient, their steps
    calls = groups // across * (T + sum(passes) + trained) + T * (1 if args.reference == "initial" else 2)
    lora = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    weights = sum(p.numel() * p.element_size() for part in (unet, model.pipe.vae) for p in part.parameters())
    rows = (1 if args.guidance_scale == 1 else 2) * groups * K  # of an epoch's batches
    sampled, without = (rows * sum(n) - (rows - rows // K) * len(n) for n in ([T], passes))  # a group's first is one
    first_map = config.sample_size**2 * config.block_out_channels[0] * unet.dtype.itemsize
    memory = weights + 12 * lora + HELD[args.gradient_checkpointing] * first_map * args.batch_size * rows // groups
    labels = groups if args.objective == "tags" else groups * K * (K - 1) // 2
    here = unet.device if unet.device.type == "cuda" else f"{unet.device}, as there is no CUDA GPU"
    said = f"""{args.model} on {here}; {args.precision}; LoRA rank {args.lora_rank}: {lora / 1e6:.2f} M weights.
Objective {args.objective}. An epoch: {groups} groups of {K} images, {labels} labels;
UNet evaluations: {sampled:,} to sample, {without:,} without and {rows * trained:,} with gradient to train.
beta {args.beta:.3g} per nat of a step's log-ratio, a sum over {D:,} latent elements; as {args.beta * D:.3g}
for their mean, which the released code takes. Memory: about {memory / 1e9:.1f} GB."""
    return said, calls, math.ceil(args.eval_images / (args.batch_size * K)) * T


def main(argv: list[str] | None = None) -> None:
    parser, args = parse(argv)
    # The LoRA's layers cast for themselves, and processes wait for a person as long as it takes
    handlers = [AutocastKwargs(enabled=False), InitProcessGroupKwargs(timeout=timedelta(days=30))]
    accelerator = Accelerator(mixed_precision="fp16" if args.precision == "fp16" else "no", kwargs_handlers=handlers)
    bar = tqdm(unit=" UNet calls", mininterval=0.5, delay=0.1, disable=args.dry_run or not accelerator.is_main_process)
    try:
        model = load_model(args, accelerator, bar.update)
        judge = feedback.Judge(args, model.prompts, accelerator.device)
        said, calls, look = plan(model, args, accelerator.num_processes)
    except ValueError as error:
        parser.error(str(error))
    accelerator.print(said)
    if args.dry_run:
        return
    weights = [p for p in model.pipe.unet.parameters() if p.requires_grad]
    optimizer = accelerator.prepare(torch.optim.AdamW(weights, args.lr, weight_decay=args.weight_decay))
    done = open_folder(parser, args, accelerator, model, optimizer)
    looks = {args.epochs, *range(0, args.epochs, args.eval_every)} - set(range(1, done + 1))
    bar.total = 2 * look if args.evaluate else calls * (args.epochs - done) + look * len(looks)
    try:
        if not args.evaluate:
            learn(model, args, accelerator, optimizer, judge, bar, done)
        elif accelerator.is_main_process:
            evaluate(model, args, judge, done)
    except KeyboardInterrupt:
        sys.exit(f"Stopped. Go on with: python sd_demo.py --resume {args.out}")
    except (feedback.ScorerError, feedback.LabelError, FloatingPointError) as error:
        sys.exit(f"{error}. The run stops; {args.out} keeps the model of the last good epoch.")


def learn(model: Model, args: Namespace, accelerator: Accelerator, optimizer, judge, bar: tqdm, done: int) -> None:
    """The main loop of Alg. 1, from the epoch after `done`."""
    chief, size, K, streak = accelerator.is_main_process, args.batch_size, args.images_per_prompt, 0
    used = slice(args.num_steps - args.skip_last)  # steps

    def under(denoiser, batch):
        return d3po.trajectory_log_prob(denoiser, model.schedule, batch.chains, batch.cond)

    if chief:
        base = held_out(model, model.initial, args, judge, HELD_OUT, 0)
        config = json.loads((args.out / "config.json").read_text())
        config["epochs"], config["initial"] = args.epochs, {"eval_score": base.score, "watched": base.watched}
        runs.save_json(args.out / "config.json", config)

    for epoch in range(done + 1, args.epochs + 1):  # Alg. 1 line 2
        began, batches, rows = time.perf_counter(), [], []
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(math.pi * (epoch - 1) / args.epochs)) / 2
        chance = runs.generator(args.seed, PROMPTS, epoch)
        numbers = torch.randint(len(model.prompts), (args.pairs_per_epoch,), generator=chance)
        for first in range(accelerator.process_index * size, len(numbers), accelerator.num_processes * size):  # line 3
            batch = sample(model, model.sampler, args, numbers[first : first + size], K, TRAINING, epoch, first)
            files = [f"images/e{epoch:03}_p{first + n // K:02}_k{n % K}.png" for n in range(size * K)]
            for image, file in zip(batch.images, files, strict=True):
                judge.keep(image, args.out / file)
            rows += judge.label(batch.images, batch.prompts, files, K, epoch)
            batches.append((batch, files))
        rows, sampled = gather_object(rows), time.perf_counter()
        (rows,) = broadcast_object_list([judge.settle(rows) if chief else None])  # lines 12-22
        labelled, told, refs = time.perf_counter(), [], []

        for n, (batch, files) in enumerate(batches):  # lines 23-36
            refs.append(batch.chains.log_prob if args.reference == "previous" else under(model.initial, batch))
            order = torch.randperm(used.stop, generator=runs.generator(args.seed, STEPS, epoch, n)).tolist()
            told += train(model, args, accelerator, optimizer, batch, feedback.pairs_of(rows, files), refs[n], order)
        for skipped in (skipped for _, skipped in told if skipped is not None):
            streak = streak + 1 if skipped or streak >= MAX_SKIPPED else 0
        if streak >= MAX_SKIPPED or not all(p.isfinite().all() for p in model.pipe.unet.parameters()):
            raise FloatingPointError(f"Epoch {epoch}: gradients or weights are not finite any more; lower --lr (now "
                                     f"{args.lr:g}) or take --precision bf16")  # fmt: skip
        losses, trained = gather_object([loss for loss, _ in told]), time.perf_counter()
        if chief:
            (batch, files), ref = batches[0], refs[0]  # what training did to one batch stands for the epoch
            after = under(model.sampler, batch)
            first = ref if args.reference == "initial" else under(model.initial, batch)
            look = epoch % args.eval_every == 0 or epoch == args.epochs
            now = held_out(model, model.sampler, args, judge, HELD_OUT, epoch) if look else None
            row = {
                "epoch": epoch, "labels": epoch * len(rows), **feedback.mean_score(rows),
                **feedback.eval_row(now, base),
                **feedback.agreement((after - ref)[used].sum(0), feedback.pairs_of(rows, files), args.beta),
                **feedback.kl(batch.chains.log_prob - first, used),
                "loss": sum(losses) / len(losses) if losses else None, "skipped": [s for _, s in told].count(True),
                "seconds_sample": sampled - began, "seconds_train": trained - labelled,
                "peak_memory_mb": runs.peak_memory_mb(),
            }  # fmt: skip
            runs.append(args.out / "metrics.jsonl", [row])
            bar.write(feedback.tell(row, args.epochs, config["initial"]))
            plots.draw_curves(args.out)
            save(model, args, accelerator, optimizer, epoch)
            judge.status(f"Sampling, epoch {epoch + 1}")
        accelerator.wait_for_everyone()
    judge.close()


if __name__ == "__main__":
    main()
