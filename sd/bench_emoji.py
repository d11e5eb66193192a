"""What sd_demo.py does to the emoji model: every objective, and one by several beta and references.

    python -m sd.bench_emoji    # 20 minutes on two cores; resumes where it stopped

Each run is a command that a reader can repeat, seed 0. Writes into sd/results: emoji_runs.json, the
table of the page emoji_runs.md between its two marks, the figures of the page, and the LoRA of the
default run.
"""

import shutil
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from sd import bench
from sd.bench import CHAIN, RESULTS, Job, size_change
from sd.files import LORA_FILE
from sd.options import as_flags
from sd.scorers import compressibility, incompressibility
from toy.emoji_sd import classifier

MARK = "<!-- python -m sd.bench_emoji writes what is between these two lines -->\n"
CLASSIFIER = "toy/emoji_sd/classifier.py"
JUDGED = 450  # images
EQ14 = {"loss": "eq14", "lr": 1.5e-3, "beta": 0.15, **bench.NO_LIMIT}
FRONTIER = {  # compressibility: name of a line -> settings
    CHAIN: {},
    f"{CHAIN}, half of beta": {"beta": bench.WHOLE_CHAIN["beta"] / 2, **bench.NO_LIMIT},
    f"{CHAIN}, twice beta": {"beta": bench.WHOLE_CHAIN["beta"] * 2},
    f"{CHAIN}, all steps": {"skip_last": 0, **bench.NO_LIMIT},
    "Eq. 14": EQ14,
    "Eq. 14, moving reference": {**EQ14, "reference": "previous"},
    "Eq. 14, as released": {
        "recipe": "paper",
        "num_steps": 10,
        "guidance_scale": 1,
        "prompts_per_epoch": 16,  # as many images
        "epochs": 12,
    },
}
RUNS = {
    **{name: {"objective": "compressibility", **FRONTIER[name]} for name in FRONTIER},
    "incompressibility": {"objective": "incompressibility"},
    "alignment": {
        "objective": f"{CLASSIFIER}:log_probability",
        "watch": f"{CLASSIFIER}:recognised_by_judge",
        "num_steps": 3,
        "epochs": 10,
    },
}
SCORES = {"incompressibility": incompressibility, "alignment": classifier.log_probability}
FIGURES = {  # of the page -> run and the file of its folder
    "compressibility": (CHAIN, "progress.png"),
    "curve": (CHAIN, "reward_curve.png"),
    "incompressibility": ("incompressibility", "progress.png"),
    "alignment": ("alignment", "progress.png"),
}
JOBS = [Job({"name": name}, settings) for name, settings in RUNS.items()]


def measure(job: Job, folder: Path) -> dict:
    """Run to the end, and judge on images from noise that no epoch has looked at."""
    run = bench.train(job, folder)
    score = SCORES.get(job.key["name"], compressibility)
    return {
        "curve": bench.curve(run),
        "judged": bench.judge(run, {1: run / "lora"}, score, images=JUDGED),
    }


def row_of(run: dict) -> dict:
    initial, tuned = run["judged"]
    low, high = tuned["win_rate_interval"]
    row = {"run": run["name"], "score before": f"{initial['score']:.3f}"}
    row["score"] = f"{tuned['score']:.3f}"
    if run["name"] != "alignment":
        change = size_change(tuned["score"], initial["score"])
        row["size above an empty picture's"] = f"{change:+.0%}"
    row["win rate (95 % interval)"] = f"{tuned['win_rate']:.1%} ({low:.1%} to {high:.1%})"
    row["animals recognised before"] = f"{initial['animals']:.1%}"
    return row | {"animals recognised": f"{tuned['animals']:.1%}", "KL": f"{tuned['kl']:.1f}"}


def section(runs: list[dict]) -> str:
    """All runs in Markdown, and their commands."""
    if not runs:
        return "\nNot measured yet.\n\n"
    commands = [f"- {run['name']}: `sd_demo.py {as_flags(run['settings'])}`" for run in runs]
    return "\n".join(["", bench.table([row_of(run) for run in runs]), *commands, "", ""])


def draw_frontier(runs: list[dict], path: Path) -> None:
    """Size against animals recognised over the epochs of the runs of compressibility."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for run, marker in zip(runs, "o^sDvPx", strict=False):
        points, name = run["curve"], run["name"]
        x = [-100 * size_change(point["score"], points[0]["score"]) for point in points]
        y = [100 * point["animals"] for point in points]
        line, width = "-" if name.startswith(CHAIN) else "--", 2.5 if name == CHAIN else 1.2
        axis.plot(x, y, line, marker=marker, markersize=5, label=name, linewidth=width)
    axis.set_xlabel("fall of the JPEG size above an empty picture's (%)")
    axis.set(ylabel="animals recognised (%)", ylim=(0, 103))
    axis.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)


def write(folder: Path, work: Path) -> None:
    """The table of the page, its figures, and the LoRA of the default run."""
    runs = bench.finished(folder / "emoji_runs.json", JOBS)
    bench.replace_section(folder / "emoji_runs.md", MARK, section(runs))
    if frontier := [run for run in runs if run["name"] in FRONTIER]:
        draw_frontier(frontier, folder / "emoji_frontier.png")
    made = {job.key["name"]: work / job.name / "run" for job in JOBS}
    copies = {f"emoji_{figure}.png": (name, file) for figure, (name, file) in FIGURES.items()}
    copies[f"emoji_lora/{LORA_FILE}"] = CHAIN, f"lora/{LORA_FILE}"
    for copy, (name, file) in copies.items():
        if (made[name].parent / "result.json").exists():
            (folder / copy).parent.mkdir(exist_ok=True)
            shutil.copyfile(made[name] / file, folder / copy)


def main(argv: list[str] | None = None) -> None:
    parser = bench.make_parser("sd.bench_emoji", __doc__.splitlines()[0])
    bench.add_runner_flags(parser, "bench_emoji")
    args = parser.parse_args(argv)
    redraw = partial(write, RESULTS, args.work)
    bench.run_jobs(JOBS, measure, args, store=RESULTS / "emoji_runs.json", write=redraw)


if __name__ == "__main__":
    main()
