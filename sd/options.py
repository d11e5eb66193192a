"""The command line of sd_demo.py: flags, presets, and in one place which of them counts.

What was typed comes first, then the presets of --loss, then the recipe, then the presets for
people, then those of the model, then the defaults. With --resume or --evaluate it is what was
typed, then what the run has.
"""

import argparse
import math
import os
import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from sd import files, run_folder
from sd.cost import Cost
from sd.families import DTYPES, PRESETS, pipeline_name
from sd.label_files import epochs_given
from sd.losses import LOSSES, SCORED
from sd.scorers import AESTHETIC_HEAD, CLIP

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EMOJI = files.ROOT / "toy" / "emoji_sd"

# What measured best on the emoji model
EMOJI_PRESETS = """
    --epochs 24 --prompts-per-epoch 4 --images-per-prompt 8 --batch-size 4 --num-steps 10
    --guidance-scale 1 --lr 1.5e-3 --beta 0.15 --no-gradient-checkpointing
    --eval-images 90 --eval-every 4 --max-kl 25
"""
# A label is dear: used again, small first steps, an average in place of the last weights, a brake.
# What measured best on the emoji model: sd/results/people.md
CHAIN = "--loss chain --update-every trajectory --batch-size 1 --replay 4"
FEW_LABELS = "--average-weights --max-kl 30 --eval-images 16 --eval-every 1"
HUMAN_PRESETS = {  # few questions an epoch: a person soon sees what the clicks do
    "human": f"""
        {CHAIN} --epochs 20 --prompts-per-epoch 8 --images-per-prompt 2 --beta 0.1 --warm-up 8
        {FEW_LABELS}""",
    "tags": f"""
        --epochs 10 --prompts-per-epoch 8 --images-per-prompt 7 --beta 0.03 --warm-up 6 --replay 8
        {FEW_LABELS}""",
}
LABELS_PRESET = f"{CHAIN} --beta 0.06 {FEW_LABELS}"
# Table 2 and Sec. 5.1 (4 GPUs, 2 batches of 10 pairs each): as released, and as Alg. 1 is printed
TABLE_2 = """
    --epochs 400 --prompts-per-epoch 80 --images-per-prompt 2 --batch-size 1 --num-steps 20 --eta 1
    --guidance-scale 5 --loss eq14 --reference initial --skip-last 0 --replay 0
    --no-average-weights --warm-up 1 --lr 3e-5 --lr-schedule constant --weight-decay 1e-4
    --max-grad-norm 1
"""
RECIPES = {
    "paper": f"{TABLE_2.rstrip()} --update-every trajectory --clip 0.1",  # one update a pair
    "alg1": f"{TABLE_2.rstrip()} --update-every timestep",
}
LOSS_PRESETS = {"sft": "--beta 0", "ddpo": "--clip 0.1"}  # the paper's SFT has no KL
EPILOG = f"""defaults of their own, after which comes what you type:
  the emoji model: {EMOJI_PRESETS.strip()}
  --objective human: {" ".join(HUMAN_PRESETS["human"].split())}
  --objective tags: {" ".join(HUMAN_PRESETS["tags"].split())}
  --labels: {" ".join(LABELS_PRESET.split())}, and alone as many --epochs as --passes
  --recipe paper: {RECIPES["paper"].strip()}
  --recipe alg1: the same, but --update-every timestep and no --clip
  --loss sft: {LOSS_PRESETS["sft"]}
  --loss ddpo: {LOSS_PRESETS["ddpo"]}"""
PAPER_BETA = 0.1  # of the mean over the D latent elements: 0.1 / D of the sum
# Of one start, not of the run
UNSAVED_FLAGS = {"out", "resume", "evaluate", "dry_run", "port", "device"}


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the longest common flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=27)


def positive(kind: type):
    """A positive and finite number, for argparse."""

    def parse_number(text: str):
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text}: give a positive number")
        return value

    parse_number.__name__ = kind.__name__
    return parse_number


count, number = positive(int), positive(float)


def not_negative(text: str) -> float:
    return float(text) and positive(float)(text)


not_negative.__name__ = "float"


def device_available(device: str) -> bool:
    """Whether this machine has a device of --device."""
    checks = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    return device not in checks or checks[device]()


def uses_cuda(device: str) -> bool:
    return device in ("auto", "cuda") and device_available("cuda")


def build_parser() -> tuple[ArgumentParser, dict]:
    """The flags, and their defaults. The parser itself gives only what was typed."""
    parser = ArgumentParser(
        prog="sd_demo.py",
        usage="%(prog)s --objective OBJECTIVE [flags]   (--help lists the flags)",
        description="D3PO on Stable Diffusion, with LoRA; labels from a score or from people.",
        epilog=EPILOG,
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    defaults = {}

    def flags(title: str):
        group = parser.add_argument_group(title)

        def add(flag: str, default=None, *, help: str, **options):
            shown = "" if default is None else f" (default: {default})"
            defaults[group.add_argument(flag, help=help + shown, **options).dest] = default

        return add

    add_common_flags(flags("the common ones"))
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    add = flags("what to learn")
    add("--images", metavar="DIR", help="of the images of --labels; by default its own folder")
    add("--passes", 4, type=count, metavar="N", help="over --labels, before --objective")
    watched = "a scorer that is only reported; by default the emoji model's classifier, else none"
    add("--watch", metavar="SCORER", help=watched)
    people = "people who answer each question of human and tags"
    add("--annotators", 1, type=count, metavar="N", help=people)
    asks = "above the images; by default which is better, or which are bad"
    add("--question", metavar="TEXT", help=asks)
    port = "of the page for people; by default the first free one from 7860"
    add("--port", type=int, metavar="N", help=port)
    add("--clip-model", CLIP, metavar="CLIP", help="of aesthetic and alignment: hub id or folder")
    head = "state dict of its linear layers: URL or file"
    add("--aesthetic-head", AESTHETIC_HEAD, metavar="HEAD", help=head)

    add = flags("sampling")
    lora = "begin from the model with this LoRA in it: folder or file; by default none"
    add("--init-lora", metavar="PATH", help=lora)
    add("--height", type=count, metavar="N", help="of images, pixels; by default the model's")
    add("--width", type=count, metavar="N", help="of images, pixels; by default the model's")
    add("--eta", 1.0, type=number, metavar="ETA", help="DDIM's noise scale, 0 < eta <= 1")
    guided = "of the prompt; at 1 and below there is no guidance, as in the stock pipelines"
    add("--guidance-scale", 5.0, type=not_negative, metavar="X", help=guided)

    add = flags("the method")
    recipes = "paper: defaults of Table 2 and the release; alg1: as printed, without its clamp"
    add("--recipe", "default", choices=["default", *RECIPES], help=recipes)
    losses = "Eq. 14, Eq. 12, Eq. 5 on whole chains, or a method that they are compared with"
    add("--loss", "eq14", choices=[*LOSSES], help=losses)
    clamp = "clamp pi_theta / pi_ref, or DDPO's ratio, to 1 +- this; by default no clamp"
    add("--clip", type=number, metavar="X", help=clamp)
    references = "the initial model, or the one that sampled"
    add("--reference", "initial", choices=["initial", "previous"], help=references)
    add("--replay", 0, type=int, metavar="N", help="batches of earlier groups in each epoch")
    shown = "show and save the average of the weights over the last tenth of the epochs"
    on_off = argparse.BooleanOptionalAction
    add("--average-weights", False, action=on_off, help=shown)
    skipped = "do not train the last N steps: their sigma is tiny"
    add("--skip-last", 2, type=int, metavar="N", help=skipped)
    share = "train each batch on a random share of the other steps, 0 < X <= 1: less time"
    add("--step-fraction", 1.0, type=number, metavar="X", help=share)
    updates = "update the weights at each step's loss, or once after the last"
    add("--update-every", "timestep", choices=["timestep", "trajectory"], help=updates)
    falls = "the step size falls to 0 as a cosine, or stays"
    add("--lr-schedule", "cosine", choices=["cosine", "constant"], help=falls)
    add("--warm-up", 1, type=count, metavar="N", help="epochs in which the step size rises to --lr")
    add("--weight-decay", 1e-4, type=not_negative, metavar="X", help="of AdamW, per unit of --lr")
    add("--max-grad-norm", 1.0, type=number, metavar="X", help="gradients are clipped to this norm")
    add("--lora-rank", 16, type=count, metavar="N", help="of the LoRA on queries, keys and values")

    add = flags("the machine")
    size = "groups at a time on each device, and in an update"
    add("--batch-size", 1, type=count, metavar="N", help=size)
    devices, best = ["auto", "cpu", "cuda", "mps"], "auto: the best one that there is"
    add("--device", "auto", choices=devices, help=f"to compute on; {best}")
    precision = "fp16" if uses_cuda("auto") else "fp32"
    add("--precision", precision, choices=list(DTYPES), help="of all but the LoRA and log-probs")
    add("--gradient-checkpointing", True, action=on_off, help="less memory, a third more time")

    add = flags("the evaluation")
    add("--eval-images", 45, type=count, metavar="N", help="held-out noises, the prompts in turn")
    asked = "of these noises, as --prompts; by default those that are sampled"
    add("--eval-prompts", metavar="PROMPTS", help=asked)
    between = "epochs from one evaluation of them to the next"
    add("--eval-every", 5, type=count, metavar="N", help=between)
    return parser, defaults


def add_common_flags(add) -> None:
    """With the usage and the description, they fit on a screen of 40 lines."""
    objectives = (
        "compressibility, incompressibility, aesthetic, alignment, or FILE.py:FUNCTION of (PIL "
        "images, prompts) -> numbers, None for no score; several with commas: better is who is "
        "worse in none and better in one. Or ask people on a page: human (which of two is "
        "better?), tags (which are bad?)"
    )
    add("--objective", help=objectives)
    files = ".jsonl, .json, .csv, .tsv, or a folder with w/ and l/: see sd/label_files.py"
    add("--labels", metavar="FILE", help=f"learn from labels that are there already: {files}")
    lists = "animals, hand, unsafe (App. C), or a file: .jsonl, .json, .csv, .tsv, else lines"
    kept = "by default animals; with --labels alone, but for emoji, its own"
    add("--prompts", help=f"{lists}; {kept}")
    models = "hub id, folder or .safetensors file of SD, SDXL, SD3 or Flux"
    where = "by default SD 1.5 with CUDA, else the bundled emoji model"
    add("--model", help=f"{models}; {where}")
    epochs = "times to sample and train; with --labels alone, passes over it"
    add("--epochs", 50, type=count, metavar="N", help=epochs)
    groups = "groups of images, each of one prompt and x_T"
    add("--prompts-per-epoch", 8, type=count, metavar="N", help=groups)
    size = "images of a group: K(K-1)/2 pairs; people are asked K of them (K = 2: one)"
    add("--images-per-prompt", 4, type=int, metavar="K", help=size)
    add("--num-steps", 20, type=count, metavar="T", help="denoising steps")
    strength = "strength of the KL, per nat of a summed log-prob; reward-weighted: temperature"
    add("--beta", 0.05, type=not_negative, metavar="BETA", help=strength)
    add("--lr", 3e-4, type=number, help="AdamW's largest step size")
    braked = "by default 30 for people and --labels, 25 for the emoji model, else none"
    brake = f"stop before this KL of held-out images to the initial model, nats; {braked}"
    add("--max-kl", type=number, metavar="NATS", help=brake)
    add("--seed", 0, type=int, metavar="N", help="of everything")
    add("--out", type=Path, metavar="RUN", help="new folder; by default runs/OBJECTIVE-1, -2, ...")
    add("--resume", type=Path, metavar="RUN", help="go on with a run, from its last whole epoch")
    noises = "tuned against initial model on new noises"
    add("--evaluate", type=Path, metavar="RUN", help=noises)
    plan = "check everything, print the plan, train nothing"
    add("--dry-run", False, action="store_true", help=plan)


def parse(argv: list[str] | None = None) -> tuple[ArgumentParser, Namespace]:
    """The settings of a run. Exits with a sentence where they cannot be meant."""
    parser, defaults = build_parser()
    typed = vars(parser.parse_args(argv))
    # A run may be resumed from another folder
    for name in {"model", "init_lora", "labels", "images", "eval_prompts"} & typed.keys():
        if os.path.exists(typed[name]):
            typed[name] = str(Path(typed[name]).resolve())
    try:
        if typed.get("device") == "cpu":
            defaults["precision"] = "fp32"
        if "resume" in typed or "evaluate" in typed:
            saved = saved_settings(typed, defaults)
            settings = {**defaults, **saved, **typed, "out": saved["out"]}
        else:
            settings = {**defaults, **presets(parser, typed, defaults), **typed}
            words = ["python", "sd_demo.py", *(sys.argv[1:] if argv is None else argv)]
            settings["command"] = shlex.join(words)
        args = Namespace(**settings, groups_given=0)  # main counts those of --labels
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return parser, args


def presets(parser: ArgumentParser, typed: dict, defaults: dict) -> dict:
    """What the model, people, the recipe and the loss set, in this order."""

    def settings_of(flags: str) -> dict:
        return vars(parser.parse_args(flags.split()))

    cuda = uses_cuda(typed.get("device", "auto"))
    model = typed.get("model", SD15 if cuda else str(EMOJI))
    kind = None if model == SD15 else pipeline_name(model)  # the default asks no hub
    settings = settings_of(PRESETS.get(kind, ("", ""))[0])
    settings["model"] = model
    if Path(model) == EMOJI:
        settings |= settings_of(EMOJI_PRESETS)
        if typed.get("prompts", "animals") == "animals":  # its classifier knows no other
            settings["watch"] = f"{EMOJI / 'classifier.py'}:recognised"
    if "objective" in typed or Path(model) == EMOJI:
        settings["prompts"] = "animals"
    settings |= settings_of(HUMAN_PRESETS.get(typed.get("objective"), ""))
    if "labels" in typed:
        settings |= settings_of(LABELS_PRESET)
        if "objective" not in typed:  # an epoch is a pass
            settings["epochs"] = typed.get("passes", defaults["passes"])
    if typed.get("recipe") in RECIPES:
        settings |= {**settings_of(RECIPES[typed["recipe"]]), "beta": None, "max_kl": None}
    return settings | settings_of(LOSS_PRESETS.get(typed.get("loss"), ""))


def saved_settings(typed: dict, defaults: dict) -> dict:
    """The settings of the run to resume or evaluate. Raises ValueError for a flag that differs."""
    folder = typed.get("resume") or typed["evaluate"]
    names = defaults.keys() - UNSAVED_FLAGS
    saved = run_folder.load_settings(folder, names | {"command"})
    check_saved(folder, {name: saved[name] for name in names})
    if not isinstance(saved["command"], str):
        raise ValueError(f"{folder / 'config.json'} has a flaw (command is no text): mend it")
    fixed = (
        saved.keys() - {"epochs", "max_kl", "question"}
        if "resume" in typed
        else {"model", "lora_rank"}
    )
    changed = [
        f"--{name.replace('_', '-')} {saved[name]}"
        for name in sorted(fixed & typed.keys())
        if typed[name] != saved[name]
    ]
    if changed:
        flags = ", ".join(changed)
        raise ValueError(f"{folder} was started with {flags}: give the same, or a new run")
    return {**saved, "out": folder}


def check_saved(folder: Path, saved: dict) -> None:
    """Raise ValueError for settings of a run that the command line would not give."""

    def refuse(message: str):
        raise ValueError(f"{folder / 'config.json'} has a flaw ({message:.200}): mend it")

    parser, defaults = build_parser()
    parser.error = refuse
    typed = []
    for name, value in saved.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            typed.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            typed.append(f"--{flag}={value}")
    parsed = dict.fromkeys(saved) | vars(parser.parse_args(typed))
    for name, value in saved.items():
        needed = name == "model" or defaults[name] is not None
        if parsed[name] != value or (value is None and needed):
            refuse(f"{name}: {value!r:.60}")


def check(args: Namespace) -> None:
    """Raise ValueError, in a sentence for the user, for settings that cannot be meant."""
    new_run = not args.resume and not args.evaluate
    problems = {
        "say what to learn: --objective compressibility, for example, or --labels FILE": (
            not args.objective and not args.labels
        ),
        "--images is the folder of the images of --labels: give that too": (
            args.images and not args.labels
        ),
        "--evaluate compares by an objective: give --objective too": (
            args.evaluate and not args.objective
        ),
        "--prompts: give animals, hand, unsafe or a file": (
            args.prompts is None and not args.labels
        ),
        "--height and --width: give both, or none": bool(args.height) != bool(args.width),
        f"--replay {args.replay}: give a number of batches, 0 or more": args.replay < 0,
        "--labels and --replay draw trajectories anew, which nobody sampled: they need "
        "--reference initial": args.reference == "previous" and (args.labels or args.replay),
        f"--images-per-prompt {args.images_per_prompt}: a preference needs 2 or more": (
            args.images_per_prompt < 2
        ),
        f"--skip-last {args.skip_last}: some of the --num-steps {args.num_steps} must be left": (
            not 0 <= args.skip_last < args.num_steps
        ),
        f"--step-fraction {args.step_fraction}: give a number up to 1": args.step_fraction > 1,
        f"--loss {args.loss} chooses its steps itself: give no --step-fraction": (
            args.step_fraction < 1 and args.loss in ("chain", "eq12")
        ),
        f"--clip {args.clip}: give a number below 1": args.clip and args.clip >= 1,
        "--loss chain has one loss for a chain: give --update-every trajectory, and no --clip": (
            args.loss == "chain" and (args.clip or args.update_every == "timestep")
        ),
        f"--loss {args.loss} clamps no ratio: give no --clip": (
            args.clip and args.loss not in ("eq14", "eq12", "chain", "ddpo")
        ),
        f"--loss {args.loss} needs a --beta above 0": args.beta == 0 and args.loss != "sft",
        f"--loss {args.loss} learns from one score of each new image: give one scorer as "
        "--objective, no --labels and no --replay": (
            args.loss in SCORED and not args.evaluate and not scores_all(args)
        ),
        f"--loss {args.loss} has the initial model as reference: give --reference initial": (
            args.reference == "previous" and args.loss not in ("eq14", "eq12", "chain")
        ),
        f"--device {args.device} is not on this machine: give another, or auto": (
            not device_available(args.device)
        ),
        "--precision fp16 needs a CUDA GPU: give fp32 or bf16": (
            args.precision == "fp16" and not uses_cuda(args.device)
        ),
        f"--seed {args.seed}: give a number from 0 to 2^63 - 1": not 0 <= args.seed < 2**63,
        f"--out {args.out} exists: give a new folder, or --resume it": (
            new_run and args.out and os.path.exists(args.out)
        ),
    }
    for message, wrong in problems.items():
        if wrong:
            raise ValueError(message)


def scores_all(args: Namespace) -> bool:
    """Whether every image that is trained on has one score."""
    scorer = args.objective and args.objective not in HUMAN_PRESETS and "," not in args.objective
    return bool(scorer and not args.labels and not args.replay)


def learning_rate(args: Namespace, epoch: int) -> float:
    """The step size of an epoch."""
    cosine = 1.0
    if args.lr_schedule == "cosine":
        cosine = (1 + math.cos(math.pi * (epoch - 1) / last_epoch(args))) / 2
    return args.lr * cosine * min(1, epoch / args.warm_up)


def last_epoch(args: Namespace) -> int:
    return epochs_given(args) + (args.epochs if args.objective else 0)


def is_evaluated(args: Namespace, epoch: int) -> bool:
    """Whether the held-out noises are evaluated after an epoch; 0 is before training."""
    return epoch % args.eval_every == 0 or epoch == last_epoch(args)


def describe_stop(args: Namespace, epoch: int) -> str:
    """Why a run ends early, and what can be done."""
    kept = f"the model of epoch {epoch - 1}" if epoch > 1 else "nothing: try a smaller --lr"
    again = f"python sd_demo.py --resume {args.out} --max-kl {2 * args.max_kl:g}"
    return f"The KL is above --max-kl {args.max_kl:g}: the run stops and keeps {kept}. On: {again}"


def calls_to_go(args: Namespace, cost: Cost, epochs_done: int) -> int:
    """Calls of the network from here to the end of a run, for the progress bar."""
    last, every = last_epoch(args), args.eval_every
    given = max(epochs_given(args) - epochs_done, 0)
    sampled = last - epochs_done - given
    between = range((epochs_done // every + 1) * every, last, every)
    looks = (len(between) + (epochs_done < last)) * (2 if args.max_kl else 1)
    return given * cost.calls_given + sampled * cost.calls + (1 + looks) * cost.calls_eval


def check_batches(args: Namespace, processes: int) -> None:
    """Raise ValueError where the groups of an epoch do not fill whole batches on all processes."""
    across = args.batch_size * processes
    if args.objective and args.prompts_per_epoch % across:
        message = f"give a multiple of {across}, as many as are trained on together"
        raise ValueError(f"--prompts-per-epoch {args.prompts_per_epoch}: {message}")
