"""One command for a machine with a GPU: does it learn, what holds there, how fast is it.

    python -m sd.bench_gpu --minutes 9     # it downloads nothing, and writes what it has by then
    python -m sd.bench_gpu --device cpu    # small networks: a trial of this script, two minutes

In this order: sd_demo.py trains the emoji model in fp16; SD 1.5 with random weights: checks, times
of a pair and step, an epoch of the default run at 512 pixels, agreement with the stock pipeline,
and what rounding adds to the KL; then SDXL and SD 3; then SD 1.5 in the other precisions. What goes
wrong in a part is said in its line of the table, and the others go on.

Prints every line as it is measured, and on a GPU writes it into --out, between its two marks. Exits
with an error where a part failed or a check does not hold.
"""

import copy
import gc
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

try:
    import torch
    from accelerate.state import AcceleratorState
    from torch import Tensor, nn

    import d3po
    import sd_demo
    from sd import UserError, files, options
    from sd.bench import RESULTS, make_parser, replace_section, size_change, table
    from sd.bench_cost import HERE, Bench, Setup, Side, count, machine_name, race, seconds
    from sd.bench_models import ARCHITECTURES, Architecture, build, small
    from sd.families import DTYPES
    from sd.pipeline import decode
except ModuleNotFoundError as error:
    wanted = Path(__file__).parents[1].joinpath("requirements.txt").read_text()
    wanted = re.findall(r"^[\w-]+", wanted, re.MULTILINE)
    present = {found.name.lower().replace("_", "-") for found in metadata.distributions()}
    lacking = ", ".join(name for name in wanted if name.lower() not in present)
    sys.exit(f"{error}. This machine lacks {lacking}: pip install -r requirements.txt")

PAGE = RESULTS / "gpu.md"
MARK = "<!-- python -m sd.bench_gpu writes what is between these two lines -->\n"
MATRICES = {"cuda": 8192, "cpu": 512}  # rows and columns of the products that are timed
ROUNDS = {"cuda": 5, "cpu": 1}
SHORT = {"epochs": 1, "prompts_per_epoch": 1, "batch_size": 1, "images_per_prompt": 2}
TRIAL = {**SHORT, "num_steps": 3, "eval_images": 2, "eval_every": 1}  # of a CPU
EPOCH = {"epochs": 1, "eval_images": 1, "eval_every": 1}
SAME_GRADIENT = 0.01  # of its norm; sums on a GPU come in any order
SAME_MEMORY = 0.02
LENGTHS = 2, 6  # T at which memory is compared
MAX_SKIPPED = 10  # updates of a GradScaler, which begins too high
FLOOR_STEPS = 20  # T
PASSED, TOO_LARGE, NO_TIME = "passed", "does not fit", "no time was left"
Lines = Iterator[tuple[str, str]]  # what, and what was measured


class OutOfTime(BaseException):
    """The minutes are over; no `except Exception` on the way takes it for its own."""


def free() -> None:
    """Give back the memory of what is not needed any more, and forget accelerate's precision."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    AcceleratorState._reset_state(reset_partial_state=True)  # it has one at a time


def random_setup(architecture: Architecture, device: str, precision: str) -> Setup:
    load = partial(build, architecture, DTYPES[precision], device)
    one_pair = {"images_per_prompt": 2, "batch_size": 1}
    return Setup(load, device=device, precision=precision, **one_pair)


# Checks


def gradient(bench: Bench, *, checkpointing: bool) -> Tensor:
    """Of the LoRA, of the first update that does not overflow; NaN where all do."""
    setup, gradients = bench.setup, []

    def note(*_):
        gradients.append(torch.cat([weight.grad.flatten() for weight in setup.lora]))

    Side(HERE, bench, bench.ours, checkpointing).prepare()
    with setup.optimizer.optimizer.register_step_pre_hook(note):
        for _ in range(MAX_SKIPPED):
            bench.ours()
            if gradients:
                return gradients[0]
    return torch.full((1,), torch.nan)


def images_are_finite(bench: Bench) -> bool:
    x_0, conditioning = bench.trajectory.x[-1], bench.setup.model.conditioning
    try:
        decode(bench.setup.pipe, x_0, conditioning, names=["image"] * len(x_0))
    except (FloatingPointError, UserError):
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


# The parts


def matrix_rate(device: str, precision: str) -> float:
    """TFLOP/s of products of square matrices: the best of ten."""
    size = MATRICES[device]
    a = torch.randn(size, size, dtype=DTYPES[precision], device=device)
    return 2 * size**3 / min(seconds(partial(torch.mm, a, a)) for _ in range(10)) / 1e12


def learn(device: str, precision: str) -> Lines:
    """The default run on the emoji model; on the CPU a very short one."""
    settings = {"objective": "compressibility", "model": str(options.EMOJI), "seed": 0}
    settings |= {"device": device, "precision": precision} | (TRIAL if device == "cpu" else {})
    with TemporaryDirectory() as folder:
        took = seconds(lambda: sd_demo.run(**settings, out=Path(folder) / "run"))
        initial = files.read_json(Path(folder) / "run" / "config.json")["initial"]
        last = files.read_lines(Path(folder) / "run" / "metrics.jsonl")[-1]
    yield "seconds", f"{took:.0f}"
    yield "score", f"{initial['eval_score']:.3f} to {last['eval_score']:.3f}"
    change = size_change(last["eval_score"], initial["eval_score"])
    yield "JPEG size above that of an empty picture", f"{change:+.0%}"
    yield "animals recognised", f"{initial['watched']:.1%} to {last['watched']:.1%}"
    yield "KL of the held-out images, nats", f"{last['eval_kl']:.1f}"


def check_and_time(architecture: Architecture, device: str, precision: str) -> Lines:
    """Checks; and of one pair ms for a pair and step, share of the matrix rate, and peak memory."""
    rate = matrix_rate(device, precision)
    setup = random_setup(architecture, device, precision)
    bench = Bench(setup, 1, 2)
    sides = {
        "sampling": Side("", bench, bench.sample),
        "training by Eq. 14": Side("", bench, bench.ours),
        "the same with checkpointing": Side("", bench, bench.ours, checkpointing=True),
        "training the whole chain": Side("", bench, partial(bench.ours, loss="chain")),
    }
    measures = {"checks": partial(check, setup)}
    measures |= {f"{name}, ms": partial(time_side, side, rate) for name, side in sides.items()}
    for what, measure in measures.items():
        try:
            yield what, measure()
        except torch.OutOfMemoryError:
            yield what, TOO_LARGE
        setup.optimizer.zero_grad()
        torch.cuda.empty_cache()


def time_side(side: Side, rate: float) -> str:
    (times,), counts = race([side], ROUNDS[side.bench.setup.device]), count(side)
    median = times["seconds"][0]
    share = counts["gflop"] / 1e3 / median / rate
    return f"{1e3 * median:.3g} ({share:.0%} of the matrix rate; {counts['peak_gb']:.3g} GB)"


def epoch(architecture: Architecture, device: str, precision: str) -> Lines:
    """One epoch of the default run on random weights, and the most that the allocator gave."""
    pipe = build(architecture, DTYPES[precision], device)
    settings = {"objective": "compressibility", "device": device, "precision": precision}
    settings |= TRIAL if device == "cpu" else EPOCH
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with TemporaryDirectory() as folder:
        sd_demo.run(model=pipe, prompts="animals", **settings, out=Path(folder) / "run")
        (row,) = files.read_lines(Path(folder) / "run" / "metrics.jsonl")
    yield "sampling, seconds", f"{row['seconds_sample']:.1f}"
    yield "training, seconds", f"{row['seconds_train']:.1f}"
    if device == "cuda":
        yield "peak of the allocator, GB", f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"


def agreement(architecture: Architecture, device: str, precision: str) -> Lines:
    """The states of the stock pipeline at eta = 0, each against our mean from the one before."""
    setup = random_setup(architecture, device, precision)
    pipe, conditioning, states = setup.pipe, setup.model.conditioning, []
    T, cond = 10, torch.zeros(1, dtype=torch.long, device=setup.accelerator.device)
    empty, prompted = conditioning.batch(cond)["encoder_hidden_states"].chunk(2)

    def keep(pipe, step, time, latents):
        states.append(latents["latents"].float())
        return {}

    x_T = torch.randn(1, *setup.model.latent_shape).to(prompted)
    pipe(
        prompt_embeds=prompted,
        negative_prompt_embeds=empty,
        latents=x_T,
        eta=0.0,
        num_inference_steps=T,
        guidance_scale=setup.args.guidance_scale,
        output_type="latent",
        callback_on_step_end=keep,
    )
    schedule = d3po.make_schedule(setup.model.policy.alpha_bars.cpu(), T, eta=1e-4)  # without noise
    errors, before = [], x_T.float()
    for i, after in enumerate(states):
        with torch.no_grad():
            mean = d3po.policy_mean(setup.model.sampler, schedule, i, before, cond)
        errors.append(((mean - after).norm() / after.norm()).item())
        before = after
    yield f"largest relative difference of {T} steps", f"{max(errors):.1e}"


def rounding_floor(architecture: Architecture, device: str, precision: str) -> Lines:
    """KL that rounding alone adds: log-ratios of a LoRA in this precision, beside float32."""
    stock = build(architecture, DTYPES[precision], device)
    means = {}
    for kind in (precision, "fp32"):
        load = partial(copy_as, stock, DTYPES[kind])
        setup = Setup(load, device=device, precision=kind)
        generator = torch.Generator().manual_seed(0)
        for weight in setup.lora:
            weight.data.copy_(0.02 * torch.randn(weight.shape, generator=generator))
        schedule = d3po.make_schedule(setup.model.policy.alpha_bars.cpu(), FLOOR_STEPS)
        cond = torch.zeros(1, dtype=torch.long, device=setup.accelerator.device)
        for i in (3, 10, 16):
            x = torch.randn(1, *setup.model.latent_shape, generator=generator).to(cond.device)
            with torch.no_grad():
                policy, reference = (
                    d3po.policy_mean(denoiser, schedule, i, x, cond)
                    for denoiser in (setup.model.sampler, setup.model.reference)
                )
            means.setdefault(i, []).append((policy - reference) / schedule.sigma[i])
        del setup
        free()
    for i, (half, single) in means.items():
        yield f"step {i} of {FLOOR_STEPS}, nats", f"{(half - single).square().sum() / 2:.2g}"


def copy_as(pipe, dtype: torch.dtype):
    return copy.deepcopy(pipe).to(dtype)


def make_parts(device: str) -> dict[str, Callable[[], Lines]]:
    first, *others = ("fp16", "bf16", "fp32") if device == "cuda" else ("fp32",)
    scale = small if device == "cpu" else lambda model: model
    models = {name: scale(model) for name, model in ARCHITECTURES.items()}
    models = {f"{name}, {model.pixels}x{model.pixels}": model for name, model in models.items()}
    (sd15, model), *larger = models.items()
    where = device, first
    parts = {
        f"emoji model, trained in {first}": partial(learn, *where),
        f"{sd15}, {first}": partial(check_and_time, model, *where),
        f"{sd15}, {first}, an epoch": partial(epoch, model, *where),
        f"{sd15}, {first}, the stock pipeline": partial(agreement, model, *where),
        f"{sd15}, {first}, rounding": partial(rounding_floor, model, *where),
    }
    parts |= {f"{name}, {first}": partial(check_and_time, other, *where) for name, other in larger}
    for precision in others:
        parts[f"{sd15}, {precision}"] = partial(check_and_time, model, device, precision)
    return parts


# The table


def measure(
    parts: dict[str, Callable[[], Lines]], minutes: float, show: Callable[[dict], None]
) -> None:
    """Show the lines of every part; what goes wrong in one is its line, as is the end of time."""

    def stop(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    end = time.monotonic() + 60 * minutes
    for part, lines in parts.items():
        free()
        left, problem = end - time.monotonic(), None
        try:
            if left <= 0:
                raise OutOfTime
            signal.setitimer(signal.ITIMER_REAL, left)
            try:
                for what, measured in lines():
                    show({"part": part, "what": what, "measured": measured})
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except OutOfTime:
            problem = NO_TIME
        except Exception as error:  # of any kind: it is what this part has to say
            problem = f"failed: {type(error).__name__}: {' '.join(str(error).split()):.150}"
        if problem:
            show({"part": part, "what": "", "measured": problem})


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("sd.bench_gpu", __doc__.splitlines()[0])
    trial = "cpu: small networks and short runs, a trial of this script"
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help=trial)
    minutes = "the most that it takes"
    parser.add_argument("--minutes", type=float, default=9, help=minutes)
    parser.add_argument("--out", type=Path, default=PAGE, help="a page; of a GPU only")
    args = parser.parse_args(argv)
    if not options.device_available(args.device):
        parser.error("there is no CUDA GPU here; --device cpu is a trial of this script without")
    machine, lines = f"{machine_name()}, torch {torch.__version__}", []

    def show(line: dict) -> None:
        lines.append(line)
        print(*line.values(), sep=" | ", flush=True)
        if args.device == "cuda":
            replace_section(args.out, MARK, f"\n{machine}\n\n{table(lines)}\n")

    measure(make_parts(args.device), args.minutes, show)
    print(f"\n{machine}\n\n{table(lines)}")
    wrong = [line for line in lines if line["measured"].startswith(("failed", "not "))]
    if wrong:
        sys.exit(f"{len(wrong)} lines of the table have failed.")


if __name__ == "__main__":
    main()
