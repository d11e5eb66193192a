"""Settings: which of several counts, what is refused, and what an earlier run has."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from sd_helpers import start_python

from sd import UserError, files, options, run
from sd.options import EMOJI, SD15

ANY = "--objective compressibility --model some/thing"
ON_EMOJI = f"--objective compressibility --model {EMOJI}"
HUMAN = f"--objective human --model {EMOJI}"
TAGS = f"--objective tags --model {EMOJI}"
PAPER = "--recipe paper"
CLASSIFIER = f"{EMOJI}/classifier.py:recognised"


def parse(flags: str) -> options.Settings:
    return options.parse(shlex.split(flags))


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# What counts: typed, then loss, then recipe, then source of labels, then model, then defaults

PRECEDENCE = {
    "epochs": [
        (ANY, 12),
        (f"{ON_EMOJI} --loss eq14", 24),
        (HUMAN, 20),
        (f"{HUMAN} --labels a.csv", 20),
        (f"{ON_EMOJI} --labels a.csv", 12),
        ("--labels a.csv", 4),
        (f"{HUMAN} {PAPER}", 400),
        (f"{ON_EMOJI} --epochs 12", 12),  # as the default, and typed
    ],
    "images_per_prompt": [(ANY, 8), (HUMAN, 2), (TAGS, 7), (f"{TAGS} {PAPER}", 2)],
    "prompts_per_epoch": [(ANY, 4), (TAGS, 8), (f"{HUMAN} {PAPER}", 80)],
    "reference": [(TAGS, "initial")],
    "lr": [
        (ANY, 3e-4),
        (ON_EMOJI, 1e-3),
        (HUMAN, 1e-3),
        (f"{ON_EMOJI} --loss eq14", 1.5e-3),
        (f"{HUMAN} {PAPER}", 3e-5),
    ],
    "beta": [
        (ANY, 0.25),
        (HUMAN, 0.25),
        (f"{ANY} --loss eq14", 0.15),
        (f"{HUMAN} {PAPER}", None),
        (f"{ON_EMOJI} --loss sft", 0),
    ],
    "clip": [(f"{ON_EMOJI} --loss ddpo", 0.1), (f"{ON_EMOJI} --loss dpok", None)],
    "num_steps": [(ANY, 20), (ON_EMOJI, 10), (f"{ON_EMOJI} --recipe default", 10)],
    "skip_last": [(ON_EMOJI, 2), (f"{ON_EMOJI} {PAPER}", 0)],
    "gradient_checkpointing": [
        (ANY, True),
        (f"{ON_EMOJI} {PAPER}", False),
        (f"{ANY} --no-gradient-checkpointing", False),
    ],
    "loss": [(ANY, "chain"), (TAGS, "chain"), (f"{TAGS} --loss eq14", "eq14")],
    "replay": [(ANY, 4), (TAGS, 4), (f"{TAGS} --loss eq14", 0), (f"{ANY} --loss ddpo", 0)],
    "prompts": [("--labels a.csv --model some/thing", None), (f"{ANY} --labels a.csv", "animals")],
    "watch": [
        (ANY, None),
        (HUMAN, CLASSIFIER),
        (f"{ON_EMOJI} --prompts animals", CLASSIFIER),
        (f"{ON_EMOJI} --prompts hand", None),
        (f"{ON_EMOJI} --watch incompressibility", "incompressibility"),
    ],
}
PRECEDENCES = [(name, flags, value) for name, cases in PRECEDENCE.items() for flags, value in cases]


@pytest.mark.parametrize("name, flags, value", PRECEDENCES)
def test_the_first_that_has_a_setting_decides(name, flags, value):
    assert getattr(parse(flags), name) == value


def test_every_setting_of_the_presets_gives_way_to_what_is_typed_or_handed_in():
    others = {
        **{"epochs": 3, "prompts_per_epoch": 5, "images_per_prompt": 6, "batch_size": 7},
        **{"num_steps": 11, "guidance_scale": 1.5, "eta": 0.5, "lr": 0.1, "beta": 3.0},
        **{"eval_images": 12, "eval_every": 13, "loss": "eq12", "reference": "previous"},
        **{"clip": 0.2, "skip_last": 1, "update_every": "timestep", "weight_decay": 0.5},
        **{"max_grad_norm": 2.0, "gradient_checkpointing": True, "replay": 3, "max_kl": 5.0},
        **{"average_weights": True, "warm_up": 5, "lr_schedule": "cosine"},
    }
    presets = [*options.RECIPES.values(), *options.SOURCE_PRESETS.values()]
    presets += [options.EMOJI_PRESETS, *options.LOSS_PRESETS.values()]
    assert {name for preset in presets for name in preset} == others.keys()
    for name, value in others.items():
        new = {"objective": "tags", "model": str(EMOJI)}
        recipe = {"recipe": "alg1", "loss": "eq14"} if name == "loss" else {"recipe": "paper"}
        typed = parse(options.as_flags(new | recipe | {name: value}))
        handed_in = options.make_settings(**new | recipe | {name: value})
        assert getattr(typed, name) == value
        assert typed.row() == handed_in.row() | {"command": typed.command}


def test_the_papers_recipes_are_table_2_with_the_releases_clamp_and_without():
    expected = {
        **{"lr": 3e-5, "weight_decay": 1e-4, "max_grad_norm": 1.0, "num_steps": 20, "eta": 1.0},
        **{"batch_size": 1, "guidance_scale": 5.0, "epochs": 400, "prompts_per_epoch": 80},
        **{"images_per_prompt": 2, "loss": "eq14", "clip": 0.1, "update_every": "trajectory"},
        **{"reference": "initial", "beta": None, "skip_last": 0},  # beta: 0.1 / D of the model
        **{"replay": 0, "average_weights": False, "max_kl": None, "warm_up": 1},  # none
        **{"lr_schedule": "constant"},
    }
    for flags in (ANY, ON_EMOJI, HUMAN, TAGS):
        released, printed = (vars(parse(f"{flags} --recipe {name}")) for name in ("paper", "alg1"))
        assert {name: released[name] for name in expected} == expected
        different = {name: printed[name] for name in expected if printed[name] != expected[name]}
        assert different == {"clip": None, "update_every": "timestep"}


@pytest.mark.parametrize("cuda, model", [(False, str(EMOJI)), (True, SD15)])
def test_without_a_model_the_machine_decides(monkeypatch, cuda, model):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = parse("--objective compressibility")
    assert args.model == model and args.precision == ("fp16" if cuda else "fp32")
    assert args.num_steps == (20 if cuda else 10) and (args.watch is None) == cuda


def test_the_emoji_model_is_known_by_its_folder_not_by_how_it_is_written(tmp_path):
    (tmp_path / "link").symlink_to(EMOJI)
    assert parse("--objective compressibility --model link").num_steps == 10
    assert parse("--objective compressibility --model elsewhere/emoji_sd").num_steps == 20
    assert options.make_settings(objective="compressibility", model=EMOJI).num_steps == 10


# --help


def test_the_common_flags_fill_a_screen_and_help_shows_each_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = options.build_parser().format_help()
    first = text.split("\n\nwhat to learn:\n")[0].splitlines()
    assert len(first) <= 40 and max(map(len, first)) <= 80
    entries = re.split(r"\n  (?=--)", text.split("\n\nother defaults")[0])[1:]
    helps = {entry.split()[0].rstrip(","): "".join(entry.split()) for entry in entries}
    assert helps.keys() == {options.flag_of(name) for name in options.FLAGS}
    for name, option in options.FLAGS.items():
        if type(option.default) in (int, float, str):
            assert f"(default:{option.default})" in helps[options.flag_of(name)]
    without = {flag for flag, shown in helps.items() if "default" not in shown}
    assert without == {"--objective", "--labels", "--resume", "--evaluate", "--dry-run"}


@pytest.mark.slow
def test_help_imports_nothing_that_is_slow(tmp_path):
    code = """
import sys
import sd_demo
try:
    sd_demo.main(["--help"])
finally:
    print("slow:", set("torch diffusers transformers peft matplotlib".split()) & sys.modules.keys())
    sys.exit()
"""
    output = start_python(["-c", code], tmp_path)
    assert "usage: sd_demo.py" in output and "slow: set()" in output


# Earlier runs


@pytest.fixture
def earlier(tmp_path):
    """The folder of an earlier run, whose settings are neither defaults nor presets."""
    flags = f"{HUMAN} --out run --seed 5 --epochs 6 --lr 0.25 --watch compressibility --port 9000"
    return run.open_folder(parse(flags)).absolute()


def refusal(flags: str) -> str:
    with pytest.raises(UserError) as refused:
        parse(flags)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("start", ["--resume", "--evaluate"])
def test_an_earlier_run_has_its_settings_not_those_of_presets(earlier, start):
    args = parse(f"{start} {earlier}")
    saved = files.read_json(earlier / "config.json")
    assert args.row() | {"out": "run"} == {name: saved[name] for name in options.SAVED}
    assert (args.lr, args.seed, args.objective, args.eval_images) == (0.25, 5, "human", 16)
    assert args.out == earlier and args.port is None and "--port 9000" in args.command


def test_a_resumed_run_takes_more_epochs_another_port_and_what_it_has(earlier):
    args = parse(f"--resume {earlier} --epochs 9 --max-kl 50 --port 9001 --seed 5 --lr 0.25")
    assert (args.epochs, args.max_kl, args.port, args.seed) == (9, 50, 9001, 5)
    for flags, was in (
        ("--lr 0.1", "--lr 0.25"),
        ("--seed 0", "--seed 5"),
        ("--gradient-checkpointing", "--gradient-checkpointing False"),
        ("--objective tags", "--objective human"),
    ):
        message = refusal(f"--resume {earlier} {flags}")
        assert f"was started with {was}: give the same, or start a new run" in message


def test_an_evaluation_takes_other_settings_but_the_same_weights(earlier):
    args = parse(f"--evaluate {earlier} --objective compressibility --eval-images 7 --seed 1")
    assert (args.objective, args.eval_images, args.seed) == ("compressibility", 7, 1)
    for flags in ("--model other/model", "--lora-rank 2"):
        assert "was started with" in refusal(f"--evaluate {earlier} {flags}")


@pytest.mark.parametrize("content", [None, "{", "{}", "[]", '{"lr": 0.1}'])
def test_a_folder_that_is_no_run_or_one_of_another_version_is_refused(earlier, content):
    file = earlier / "config.json"
    file.unlink() if content is None else file.write_text(content)
    for start in ("--resume", "--evaluate"):
        assert f"{earlier} is no run of sd_demo.py" in refusal(f"{start} {earlier}")


def test_files_are_found_from_another_folder_and_links_are_not_followed(tmp_path, monkeypatch):
    Path("data.py").write_text("")
    for name in ("mine.py", "prompts.txt", "few.txt", "pairs.csv", "weights", "clip", "head"):
        Path(name).symlink_to("data.py")
    flags = {
        **{"objective": "mine.py:f", "watch": "mine.py:g", "prompts": "prompts.txt"},
        **{"eval_prompts": "few.txt", "labels": "pairs.csv", "images": "clip"},
        **{"init_lora": "weights", "clip_model": "clip", "aesthetic_head": "head"},
    }
    args = parse(f"--model some/thing --out run {options.as_flags(flags)}")
    folder = run.open_folder(args).absolute()
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    resumed = parse(f"--resume {folder}")
    for name, value in flags.items():
        assert getattr(resumed, name) == f"{tmp_path}/{value}"
    # Typed again, from here
    again = options.as_flags({name: f"../{value}" for name, value in flags.items()})
    assert parse(f"--resume {folder} {again}") == resumed


def my_score(images, prompts):
    return [1.0] * len(images)


class Labeller:
    def label(self, batches, epoch):
        return None


def test_what_was_handed_in_is_noted_by_name_and_has_to_be_handed_in_again(tmp_path):
    settings = {"watch": my_score, "labeller": Labeller(), "model": "some/thing", "out": "run"}
    args = options.make_settings(objective=my_score, **settings)
    assert "objective=<my_score>" in args.command.replace("'", "")
    folder = run.open_folder(args)
    config = files.read_json(folder / "config.json")
    assert config["objective"] == config["watch"] == "<my_score>"
    again = f"{folder} was started from Python; call sd_demo.run(resume='{folder}', "
    handed_in = "labeller=Labeller, objective=my_score, watch=my_score)"
    assert refusal(f"--resume {folder}") == again + handed_in
    with pytest.raises(UserError, match=re.escape(f"evaluate='{folder}', objective=my_score")):
        options.make_settings(evaluate=folder, watch=my_score)
    resumed = options.make_settings(resume=folder, objective=my_score, **settings)
    assert resumed.objective is resumed.watch is my_score


# What is refused


def test_a_labeller_alone_asks_as_people_are_asked():
    args = options.make_settings(labeller=Labeller(), model=EMOJI)
    assert args.by_people and args.images_per_prompt == 2 and args.eval_every == 1


def test_a_setting_that_there_is_not_is_refused():
    with pytest.raises(UserError, match="learning_rate, pairs: there is no such flag"):
        options.make_settings(objective="compressibility", pairs=3, learning_rate=0.1)


REFUSED = {
    "--objective ''": "say what to learn: --objective",
    "--images .": "--images is the folder of the images of --labels",
    "--height 64": "--height and --width: give both, or none",
    "--replay 1 --reference previous": "need --reference initial",
    "--labels x.csv --reference previous": "need --reference initial",
    "--replay -1": "--replay -1: give a number, 0 or more",
    "--max-kl 0": "--max-kl 0.0: give a number, more than 0",
    "--epochs 0": "--epochs 0: give a number, more than 0",
    "--lr inf": "--lr inf: give a number, more than 0",
    "--weight-decay nan": "--weight-decay nan: give a number, 0 or more",
    "--skip-last 20": "--skip-last 20: some of the --num-steps 20 must be left",
    "--images-per-prompt 1": "a preference needs 2 or more",
    "--clip 1": "--clip 1.0: give a number below 1",
    "--loss chain --update-every timestep": "give no --update-every timestep",
    "--loss chain --recipe paper": "clamps no ratio: give no --clip",
    "--beta 0": "--loss chain needs a --beta above 0",
    "--loss ddpo --replay 2": "give one scorer as --objective, no --labels and no --replay",
    "--loss dpok --labels x.csv": "learns from one score of each new image",
    "--loss reward-weighted --objective tags": "learns from one score of each new image",
    "--loss dpok --objective aesthetic,alignment": "learns from one score of each new image",
    "--loss ddpo --reference previous": "give --reference initial",
    "--precision fp16": "needs a CUDA GPU: give fp32 or bf16",
    "--device cuda": "--device cuda is not on this machine: give another, or auto",
    "--seed -1": "--seed -1: give a number, 0 or more",
    f"--seed {2**63}": f"--seed {2**63}: give a number from 0 to 2^63 - 1",
    "--out .": "exists: give a new folder, or --resume it",
}
MISTYPED = {
    "--epochs 1.5": "--epochs: invalid int value: '1.5'",
    "--guidance-scale much": "--guidance-scale: invalid float value: 'much'",
    "--loss lora": "invalid choice",
    "--epoch 3": "unrecognized",  # no abbreviations
    "stray": "unrecognized",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_sentence(flags):
    assert REFUSED[flags] in refusal(f"{ANY} {flags}")


@pytest.mark.parametrize("flags", MISTYPED)
def test_what_is_mistyped_is_refused_below_one_line_of_usage(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(f"{ANY} {flags}")
    usage, message = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and usage.startswith("usage: sd_demo.py")
    assert MISTYPED[flags] in message


def test_from_python_a_choice_is_checked_too():
    with pytest.raises(UserError, match="--loss lora: choose one of chain, eq14"):
        options.make_settings(objective="compressibility", loss="lora")


@pytest.mark.parametrize("flag", ["--out", "--labels", "--model", "--images", "--init-lora"])
def test_a_name_too_long_for_a_file_is_no_traceback(flag):
    parse(f"--objective compressibility --labels x.csv --model some/thing {flag} {'a' * 300}")


# What follows from the settings


def test_the_learning_rate_rises_and_falls_or_stays():
    args = parse(f"{ANY} --lr 0.4 --warm-up 4")
    rates = [run.learning_rate(args, epoch, 8) for epoch in (1, 5)]
    assert rates == pytest.approx([0.1, 0.2])
    args = parse(f"{ANY} --lr 0.4 --warm-up 4 --lr-schedule constant")
    assert [run.learning_rate(args, epoch, 8) for epoch in (1, 5, 8)] == [0.1, 0.4, 0.4]


@pytest.mark.parametrize("last, every, at", [(10, 4, {4, 8, 10}), (3, 5, {3}), (2, 1, {1, 2})])
def test_held_out_images_are_evaluated_at_intervals_and_at_the_end(last, every, at):
    args = parse(f"{ANY} --eval-every {every}")
    assert {n for n in range(1, last + 1) if run.is_evaluated(args, n, last)} == at


def test_the_groups_of_an_epoch_must_fill_batches():
    args = parse(f"{ANY} --batch-size 2 --prompts-per-epoch 12")
    run.check_batches(args, 3)
    with pytest.raises(UserError, match="--prompts-per-epoch 12: give a multiple of 8"):
        run.check_batches(args, 4)
