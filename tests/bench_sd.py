"""What sd_demo.py costs, beside whole-chain DPO and the authors' released code: python tests/bench_sd.py

The bundled emoji model is timed and counted. SD 1.5's architecture, 512x512, fp16, one pair, has random weights; on a
CUDA GPU of 24 GB or more it is timed as well. Elsewhere its bytes, operations and UNet rows are counted on tensors
without data (torch's meta device), passes with data on small latents check the count, and a small epoch of sd_demo.py
runs.

All sides train one LoRA on the same chains and pairs; tests/test_bench_sd.py compares their gradients. The released
structure, from its description: policy and reference apart and each chain alone, pair after pair; the reference is a
second UNet. Its clamp and mean over elements, which cost nothing, are left out. The sides of a race run in turn, and a
ratio is that of neighbours in time. Nothing else may run meanwhile. Writes --out, and beside it the tables (.md) and
memory against T (.png); what other machines wrote into --out stays.
"""

import copy
import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import weakref
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import diffusers
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.training_utils import cast_training_params
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: this file is run as a script

import d3po
import feedback
import sd_demo
from toy import plots, runs
from toy.emoji_sd import models

SD15_UNET = {"cross_attention_dim": 768, "attention_head_dim": 8, "block_out_channels": (320, 640, 1280, 1280)}
SD15_VAE = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
LATENTS, SMALL = 64, 16  # latents of 512x512 pixels, and of the real passes of SD 1.5 on a CPU
LENGTHS = (2, 4, 8)  # T of the curves
CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FORMULAS = flop_registry | {  # of torch's FlopCounterMode, and what it lacks
    CPU_FLASH: shape_wrapper(lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)),
}  # fmt: skip
HERE, RELEASED, AUTOGRAD = "here, previous", "released structure, pair after pair", "whole chain by autograd"
PIECES, FILLED = "whole chain in pieces", "here, previous, a full GPU"
BATCHED = "released structure, batches like ours"
STOCK = "sampling, stock pipeline with the LoRA", "sampling, stock pipeline, no LoRA"
IDLE = "with a UNet that does nothing"
CURVES = HERE, f"{HERE}, checkpointed", PIECES, AUTOGRAD
GROUP = "K = 7, 3 tagged: "
SEVENS = f"{GROUP}released, the 12 pairs", f"{GROUP}released, all 21 pairs"
ONE_PAIR = "--model", "SD 1.5, random weights", "--images-per-prompt", "2", "--batch-size", "1"
HEADS = ("", "ms", "here / this", "UNet rows", "GFLOP", "share of rate", "held, GB", "peak, GB")
UNKNOWN, BUSY = "not measured yet", 0.6  # load: one core in use for a minute says 0.63
EXPLAINED = """For each pair and step: median (least to most) of the rounds, three times as many for
sampling; time of the first row of its kind / time of this one; rows of UNet batches (a guided chain has two) without
gradient / with gradient / run again by checkpointing / backward; operations, and their share of the rate of a large
matrix product. Held: the most that autograd keeps beside the weights; peak: all tensors, weights included. Without
gradient, the first of the T steps runs once for the chains of a group: T = 10 for the emoji model, 2 for SD 1.5."""
NOTES = {
    "rate": "FLOP/s of a large matrix product",
    "planned": "GB that sd_demo.py plans for a pair, without and with checkpointing",
    "small": "GB beyond the weights on small latents, without and with checkpointing",
    "pairs_that_fill": "pairs in the batch that fills the GPU", "curves": "peak of one pair",
    "epoch": "an epoch of sd_demo.py",
}  # fmt: skip


# SD 1.5's architecture

class Landing(torch.autograd.Function):
    """Zeros for a tensor without data, and gradients without data for real ones."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros(x.shape)

    @staticmethod
    def backward(ctx, gradient):
        return torch.empty_like(gradient, device="meta")


class Weightless(UNet2DConditionModel):
    """A UNet on the meta device that takes and gives real tensors: all of sd_demo.py runs, nothing is computed."""

    device = torch.device("cpu")  # where others shall put its inputs

    def to(self, *_, **__):
        return self

    def forward(self, sample, timestep, encoder_hidden_states, **_):
        inputs = sample.to("meta", self.dtype), timestep.to("meta"), encoder_hidden_states.to("meta", self.dtype)
        return UNet2DConditionOutput(sample=Landing.apply(super().forward(*inputs).sample.float()))


class WeightlessVAE(AutoencoderKL):
    """The same for the decoder."""

    def to(self, *_, **__):
        return self

    def decode(self, z):
        return DecoderOutput(sample=Landing.apply(super().decode(z.to("meta", self.dtype)).sample.float()))


def sd15(size: int, dtype: torch.dtype, weightless: bool) -> StableDiffusionPipeline:
    """SD 1.5 with random weights, one layer of its text encoder, and the emoji model's tokenizer."""
    words, width = models.tokenizer(), SD15_UNET["cross_attention_dim"]
    special = {f"{kind}_token_id": getattr(words, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=width, projection_dim=width, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=77, **special,
    )  # fmt: skip
    device = "meta" if weightless else "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        unet = (Weightless if weightless else UNet2DConditionModel)(sample_size=size, **SD15_UNET)
        vae = (WeightlessVAE if weightless else AutoencoderKL)(**SD15_VAE)
    pipe = models.pipeline(vae, CLIPTextModel(text), unet)
    pipe.tokenizer.model_max_length = 77
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        torch.nn.Module.to(part, dtype)
    return pipe


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *_, **__) -> Tensor:
    """The kernel that a GPU would choose; on the meta device torch would choose to hold every attention matrix."""
    return CPU_FLASH(q, k, v)[0]


@contextmanager
def random_sd15(size: int, weightless: bool = False):
    """Here every pipeline that sd_demo.py loads is SD 1.5 with random weights, or with none, then in fp16."""
    def load(name, precision):
        return sd15(size, torch.float16 if weightless else sd_demo.DTYPES[precision], weightless)

    attention = flash_attention if weightless else F.scaled_dot_product_attention
    with mock.patch.object(sd_demo, "load_pipeline", load):
        with mock.patch.object(F, "scaled_dot_product_attention", attention):
            yield


# The sides

class Setup:
    """A model ready to train, as sd_demo.py loads it."""

    def __init__(self, *flags: str):
        fixed = "--objective compressibility --guidance-scale 5 --max-grad-norm 1e9".split()
        _, self.args = sd_demo.parse([*fixed, *flags])
        half = "fp16" if self.args.precision == "fp16" else "no"
        self.accelerator = Accelerator(mixed_precision=half, kwargs_handlers=[AutocastKwargs(enabled=False)])
        self.model = sd_demo.load_model(self.args, self.accelerator, lambda: None)
        self.unet = self.model.pipe.unet
        self.weights = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(self.weights, 1e-6))
        for weight in self.weights:
            weight.grad = torch.zeros_like(weight)
        self.optimizer.optimizer.step()  # Adam's moments are there before anything is counted
        self.optimizer.zero_grad()
        self.device = self.weights[0].device.type
        if self.device == "meta":
            self.accelerator.clip_grad_norm_ = lambda *_: torch.ones(())  # its norm has no value

    def plain(self) -> StableDiffusionPipeline:
        pipe = sd_demo.load_pipeline(self.args.model, self.args.precision).to(self.accelerator.device)
        pipe.scheduler = self.model.pipe.scheduler
        pipe.unet.requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def stock(self) -> StableDiffusionPipeline:
        """A pipeline that nobody has touched; its UNet is the second one of the released structure."""
        return self.plain()

    @cached_property
    def stock_with_lora(self) -> StableDiffusionPipeline:
        pipe = self.plain()
        pipe.unet.add_adapter(self.unet.peft_config["default"])
        cast_training_params(pipe.unet, torch.float32)
        return pipe


class Bench:
    """Chains of `groups` groups of K, `tagged` of each group marked as bad, and all that is timed on them."""

    def __init__(self, setup: Setup, groups: int, T: int, K: int = 2, tagged: int = 1):
        model, size, device = setup.model, setup.unet.config.sample_size, setup.accelerator.device
        self.setup, self.steps = setup, list(range(T))
        self.model = model._replace(schedule=d3po.make_schedule(model.pipe.scheduler.alphas_cumprod, T))
        self.pairs = d3po.pairs_from_tags(torch.arange(K).expand(groups, K) < tagged).to(device)
        self.combinations = torch.tensor(list(combinations(range(K), 2)), device=device)
        self.prompts = torch.arange(groups) % len(model.prompts)
        rows = self.prompts.repeat_interleave(K)
        self.x_T = torch.randn(groups, 4, size, size).repeat_interleave(K, 0).to(device)
        self.cond = torch.stack([model.text[-1:].expand(len(rows), -1, -1), model.text[rows]], 1).to(device)
        self.batch = sd_demo.Batch(self.sample(), self.cond, [], [])

    def sample(self) -> d3po.Trajectory:
        return d3po.rollout(self.model.sampler, self.model.schedule, self.x_T, self.cond)

    def sample_and_score(self) -> None:
        K = len(self.x_T) // len(self.prompts)
        for image in sd_demo.sample(self.model, self.model.sampler, self.setup.args, self.prompts, K, 0).images:
            feedback.jpeg_kb(image)

    def stock(self, lora: bool) -> None:
        pipe = self.setup.stock_with_lora if lora else self.setup.stock
        pipe(
            prompt_embeds=self.cond[:, 1], negative_prompt_embeds=self.cond[:, 0], latents=self.x_T.to(pipe.unet.dtype),
            eta=1.0, num_inference_steps=len(self.steps), guidance_scale=self.setup.args.guidance_scale,
            output_type="latent",
        )  # fmt: skip

    def ours(self, reference: str = "previous", loss: str = "eq14") -> None:
        model, chains, setup = self.model, self.batch.chains, self.setup
        ref = chains.log_prob
        if reference == "initial":
            ref = d3po.trajectory_log_prob(model.initial, model.schedule, chains, self.cond)
        args = vars(setup.args) | {"loss": loss, "update_every": "trajectory" if loss == "chain" else "timestep"}
        given = setup.accelerator, setup.optimizer, self.batch, self.pairs, ref, self.steps
        sd_demo.train(model, Namespace(**args), *given)

    def log_prob(self, denoiser: d3po.Denoiser, i: int, chains: Tensor) -> Tensor:
        x, schedule = self.batch.chains.x, self.model.schedule
        mean = d3po.policy_mean(denoiser, schedule, i, x[i, chains], self.cond[chains])
        return d3po.log_prob(x[i + 1, chains], mean, schedule.sigma[i])

    def update(self) -> None:
        self.setup.accelerator.clip_grad_norm_(self.setup.weights, self.setup.args.max_grad_norm)
        self.setup.optimizer.step()
        self.setup.optimizer.zero_grad()

    def by_autograd(self) -> None:
        """Eq. 5 as it stands: the graphs of all steps at once."""
        every, ref = torch.arange(len(self.x_T)), self.batch.chains.log_prob
        ratio = sum(self.log_prob(self.model.policy, i, every) - ref[i] for i in self.steps)
        loss = d3po.d3po_loss(*ratio[self.pairs.T], self.setup.args.beta).mean()
        self.setup.accelerator.backward(loss)
        self.update()

    def released(self, pairs: Tensor, size: int = 1) -> None:
        """Four forwards a step for `size` pairs, from the description of the released code; an update after T steps."""
        reference = sd_demo.Guided(self.setup.stock.unet, self.model.pipe, self.setup.args.guidance_scale)
        for some in pairs.split(size):
            for i in torch.randperm(len(self.steps)).tolist():
                ratios = []
                for chains in some.T:  # the winners, the losers
                    log_prob = self.log_prob(self.model.policy, i, chains)
                    with torch.no_grad():
                        ref_log_prob = self.log_prob(reference, i, chains)
                    ratios.append(log_prob - ref_log_prob)
                self.setup.accelerator.backward(d3po.d3po_loss(*ratios, self.setup.args.beta).mean())
            self.update()


class Side(NamedTuple):
    name: str
    bench: Bench
    run: Callable[[], object]
    checkpointing: bool = False
    second: bool = False  # keeps another UNet in memory
    around: Callable = nullcontext

    @property
    def work(self) -> int:
        return len(self.bench.pairs) * len(self.bench.steps)

    @contextmanager
    def ready(self):
        unet = self.bench.setup.unet
        (unet.enable_gradient_checkpointing if self.checkpointing else unet.disable_gradient_checkpointing)()
        with self.around():
            yield


def training(bench: Bench) -> list[Side]:
    sides = []
    for name, run in ((HERE, bench.ours), ("here, initial", partial(bench.ours, "initial")),
                      (PIECES, partial(bench.ours, loss="chain"))):  # fmt: skip
        sides += [Side(name, bench, run), Side(f"{name}, checkpointed", bench, run, checkpointing=True)]
    sides.append(Side(AUTOGRAD, bench, bench.by_autograd))
    sides.append(Side(RELEASED, bench, partial(bench.released, bench.pairs), second=True))
    if (pairs := len(bench.pairs)) > 1:
        run = partial(bench.released, bench.pairs, pairs)
        sides.append(Side(BATCHED, bench, run, second=True))
    return sides


def of_seven(setup: Setup, T: int) -> list[Side]:
    bench = Bench(setup, 1, T, K=7, tagged=3)
    return [
        Side(f"{GROUP}here", bench, bench.ours),
        Side(f"{GROUP}here, checkpointed", bench, bench.ours, checkpointing=True),
        Side(SEVENS[0], bench, partial(bench.released, bench.pairs), second=True),
        Side(SEVENS[1], bench, partial(bench.released, bench.combinations), second=True),
    ]


def sampling(bench: Bench) -> list[Side]:
    return [
        Side("sampling, here", bench, bench.sample),
        Side(STOCK[0], bench, partial(bench.stock, True)),
        Side(STOCK[1], bench, partial(bench.stock, False)),
        Side(f"sampling, here, T = {len(bench.steps)}, decoding and JPEG too", bench, bench.sample_and_score),
    ]


@contextmanager
def channels_last(unet):
    unet.to(memory_format=torch.channels_last)
    yield
    unet.to(memory_format=torch.contiguous_format)


def nothing(unet, sample, *_, return_dict=True, **__):
    """A UNet's forward: what is left of the time is spent around it."""
    return UNet2DConditionOutput(sample=sample) if return_dict else (sample,)


def compiled(bench: Bench) -> Bench:
    changed, setup = copy.copy(bench), bench.setup
    policy = sd_demo.Guided(torch.compile(setup.unet), setup.model.pipe, setup.args.guidance_scale)
    changed.model = bench.model._replace(policy=policy, sampler=policy)
    return changed


def levers(bench: Bench, others: dict[str, Bench]) -> list[list[Side]]:
    """Races of training and of sampling as they are against the same with one thing changed."""
    around = {"channels_last": partial(channels_last, bench.setup.unet)}
    if bench.setup.device == "cuda":
        around["cudnn.benchmark"] = partial(torch.backends.cudnn.flags, enabled=True, benchmark=True)
        around["attention: efficient"] = partial(sdpa_kernel, SDPBackend.EFFICIENT_ATTENTION)
    else:
        around["attention: math"] = partial(sdpa_kernel, SDPBackend.MATH)
    races = []
    for what, run in (("training", "ours"), ("sampling", "sample")):
        how = around | ({"inference_mode": torch.inference_mode} if what == "sampling" else {})
        sides = [Side(f"{what}, as above", bench, getattr(bench, run))]
        sides += [Side(f"{what}: {name}", bench, sides[0].run, around=context) for name, context in how.items()]
        sides += [Side(f"{what}: {name}", other, getattr(other, run)) for name, other in others.items()]
        races.append(sides)
    idle = partial(mock.patch.object, UNet2DConditionModel, "forward", nothing)
    races.append([side._replace(name=f"{side.name}, {IDLE}", around=idle) for side in sampling(bench)[:2]])
    return races


# Counting and timing

class Rows(ExitStack):
    """Counts the rows of the batches that go through UNets forwards and backwards; a guided chain has two."""

    def __init__(self, *unets):
        super().__init__()
        self.count = Counter()
        for unet in unets:
            self.callback(unet.register_forward_hook(self.forward).remove)
            self.callback(unet.mid_block.resnets[-1].register_forward_pre_hook(self.block).remove)

    def forward(self, unet, inputs, output):
        rows, gradient = len(inputs[0]), torch.is_grad_enabled()
        self.count["with" if gradient else "without"] += rows
        if gradient:
            output.sample.register_hook(lambda _: self.count.update(backward=rows))

    def block(self, block, inputs):
        self.count["block"] += len(inputs[0])

    def told(self) -> list[int]:
        """Rows without gradient, with gradient, run again by checkpointing, backward."""
        n = self.count
        return [n["without"], n["with"], n["block"] - n["without"] - n["with"], n["backward"]]


class Held:
    """Bytes that autograd keeps of all but the weights, now and at most; each storage once."""

    def __init__(self, weights):
        self.users = Counter({w.untyped_storage()._cdata: 1 for w in weights})
        self.now = self.most = 0

    def keep(self, tensor: Tensor) -> "Kept":
        return Kept(self, tensor)

    def count(self, storage, change: int) -> None:
        users = self.users[storage._cdata]
        self.users[storage._cdata] += change
        if 0 in (users, users + change):
            self.now += change * storage.nbytes()
            self.most = max(self.most, self.now)


class Kept:
    """A tensor in autograd's hands, counted as long as it is there."""

    def __init__(self, owner: Held, tensor: Tensor):
        self.owner, self.tensor = owner, tensor.detach()  # an operation that kept its own result would never go
        owner.count(tensor.untyped_storage(), 1)

    def __del__(self):
        self.owner.count(self.tensor.untyped_storage(), -1)


class Meter(TorchDispatchMode):
    """Counts operations, and the bytes of tensors made in this context that are alive, now and at most."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.known, self.now, self.most, self.flops = device, set(), 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {s._cdata for s in self.storages((*args, *kwargs.values()))}
        out = func(*args, **kwargs)
        if formula := FORMULAS.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        for storage in self.storages([out]):
            if (key := storage._cdata) not in given and key not in self.known:
                self.known.add(key)
                self.now += (size := storage.nbytes())
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.forget, key, size)
        return out

    def storages(self, values):
        for value in values:
            if isinstance(value, Tensor) and value.device.type == self.device:
                yield value.untyped_storage()
            elif isinstance(value, list | tuple):
                yield from self.storages(value)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def size_of(tensors) -> int:
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


def count(side: Side) -> dict:
    """One pass: rows and GFLOP for each pair and step; GB that autograd held; GB at the peak, and without weights."""
    setup, batch = side.bench.setup, side.bench.batch
    unets = [setup.unet] + [setup.stock.unet] * (side.second or "stock" in side.name)
    unets += [setup.stock_with_lora.unet] * ("stock" in side.name)
    held, meter = Held(p for unet in unets for p in unet.parameters()), Meter(setup.device)
    with side.ready():
        adam = [t for state in setup.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        kept = [*setup.unet.parameters(), *setup.model.pipe.vae.parameters(), *adam, *batch.chains, batch.cond]
        base = size_of(kept + list(setup.stock.unet.parameters() if side.second else []))
        with Rows(*unets) as rows, meter, torch.autograd.graph.saved_tensors_hooks(held.keep, lambda kept: kept.tensor):
            side.run()
        grown = meter.most
        if setup.device == "cuda":  # what its allocator says, without the counters
            synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            side.run()
            grown = torch.cuda.max_memory_allocated() - before
    return {
        "rows": [n / side.work for n in rows.told()], "gflop": meter.flops / 1e9 / side.work,
        "held_gb": held.most / 1e9, "grown_gb": grown / 1e9, "peak_gb": (base + grown) / 1e9,
    }  # fmt: skip


def race(sides: list[Side], repeats: int) -> list[dict]:
    """Seconds for each pair and step, and the first side's in units of them: median, least, most of the rounds."""
    rounds = []
    for _ in range(repeats + 1):
        rounds.append([])
        for side in sides:
            with side.ready():
                synchronize()
                start = time.perf_counter()
                side.run()
                synchronize()
                rounds[-1].append((time.perf_counter() - start) / side.work)

    def spread(values):
        return [statistics.median(values), min(values), max(values)]

    columns = list(zip(*rounds[1:], strict=True))  # the first round warms up
    ratios = ([first / s for first, s in zip(columns[0], column, strict=True)] for column in columns)
    return [{"seconds": spread(c), "ratio": spread(r)} for c, r in zip(columns, ratios, strict=True)]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_rate(setup: Setup) -> float:
    """FLOP/s of a product of large matrices, the best of several."""
    device, times = setup.accelerator.device, []
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).to(setup.unet.dtype)
    for _ in range(8):
        synchronize()
        start = time.perf_counter()
        a @ b
        synchronize()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def table(sides: list[Side], repeats: int, rate: float | None, counted: bool = True) -> list[dict]:
    """A row for each side of a race; without a rate nothing is timed."""
    rows, repeats = [], repeats * (3 if "sampling" in sides[0].name else 1)  # sides that are nearly equal
    timed = race(sides, repeats) if rate else [{"seconds": None, "ratio": None}] * len(sides)
    for side, times in zip(sides, timed, strict=True):
        row = {"name": side.name, **times, "share": None, **(count(side) if counted else {})}
        if rate and counted:
            row["share"] = row["gflop"] * 1e9 / times["seconds"][0] / rate
        rows.append(row)
        print(*cells(row), sep="  ", flush=True)
    return rows


def curves(setup: Setup) -> dict:
    """Peak GB of one pair for several T, without checkpointing but in one; None where memory ran out."""
    found = {}
    for T in LENGTHS:
        for side in (side for side in training(Bench(setup, 1, T)) if side.name in CURVES):
            try:
                peak = count(side)["peak_gb"]
            except torch.OutOfMemoryError:
                peak = None
                setup.optimizer.zero_grad()
            found.setdefault(side.name, []).append(peak)
    return {"T": LENGTHS, "peak_gb": found}


# The models

def emoji(args: Namespace) -> dict:
    setup = Setup("--model", str(sd_demo.EMOJI))
    rate, bench = matrix_rate(setup), Bench(setup, 4, 2)
    found = {"batch": "4 pairs", "rate": rate, "curves": curves(setup)}
    races = training(ten := Bench(setup, 4, 10)), of_seven(setup, 1), sampling(ten)
    found["rows"] = [row for sides in races for row in table(sides, args.repeats, rate)]
    others = {f"batches of {n}": Bench(setup, n, 2) for n in (1, 16)}
    if setup.device == "cpu":
        others["bf16"] = Bench(Setup("--model", str(sd_demo.EMOJI), "--precision", "bf16"), 4, 2)
    return found | {"levers": tried(bench, others, args)}


def sd15_on_a_gpu(args: Namespace) -> dict:
    with random_sd15(LATENTS):
        found = {"batch": "1 pair", "epoch": epoch("--pairs-per-epoch", "4", "--eval-images", "4")}
        setup = Setup(*ONE_PAIR)
        rate, bench = matrix_rate(setup), Bench(setup, 1, 4)
        found |= {"rate": rate, "planned": planned(setup)}
        room = 0.8 * torch.cuda.mem_get_info()[0] / 1e9
        filled = Bench(setup, max(1, min(16, int(room / count(training(bench)[0])["grown_gb"]))), 2)
        full = [Side(FILLED, filled, filled.ours), Side(f"{FILLED}, checkpointed", filled, filled.ours, True)]
        races = training(bench), of_seven(setup, 1), full, sampling(Bench(setup, 4, 20))
        found["rows"] = [row for sides in races for row in table(sides, args.repeats, rate)]
        found |= {"curves": curves(setup), "pairs_that_fill": len(filled.pairs)}
        return found | {"levers": tried(filled, {}, args)}


def sd15_without_a_gpu() -> dict:
    found = {"batch": "1 pair"}
    with random_sd15(SMALL):
        found["epoch"] = epoch("--pairs-per-epoch", "1", "--num-steps", "2", "--skip-last", "0", "--eval-images", "1",
                               "--precision", "bf16")  # fmt: skip
        setup = Setup(*ONE_PAIR, "--precision", "bf16")
        real = [count(side)["grown_gb"] for side in training(Bench(setup, 1, 1))[:2]]
    with random_sd15(SMALL, weightless=True):
        setup = Setup(*ONE_PAIR)
        counted = [count(side)["grown_gb"] for side in training(Bench(setup, 1, 1))[:2]]
    with random_sd15(LATENTS, weightless=True):
        setup = Setup(*ONE_PAIR)
        found |= {"planned": planned(setup), "small": {"with data": real, "without": counted}}
        races = training(bench := Bench(setup, 1, 2)), of_seven(setup, 1)[:2], sampling(bench)[::3]
        found["rows"] = [row for sides in races for row in table(sides, 0, None)]
        return found | {"curves": curves(setup)}


def tried(bench: Bench, others: dict[str, Bench], args: Namespace) -> list[dict]:
    others = others | ({"torch.compile": compiled(bench)} if args.compile else {})
    return [row for sides in levers(bench, others) for row in table(sides, args.repeats, 1.0, counted=False)]


def epoch(*flags: str) -> dict:
    """One epoch of sd_demo.py, from its command line to its run folder."""
    flags = [*ONE_PAIR, "--objective", "compressibility", "--epochs", "1", *flags]
    with tempfile.TemporaryDirectory() as folder:
        sd_demo.main([*flags, "--out", f"{folder}/run"])
        row = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text())
    names = ("labels", "loss", "seconds_sample", "seconds_train", "peak_memory_mb")
    return {"flags": " ".join(flags)} | {name: row[name] for name in names}


def planned(setup: Setup) -> list[float]:
    """GB that sd_demo.py announces for one pair, without and with checkpointing."""
    told = []
    for checkpointing in (False, True):
        args = Namespace(**vars(setup.args) | {"gradient_checkpointing": checkpointing})
        told.append(float(re.search(r"Memory: about ([\d.]+) GB", sd_demo.plan(setup.model, args, 1)[0])[1]))
    return told


# The report

def targets(model: str, part: dict, cuda: bool) -> list[list[str]]:
    """What was aimed at: words, the number found, the bound, whether it is kept."""
    row = {row["name"]: row for row in part["rows"] + part.get("levers", [])}
    peaks = part["curves"]["peak_gb"]

    def ratio(name):
        return row[name]["ratio"][0] if name in row and row[name]["ratio"] else None

    flat = max(max(peak) / min(peak) for name, peak in peaks.items() if name != AUTOGRAD)
    found = [
        *((f"{name}: time here / released", ratio(name), 0.6) for name in (RELEASED, BATCHED) if name in row),
        *((f"{name}: time here / released", ratio(name), 0.12) for name in SEVENS),
        *((f"{name}: time here / this", ratio(name), 1.0) for name in (*STOCK, f"{STOCK[0]}, {IDLE}")),
        ("peak at the largest T / at the smallest", flat, 1.01),
        ("beyond the weights, checkpointed / not", row[CURVES[1]]["grown_gb"] / row[HERE]["grown_gb"], 1 / 3),
    ]
    if model == "SD 1.5":
        found += [("peak, GB", row[HERE]["peak_gb"], 6.0), ("peak, GB, checkpointed", row[CURVES[1]]["peak_gb"], 5.0)]
        found += [("time at 40 % of the matrix rate / time", 0.4 / row[FILLED]["share"] if cuda else None, 1.0)]
    return [
        [words, UNKNOWN if value is None else f"{value:#.3g}", f"{bound:.3g}",
         "" if value is None else "yes" if value <= bound else "no"]
        for words, value, bound in found
    ]  # fmt: skip


def cells(row: dict) -> list[str]:
    def spread(values, scale=1.0):
        return "{:.3g} ({:.3g} to {:.3g})".format(*(scale * v for v in values)) if values else UNKNOWN

    said = [row["name"], spread(row["seconds"], 1e3), spread(row["ratio"])]
    if "rows" in row:
        share = UNKNOWN if row["share"] is None else f"{row['share']:.0%}"
        said += [" / ".join(f"{n:.3g}" for n in row["rows"]), f"{row['gflop']:.4g}", share]
        said += [f"{row['held_gb']:.3g}", f"{row['peak_gb']:.3g}"]
    return said


def markdown(heads: tuple[str, ...], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in (heads, ["---"] * len(heads), *rows)) + "\n"


def report(results: dict) -> str:
    """Tables of what every machine found."""
    text = f"# What sd_demo.py costs\n\n`python tests/bench_sd.py`. {EXPLAINED}\n\n"
    for machine, result in results.items():
        for model, part in result["models"].items():
            text += f"## {model}, {part['batch']} in a batch: {machine}\n\n"
            text += markdown(HEADS, [cells(row) for row in part["rows"]])
            if "levers" in part:
                text += markdown(("what if", *HEADS[1:3]), [cells(row) for row in part["levers"]])
            text += markdown(("target", "found", "at most", "reached"), targets(model, part, result["cuda"]))
            text += "".join(f"- {words}: {json.dumps(part[key])}\n" for key, words in NOTES.items() if key in part)
            text += f"- {result['versions']}, {result['repeats']} rounds; load at the start {result['load']:.2f}"
            text += ", so other programs ran: TIME IT AGAIN\n\n" if result["load"] > BUSY else "\n\n"
    if not any(result["cuda"] for result in results.values()):
        text += "## A CUDA GPU\n\nNot measured yet.\n"
    return text


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    return f"{(names or [platform.machine()])[0].strip()}, {torch.get_num_threads()} threads"


def parse(argv: list[str] | None) -> Namespace:
    parser = runs.Parser(prog="bench_sd.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["emoji", "sd15", "both"], default="both")
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds of each race")
    parser.add_argument("--compile", action="store_true", help="try torch.compile too: many minutes on a CPU")
    parser.add_argument("--out", type=Path, default=runs.ROOT / "toy" / "results" / "bench_sd.json")
    args = parser.parse_args(argv)
    runs.refuse_unless_positive(parser, args, "repeats")
    return args


def main(argv: list[str] | None = None) -> None:
    args, name, cuda = parse(argv), machine(), torch.cuda.is_available()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    print(f"{name}: times mean something only while nothing else runs on it.\n{'  '.join(HEADS)}")
    torch.manual_seed(0)
    measure = {"emoji": partial(emoji, args), "SD 1.5": partial(sd15_on_a_gpu, args) if cuda else sd15_without_a_gpu}
    chosen = {"emoji": ["emoji"], "sd15": ["SD 1.5"], "both": list(measure)}[args.model]
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    here = results.setdefault(name, {"models": {}})
    here |= {"cuda": cuda, "versions": f"torch {torch.__version__}, diffusers {diffusers.__version__}",
             "repeats": args.repeats, "load": os.getloadavg()[0]}  # fmt: skip
    for model in chosen:
        here["models"][model] = measure[model]()
        runs.save_json(args.out, results)
    runs.save_text(args.out.with_suffix(".md"), report(results))
    drawn = f"{model}, one pair, {'measured' if cuda else 'counted'}: {name}"
    plots.draw_cost(here["models"][model]["curves"], drawn, args.out.with_suffix(".png"))
    print(f"\n{report({name: here})}\n{args.out}, and beside it .md and .png")


if __name__ == "__main__":
    main()
