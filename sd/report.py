"""What a run leaves to read: README.md for who gets the LoRA, report.html for who made it."""

import base64
import html
from argparse import Namespace
from pathlib import Path

from sd import files

FIGURES = {  # file of a run -> what it shows
    "reward_curve.png": "Over the epochs.",
    "progress.png": "The same noises over the epochs; no training saw them.",
    "evaluation.png": "Initial and tuned model on noises of the evaluation.",
    "evaluation_stock.png": "The same at the pipeline's own settings.",
}
STYLE = """<style>
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #8882; padding: 1rem }
th { text-align: left; font-weight: normal; padding-right: 2rem }
</style>"""


def settings_of(run: Path) -> Namespace:
    return Namespace(**{**files.read_json(run / "config.json"), "out": run})


def usage(run: Path, prompt: str, *, pipeline: str, flow: bool) -> str:
    """Python that loads the LoRA and draws an image as the training did; it runs as it stands.

    pipeline: its class in diffusers; flow: whether it is a rectified flow, which has no eta.
    """
    args = settings_of(run)
    load = "from_single_file" if args.model.endswith(".safetensors") else "from_pretrained"
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[args.precision]
    call = {"num_inference_steps": args.num_steps, "guidance_scale": args.guidance_scale}
    call |= {} if flow else {"eta": args.eta}
    call |= {name: value for name in ("height", "width") if (value := getattr(args, name))}
    settings = ", ".join(f"{name}={value!r}" for name, value in call.items())
    lines = [
        "import torch",
        f"from diffusers import {'' if flow else 'DDIMScheduler, '}{pipeline}",
        "",
        f"pipe = {pipeline}.{load}({args.model!r}, dtype=torch.{dtype})",
        'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
    ]
    if not flow:  # a scheduler's default for the last step is another
        lines += [
            'options = {"set_alpha_to_one": False, "clip_sample": False}',
            "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **options)",
        ]
    if args.init_lora:
        lines += [f"pipe.load_lora_weights({args.init_lora!r})", "pipe.fuse_lora()"]
        lines += ["pipe.unload_lora_weights()"]
    lines += [
        "# That it finds no keys of the text encoder is as it should be",
        f"pipe.load_lora_weights({str(run.resolve() / 'lora')!r})",
        f"image = pipe({prompt!r}, {settings}).images[0]",
        'image.save("image.png")',
    ]
    return "\n".join(lines)


def write(run: Path, epoch: int, code: str) -> None:
    """README.md, a model card, and report.html, one file that needs no network, of a run.

    code: `usage`.
    """
    args = settings_of(run)
    learned = f"objective {args.objective}" if args.objective else f"labels of {args.labels}"
    title = f"LoRA for {args.model}, {learned}, {epoch} epochs of D3PO (arXiv 2311.13231)"
    rows = files.read_lines(run / "metrics.jsonl")
    evaluation = run / "evaluation.json"
    result = files.read_json(evaluation) if evaluation.exists() else {}
    stock = result.pop("stock", None)
    note = "At the pipeline's own settings its effect is not measured: --evaluate does it."
    if stock:
        note = f"At the pipeline's own settings, pipe(prompt), its effect: {format_value(stock)}."
    pictures = [name for name in FIGURES if (run / name).exists()]

    card = [f"# {title}", f"    {args.command}", f"```python\n{code}\n```", note]
    card += [f"![{FIGURES[name]}]({name})" for name in pictures]
    card += [f"Evaluation: {format_value(result)}."] if result else []
    files.save_text(run / "README.md", "\n\n".join(card) + "\n")

    page = [f"<!doctype html><html lang=en><meta charset=utf-8><title>D3PO</title>{STYLE}"]
    page += [f"<main><h1>{html.escape(title)}</h1><pre>{html.escape(args.command)}</pre>"]
    page += [f"<h2>Use it</h2><pre>{html.escape(code)}</pre><p>{html.escape(note)}"]
    for name in pictures:
        image = base64.b64encode((run / name).read_bytes()).decode()
        page += [f"<h2>{FIGURES[name]}</h2><img src=data:image/png;base64,{image} alt={name}>"]
    stopped = getattr(args, "stopped", None)
    told = {stopped: []} if stopped else {}  # warning: epochs
    for row in rows:
        for warning in row.get("warnings", []):
            told.setdefault(warning, []).append(str(row["epoch"]))
    last = {key: value for key, value in (rows or [{}])[-1].items() if key != "warnings"}
    if told:
        lines = [
            f"{warning} (epoch {', '.join(at)})" if at else warning for warning, at in told.items()
        ]
        page += ["<h2>Warnings</h2><ul>", *(f"<li>{html.escape(line)}" for line in lines), "</ul>"]
    for head, content in (("Evaluation", result), ("The last epoch", last)):
        known = {key: value for key, value in content.items() if value is not None}
        cells = "".join(
            f"<tr><th>{key}<td>{html.escape(format_value(v))}" for key, v in known.items()
        )
        page += [f"<h2>{head}</h2><table>{cells}</table>"] if known else []
    files.save_text(run / "report.html", "\n".join(page) + "\n")


def format_value(value) -> str:
    """A value of a table, numbers to four digits."""
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {format_value(part)}" for key, part in value.items() if part is not None
        )
    if isinstance(value, list):
        return " to ".join(map(format_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def ending(folder: Path, epochs: int, objective: str | None) -> str:
    """Where a run left its LoRA, and what can be done with it."""
    more = "" if objective else " --objective OBJECTIVE"
    return (
        f"The LoRA: {folder / 'lora'}\nThe report: {folder / 'report.html'}\n"
        f"Evaluate: python sd_demo.py --evaluate {folder}{more}\n"
        f"Go on: python sd_demo.py --resume {folder} --epochs {2 * epochs}"
    )
