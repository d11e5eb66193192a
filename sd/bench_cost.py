"""What sd_demo.py costs, beside whole-chain DPO and the authors' released code.

    python -m sd.bench_cost    # 8 minutes and more on two cores; nothing else may run meanwhile

The bundled emoji model is timed and counted. Of SD 1.5, SDXL and SD 3 there are the architectures,
in fp16: bytes and operations are counted on tensors without data (torch's meta device). On a
CUDA GPU of 24 GB or more SD 1.5 is timed instead, with random weights.

All sides train one LoRA on the same trajectories and pairs; tests/sd/test_bench_cost.py compares
their gradients. The released structure, from its description: policy and reference apart and each
trajectory alone, pair after pair; the reference is a second UNet. Its clamp and its mean over
elements, which cost nothing, are left out. The sides of a race run in turn, and a ratio is that of
neighbours in time.

Writes --out, and beside it the tables of the page (.md), between its two marks, and the figure of
SD 1.5's memory (.png). What other machines wrote stays.
"""

import copy
import os
import platform
import re
import time
import weakref
from collections.abc import Callable
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

import d3po
from sd import files, options
from sd.bench import RESULTS, make_parser, replace_section, table
from sd.bench_models import ARCHITECTURES, CPU_ATTENTION, SD15, Architecture, build, without_data
from sd.model import PipelinePolicy, load_model, make_accelerator
from sd.pipeline import NETWORKS, load_pipeline
from sd.prompts import load_prompts

MARK = "<!-- python -m sd.bench_cost writes what is between these two lines -->\n"
FIXED = {"objective": "compressibility", "guidance_scale": 5, "max_grad_norm": 1e9, "beta": 0.05}
LENGTHS = (2, 4, 8)  # T of the figure
# GB; TFLOP/s that makers give for fp16 products summed in float32; how many cards
CARDS = {
    "8 GB: RTX 3070": (8, 41, 1),
    "12 GB: RTX 3060": (12, 25, 1),
    "16 GB: T4": (16, 65, 1),
    "24 GB: RTX 4090": (24, 165, 1),
    "80 GB: A100": (80, 312, 1),
}
AUTHORS_CARDS = "4 x 32 GB: V100", (32, 125, 4)
SHARE_OF_PEAK = 0.3  # that is reached: an assumption
RESERVE_GB = 1.5  # of a card for its libraries and the allocator: an assumption

DEFAULT_RUN = "The default run on SD 1.5, 512x512, by card: counted, not measured"
BOTH_UNETS = "pipe", "stock"
HERE, AUTOGRAD, PIECES = "here, previous", "whole chain by autograd", "whole chain in pieces"
IN_FIGURE = {HERE: "ko-", f"{HERE}, checkpointed": "k^--", PIECES: "kx:", AUTOGRAD: "rs-."}

CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention_flop(q, k, v, *_, **__) -> int:
    return flop_counter.sdpa_flop_count(q, k, v)


def attention_backward_flop(gradient, q, k, v, *_, **__) -> int:
    return flop_counter.sdpa_backward_flop_count(gradient, q, k, v)


FORMULAS = {  # of operations: those of torch's FlopCounterMode, and what it lacks
    **flop_counter.flop_registry,
    CPU_ATTENTION: flop_counter.shape_wrapper(attention_flop),
    CPU_ATTENTION_BACKWARD: flop_counter.shape_wrapper(attention_backward_flop),
}


def network_of(pipe: DiffusionPipeline) -> nn.Module:
    return getattr(pipe, NETWORKS[type(pipe)])


# The sides of a race


class Setup:
    """A model ready to train, as sd_demo.py loads it; load: makes its pipeline."""

    def __init__(self, load: Callable[[], DiffusionPipeline], **settings):
        self.load = load
        self.args = options.make_settings(**FIXED, **settings, model=load())
        self.accelerator = make_accelerator(self.args.precision, self.args.device)
        self.model = load_model(self.args, load_prompts("animals"), self.accelerator)
        self.pipe, self.lora = self.model.pipe, self.model.lora
        self.device = self.lora[0].device.type
        self.optimizer = self.accelerator.prepare(torch.optim.AdamW(self.lora, 1e-6))
        for weight in self.lora:
            weight.grad = torch.zeros_like(weight)
        self.optimizer.optimizer.step()  # Adam's moments are there before anything is counted
        self.optimizer.zero_grad()
        if self.device == "meta":
            self.accelerator.clip_grad_norm_ = lambda *_: torch.ones(())  # its norm has no value

    @cached_property
    def stock(self) -> StableDiffusionPipeline:
        """Its UNet is the second one of the released structure."""
        pipe = self.load().to(self.accelerator.device)
        pipe.unet.requires_grad_(False)
        return pipe

    def update(self) -> None:
        self.accelerator.clip_grad_norm_(self.lora, self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Bench:
    """Trajectories of groups of K, `tagged` of each marked as bad, and all that is timed on them.

    groups: how many; T: steps, all of which are trained.
    """

    def __init__(self, setup: Setup, groups: int, T: int, *, K: int = 2, tagged: int = 1):
        device = setup.accelerator.device
        self.setup, self.steps = setup, list(range(T))
        self.schedule = d3po.make_schedule(setup.model.policy.alpha_bars.cpu(), T)
        self.model = setup.model._replace(schedule=self.schedule)
        bad = torch.arange(K).expand(groups, K) < tagged
        self.pairs = d3po.pairs_from_tags(bad).to(device)
        self.combinations = torch.tensor(list(combinations(range(K), 2)), device=device)
        numbers = torch.arange(groups) % len(self.model.prompts)
        self.cond = numbers.repeat_interleave(K, 0).to(device)
        x_T = torch.randn(groups, *self.model.latent_shape)
        self.x_T = x_T.repeat_interleave(K, 0).to(device)
        self.trajectory = self.sample()

    @property
    def units(self) -> int:
        """Pairs times steps."""
        return len(self.pairs) * len(self.steps)

    def sample(self) -> d3po.Trajectory:
        return d3po.rollout(self.model.sampler, self.schedule, self.x_T, self.cond)

    def ours(self, *, reference: str = "previous", loss: str = "eq14") -> None:
        """The updates of sd_demo.py: at every step, or for the whole chain after the last one."""
        model, setup, trajectory = self.model, self.setup, self.trajectory
        ref_log_prob = trajectory.log_prob
        if reference == "initial":
            denoiser = model.reference
            ref_log_prob = d3po.trajectory_log_prob(denoiser, self.schedule, trajectory, self.cond)
        losses = d3po.chain_dpo_losses if loss == "chain" else d3po.d3po_losses
        chains = model.policy, self.schedule, trajectory, self.pairs, setup.args.beta, ref_log_prob
        for k, piece in enumerate(losses(*chains, cond=self.cond, steps=self.steps), 1):
            setup.accelerator.backward(piece)
            if loss == "eq14" or k == len(self.steps):
                setup.update()

    def log_prob(self, denoiser: PipelinePolicy, i: int, chosen: Tensor) -> Tensor:
        """Of action i of the chosen trajectories."""
        x = self.trajectory.x
        mean = d3po.policy_mean(denoiser, self.schedule, i, x[i, chosen], self.cond[chosen])
        return d3po.log_prob(x[i + 1, chosen], mean, self.schedule.sigma[i])

    def by_autograd(self) -> None:
        """Eq. 5 as it stands: the graphs of all steps at once."""
        every, ref = torch.arange(len(self.x_T)), self.trajectory.log_prob
        log_ratio = sum(self.log_prob(self.model.policy, i, every) - ref[i] for i in self.steps)
        loss = d3po.d3po_loss(*log_ratio[self.pairs.T], self.setup.args.beta).mean()
        self.setup.accelerator.backward(loss)
        self.setup.update()

    def released(self, pairs: Tensor, batch_size: int = 1) -> None:
        """Four forwards a step for batch_size pairs; an update after the last step."""
        setup = self.setup
        reference = copy.copy(self.model.sampler)
        reference.network = setup.stock.unet
        for batch in pairs.split(batch_size):
            for i in torch.randperm(len(self.steps)).tolist():
                log_ratios = []
                for chosen in batch.T:  # the winners, the losers
                    log_prob = self.log_prob(self.model.policy, i, chosen)
                    with torch.no_grad():
                        ref_log_prob = self.log_prob(reference, i, chosen)
                    log_ratios.append(log_prob - ref_log_prob)
                setup.accelerator.backward(d3po.d3po_loss(*log_ratios, setup.args.beta).mean())
            setup.update()


class Side(NamedTuple):
    """One way to do the work of a bench."""

    name: str
    bench: Bench
    run: Callable[[], object]
    checkpointing: bool = False
    pipelines: tuple[str, ...] = ("pipe",)  # of the setup, whose networks are at work

    def prepare(self) -> None:
        network = self.bench.setup.model.network
        if self.checkpointing:
            network.enable_gradient_checkpointing()
        else:
            network.disable_gradient_checkpointing()


def training(bench: Bench) -> list[Side]:
    ours = {
        HERE: bench.ours,
        "here, initial": partial(bench.ours, reference="initial"),
        PIECES: partial(bench.ours, loss="chain"),
    }
    sides = []
    for name, run in ours.items():
        sides.append(Side(name, bench, run))
        sides.append(Side(f"{name}, checkpointed", bench, run, checkpointing=True))
    sides.append(Side(AUTOGRAD, bench, bench.by_autograd))
    for size, how in {len(bench.pairs): "batches like ours", 1: "pair after pair"}.items():
        run = partial(bench.released, bench.pairs, size)
        name = f"released structure, {how}"
        sides.append(Side(name, bench, run, pipelines=BOTH_UNETS))
    return sides


def groups_of_seven(setup: Setup) -> list[Side]:
    bench = Bench(setup, 1, 1, K=7, tagged=3)
    sides = [
        Side("K = 7, 3 tagged: here", bench, bench.ours),
        Side("K = 7, 3 tagged: here, checkpointed", bench, bench.ours, checkpointing=True),
    ]
    for pairs, which in ((bench.pairs, "the 12 pairs"), (bench.combinations, "all 21 pairs")):
        run, name = partial(bench.released, pairs), f"K = 7, 3 tagged: released, {which}"
        sides.append(Side(name, bench, run, pipelines=BOTH_UNETS))
    return sides


def sampling(bench: Bench) -> Side:
    return Side("sampling, here", bench, bench.sample)


# Counting and timing


class Meter(TorchDispatchMode):
    """Counts operations, and the bytes alive of tensors made inside, now and at most."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.known = device, set()
        self.now = self.most = self.flop = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = {s._cdata for s in self.storages((*args, *kwargs.values()))}
        out = func(*args, **kwargs)
        if formula := FORMULAS.get(func.overloadpacket):
            self.flop += formula(*args, **kwargs, out_val=out)
        for storage in self.storages([out]):
            key, size = storage._cdata, storage.nbytes()
            if key not in inputs and key not in self.known:
                self.known.add(key)
                self.now += size
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


def gb(tensors: list[Tensor]) -> float:
    """Of memory, each storage once."""
    storages = (t.untyped_storage() for t in tensors)
    return sum({s._cdata: s.nbytes() for s in storages}.values()) / 1e9


def count(side: Side) -> dict:
    """Of one pass: GFLOP for each pair and step; GB beyond the base, and in all."""
    bench, setup = side.bench, side.bench.setup
    networks = [network_of(getattr(setup, name)) for name in side.pipelines]
    weights = [p for network in networks for p in network.parameters()]
    states = [t for state in setup.optimizer.state.values() for t in state.values()]
    vae, trajectory = setup.pipe.vae.parameters(), bench.trajectory
    base_gb = gb([*weights, *vae, *states, *trajectory, bench.cond])

    meter = Meter(setup.device)
    side.prepare()
    with meter:
        side.run()
    grown_gb = meter.most / 1e9
    if setup.device == "cuda":  # what its allocator says, without the counters
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side.run()
        grown_gb = (torch.cuda.max_memory_allocated() - before) / 1e9
    return {
        "gflop": meter.flop / 1e9 / bench.units,
        "grown_gb": grown_gb,
        "peak_gb": base_gb + grown_gb,
    }


def seconds(run: Callable) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def race(sides: list[Side], rounds: int) -> list[dict]:
    """For each side, for each pair and step: its time, and the first side's in units of it.

    Both as [median, least, most] of the rounds; the first round warms up.
    """
    times = []
    for _ in range(rounds + 1):
        times.append([])
        for side in sides:
            side.prepare()
            times[-1].append(seconds(side.run) / side.bench.units)

    def spread(values):
        return [float(find(values)) for find in (np.median, np.min, np.max)]

    columns = np.array(times[1:]).T
    ratios = columns[0] / columns
    return [
        {"seconds": spread(column), "ratio": spread(ratio)}
        for column, ratio in zip(columns, ratios, strict=True)
    ]


def measure(sides: list[Side], rounds: int) -> list[dict]:
    """A row for each side of a race: timed and counted."""
    if sides[0].name.startswith("sampling"):  # which takes less time
        rounds *= 3
    rows = []
    for side, times in zip(sides, race(sides, rounds), strict=True):
        rows.append({"name": side.name, **times, **count(side)})
        print(*cells(rows[-1]).values(), sep="  ", flush=True)
    return rows


def memory_by_length(setup: Setup) -> dict:
    """Peak GB of one pair for several T."""
    found = {name: [] for name in IN_FIGURE}
    for T in LENGTHS:
        for side in training(Bench(setup, 1, T)):
            if side.name in IN_FIGURE:
                found[side.name].append(count(side)["peak_gb"])
    return {"T": LENGTHS, "peak_gb": found}


# The models


def emoji(rounds: int) -> dict:
    setup, bf16 = (
        Setup(partial(load_pipeline, str(options.EMOJI), precision), precision=precision)
        for precision in ("fp32", "bf16")
    )
    bench = Bench(setup, 4, 10)
    other_batches = {
        "1 pair in a batch": Bench(setup, 1, 10),
        "16 pairs in a batch": Bench(setup, 16, 10),
        "bf16": Bench(bf16, 4, 10),
    }
    trained, sampled = training(bench), [sampling(bench)]
    for name, other in other_batches.items():
        trained.append(Side(f"{HERE}, {name}", other, other.ours))
        sampled.append(Side(f"sampling, here, {name}", other, other.sample))
    races = trained, groups_of_seven(setup), sampled
    return {"rows": [row for sides in races for row in measure(sides, rounds)]}


def sd15_timed(rounds: int) -> dict:
    setup = Setup(partial(build, SD15, torch.float16, "cuda"))
    races = training(Bench(setup, 1, 4)), groups_of_seven(setup), [sampling(Bench(setup, 4, 20))]
    return {"rows": [row for sides in races for row in measure(sides, rounds)]}


def counted(architecture: Architecture) -> dict:
    """Of one pair; of SD 1.5 also the other structures, and memory for several T."""
    with without_data(architecture) as load:
        setup = Setup(load)
        bench, more = Bench(setup, 1, 2), {}
        sides = training(bench)[:2]
        if architecture is SD15:
            sides = [*training(bench), *groups_of_seven(setup)[:2]]
            more = {"memory": memory_by_length(setup)}
        sides.append(sampling(bench))
        of_lora = sum(weight.numel() for weight in setup.lora)
        of_network = sum(weight.numel() for weight in setup.model.network.parameters())
        weights = {"network": of_network - of_lora, "lora": of_lora}
        rows = [{"name": side.name, **count(side)} for side in sides]
        return {"weights": weights, "rows": rows, **more}


# The default run, counted


def default_run(**settings) -> dict:
    """Of SD 1.5: operations of an epoch and peak memory, with checkpointing and without.

    Beside it the paper's run, as in the released structure. settings: other than the default ones.
    """
    with without_data(SD15) as load:
        setup = Setup(load, **settings)
        args, paper = setup.args, options.RECIPES["paper"]
        bench = Bench(setup, args.batch_size, 2, K=args.images_per_prompt)
        chain = partial(bench.ours, loss="chain")
        chains = bench.model.reference, bench.schedule, bench.trajectory, bench.cond
        reference = count(Side("", bench, partial(d3po.trajectory_log_prob, *chains)))
        sampled, kept, checkpointed = (
            count(Side("", bench, run, checkpointing=on))
            for run, on in ((bench.sample, False), (chain, False), (chain, True))
        )
        decoding = count(Side("", bench, partial(decode_one, setup)))
        pair = Bench(setup, 1, 2)
        released = count(Side("", pair, partial(pair.released, pair.pairs), False, BOTH_UNETS))
        sampled_pair = count(sampling(pair))

    pairs_to_images = len(bench.pairs) / len(bench.x_T)  # what is counted is of a pair and step
    new = args.prompts_per_epoch * args.images_per_prompt
    earlier = args.replay * args.batch_size * args.images_per_prompt
    held_out = args.eval_images / args.eval_every
    forward = (new + held_out) * sampled["gflop"] + (new + earlier + held_out) * reference["gflop"]
    trained = (new + earlier) * args.trained_steps
    decoded = (new + held_out) * decoding["gflop"] * bench.units

    def run(side: dict) -> dict:
        passes = forward * args.num_steps + trained * side["gflop"]
        peak_gb = max(side["peak_gb"], sampled["peak_gb"], decoding["peak_gb"])
        pflop = (pairs_to_images * passes + decoded) / 1e6
        return {"pflop": pflop, "peak_gb": peak_gb, "epochs": args.epochs}

    units = paper["prompts_per_epoch"] * paper["num_steps"]
    pflop = units * (sampled_pair["gflop"] + released["gflop"]) / 1e6
    authors = {"pflop": pflop, "peak_gb": released["peak_gb"], "epochs": paper["epochs"]}
    return {"checkpointed": run(checkpointed), "kept": run(kept), "authors": authors}


def decode_one(setup: Setup) -> None:
    """One image, as `enable_slicing` has it."""
    vae = setup.pipe.vae
    with torch.no_grad():
        vae.decode(torch.empty(1, *setup.model.latent_shape, dtype=vae.dtype, device="meta"))


def cards(runs: dict) -> list[dict]:
    """What to type on each card, and how long it takes if it reaches SHARE_OF_PEAK."""
    rows = []
    for card, numbers in CARDS.items():
        fits = runs["kept"]["peak_gb"] + RESERVE_GB < numbers[0]
        run, flags = runs["checkpointed"], ""
        if fits:
            run, flags = runs["kept"], " --no-gradient-checkpointing"
        command = f"`python sd_demo.py --objective compressibility{flags}`"
        rows.append(card_row(card, command, run, numbers))
    card, numbers = AUTHORS_CARDS
    return [*rows, card_row(card, "Table 2 in the released structure", runs["authors"], numbers)]


def card_row(card: str, command: str, run: dict, numbers: tuple[int, int, int]) -> dict:
    _, peak, count = numbers
    minutes = run["pflop"] * 1e3 / (count * peak * SHARE_OF_PEAK) / 60
    return {
        "card": card,
        "TFLOP/s by its maker": peak,
        "what to type": command,
        "GB": f"{run['peak_gb']:.1f}",
        "PFLOP an epoch": f"{run['pflop']:.1f}",
        "minutes an epoch": f"{minutes:.1f}",
        "epochs": run["epochs"],
        "hours": f"{minutes * run['epochs'] / 60:.1f}",
        "measured": "not yet",
    }


# The report


def cells(row: dict) -> dict:
    def spread(values, scale=1.0):
        return "{:.3g} ({:.3g} to {:.3g})".format(*(scale * v for v in values)) if values else "-"

    return {
        "": row["name"],
        "ms": spread(row.get("seconds"), 1e3),
        "here / this": spread(row.get("ratio")),
        "GFLOP": f"{row['gflop']:.4g}",
        "grown, GB": f"{row['grown_gb']:.3g}",
        "peak, GB": f"{row['peak_gb']:.3g}",
    }


def tables(results: dict) -> str:
    text = "\n"
    for title, part in results.items():
        if "runs" in part:
            text += f"## {title}\n\n{table(cards(part['runs']))}\n{part['versions']}.\n\n"
            continue
        text += f"## {title}\n\n{table(list(map(cells, part['rows'])))}\n"
        if "weights" in part:
            millions = {name: number / 1e6 for name, number in part["weights"].items()}
            text += "Weights: {network:,.0f} M, LoRA {lora:.2f} M. ".format(**millions)
        text += part["versions"]
        if "seconds" in part["rows"][0]:
            text += f"; {part['rounds']} rounds; load at the start {part['load']:.2f}"
        text += ".\n\n"
    return text


def draw_memory(memory: dict, path: Path) -> None:
    """Peak memory against T: what was counted, and the line through it up to T = 20."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis, T = figure.subplots(), memory["T"]
    for name, style in IN_FIGURE.items():
        peak = memory["peak_gb"][name]
        slope, start = np.polyfit(T, peak, 1)
        value = f"{slope:.2g} GB a step" if slope > 0.01 * peak[0] else f"{peak[0]:.2g} GB"
        size = 9 if "x" in style else 6
        axis.plot(T, peak, style[:2], label=f"{name}: {value}", markersize=size)
        line = [slope * end + start for end in (T[0], 20)]
        axis.plot((T[0], 20), line, style[0] + style[2:], linewidth=1)
    axis.axhline(100, color="0.6", linewidth=1)
    paper = 'the paper on whole chains: "more than 100 GB"'
    axis.text(2, 100, paper, fontsize=8, color="0.3", va="bottom")
    axis.set(xlabel="T, steps of the chain", ylabel="peak memory in training (GB)")
    axis.set(title="SD 1.5, one pair, counted", xticks=range(2, 21, 2), ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.92))
    figure.savefig(path, dpi=110)


def machine_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    file = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", file.read_text()) if file.exists() else []
    name = names[0] if names else platform.machine()
    return f"{name.strip()}, {torch.get_num_threads()} threads"


def write(results: dict, out: Path) -> None:
    """The numbers, and beside them their figure, and their tables in the page."""
    files.save_json(out, results)
    replace_section(out.with_suffix(".md"), MARK, tables(results))
    for memory in (part["memory"] for part in results.values() if "memory" in part):
        draw_memory(memory, out.with_suffix(".png"))


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("sd.bench_cost", __doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each race")
    parser.add_argument("--out", type=Path, default=RESULTS / "cost.json", help="a JSON file")
    args, machine, cuda = parser.parse_args(argv), machine_name(), torch.cuda.is_available()
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    print(f"{machine}: times mean something only while nothing else runs on it.")

    parts = {f"Emoji model, 4 pairs in a batch, T = 10: {machine}": partial(emoji, args.rounds)}
    if cuda:
        parts[f"SD 1.5, 1 pair in a batch, T = 4: {machine}"] = partial(sd15_timed, args.rounds)
    for name, architecture in {} if cuda else ARCHITECTURES.items():
        pixels = f"{architecture.pixels}x{architecture.pixels}"
        title = f"{name}, {pixels}, 1 pair in a batch, T = 2: counted"
        parts[title] = partial(counted, architecture)
    if not cuda:
        parts[DEFAULT_RUN] = lambda: {"runs": default_run()}
    results = files.read_json(args.out) if args.out.exists() else {}
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}"
    common = {"versions": versions, "rounds": args.rounds, "load": os.getloadavg()[0]}
    torch.manual_seed(0)
    for title, measure_part in parts.items():
        results[title] = {**common, **measure_part()}
        write(results, args.out)
    print(f"{args.out}, and beside it .md and .png")


if __name__ == "__main__":
    main()
