"""What sd_demo.py does to the emoji model: each objective, and compressibility for several beta and both references.

    python tests/bench_emoji.py     # on two cores; resumes where it stopped

Each run is a command that a reader can repeat; their folders are under --work. Writes toy/results/emoji_runs.json, .md,
the figure of the frontier (size of the images against animals recognised), the default run's LoRA, and the figures that
the README shows. Runs that --only leaves out keep what an earlier start wrote.
"""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository: this file is run as a script

import feedback
from toy import runs

RESULTS, CLASSIFIER = runs.ROOT / "toy" / "results", "toy/emoji_sd/classifier.py"
SIZE = "--objective compressibility"
DEFAULT = "initial, beta 0.06"
COMPRESSIBILITY = {  # the frontier: name of a line -> flags
    DEFAULT: SIZE,
    "initial, beta 0.04": f"{SIZE} --beta 0.04",
    "initial, beta 0.07": f"{SIZE} --beta 0.07",
    "initial, beta 0.2": f"{SIZE} --beta 0.2",
    "previous, beta 0.07": f"{SIZE} --reference previous --beta 0.07",
    "previous, beta 0.2": f"{SIZE} --reference previous --beta 0.2",
    "initial, beta 0.07, all steps": f"{SIZE} --beta 0.07 --skip-last 0",
    "the paper's recipe": f"{SIZE} --recipe paper --num-steps 10 --guidance-scale 1 --pairs-per-epoch 20 --epochs 19",
}  # the last has as many images as the others
OTHERS = {
    "incompressibility": "--objective incompressibility",
    "alignment": f"--objective {CLASSIFIER}:log_probability --watch {CLASSIFIER}:recognised_by_judge --num-steps 3 "
    "--epochs 40 --eval-images 180 --eval-every 8",
}
SHOWN = {DEFAULT: "progress", "incompressibility": "evaluation", "alignment": "evaluation"}  # in the README
SHORT = {DEFAULT: "compressibility"}
LORA = "pytorch_lora_weights.safetensors"
BLANK = feedback.jpeg_kb(Image.new("RGB", (64, 64), "white"))


def parse() -> Namespace:
    parser = runs.Parser(prog="bench_emoji.py", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/bench_emoji"), help="folder of the runs")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--only", nargs="+", choices=[*COMPRESSIBILITY, *OTHERS], help="these runs alone")
    return parser.parse_args()


def place(work: Path, name: str) -> Path:
    return work / "".join(c if c.isalnum() or c == "." else "-" for c in name)


def train(name: str, flags: str, work: Path) -> None:
    """Run sd_demo.py to its end, and evaluate it on noises that no epoch has looked at."""
    out = place(work, name)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    state = out / "checkpoint" / "state.pt"
    if out.exists() and not state.exists():
        shutil.rmtree(out)  # killed in its first epoch
    start = [sys.executable, "sd_demo.py"]
    if not (out / "evaluation.json").exists():
        more = ["--resume", str(out)] if state.exists() else [*flags.split(), "--out", str(out)]
        with (work / f"{out.name}.txt").open("a") as said:
            subprocess.run([*start, *more], check=True, env=env, stdout=said, stderr=said, cwd=runs.ROOT)
            last = [*start, "--evaluate", str(out), "--eval-images", "450"]
            subprocess.run(last, check=True, env=env, stdout=said, stderr=said, cwd=runs.ROOT)
    print(f"{name}: done", flush=True)


def told(name: str, flags: str, work: Path) -> dict:
    """What the JSON keeps of a run: its looks at held-out noises, its evaluation, its time."""
    out = place(work, name)
    config = json.loads((out / "config.json").read_text())
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    keys = ("epoch", "labels", "eval_score", "eval_win_rate", "watched", "kl", "kl_trained")
    return {
        "command": f"python sd_demo.py {flags}", "initial": config["initial"],
        "looks": [{key: row[key] for key in keys} for row in rows if row["eval_score"] is not None],
        "seconds": sum(row["seconds_sample"] + row["seconds_train"] for row in rows),
        "winners": [row["log_ratio_winners"] for row in rows], "losers": [row["log_ratio_losers"] for row in rows],
        "evaluation": json.loads((out / "evaluation.json").read_text()),
    }  # fmt: skip


def fallen(score: float, initial: float) -> float:
    """By how much of its size above a blank image's the mean JPEG has become smaller; scores are minus kB."""
    return 1 - (-score - BLANK) / (-initial - BLANK)


def table(result: dict) -> str:
    """All runs as a table in Markdown: the evaluation on 450 noises that no epoch has looked at."""
    lines = [
        "| run | score, initial to tuned | size above a blank image's | win rate (95 % interval) | animals right | KL "
        "| minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (name for name in COMPRESSIBILITY | OTHERS if name in result):
        run, found = result[name], result[name]["evaluation"]
        first, last = found["initial"], found["tuned"]
        sign = -1 if name == "incompressibility" else 1  # its score is the size, not minus the size
        change = "" if name == "alignment" else f"{-fallen(sign * last['score'], sign * first['score']):+.0%}"
        low, high = found["win_rate_interval"]
        cells = [name, f"{first['score']:.3f} to {last['score']:.3f}", change]
        cells += [f"{found['win_rate']:.1%} ({low:.1%} to {high:.1%})"]
        cells += [f"{first['watched']:.1%} to {last['watched']:.1%}", f"{run['looks'][-1]['kl_trained']:.1f}"]
        cells += [f"{run['seconds'] / 60:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw_frontier(result: dict, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name in COMPRESSIBILITY:
        if name not in result:
            continue
        run = result[name]
        initial = run["initial"]
        points = [(0, initial["watched"])]
        points += [(fallen(row["eval_score"], initial["eval_score"]), row["watched"]) for row in run["looks"]]
        x, y = zip(*points, strict=True)
        style = "-" if name.startswith("initial") else "--" if name.startswith("previous") else ":"
        axis.plot([100 * v for v in x], [100 * v for v in y], style, marker="o", markersize=3, label=name,
                  linewidth=2.5 if name == DEFAULT else 1.2)  # fmt: skip
    axis.axhline(80, color="0.7", linewidth=0.8)
    axis.axvline(35, color="0.7", linewidth=0.8)
    axis.set(xlabel="fall of the JPEG size above a blank image's (%)", ylabel="animals recognised (%)", ylim=(0, 103))
    axis.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    todo = {name: flags for name, flags in (COMPRESSIBILITY | OTHERS).items() if not args.only or name in args.only}
    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(lambda item: train(*item, args.work), todo.items()))
    file = RESULTS / "emoji_runs.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    result |= {name: told(name, flags, args.work) for name, flags in todo.items()}
    runs.save_json(file, result)
    runs.save_text(file.with_suffix(".md"), table(result))
    draw_frontier(result, RESULTS / "emoji_frontier.png")
    for name, figure in SHOWN.items():
        if name in todo:
            shutil.copy(place(args.work, name) / f"{figure}.png", RESULTS / f"emoji_{SHORT.get(name, name)}.png")
    if DEFAULT in todo:
        shutil.copy(place(args.work, DEFAULT) / "reward_curve.png", RESULTS / "emoji_curve.png")
        (RESULTS / "emoji_lora").mkdir(exist_ok=True)
        shutil.copyfile(place(args.work, DEFAULT) / "lora" / LORA, RESULTS / "emoji_lora" / LORA)


if __name__ == "__main__":
    main()
