"""What sd_demo.py does to the emoji model: every objective, and one by several beta and references.

    python -m sd.bench_emoji    # 20 minutes on two cores; resumes where it stopped

Each run is a command that a reader can repeat, seed 0; its folder lies under --work. Writes into
sd/results: emoji_runs.json, the table of the page emoji_runs.md between its two marks, the figures
of the page, and the LoRA of the default run.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure

from sd import files
from sd.bench import make_parser, markdown_table, replace_section, size_change
from sd.files import LORA_FILE
from sd.options import positive

RESULTS = files.ROOT / "sd" / "results"
MARK = "<!-- python -m sd.bench_emoji writes what is between these two lines -->\n"
CLASSIFIER = "toy/emoji_sd/classifier.py"
NUM_EVALUATED = 450  # noises
DEFAULT, NO_BRAKE = "initial, beta 0.15", "--max-kl 1e9"
FRONTIER = {  # compressibility: name of a line -> flags
    DEFAULT: "",
    "initial, beta 0.1": f"--beta 0.1 {NO_BRAKE}",
    "initial, beta 0.06": f"--beta 0.06 {NO_BRAKE}",
    "initial, beta 0.04": f"--beta 0.04 {NO_BRAKE}",
    "previous, beta 0.15": f"--reference previous {NO_BRAKE}",
    "initial, beta 0.15, all steps": f"--skip-last 0 {NO_BRAKE}",
    "the paper's recipe": (  # as many images as the others
        "--recipe paper --num-steps 10 --guidance-scale 1 --prompts-per-epoch 20 --epochs 19"
    ),
}
RUNS = {
    **{name: f"--objective compressibility {flags}" for name, flags in FRONTIER.items()},
    "incompressibility": "--objective incompressibility",
    "alignment": (
        f"--objective {CLASSIFIER}:log_probability --watch {CLASSIFIER}:recognised_by_judge "
        "--num-steps 3 --epochs 40 --eval-images 180 --eval-every 8"
    ),
}
FIGURES = {  # of the page -> run and the file of its folder
    "compressibility": (DEFAULT, "progress.png"),
    "curve": (DEFAULT, "reward_curve.png"),
    "incompressibility": ("incompressibility", "evaluation.png"),
    "alignment": ("alignment", "evaluation.png"),
}
HEADS = (
    "run",
    "score, initial to tuned",
    "size above a blank image's",
    "win rate (95 % interval)",
    "animals right",
    "KL",
)


def folder_of(work: Path, name: str) -> Path:
    return work / "".join(c if c.isalnum() or c == "." else "-" for c in name)


def run(name: str, work: Path) -> None:
    """Run sd_demo.py to its end, and evaluate it on noises that no epoch has looked at."""
    out = folder_of(work, name)
    has_checkpoint = (out / "checkpoint" / "state.pt").exists()
    if out.exists() and not has_checkpoint:
        shutil.rmtree(out)  # killed in its first epoch
    start = [*RUNS[name].split(), "--out", str(out)]
    commands = [
        ["--resume", str(out)] if has_checkpoint else start,
        ["--evaluate", str(out), "--eval-images", str(NUM_EVALUATED)],
    ]
    one_core = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if not (out / "evaluation.json").exists():
        with (work / f"{out.name}.txt").open("a") as log:
            options = {"env": one_core, "cwd": files.ROOT, "stdout": log, "stderr": log}
            for flags in commands:
                subprocess.run([sys.executable, "sd_demo.py", *flags], check=True, **options)
    print(f"{name}: done", flush=True)


def summary(name: str, out: Path) -> dict:
    """What the JSON keeps of a run: held-out noises over its epochs, and its evaluation."""
    keys = ("epoch", "labels", "eval_score", "eval_win_rate", "eval_kl", "watched", "kl")
    keys += ("kl_trained", "log_ratio_winners", "log_ratio_losers")
    rows = files.read_lines(out / "metrics.jsonl")
    evaluated = [row for row in rows if row["eval_score"] is not None]
    return {
        "command": f"python sd_demo.py {RUNS[name]}".strip(),
        "initial": files.read_json(out / "config.json")["initial"],
        "epochs": [{key: row[key] for key in keys} for row in evaluated],
        "evaluation": files.read_json(out / "evaluation.json"),
    }


def cells(name: str, result: dict) -> list[str]:
    evaluation = result["evaluation"]
    initial, tuned = evaluation["initial"], evaluation["tuned"]
    low, high = evaluation["win_rate_interval"]
    is_size = "compressibility" in result["command"]
    return [
        name,
        f"{initial['score']:.3f} to {tuned['score']:.3f}",
        f"{size_change(tuned['score'], initial['score']):+.0%}" if is_size else "",
        f"{evaluation['win_rate']:.1%} ({low:.1%} to {high:.1%})",
        f"{initial['watched']:.1%} to {tuned['watched']:.1%}",
        f"{result['epochs'][-1]['kl_trained']:.1f}",
    ]


def table(results: dict) -> str:
    """All runs in Markdown, and their commands."""
    rows = [cells(*item) for item in results.items()]
    commands = [f"- {name}: `{result['command']}`" for name, result in results.items()]
    return "\n".join(["", markdown_table(HEADS, rows), *commands, "", ""])


def draw_frontier(results: dict, path: Path) -> None:
    """Size against animals recognised over the epochs of the runs of compressibility."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, marker in zip(FRONTIER, "o^sDvPx*", strict=False):
        initial = results[name]["initial"]
        rows = [initial, *results[name]["epochs"]]
        x = [-100 * size_change(row["eval_score"], initial["eval_score"]) for row in rows]
        y = [100 * row["watched"] for row in rows]
        style = {"initial": "-", "previous": "--"}.get(name.partition(",")[0], ":")
        width = 2.5 if name == DEFAULT else 1.2
        axis.plot(x, y, style, marker=marker, markersize=5, label=name, linewidth=width)
    axis.set_xlabel("fall of the JPEG size above a blank image's (%)")
    axis.set(ylabel="animals recognised (%)", ylim=(0, 103))
    axis.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def write(results: dict, folder: Path) -> None:
    """The numbers, their table in the page beside them, and their figure."""
    files.save_json(folder / "emoji_runs.json", results)
    replace_section(folder / "emoji_runs.md", MARK, table(results))
    draw_frontier(results, folder / "emoji_frontier.png")


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("sd.bench_emoji", __doc__.splitlines()[0])
    runs, at_a_time = files.ROOT / "runs" / "bench_emoji", "runs at a time, one core each"
    parser.add_argument("--work", type=Path, default=runs, help="folder of the runs")
    parser.add_argument("--processes", type=positive(int), default=2, help=at_a_time)
    args = parser.parse_args(argv)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(lambda name: run(name, work), RUNS))
    write({name: summary(name, folder_of(work, name)) for name in RUNS}, RESULTS)
    for figure, (name, file) in FIGURES.items():
        shutil.copy(folder_of(work, name) / file, RESULTS / f"emoji_{figure}.png")
    (RESULTS / "emoji_lora").mkdir(exist_ok=True)
    shutil.copyfile(
        folder_of(work, DEFAULT) / "lora" / LORA_FILE, RESULTS / "emoji_lora" / LORA_FILE
    )


if __name__ == "__main__":
    main()
