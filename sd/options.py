"""The settings of a run: fields with their help and default, and the flags made from them.

What was typed counts first, then the presets of --recipe, the source of labels, --loss and the
model, then the defaults. With --resume or --evaluate it is what was typed, then what the run has.
"""

import argparse
import math
import os
import shlex
import sys
import textwrap
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from sd import UserError, files
from sd.prompts import PROMPTS, load_prompts

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
EMOJI = files.ROOT / "toy" / "emoji_sd"
CLIP = "openai/clip-vit-large-patch14"
AESTHETIC_HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
    "sac+logos+ava1-l14-linearMSE.pth"
)
PRECISIONS = ["fp16", "bf16", "fp32"]
SCORERS = ("compressibility", "incompressibility", "aesthetic", "alignment")
PEOPLE = ("human", "tags")  # objectives for which people answer on a page
OF_PAIRS = ["chain", "eq14", "eq12"]  # the losses of d3po.py
SCORED = ["reward-weighted", "ddpo", "dpok"]  # losses that see scores, not preferences
LOSSES = [*OF_PAIRS, "sft", *SCORED, "diffusion-dpo"]
METHOD = (
    "The whole chain (--loss chain) for scores, people and files: it is exact, it ends first in "
    "the plane, and its beta means the same for every model and number of steps."
)
PAPER_BETA = 0.1  # of the mean over the D latent elements: 0.1 / D of the sum
LABEL_PASSES = 4  # over --labels, where an objective follows

EMOJI_PRESETS = {  # sd/results/paper.md has the sweep
    "num_steps": 10,
    "guidance_scale": 1.0,
    "lr": 1e-3,
    "gradient_checkpointing": False,
    "eval_images": 90,
}
# A source of labels decides how many questions a round has, and how soon one sees what they do
OF_PEOPLE = {"prompts_per_epoch": 8, "eval_images": 16, "eval_every": 1}
SOURCE_PRESETS = {
    "human": {**OF_PEOPLE, "epochs": 20, "images_per_prompt": 2},
    "tags": {**OF_PEOPLE, "epochs": 10, "images_per_prompt": 7},
    "labels": {"eval_images": 16, "eval_every": 1, "warm_up": 1},  # all labels are there
}
# Table 2 and Sec. 5.1 (4 GPUs, 2 batches of 10 pairs each): as released, and as Alg. 1 is printed
TABLE_2 = {
    "epochs": 400,
    "prompts_per_epoch": 80,
    "images_per_prompt": 2,
    "batch_size": 1,
    "num_steps": 20,
    "eta": 1.0,
    "guidance_scale": 5.0,
    "loss": "eq14",
    "reference": "initial",
    "skip_last": 0,
    "replay": 0,
    "average_weights": False,
    "warm_up": 1,
    "lr": 3e-5,
    "lr_schedule": "constant",
    "weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "beta": None,  # of the model's size
    "max_kl": None,
}
RECIPES = {
    "paper": {**TABLE_2, "update_every": "trajectory", "clip": 0.1},
    "alg1": {**TABLE_2, "update_every": "timestep"},
}
# The other methods, at what measured best for them on the emoji model
OTHERS = {
    "epochs": 24,
    "batch_size": 4,
    "beta": 0.15,
    "replay": 0,
    "average_weights": False,
    "warm_up": 1,
}
EMOJI_OTHERS = {"lr": 1.5e-3}
LOSS_PRESETS = {loss: OTHERS for loss in LOSSES if loss != "chain"}
LOSS_PRESETS["sft"] = {**OTHERS, "beta": 0.0}  # the paper's has no KL
LOSS_PRESETS["ddpo"] = {**OTHERS, "clip": 0.1}


def setting(default: Any, help: str, metavar: str | None = None, **more) -> Any:
    """A field with its help. more: choices; zero=True where a number may be 0."""
    return field(default=default, metadata={"help": help, "metavar": metavar, **more})


# The bases of Settings are the groups of --help; a docstring is the title of its group


@dataclass(frozen=True, kw_only=True)
class Common:
    """common flags"""

    objective: str | Callable | None = setting(
        None,
        "compressibility, incompressibility, aesthetic, alignment, or a function (PIL images, "
        "prompts) -> numbers as FILE.py:NAME; several with commas: better in one, worse in none. "
        "People on a page: human (which of two is better?), tags (which are bad?)",
    )
    labels: str | None = setting(
        None,
        "learn from labels that exist: a file or a folder, see sd/label_files.py",
        "FILE",
    )
    prompts: str | list | None = setting(
        None,
        "animals, hand or unsafe (the paper's), or a file of prompts; by default animals, or those "
        "of --labels",
    )
    model: Any = setting(
        None,
        "hub id, folder or file of SD, SDXL, SD3 or Flux; by default SD 1.5 with CUDA, else the "
        "bundled emoji model",
    )
    epochs: int = setting(12, "rounds of sampling and training; with --labels alone, passes", "N")
    prompts_per_epoch: int = setting(4, "groups of images, each of one prompt and one x_T", "N")
    images_per_prompt: int = setting(
        8, "images of a group: K(K-1)/2 pairs, of which people compare K", "K"
    )
    num_steps: int = setting(20, "denoising steps", "T")
    beta: float | None = setting(
        0.25,
        "weight of the KL, per nat of a log-ratio; larger stays nearer the initial model",
        zero=True,
    )
    lr: float = setting(3e-4, "largest step size of AdamW")
    max_kl: float | None = setting(
        25.0,
        "KL limit: stop before the KL to the initial model is larger, nats",
        "NATS",
    )
    seed: int = setting(0, "seed of all random numbers", "N", zero=True)
    out: Path | None = setting(None, "new folder; by default runs/OBJECTIVE-1, -2, ...", "RUN")
    resume: Path | None = setting(None, "go on with a run, from its last whole epoch", "RUN")
    evaluate: Path | None = setting(
        None, "compare the tuned with the initial model on images from new noise", "RUN"
    )
    dry_run: bool = setting(False, "check everything, print the plan, train nothing")


@dataclass(frozen=True, kw_only=True)
class Learning:
    """what to learn"""

    images: str | None = setting(
        None, "folder of the images of --labels; by default its own", "DIR"
    )
    watch: str | Callable | None = setting(
        None,
        "a scorer that is only reported; by default the emoji model's classifier, else none",
        "SCORER",
    )
    annotators: int = setting(1, "people who answer each question of human and tags", "N")
    question: str | None = setting(
        None, "text above the images; by default which is better, or which are bad", "TEXT"
    )
    port: int | None = setting(
        None, "port of the page for people; by default the first free one from 7860", "N", zero=True
    )
    public_url: str | None = setting(
        None, "the address at which a proxy shows this page; by default only this machine's", "URL"
    )
    clip_model: str = setting(CLIP, "CLIP of aesthetic and alignment: hub id or folder", "CLIP")
    aesthetic_head: str = setting(
        AESTHETIC_HEAD, "state dict of its linear layers: URL or file", "HEAD"
    )


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """sampling"""

    init_lora: str | None = setting(
        None, "begin from the model with this LoRA in it: folder or file; by default none", "PATH"
    )
    height: int | None = setting(None, "height of images, pixels; by default the model's", "N")
    width: int | None = setting(None, "width of images, pixels; by default the model's", "N")
    eta: float = setting(
        1.0,
        "DDIM's noise scale, 0 < eta <= 1; at 1 the images follow the law tilted by the score, "
        "with less x_T decides a part of them",
        "ETA",
    )
    guidance_scale: float = setting(
        5.0, "classifier-free guidance; 1 or less: none", "X", zero=True
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """the method"""

    recipe: str = setting(
        "default",
        "paper: Table 2 as released; alg1: Table 2 with Alg. 1 as printed, without the clamp",
        choices=["default", *RECIPES],
    )
    loss: str = setting(
        "chain",
        "chain: Eq. 5 on whole chains; eq14, eq12: the paper's; or a method to compare with",
        choices=LOSSES,
    )
    update_every: str | None = setting(
        None,
        "update the weights at each step's loss, or once after the last; by default once with "
        "--loss chain, else at each",
        choices=["timestep", "trajectory"],
    )
    clip: float | None = setting(
        None, "clamp pi_theta / pi_ref, or DDPO's ratio, to 1 +- this; by default no clamp", "X"
    )
    reference: str = setting(
        "initial",
        "the initial model, or the one that sampled",
        choices=["initial", "previous"],
    )
    replay: int = setting(4, "batches of earlier groups in each epoch", "N", zero=True)
    average_weights: bool = setting(
        True, "evaluate and save the average of the weights over the last tenth of the epochs"
    )
    skip_last: int = setting(
        2, "do not train the last N steps: their sigma is tiny", "N", zero=True
    )
    lr_schedule: str = setting(
        "cosine",
        "the step size falls to 0 as a cosine, or stays",
        choices=["cosine", "constant"],
    )
    warm_up: int = setting(3, "epochs in which the step size rises to --lr", "N")
    weight_decay: float = setting(1e-4, "AdamW's weight decay", "X", zero=True)
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", "X")
    lora_rank: int = setting(16, "rank of the LoRA on queries, keys and values", "N")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """the machine"""

    batch_size: int = setting(1, "groups at a time on each device, and in an update", "N")
    device: str = setting(
        "auto",
        "where to compute; auto: the best device of this machine",
        choices=["auto", "cpu", "cuda", "mps"],
    )
    precision: str | None = setting(
        None,
        "number format of the model, but for the LoRA; by default fp16 with CUDA, else fp32",
        choices=PRECISIONS,
    )
    gradient_checkpointing: bool = setting(True, "less memory, a third more time")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """the evaluation"""

    eval_images: int = setting(45, "held-out images, of the prompts in turn", "N")
    eval_prompts: str | list | None = setting(
        None, "prompts of these images, as --prompts; by default those that are trained on"
    )
    eval_every: int = setting(2, "epochs from one evaluation of them to the next", "N")


GROUPS = (Common, Learning, Sampling, Method, Machine, Evaluation)


@dataclass(frozen=True, kw_only=True)
class Settings(*reversed(GROUPS)):
    """All settings of a run, under the names of their flags."""

    labeller: Any = None  # from Python alone: an object with the method `label` of sd/labellers.py
    command: str = ""  # what started the run

    @property
    def by_people(self) -> bool:
        return self.objective in PEOPLE

    @property
    def trained_steps(self) -> int:
        return self.num_steps - self.skip_last

    @property
    def updates_each_step(self) -> bool:
        return (self.update_every or "timestep") == "timestep" and self.loss != "chain"

    def row(self) -> dict:
        """The settings as config.json has them: of what was handed in from Python the name."""
        return {name: describe(value) for name, value in vars(self).items() if name in SAVED}


FLAGS = {option.name: option for group in GROUPS for option in fields(group)}
SAVED = set(FLAGS) - {"resume", "evaluate", "dry_run", "port", "public_url", "device"} | {
    "labeller",
    "command",
}
PATHS = {"out", "resume", "evaluate"}
ON_RESUME = {"epochs", "max_kl", "question"}  # what --resume may change
FROM_PYTHON = {"objective", "watch", "model", "labeller"}  # may be an object, which has no JSON


def describe(value: Any) -> Any:
    """A setting as JSON has it; of an object that was handed in from Python the name."""
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int | float | list):
        return value
    return f"<{getattr(value, '__name__', type(value).__name__)}>"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """As wide as the longest common flag."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=27)


def build_parser() -> argparse.ArgumentParser:
    """The flags. It gives only what was typed."""
    parser = argparse.ArgumentParser(
        prog="sd_demo.py",
        usage="%(prog)s --objective OBJECTIVE [flags]   (--help lists the flags)",
        description="D3PO on Stable Diffusion, with LoRA; labels from a score or from people.",
        epilog=epilog(),
        formatter_class=HelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    for group in GROUPS:
        add = parser.add_argument_group(group.__doc__).add_argument
        for option in fields(group):
            add(flag_of(option.name), **argument(option))
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    return parser


def argument(option: Field) -> dict:
    """A setting as argparse's add_argument takes it."""
    more = {key: option.metadata.get(key) for key in ("metavar", "choices")}
    if option.type is bool:
        more = {"action": argparse.BooleanOptionalAction if option.default else "store_true"}
    kinds = [kind for kind in (int, float, Path) if kind in kinds_of(option)]
    more |= {"type": kinds[0]} if kinds else {}
    default = "on" if option.default is True else option.default
    shown = "" if default is None or default is False else f" (default: {default})"
    return {**more, "help": option.metadata["help"] + shown}


def kinds_of(option: Field) -> tuple:
    return get_args(option.type) or (option.type,)


def flag_of(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def as_flags(preset: dict) -> str:
    """Settings as one would type them."""
    words = []
    for name, value in preset.items():
        match value:
            case True:
                words.append(flag_of(name))
            case False:
                words.append(f"--no-{name.replace('_', '-')}")
            case None:
                pass
            case str():
                words.append(f"{flag_of(name)} {value}")
            case _:
                words.append(f"{flag_of(name)} {value:g}")
    return " ".join(words)


def epilog() -> str:
    presets = {
        "the emoji model": EMOJI_PRESETS,
        **{f"--objective {source}": SOURCE_PRESETS[source] for source in PEOPLE},
        "--labels": {**SOURCE_PRESETS["labels"], "epochs": LABEL_PASSES},
        "--loss eq14 and all but chain": OTHERS,
        "the same on the emoji model": EMOJI_OTHERS,
        **{f"--recipe {recipe}": preset for recipe, preset in RECIPES.items()},
    }
    texts = [METHOD, "", "other defaults, after which comes what you type:"]
    texts += [f"  {name}: {as_flags(preset)}" for name, preset in presets.items()]
    wrapped = [textwrap.wrap(text, 79, subsequent_indent="    ") or [""] for text in texts]
    return "\n".join(line for lines in wrapped for line in lines)


# From a command line, or from Python


def parse(argv: list[str] | None = None) -> Settings:
    """The settings of a command line. Raises UserError where they cannot be meant."""
    typed = vars(build_parser().parse_args(argv))
    words = ["python", "sd_demo.py", *(sys.argv[1:] if argv is None else argv)]
    return complete(typed, shlex.join(words))


def make_settings(**typed) -> Settings:
    """The settings of a call from Python, under the names of the flags. Raises UserError."""
    unknown = typed.keys() - FLAGS.keys() - {"labeller"}
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: there is no such flag (see --help)")
    call = ", ".join(f"{name}={describe(value)!r}" for name, value in typed.items())
    for name, value in typed.items():
        if isinstance(value, str | Path):
            typed[name] = Path(value) if name in PATHS else str(value)
    return complete(typed, f"sd_demo.run({call})")


def complete(typed: dict, command: str) -> Settings:
    """What was typed or handed in, and for the rest the presets or what an earlier run has."""
    typed = {name: absolute(name, value) for name, value in typed.items()}
    if typed.get("labeller") and not typed.keys() & {"objective", "labels", "resume", "evaluate"}:
        typed["objective"] = "human"
    if folder := typed.get("resume") or typed.get("evaluate"):
        settings = saved_settings(folder, typed)
    else:
        settings = {**presets(typed), **typed, "command": command}
    if settings.get("precision") is None:
        cuda = device_available("cuda") and settings.get("device") in (None, "auto", "cuda")
        settings["precision"] = "fp16" if cuda else "fp32"
    args = Settings(**settings)
    check(args)
    return args


def absolute(name: str, value: Any) -> Any:
    """A setting whose files are found from another folder too; links are not followed."""
    if not isinstance(value, str):
        return value
    if name in ("objective", "watch"):
        scorers = [part.rpartition(":") for part in split_objective(value)]
        return ",".join(
            f"{os.path.abspath(file)}:{function}"
            if os.path.isfile(file)
            else file + colon + function
            for file, colon, function in scorers
        )
    paths = ("model", "init_lora", "labels", "images", "prompts", "eval_prompts", "clip_model")
    is_path = name in (*paths, "aesthetic_head") and os.path.exists(value)
    return os.path.abspath(value) if is_path else value


def absolute_scorer(scorer: str) -> str:
    file, _, function = scorer.rpartition(":")
    return f"{os.path.abspath(file)}:{function}" if os.path.isfile(file) else scorer


def split_objective(objective: str) -> list[str]:
    """The names between the commas. A path may have commas too: it ends with .py:FUNCTION."""
    names, parts = [], []
    for part in objective.split(","):
        parts.append(part)
        name = ",".join(parts).strip()
        if name in SCORERS or ".py:" in name:
            names.append(name)
            parts = []
    return names + parts


def presets(typed: dict) -> dict:
    """What the model, the source of labels, the recipe and the loss set, in this order."""
    from sd.families import PRESETS, pipeline_name  # torch is slow, and --help needs none

    model = typed.get("model")
    if model is None:
        cuda = device_available("cuda") and typed.get("device", "auto") in ("auto", "cuda")
        model = SD15 if cuda else str(EMOJI)
    kind = type(model).__name__
    if isinstance(model, str):
        kind = None if model == SD15 else pipeline_name(model)  # the default asks no hub
    settings = {"model": model, **PRESETS.get(kind, {})}
    if is_emoji := isinstance(model, str) and os.path.exists(model) and EMOJI.samefile(model):
        settings |= EMOJI_PRESETS
        if are_animals(typed.get("prompts")) and are_animals(typed.get("eval_prompts")):
            settings["watch"] = f"{EMOJI / 'classifier.py'}:recognised"
    objective, labels = typed.get("objective"), typed.get("labels")
    if objective or is_emoji:
        settings["prompts"] = "animals"
    if other := LOSS_PRESETS.get(typed.get("loss")):
        settings |= {**other, **(EMOJI_OTHERS if is_emoji else {})}
    settings |= SOURCE_PRESETS["labels"] if labels else {}
    settings |= SOURCE_PRESETS[objective] if objective in PEOPLE else {}
    settings |= {"epochs": LABEL_PASSES} if labels and not objective else {}
    return settings | RECIPES.get(typed.get("recipe"), {})


def are_animals(prompts: str | list | None) -> bool:
    """Whether the emoji model's classifier knows all prompts; None: those that are the default."""
    try:
        names = load_prompts(prompts) if isinstance(prompts, str) else prompts or []
    except ValueError:  # said when they are loaded
        return False
    return set(names) <= {*PROMPTS["animals"]}


def saved_settings(folder: Path, typed: dict) -> dict:
    """The settings of an earlier run with what was typed; UserError for a flag that differs."""
    try:
        config = files.read_json(folder / "config.json")
        saved = {name: config[name] for name in SAVED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{folder} is no run of sd_demo.py: it has no config.json with its settings"
        raise UserError(message) from error
    fixed = SAVED - ON_RESUME if typed.get("resume") else {"model", "lora_rank"}
    for name in sorted(fixed & typed.keys()):
        if describe(typed[name]) != saved[name]:
            remedy = f"{folder} was started with {flag_of(name)} {saved[name]}"
            raise UserError(f"{remedy}: give the same, or start a new run")
    needed = FROM_PYTHON if typed.get("resume") else FROM_PYTHON - {"labeller"}
    missing = [
        f"{name}={saved[name][1:-1]}"
        for name in sorted(needed - typed.keys())
        if str(saved[name]).startswith("<")
    ]
    if missing:
        again = f"sd_demo.run({'resume' if typed.get('resume') else 'evaluate'}={str(folder)!r}"
        raise UserError(f"{folder} was started from Python; call {again}, {', '.join(missing)})")
    return {**saved, **typed, "out": folder}


def device_available(device: str) -> bool:
    """Whether this machine has a device of --device."""
    import torch

    checks = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    return device not in checks or checks[device]()


def check(args: Settings) -> None:
    """Raise UserError for settings that cannot be meant."""
    for name, option in FLAGS.items():
        value, choices = getattr(args, name), option.metadata.get("choices")
        if value is None:
            continue
        if choices and value not in choices:
            raise UserError(f"{flag_of(name)} {value}: choose one of {', '.join(choices)}")
        if {int, float} & {*kinds_of(option)}:
            if not (0 < value < math.inf or value == 0 and option.metadata.get("zero")):
                least = "0 or more" if option.metadata.get("zero") else "more than 0"
                raise UserError(f"{flag_of(name)} {value}: give a number, {least}")
    for message, wrong in problems(args).items():
        if wrong:
            raise UserError(message)


def problems(args: Settings) -> dict[str, bool]:
    """Sentences about settings that clash, and whether they do."""
    new_run, K, T = not args.resume and not args.evaluate, args.images_per_prompt, args.num_steps
    loss, redrawn = f"--loss {args.loss}", args.labels or args.replay
    of_initial = args.reference == "initial"
    cuda = args.device in ("auto", "cuda") and device_available("cuda")
    return {
        "say what to learn: --objective compressibility, for example, or --labels FILE": (
            not args.objective and not args.labels
        ),
        "--images is the folder of the images of --labels: give that too": (
            args.images and not args.labels
        ),
        "--evaluate compares by an objective: give --objective too": (
            args.evaluate and not args.objective
        ),
        "--prompts: give animals, hand, unsafe or a file": not args.prompts and not args.labels,
        "--height and --width: give both, or none": bool(args.height) != bool(args.width),
        "--labels and --replay train on trajectories that no model sampled: they need "
        "--reference initial": redrawn and not of_initial,
        f"--images-per-prompt {K}: a preference needs 2 or more": K < 2,
        f"--skip-last {args.skip_last}: some of the --num-steps {T} must be left": (
            args.skip_last >= T
        ),
        "--loss chain has one loss for a chain: give no --update-every timestep": (
            args.loss == "chain" and args.update_every == "timestep"
        ),
        f"--clip {args.clip}: give a number below 1": (args.clip or 0) >= 1,
        f"{loss} clamps no ratio: give no --clip": (
            args.clip and args.loss not in ("eq14", "eq12", "ddpo")
        ),
        f"{loss} needs a --beta above 0": args.beta == 0 and args.loss != "sft",
        f"{loss} learns from one score of each new image: give one scorer as --objective, no "
        "--labels and no --replay": args.loss in SCORED and not (args.evaluate or scores_all(args)),
        f"{loss} has the initial model as reference: give --reference initial": (
            args.loss not in OF_PAIRS and not of_initial
        ),
        f"--device {args.device} is not on this machine: give another, or auto": (
            not device_available(args.device)
        ),
        "--precision fp16 needs a CUDA GPU: give fp32 or bf16": (
            args.precision == "fp16" and not cuda
        ),
        f"--seed {args.seed}: give a number from 0 to 2^63 - 1": args.seed >= 2**63,
        f"--out {args.out} exists: give a new folder, or --resume it": (
            new_run and args.out and os.path.exists(args.out)
        ),
    }


def scores_all(args: Settings) -> bool:
    """Whether every image that is trained on has one score."""
    several = isinstance(args.objective, str) and "," in args.objective
    by_scorer = args.objective and not args.by_people and not several and not args.labeller
    return bool(by_scorer and not args.labels and not args.replay)
