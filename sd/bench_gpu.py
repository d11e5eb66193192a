"""One command for a machine with a GPU: what holds there, how fast it is, and whether it learns.

    python -m sd.bench_gpu                 # under ten minutes on a current card; no download
    python -m sd.bench_gpu --device cpu    # small networks: a trial of this script, about a minute

For each model and precision, checks come first: images and gradients are finite; the LoRA is
float32, and all else of the network has its precision; gradients with checkpointing are those
without; memory does not grow with T. Then SD 1.5, SDXL and SD 3 are timed, with random weights.
Then sd_demo.py trains the emoji model, seed 0.

Prints one Markdown table, and on a GPU writes it row by row into --out, between its two marks.
Exits with an error where a check failed.
"""

import gc
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import sd_demo
from sd import files, options
from sd.bench import make_parser, markdown_table, replace_section, size_change
from sd.bench_cost import HERE, ONE_PAIR, Bench, Setup, Side, count, machine_name, race, seconds
from sd.bench_models import ARCHITECTURES, Architecture, random_models, small
from sd.families import DTYPES
from sd.pipeline import decode

PAGE = files.ROOT / "sd" / "results" / "gpu.md"
MARK = "<!-- python -m sd.bench_gpu writes what is between these two lines -->\n"
PRECISIONS = {"cuda": ("fp16", "bf16", "fp32"), "cpu": ("fp32",)}
TIMED_IN = {"cuda": ("fp16", "bf16"), "cpu": ("fp32",)}
MATRICES = {"cuda": 8192, "cpu": 512}  # rows and columns of the products that are timed
ROUNDS = {"cuda": 5, "cpu": 1}
RUN = "--objective compressibility --seed 0"
TRIAL = """
    --epochs 1 --prompts-per-epoch 1 --batch-size 1 --images-per-prompt 2 --num-steps 3
    --eval-images 2 --eval-every 1
"""
SAME_GRADIENT = 0.01  # of its norm; sums on a GPU come in any order
SAME_MEMORY = 0.02
LENGTHS = 2, 6  # T at which memory is compared
PASSED, TOO_LARGE = "passed", "does not fit"
TIMED = (
    "checks",
    "sampling, ms (share of the matrix rate; peak memory)",
    "training, ms (the same)",
    "training with checkpointing, ms (the same)",
)
LEARNED = ("score", "size above a blank image's", "animals right", "KL", "seconds")


def start_with(device: str, precision: str) -> list[str]:
    """Flags of a model, after what an earlier one left is forgotten."""
    free()
    AcceleratorState._reset_state(reset_partial_state=True)  # it has one precision at a time
    return ["--device", device, "--precision", precision]


def load(device: str, precision: str, *flags: str) -> Setup:
    return Setup(*flags, *start_with(device, precision))


def matrix_rate(device: str, precision: str) -> float:
    """TFLOP/s of products of square matrices: the best of ten."""
    size = MATRICES[device]
    a = torch.randn(size, size, dtype=DTYPES[precision], device=device)
    return 2 * size**3 / min(seconds(partial(torch.mm, a, a)) for _ in range(10)) / 1e12


# Checks


def gradient(bench: Bench, *, checkpointing: bool) -> Tensor:
    """Of the LoRA, of the first update that does not overflow: a GradScaler begins too high."""
    setup, found = bench.setup, []

    def note(*_):
        found.append(torch.cat([weight.grad.flatten() for weight in setup.lora]))

    Side(HERE, bench, bench.ours, checkpointing).prepare()
    with setup.optimizer.optimizer.register_step_pre_hook(note):
        for _ in range(sd_demo.MAX_SKIPPED):
            bench.ours()
            if found:
                return found[0]
    return torch.full((1,), torch.nan)


def images_are_finite(bench: Bench) -> bool:
    x_0, conditioning = bench.batch.trajectory.x[-1], bench.setup.model.conditioning
    try:
        decode(bench.setup.pipe, x_0, conditioning, names=["image"] * len(x_0))
    except FloatingPointError:
        return False
    return True


def check(setup: Setup) -> str:
    """PASSED, or what does not hold."""
    for group in setup.optimizer.param_groups:
        group["lr"] = 0  # all gradients are those of one model
    for weight in setup.lora:
        nn.init.normal_(weight, std=0.02)
    bench = Bench(setup, 1, 1)
    plain, checkpointed = (gradient(bench, checkpointing=on) for on in (False, True))
    grown = [
        count(Side(HERE, longer, longer.ours, checkpointing=True))["grown_gb"]
        for longer in (Bench(setup, 1, T) for T in LENGTHS)
    ]
    weights = setup.model.network.parameters()
    others = {weight.dtype for weight in weights if not weight.requires_grad}
    holds = {
        "images finite": images_are_finite(bench),
        "gradient finite": plain.isfinite().all() and plain.any(),
        "LoRA in float32": all(weight.dtype == torch.float32 for weight in setup.lora),
        "network in its precision": others == {DTYPES[setup.args.precision]},
        "checkpointing's gradient": (plain - checkpointed).norm() < SAME_GRADIENT * plain.norm(),
        "memory flat in T": grown[1] < (1 + SAME_MEMORY) * grown[0],
    }
    return ", ".join(f"not {name}" for name, yes in holds.items() if not yes) or PASSED


# Times


def cell(side: Side, rate: float) -> str:
    """Milliseconds for a pair and step, the share of the rate in TFLOP/s, and peak GB."""
    (times,), counts = race([side], ROUNDS[side.bench.setup.device]), count(side)
    median = times["seconds"][0]
    share = counts["gflop"] / 1e3 / median / rate
    return f"{1e3 * median:.3g} ({share:.0%}; {counts['peak_gb']:.3g} GB)"


def cells(device: str, precision: str, architecture: Architecture | None) -> Iterator[str]:
    """The column of a precision in the rows of a model: checks, and of an architecture times.

    architecture: None is the emoji model.
    """
    rate = matrix_rate(device, precision)
    flags = ONE_PAIR if architecture else ["--model", str(options.EMOJI)]
    with random_models(architecture, device) if architecture else nullcontext():
        setup = load(device, precision, *flags)
        bench = Bench(setup, 1, 2)
        jobs = [partial(check, setup)]
        if architecture:
            sides = [Side("", bench, bench.sample)]
            sides += [Side("", bench, bench.ours, checkpointing=on) for on in (False, True)]
            jobs += [partial(cell, side, rate) for side in sides]
        for job in jobs:
            try:
                yield job()
            except torch.OutOfMemoryError:
                yield TOO_LARGE
            setup.optimizer.zero_grad()
            free()


def free() -> None:
    """Give back the memory of what is not needed any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Learning


def learn(device: str, precision: str, out: Path) -> list[str]:
    """A column: the default run on the emoji model; on the CPU a very short one."""
    flags = RUN + (TRIAL if device == "cpu" else "")
    model = ["--model", str(options.EMOJI), *start_with(device, precision)]
    started = time.perf_counter()
    try:
        sd_demo.main([*flags.split(), *model, "--out", str(out)])
    except SystemExit as stop:  # it says why
        print(stop)
        return ["not finished"] * len(LEARNED)
    took = time.perf_counter() - started
    initial = files.read_json(out / "config.json")["initial"]
    last = files.read_lines(out / "metrics.jsonl")[-1]
    return [
        f"{initial['eval_score']:.3f} to {last['eval_score']:.3f}",
        f"{size_change(last['eval_score'], initial['eval_score']):+.0%}",
        f"{initial['watched']:.1%} to {last['watched']:.1%}",
        f"{last['kl_trained']:.1f}",
        f"{took:.0f}",
    ]


# The table


def rows(device: str) -> Iterator[list[str]]:
    precisions = PRECISIONS[device]
    rates = [f"{matrix_rate(device, precision):.3g}" for precision in precisions]
    yield ["matrix products, TFLOP/s", *rates]
    free()
    yield ["emoji model: checks", *(next(cells(device, each, None)) for each in precisions)]
    for name, architecture in ARCHITECTURES.items():
        model = small(architecture) if device == "cpu" else architecture
        timed = [list(cells(device, each, model)) for each in TIMED_IN[device]]
        empty = [""] * (len(precisions) - len(timed))
        for job, *found in zip(TIMED, *timed, strict=True):
            yield [f"{name}, {model.pixels}x{model.pixels}: {job}", *found, *empty]
    with TemporaryDirectory() as folder:
        runs = [learn(device, each, Path(folder) / each) for each in precisions]
    for what, *found in zip(LEARNED, *runs, strict=True):
        yield [f"emoji model, trained: {what}", *found]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("sd.bench_gpu", __doc__.splitlines()[0])
    trial = "cpu: small networks and short runs, a trial of this script"
    parser.add_argument("--device", default="cuda", choices=[*PRECISIONS], help=trial)
    parser.add_argument("--out", type=Path, default=PAGE, help="a page; of a GPU only")
    args = parser.parse_args(argv)
    if not options.device_available(args.device):
        parser.error("there is no CUDA GPU here; --device cpu is a trial of this script without")
    heads = [f"{machine_name()}, torch {torch.__version__}", *PRECISIONS[args.device]]
    found = []
    for row in rows(args.device):
        found.append(row)
        print(*row, sep=" | ", flush=True)
        table = markdown_table(heads, found)
        if args.device == "cuda":
            replace_section(args.out, MARK, f"\n{table}\n")
    print(f"\n{table}")
    failed = [row[0] for row in found if "not " in " ".join(row[1:])]
    if failed:
        sys.exit(f"A check failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
