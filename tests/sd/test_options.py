"""The command line: which of several settings counts, and what is refused."""

import re
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from sd import cost, files, options, run_folder
from sd.label_files import EPOCH_GROUPS
from sd.options import EMOJI, SD15

PEOPLE = {"human", "tags"}
PAPER = "--recipe paper"
ANY = "--objective compressibility --model some/thing"
ON_EMOJI = f"--objective compressibility --model {EMOJI}"


def parse(flags: str) -> Namespace:
    return options.parse(shlex.split(flags))[1]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# What counts: typed, then recipe, then people, then model, then defaults
HUMAN = f"--objective human --model {EMOJI}"
TAGS = f"--objective tags --model {EMOJI}"
PRECEDENCE = {
    "epochs": [
        (ANY, 50),
        (ON_EMOJI, 24),
        (HUMAN, 20),
        (f"{HUMAN} --labels a.csv", 20),
        (f"{ON_EMOJI} --labels a.csv", 24),
        ("--labels a.csv", 4),
        (f"{HUMAN} {PAPER}", 400),
        (f"{HUMAN} {PAPER} --epochs 3", 3),
        (f"{ON_EMOJI} --epochs 50", 50),  # as the default, and typed
        (f"{HUMAN} --epochs 24", 24),
    ],
    "images_per_prompt": [
        (ANY, 4),
        (ON_EMOJI, 8),
        (HUMAN, 2),
        (TAGS, 7),
        (f"{TAGS} {PAPER}", 2),
        (f"{TAGS} {PAPER} --images-per-prompt 5", 5),
        (f"{TAGS} --images-per-prompt 4", 4),
    ],
    "prompts_per_epoch": [(ANY, 8), (ON_EMOJI, 4), (HUMAN, 8), (f"{HUMAN} {PAPER}", 80)],
    "reference": [
        (ANY, "initial"),
        (ON_EMOJI, "initial"),
        ("--objective human --model some/thing", "initial"),
        (TAGS, "initial"),
        (f"{TAGS} {PAPER}", "initial"),
        (f"{TAGS} {PAPER} --reference previous", "previous"),
        (f"{TAGS} --reference initial", "initial"),
    ],
    "lr": [
        (ANY, 3e-4),
        (ON_EMOJI, 1.5e-3),
        (HUMAN, 1.5e-3),
        (f"{HUMAN} {PAPER}", 3e-5),
        (f"{HUMAN} {PAPER} --lr 3e-4", 3e-4),
    ],
    "beta": [
        (ANY, 0.05),
        (HUMAN, 0.1),
        (TAGS, 0.03),
        (f"{HUMAN} --labels a.csv", 0.06),
        (f"{HUMAN} {PAPER}", None),
        (f"{HUMAN} {PAPER} --beta 0.06", 0.06),
    ],
    "num_steps": [
        (ANY, 20),
        (ON_EMOJI, 10),
        (f"{ON_EMOJI} {PAPER}", 20),
        (f"{ON_EMOJI} --recipe default", 10),
    ],
    "skip_last": [(ON_EMOJI, 2), (f"{ON_EMOJI} {PAPER}", 0), (f"{ANY} {PAPER} --skip-last 2", 2)],
    "gradient_checkpointing": [
        (ANY, True),
        (ON_EMOJI, False),
        (f"{ON_EMOJI} {PAPER}", False),
        (f"{ON_EMOJI} --gradient-checkpointing", True),
        (f"{ANY} --no-gradient-checkpointing", False),
    ],
    "watch": [
        (ANY, None),
        (ON_EMOJI, f"{EMOJI}/classifier.py:recognised"),
        (HUMAN, f"{EMOJI}/classifier.py:recognised"),
        (f"{ON_EMOJI} --prompts animals", f"{EMOJI}/classifier.py:recognised"),
        (f"{ON_EMOJI} --prompts hand", None),
        (f"{ON_EMOJI} --prompts hand --watch incompressibility", "incompressibility"),
        (f"{ON_EMOJI} --watch incompressibility", "incompressibility"),
    ],
}
PRECEDENCES = [(name, flags, value) for name, cases in PRECEDENCE.items() for flags, value in cases]


@pytest.mark.parametrize("name, flags, value", PRECEDENCES)
def test_the_first_that_has_a_setting_decides(name, flags, value):
    assert getattr(parse(flags), name) == value


def test_every_setting_of_the_presets_gives_way_to_what_is_typed():
    others = {
        **{"epochs": 3, "prompts_per_epoch": 5, "images_per_prompt": 6, "batch_size": 7},
        **{"num_steps": 11, "guidance_scale": 1.5, "eta": 0.5, "lr": 0.1, "beta": 3.0},
        **{"eval_images": 12, "eval_every": 13, "loss": "eq12", "reference": "previous"},
        **{"clip": 0.2, "skip_last": 1, "update_every": "timestep", "weight_decay": 0.5},
        **{"max_grad_norm": 2.0, "gradient_checkpointing": True, "replay": 3, "max_kl": 5.0},
        **{"average_weights": True, "warm_up": 5, "lr_schedule": "cosine"},
    }
    parser, _ = options.build_parser()
    presets = [options.EMOJI_PRESETS, *options.RECIPES.values(), *options.HUMAN_PRESETS.values()]
    presets += [options.LABELS_PRESET, *options.LOSS_PRESETS.values()]
    flags = [flag for preset in presets for flag in preset.split()]
    names = {name for preset in presets for name in vars(parser.parse_args(preset.split()))}
    assert names == others.keys() and "--recipe" not in flags
    for objective in PEOPLE:
        for name, value in others.items():
            typed = f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
            paper = "--recipe alg1 --loss eq14" if name == "loss" else PAPER
            args = parse(f"--objective {objective} --model {EMOJI} {paper} {typed}")
            assert getattr(args, name) == value


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
        args = vars(parse(f"{flags} {PAPER}"))
        assert {name: args[name] for name in expected} == expected
        printed = vars(parse(f"{flags} --recipe alg1"))
        different = {name: printed[name] for name in expected if printed[name] != expected[name]}
        assert different == {"clip": None, "update_every": "timestep"}


def test_a_loss_has_a_strength_of_its_own():
    for loss, beta, clip in (("sft", 0, None), ("ddpo", 0.15, 0.1), ("dpok", 0.15, None)):
        args = parse(f"{ON_EMOJI} --loss {loss}")
        assert (args.beta, args.clip) == (beta, clip)
        assert parse(f"{ON_EMOJI} --loss {loss} --beta 2").beta == 2
    assert parse(f"{ON_EMOJI} --loss ddpo --clip 0.2").clip == 0.2


def test_the_learning_rate_rises_and_falls_or_stays():
    args = parse(f"{ANY} --epochs 8 --lr 0.4 --warm-up 4")
    assert [options.learning_rate(args, epoch) for epoch in (1, 5)] == pytest.approx([0.1, 0.2])
    args = parse(f"{ANY} --epochs 8 --lr 0.4 --warm-up 4 --lr-schedule constant")
    assert [options.learning_rate(args, epoch) for epoch in (1, 5, 8)] == [0.1, 0.4, 0.4]


@pytest.mark.parametrize("cuda, model", [(False, str(EMOJI)), (True, SD15)])
def test_without_a_model_the_machine_decides(monkeypatch, cuda, model):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    args = parse("--objective compressibility")
    assert args.model == model
    assert args.precision == ("fp16" if cuda else "fp32")
    assert args.epochs == (50 if cuda else 24) and (args.watch is None) == cuda


def test_the_emoji_model_is_known_by_its_folder_not_by_how_it_is_written(tmp_path):
    (tmp_path / "link").symlink_to(EMOJI)
    assert parse("--objective compressibility --model link").epochs == 24
    assert parse("--objective compressibility --model elsewhere/emoji_sd").epochs == 50


def test_the_flags_have_their_defaults_and_help_shows_them():
    args = parse(ANY)
    assert (args.prompts, args.watch, args.out, args.clip) == ("animals", None, None, None)
    assert args.clip_model == "openai/clip-vit-large-patch14"
    assert "l14-linearMSE" in args.aesthetic_head
    parser, defaults = options.build_parser()
    text = "".join(parser.format_help().split())  # long lines are wrapped
    assert vars(args).keys() == defaults.keys() | {"command", "groups_given"}
    for name, default in defaults.items():
        assert f"--{name.replace('_', '-')}" in text
        if type(default) in (int, float, str):
            assert f"(default:{default})" in text


def test_the_common_flags_fill_a_screen_and_each_has_its_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = options.build_parser()[0].format_help()
    first, *_ = text.split("\n\nwhat to learn:\n")
    assert len(first.splitlines()) <= 40 and max(map(len, first.splitlines())) <= 80
    common = "objective labels prompts model epochs beta lr max-kl out resume evaluate dry-run"
    assert all(f"\n  --{flag} " in first for flag in common.split())
    entries = re.split(r"\n  (?=--)", text.split("\n\ndefaults of their own")[0])[1:]
    assert len(entries) == len(options.build_parser()[1])
    without = {entry.split()[0] for entry in entries if "default" not in entry}
    assert without == {"--objective", "--labels", "--resume", "--evaluate"}


def test_the_command_is_kept_as_it_was_typed():
    command = "python sd_demo.py --objective 'my scorers.py:f' --model some/thing"
    assert parse("--objective 'my scorers.py:f' --model some/thing").command == command


# Earlier runs


@pytest.fixture
def earlier(tmp_path):
    """The folder of an earlier run, whose settings are neither defaults nor presets."""
    flags = f"{HUMAN} --out run --seed 5 --epochs 6 --lr 0.25 --watch compressibility --port 9000"
    return run_folder.create_or_resume(vars(parse(flags)) | {"beta": 0.125})


@pytest.mark.parametrize("start", ["--resume", "--evaluate"])
def test_an_earlier_run_has_its_settings_not_those_of_presets(earlier, start):
    args = parse(f"{start} {earlier}")
    saved = files.read_json(earlier / "config.json")
    unsaved = options.UNSAVED_FLAGS
    assert {**saved, **{name: None for name in unsaved}} == {
        **{name: saved[name] for name in ("versions", "git_revision")},
        **vars(args),
        **{name: None for name in unsaved},
    }
    assert (args.lr, args.beta, args.seed, args.objective) == (0.25, 0.125, 5, "human")
    assert args.out == earlier and args.port is None and "--port 9000" in args.command


@pytest.mark.parametrize("start", ["--resume", "--evaluate"])
def test_an_earlier_run_stays_in_its_folder(earlier, start):
    assert parse(f"{start} {earlier} --out elsewhere").out == earlier


def test_a_resumed_run_takes_more_epochs_another_port_and_what_it_has(earlier):
    args = parse(f"--resume {earlier} --epochs 9 --max-kl 50 --port 9001 --seed 5 --lr 0.25")
    assert (args.epochs, args.max_kl, args.port, args.seed) == (9, 50, 9001, 5)


@pytest.mark.parametrize(
    "flags, was",
    [
        ("--lr 0.1", "--lr 0.25"),
        ("--images-per-prompt 4", "--images-per-prompt 2"),
        ("--seed 0", "--seed 5"),
        ("--gradient-checkpointing", "--gradient-checkpointing False"),
        ("--objective tags --watch none", "--objective human, --watch compressibility"),
    ],
)
def test_a_resumed_run_takes_no_other_settings(earlier, capsys, flags, was):
    message = refusal(f"--resume {earlier} {flags}", capsys)
    assert f"was started with {was}: give the same, or a new run" in message


def test_an_evaluation_takes_other_settings_but_the_same_weights(earlier, capsys):
    args = parse(f"--evaluate {earlier} --objective compressibility --eval-images 7 --seed 1")
    assert (args.objective, args.eval_images, args.seed) == ("compressibility", 7, 1)
    for flags in ("--model other/model", "--lora-rank 2"):
        assert "was started with" in refusal(f"--evaluate {earlier} {flags}", capsys)


def test_a_run_of_another_version_with_fewer_settings_is_refused(earlier, capsys):
    config = files.read_json(earlier / "config.json")
    del config["eta"]
    files.save_json(earlier / "config.json", config)
    assert "is no run of sd_demo.py" in refusal(f"--resume {earlier}", capsys)


FLAWS = {
    "lr": ["fast", True, None, [0.1], {}, -1, 0, float("nan"), float("inf"), "0.25"],
    "epochs": [2.5, "6", 0, []],
    "model": [None, 3],
    "prompts": [None, ["a cat"]],
    "average_weights": ["yes", 1, None],
    "loss": ["eq15", 14, None, ["eq14"]],
    "objective": [5, ["human"], ""],
    "watch": [["a", "b"], True],
    "seed": [1.5, -1, 2**63],
    "command": [None, ["python"]],
}
CASES = [(name, value) for name, values in FLAWS.items() for value in values]


@pytest.mark.parametrize("start", ["--resume", "--evaluate"])
@pytest.mark.parametrize("name, value", CASES)
def test_a_config_with_a_flaw_is_refused_and_kept(earlier, capsys, start, name, value):
    file = earlier / "config.json"
    files.save_json(file, files.read_json(file) | {name: value})
    before = file.read_bytes()
    message = refusal(f"{start} {earlier}", capsys)
    assert "has a flaw" in message or name in message and len(message) < 300
    assert file.read_bytes() == before


# What is refused


def refusal(flags: str, capsys) -> str:
    """The sentence with which the command line refuses, below one line of usage."""
    with pytest.raises(SystemExit) as stop:
        parse(flags)
    usage, message = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert usage.startswith("usage: sd_demo.py") and message.startswith("sd_demo.py: error: ")
    return message


REFUSED = {
    "--objective ''": "say what to learn: --objective",
    "--images .": "--images is the folder of the images of --labels",
    "--height 64": "--height and --width: give both, or none",
    "--width 64": "--height and --width: give both, or none",
    "--replay -1": "--replay -1: give a number of batches",
    "--replay 1 --reference previous": "need --reference initial",
    "--labels x.csv --reference previous": "need --reference initial",
    "--max-kl 0": "--max-kl: 0: give a positive number",
    "--passes 0": "--passes: 0: give a positive number",
    "--annotators 0": "--annotators: 0: give a positive number",
    "--eta 0": "--eta: 0: give a positive number",
    "--beta -1": "--beta: -1: give a positive number",
    "--lr nan": "--lr: nan: give a positive number",
    "--lr inf": "--lr: inf: give a positive number",
    "--epochs 0": "--epochs: 0: give a positive number",
    "--epochs 1.5": "--epochs: invalid int value: '1.5'",
    "--guidance-scale -1": "--guidance-scale: -1: give a positive number",
    "--guidance-scale much": "--guidance-scale: invalid float value: 'much'",
    "--weight-decay -1": "--weight-decay: -1: give a positive number",
    "--weight-decay nan": "--weight-decay: nan: give a positive number",
    "--lora-rank 0": "--lora-rank: 0",
    "--eval-every 0": "--eval-every: 0",
    "--skip-last 20": "--skip-last 20: some of the --num-steps 20 must be left",
    "--skip-last -1": "--skip-last -1",
    "--num-steps 2": "--skip-last 2: some of the --num-steps 2 must be left",
    "--step-fraction 0": "--step-fraction: 0: give a positive number",
    "--step-fraction 1.1": "--step-fraction 1.1: give a number up to 1",
    "--step-fraction 0.5 --loss eq12": "--loss eq12 chooses its steps itself",
    "--step-fraction 0.5 --loss chain --update-every trajectory": "give no --step-fraction",
    "--images-per-prompt 1": "a preference needs 2 or more",
    "--clip 1": "--clip 1.0: give a number below 1",
    "--loss chain": "give --update-every trajectory",
    "--loss chain --update-every trajectory --clip 0.1": "no --clip",
    "--loss chain --recipe paper": "no --clip",
    "--loss sft --clip 0.1": "--loss sft clamps no ratio: give no --clip",
    "--loss dpok --recipe paper": "--loss dpok clamps no ratio: give no --clip",
    "--beta 0": "--loss eq14 needs a --beta above 0",
    "--loss dpok --beta 0": "--loss dpok needs a --beta above 0",
    "--loss ddpo --replay 2": "give one scorer as --objective, no --labels and no --replay",
    "--loss dpok --labels x.csv": "learns from one score of each new image",
    "--loss ddpo --objective human": "learns from one score of each new image",
    "--loss reward-weighted --objective tags": "learns from one score of each new image",
    "--loss dpok --objective aesthetic,alignment": "learns from one score of each new image",
    "--loss sft --reference previous": "give --reference initial",
    "--loss ddpo --reference previous": "give --reference initial",
    "--loss lora": "invalid choice",
    "--lr-schedule linear": "invalid choice",
    "--precision fp16": "needs a CUDA GPU: give fp32 or bf16",
    "--precision int8": "invalid choice",
    "--seed -1": "--seed -1: give a number from 0",
    f"--seed {2**63}": f"--seed {2**63}",
    "--out .": "--out . exists: give a new folder, or --resume it",
    "--resume nothing": "nothing is no run of sd_demo.py",
    "--evaluate nothing": "nothing is no run of sd_demo.py",
    "--epoch 3": "unrecognized",  # no abbreviations
    "stray": "unrecognized",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_cannot_be_meant_is_refused_in_one_sentence(flags, capsys):
    assert REFUSED[flags] in refusal(f"{ANY} {flags}", capsys)


@pytest.mark.parametrize("flag", ["--out", "--labels", "--model", "--images", "--init-lora"])
def test_a_name_too_long_for_a_file_is_no_traceback(flag):
    parse(f"--objective compressibility --labels x.csv --model some/thing {flag} {'a' * 300}")


def test_without_an_objective_the_command_line_asks_for_one(capsys):
    assert "say what to learn: --objective" in refusal("", capsys)


def test_an_earlier_run_may_exist(earlier):
    assert parse(f"--resume {earlier}").out.exists()
    shutil.rmtree(earlier)
    assert parse(f"{ANY} --out {earlier}").out == Path(earlier)


# What follows from the settings


@pytest.mark.parametrize(
    "epochs, every, expected",
    [(10, 4, {0, 4, 8, 10}), (8, 4, {0, 4, 8}), (3, 5, {0, 3}), (2, 1, {0, 1, 2})],
)
def test_held_out_images_are_evaluated_before_at_intervals_and_at_the_end(epochs, every, expected):
    args = Namespace(epochs=epochs, eval_every=every, passes=1, groups_given=0, objective="human")
    assert {n for n in range(epochs + 1) if options.is_evaluated(args, n)} == expected


@pytest.mark.parametrize("max_kl, calls", [(None, 7), (9.0, 14)])
def test_the_bar_counts_what_is_to_do(max_kl, calls):
    args = Namespace(epochs=7, eval_every=3, passes=2, groups_given=1, objective="human")
    args.max_kl, last = max_kl, options.last_epoch(args)
    plan = cost.Cost(**dict.fromkeys(cost.Cost._fields, 0))
    plan = plan._replace(calls=1000, calls_given=10**6, calls_eval=7)
    for done in range(last + 1):
        to_do = range(done + 1, last + 1)
        expected = sum(10**6 if epoch <= 2 else 1000 for epoch in to_do)
        expected += 7 + calls * sum(options.is_evaluated(args, epoch) for epoch in to_do)
        assert options.calls_to_go(args, plan, done) == expected
    args.epochs = 10**15  # and takes no time to do so
    assert options.calls_to_go(args, plan, last) > 10**15


def test_the_images_of_a_file_come_first():
    """Alone, its passes are the epochs; with an objective, they come before those that sample."""
    assert parse("--labels a.csv").epochs == 4 and parse("--labels a.csv --passes 7").epochs == 7
    alone = parse("--labels a.csv --model some/thing --epochs 3")
    first = parse(f"{ANY} --labels a.csv --epochs 3 --passes 2")
    alone.groups_given = first.groups_given = 5
    for args, expected in ((alone, (3, 3)), (first, (2, 5)), (parse(ANY), (0, 50))):
        assert (options.epochs_given(args), options.last_epoch(args)) == expected
    assert all(options.is_evaluated(first, n) for n in range(6))
    alone.groups_given = 2 * EPOCH_GROUPS + 1  # a large file is cut into epochs
    assert options.epochs_given(alone) == 9
    assert alone.prompts is None and first.prompts == "animals"  # alone, those of the file
    assert alone.loss == first.loss == "chain" and alone.max_kl and first.average_weights


def test_the_groups_of_an_epoch_must_fill_batches():
    args = Namespace(batch_size=2, prompts_per_epoch=12, objective="human")
    options.check_batches(args, 3)
    with pytest.raises(ValueError, match="--prompts-per-epoch 12: give a multiple of 8"):
        options.check_batches(args, 4)
