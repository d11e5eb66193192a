"""What a run leaves to read: its result in sentences, a card for the LoRA, and report.html."""

import base64
import html
import os
import re
from argparse import Namespace
from pathlib import Path

from sd import files
from sd.metrics import as_sentence, count, describe_kl, epoch_word, percent, wilson
from sd.options import OF_PAIRS, PEOPLE
from sd.scorers import measure_of, split_objective

SETTINGS = "These are the settings that it was trained with; with others its effect may differ."
FIGURES = {  # file of a run -> what it shows
    "progress.png": "Held-out images, on which nothing is trained, over the training: each column "
    "keeps its prompt and starting noise. A number beside a row is the mean of all of them.",
    "reward_curve.png": "What was measured during the training.",
    "evaluation.png": "Before and after training, from the same new noise.",
    "evaluation_stock.png": "The same with the pipeline's own settings.",
}
STYLE = """<meta name=viewport content="width=device-width">
<style>
:root { color-scheme: light dark }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }
h1 { overflow-wrap: anywhere; line-height: 1.2 }
img { width: 100% }
pre { overflow-x: auto; background: #8882; padding: 1rem }
</style>"""


def settings_of(folder: Path) -> Namespace:
    return Namespace(**{**files.read_json(folder / "config.json"), "out": folder})


# The result


def result_sentences(folder: Path) -> list[str]:
    """What a run was trained on, what came of it, at which cost, and how far the model went.

    From evaluation.json where it is about the model as it is, else from the last held-out images.
    """
    settings, rows = settings_of(folder), files.read_lines(folder / "metrics.jsonl")
    if not rows:
        return ["No epoch is done, so nothing is learned yet."]
    last = rows[-1]
    preferences = f"{count(last['labels'], 'preference')} {source(settings)}"
    epochs = count(last["epoch"], epoch_word(settings.objective))
    sentences = [f"Trained on {preferences}, in {epochs}."]
    evaluation = folder / "evaluation.json"
    result = files.read_json(evaluation) if evaluation.exists() else {}
    if result.get("epoch") == last["epoch"]:
        sentences += evaluation_sentences(result, result["objective"], settings.watch)
    else:
        sentences += held_out_sentences(settings, rows)
    accuracy = last["accuracy"]
    if settings.objective in PEOPLE and accuracy is not None:
        sentences.append(
            f"Before it was trained on the last round's answers it agreed with {percent(accuracy)} "
            "of them; chance is 50 %."
        )
    kl = [words for row in rows if (words := describe_kl(row, settings.max_kl))]
    return sentences + [as_sentence(words) for words in kl[-1:]]


def source(settings: Namespace) -> str:
    """Where the labels come from."""
    people = {"human": "people", "tags": "tags of people"}
    scorers = split_objective(settings.objective) if settings.objective else []
    names = [name.rpartition(".py:")[2].replace("_", " ") for name in scorers]
    sources = [f"by {' and '.join(people.get(name, name) for name in names)}"] if names else []
    sources += [f"from {Path(settings.labels).name}"] if settings.labels else []
    return " and ".join(sources)


def held_out_sentences(settings: Namespace, rows: list[dict]) -> list[str]:
    """The last held-out images that metrics.jsonl has a number of, as `comparison_sentences`."""
    keys = {"score": "eval_score", "watched": "watched"}
    measured = [row for row in rows if any(row[key] is not None for key in keys.values())]
    result = {}
    if measured:
        for name, side in (("initial", settings.initial), ("tuned", measured[-1])):
            result[name] = {key: side[stored] for key, stored in keys.items()}
        pairs, share = measured[-1]["eval_pairs"], measured[-1]["eval_win_rate"]
        if pairs:
            result |= {"pairs": pairs, "win_rate": share, "win_rate_interval": wilson(share, pairs)}
    sentences = comparison_sentences(result, settings.objective, settings.watch)
    if "win_rate" not in result:
        sentences.append("Whether its images are better is not measured yet: --evaluate does it.")
    return sentences


def evaluation_sentences(result: dict, objective: str, watch: str | None = None) -> list[str]:
    """evaluation.json in words; watch: the scorer of --watch, as in config.json."""
    sentences = comparison_sentences(result, objective, watch)
    if result.get("annotators", 1) > 1:
        share = percent(result["more_than_half_of_votes"])
        sentences.append(f"In {share} of the questions more than half of the answers preferred it.")
    if result.get("skipped"):
        sentences.append(f"Skipped questions: {result['skipped']}.")
    if result.get("unscored"):
        sentences.append(f"Images without a score, which do not count: {result['unscored']}.")
    stock = comparison_sentences(result.get("stock", {}), objective, watch)
    if stock:
        sentences.append(f"With the pipeline's own settings, pipe(prompt): {' '.join(stock)}")
    return sentences


def comparison_sentences(result: dict, objective: str | None, watch: str | None) -> list[str]:
    """Tuned against initial model: who is preferred, the score, and what the labels do not see."""
    sentences, initial, tuned = [], result.get("initial", {}), result.get("tuned", {})
    if result.get("pairs"):
        low, high = result["win_rate_interval"]
        share, interval = percent(result["win_rate"]), f"{100 * low:.0f} to {percent(high)}"
        blind = f"Of {result['pairs']} blind answers {share} preferred the tuned model"
        scored = f"Of {result['pairs']} images from new noise {share} are better than before"
        words = blind if "votes" in result else scored
        sentences.append(f"{words} (95 % interval {interval}; ties count half).")
    for scorer, key in ((objective, "score"), (watch, "watched")):
        if tuned.get(key) is not None:
            words = measure_of(scorer or "watched score").say(tuned[key], initial[key])
            sentences.append(as_sentence(words))
    return sentences


# Card and page


def usage(
    folder: Path, prompt: str, *, pipeline: str, loading: dict, scheduler: dict | None
) -> str:
    """Python that loads the LoRA and draws an image as the training did; it runs as it stands.

    pipeline: its class in diffusers; loading: what it needs beside its name; scheduler: what DDIM
    needs beside the settings of the stock scheduler; None for a rectified flow, which has no eta.
    """
    args, classes, lines = settings_of(folder), [pipeline], []
    load = "from_single_file" if args.model.endswith(".safetensors") else "from_pretrained"
    dtype = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}[args.precision]
    call = {"num_inference_steps": args.num_steps, "guidance_scale": args.guidance_scale}
    if scheduler is not None:  # a scheduler's default for the last step is another
        classes, call = ["DDIMScheduler", pipeline], {**call, "eta": args.eta}
        options = keywords(scheduler)
        lines += [f"pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config{options})"]
    call |= {name: value for name in ("height", "width") if (value := getattr(args, name))}
    if args.init_lora:
        lines += [f"pipe.load_lora_weights({args.init_lora!r})", "pipe.fuse_lora()"]
        lines += ["pipe.unload_lora_weights()"]
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {', '.join(classes)}",
            "",
            f"pipe = {pipeline}.{load}({args.model!r}, dtype=torch.{dtype}{keywords(loading)})",
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")',
            *lines,
            "# It may say that there are no keys of the text encoder: that was not trained",
            f"pipe.load_lora_weights({os.path.abspath(folder / 'lora')!r})",
            f"image = pipe({prompt!r}{keywords(call)}).images[0]",
            'image.save("image.png")',
        ]
    )


def keywords(options: dict) -> str:
    return "".join(f", {name}={value!r}" for name, value in options.items())


def write(folder: Path, epoch: int, code: str) -> None:
    """README.md, a model card, and report.html, one file that needs no network, of a run.

    epoch: the last one that is kept; code: `usage`.
    """
    settings = settings_of(folder)
    method = "D3PO" if settings.loss in OF_PAIRS else settings.loss
    title = f"{Path(settings.model).name}, tuned by {method} on labels {source(settings)}"
    files.save_text(folder / "README.md", card(folder, title, epoch=epoch, code=code))
    files.save_text(folder / "report.html", page(folder, title, code=code))


def card(folder: Path, title: str, *, epoch: int, code: str) -> str:
    """Its code finds the LoRA in the card's folder, wherever that is."""
    local = code.replace(repr(os.path.abspath(folder / "lora")), "'lora'")
    parts = [f"# {title}", "\n".join(result_sentences(folder))]
    parts += [f"![{FIGURES[name]}]({name})\n\n*{FIGURES[name]}*" for name in pictures(folder)]
    parts += [f"A LoRA. In the folder of this file, run\n\n```python\n{local}\n```", SETTINGS]
    word = epoch_word(settings_of(folder).objective)
    parts += [f"It was made in {word} {epoch} of\n\n    {settings_of(folder).command}"]
    parts += ["The method: [D3PO](https://arxiv.org/abs/2311.13231). All numbers: metrics.jsonl."]
    return "\n\n".join(parts) + "\n"


def page(folder: Path, title: str, *, code: str) -> str:
    first, *more = (
        html.escape(sentence).replace(" %", "&nbsp;%") for sentence in result_sentences(folder)
    )
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>D3PO</title>{STYLE}"]
    parts += [f"<h1>{html.escape(title)}</h1><p>{first}</p>"]
    parts += ["<ul>", *(f"<li>{sentence}</li>" for sentence in more), "</ul>"]
    if warnings := collect_warnings(folder):
        text = "".join(f"<li>{html.escape(warning)}</li>\n" for warning in warnings)
        text = re.sub("(python sd_demo.py .+)</li>", r"<pre>\1</pre></li>", text)
        parts += [f"<h2>Warnings</h2><ul>{text}</ul>"]
    for name in pictures(folder):
        image = base64.b64encode((folder / name).read_bytes()).decode()
        parts += [f"<p>{FIGURES[name]}</p><img src=data:image/png;base64,{image} alt={name}>"]
    parts += [f"<h2>Use it</h2><pre>{html.escape(code)}</pre><p>{SETTINGS}"]
    parts += [f"<h2>How it was made</h2><pre>{html.escape(settings_of(folder).command)}</pre>"]
    parts += [f"<h2>All numbers</h2><pre>{html.escape(str(folder / 'metrics.jsonl'))}</pre>"]
    return "\n".join(parts) + "\n"


def pictures(folder: Path) -> list[str]:
    return [name for name in FIGURES if (folder / name).exists()]


def collect_warnings(folder: Path) -> list[str]:
    """Why a run ended early, and its warnings, each once with its epochs."""
    settings, epochs = settings_of(folder), {}
    for row in files.read_lines(folder / "metrics.jsonl"):
        for warning in row.get("warnings", []):
            epochs.setdefault(warning, []).append(str(row["epoch"]))
    time = epoch_word(settings.objective)
    warnings = [f"{warning} ({time} {', '.join(at)})" for warning, at in epochs.items()]
    return [settings.stopped, *warnings] if settings.stopped else warnings


def ending(folder: Path, epochs: int, objective: str | None) -> str:
    """The result of a run, where its LoRA is, and what can be done with it.

    epochs: those that are done, as --epochs counts them. After --labels alone people compare.
    """
    by_people = "" if objective else " --objective human"
    lines = [
        *result_sentences(folder),
        f"The LoRA: {folder / 'lora'}",
        f"The report: {folder / 'report.html'}",
        f"To compare it with the initial model: python sd_demo.py --evaluate {folder}{by_people}",
    ]
    if not settings_of(folder).stopped:  # which says itself how to go on
        more = 2 * max(epochs, 1)
        lines.append(f"To go on: python sd_demo.py --resume {folder} --epochs {more}")
    return "\n".join(lines)
