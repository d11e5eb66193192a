"""The command line: what it refuses, what a run leaves behind, and when it stops."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import d3po
from toy import ddpm, measure, plots, train_toy, worlds

KEYS = (
    "loss_name epoch score kl win_rate on_data attained_share accuracy margin loss labels".split()
)
FILES = {"config.json", "metrics.jsonl", "labels.jsonl", "policy.pt", "samples.npz", "toy.png"}
EPOCHS, PAIRS = 3, 8


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """A reference trained for 30 steps, a coarse grid, few final chains: a run learns nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name, model in train_toy.MODELS.items():
            short = model._replace(pretrain=partial(model.pretrain, steps=30))
            patch.setitem(train_toy.MODELS, name, short)
        patch.setattr(train_toy, "SPACING", 0.2)
        patch.setattr(train_toy, "SAMPLES", 100)
        patch.setattr(train_toy, "WATCHED", 50)
        yield


def run(out, *flags, figure=False):
    """Train by the whole chain alone, unless the flags say otherwise."""
    flags = flags if "--loss" in flags else ("--loss", "chain", *flags)
    small = f"--epochs {EPOCHS} --pairs {PAIRS} --replay 1 --num-steps 4 --out {out}"
    with pytest.MonkeyPatch.context() as patch:
        if not figure:  # it takes longer than such a run
            patch.setattr(plots, "draw_run", lambda run: "not drawn")
        train_toy.main([*small.split(), *flags])
    return out


def strict(line):
    """Parse JSON as other programs do, which know no NaN and no Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def rows(path):
    return [strict(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of both losses, as without flags."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    return run(out, "--loss", "eq14", "chain", figure=True)


# Refusals


def refused(capsys, *flags):
    """The sentence that a refused command prints, after one line of usage."""
    with pytest.raises(SystemExit) as stop:
        train_toy.main(list(flags))
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: train_toy.py") and error.startswith("train_toy.py: error: ")
    return error


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--eta 0", "eta density noise"),
        ("--beta 0", "--beta positive"),
        ("--lr inf", "--lr"),
        ("--num-steps 1000", "1000 999"),
        ("--epochs 0", "--epochs 0"),
        ("--seed -1", "--seed -1"),
        ("--loss ppo", "--loss ppo eq14 eq12 chain"),
        ("--model flow --num-steps 1000", "1000 999"),
        ("--ep 3", "--ep"),
        ("--out .", "--out ."),
    ],
)
def test_bad_input_is_refused_in_one_sentence(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, *flags.split())
    for word in words.split():  # what was wrong, and what is possible
        assert word in error, error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "deep/run"])
def test_an_unwritable_folder_is_refused_before_anything_is_trained(
    below, capsys, tmp_path, monkeypatch
):
    untrained = train_toy.MODELS["ddpm"]._replace(pretrain=None)
    monkeypatch.setitem(train_toy.MODELS, "ddpm", untrained)
    (tmp_path / "file").write_text("")
    error = refused(capsys, "--out", str(tmp_path / "file" / below))
    assert "--out" in error and str(tmp_path / "file") in error


@pytest.mark.slow  # it starts a process
def test_as_a_script_from_another_folder(tmp_path):
    command = [sys.executable, Path(train_toy.__file__), "--eta", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 2 and "Traceback" not in done.stderr


# What a run leaves behind


def test_a_run_leaves_its_folder(tiny):
    assert {path.name for path in tiny.iterdir()} == FILES
    config = strict((tiny / "config.json").read_text())
    assert config["epochs"] == EPOCHS and config["pairs"] == PAIRS and config["num_steps"] == 4
    assert config["out"] == str(tiny)
    assert {"mixture", "model", "preference", "labels", "reference", "eta"} <= set(config)
    assert {"beta", "seed", "git_revision", "optimum"} <= set(config)
    assert list(config["loss"]) == ["eq14", "chain"]
    assert config["loss"]["chain"] == {"title": "whole chain", "lr": 0.01, "replay": 1}
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["d3po"] == d3po.__version__
    assert {"j_ref", "j_gauss", "j_star", "score_star", "kl_star"} <= set(config["optimum"])


def test_metrics_have_the_keys_of_the_design(tiny):
    metrics = rows(tiny / "metrics.jsonl")
    assert [list(row) for row in metrics] == [KEYS] * 2 * EPOCHS
    names = [name for name in ("eq14", "chain") for _ in range(EPOCHS)]
    assert [row["loss_name"] for row in metrics] == names
    assert [row["epoch"] for row in metrics] == 2 * [1, 2, 3]
    assert [row["labels"] for row in metrics] == 2 * [PAIRS, 2 * PAIRS, 3 * PAIRS]
    shares = [row[name] for row in metrics for name in ("win_rate", "on_data", "accuracy")]
    assert all(0 <= share <= 1 for share in shares)
    # the first chains are the reference's
    assert metrics[0]["margin"] == 0 and metrics[0]["accuracy"] == 0.5


def test_every_comparison_is_a_row(tiny):
    labels = rows(tiny / "labels.jsonl")
    places = [(row["loss_name"], row["epoch"]) for row in labels]
    assert places == [
        (name, n) for name in ("eq14", "chain") for n in (1, 2, 3) for _ in range(PAIRS)
    ]
    score = worlds.SCORES[strict((tiny / "config.json").read_text())["preference"]]
    for row in labels:
        assert list(row) == ["loss_name", "epoch", "points", "scores", "h"] and row["h"] in (1, -1)
        assert row["scores"] == pytest.approx(score(torch.tensor(row["points"])).tolist())
    # both losses begin with the same pairs of the same reference
    first, other = (
        [{**row, "loss_name": ""} for row in labels if row["loss_name"] == name][:PAIRS]
        for name in ("eq14", "chain")
    )
    assert first == other


def test_greedy_labels_are_the_better_score(tmp_path):
    for row in rows(run(tmp_path / "run", "--labels", "greedy") / "labels.jsonl"):
        assert row["h"] == np.sign(row["scores"][0] - row["scores"][1])


def stored_policy(out, name):
    mixture, schedule = worlds.MIXTURES["ring"], d3po.make_schedule(worlds.ALPHA_BARS, 4)
    policy = ddpm.Adapter(ddpm.MLP(ddpm.data_variance(mixture)), schedule, mixture)
    policy.requires_grad_(False).load_state_dict(torch.load(out / "policy.pt")[name])
    return policy, schedule


@pytest.mark.parametrize("name", ["eq14", "chain"])
def test_the_stored_weights_are_the_policy_of_the_stored_samples(tiny, name):
    """Of the final ones and of the last epoch, whose noises have the seeds 2 and 1."""
    policy, schedule = stored_policy(tiny, name)
    samples = np.load(tiny / "samples.npz")
    for seed, points in ((2, samples[name]), (1, samples[f"{name}_epochs"][-1])):
        x = measure.sample(policy, schedule, len(points), seed=seed)[-1]
        assert np.array_equal(x, points)
    x = measure.sample(policy.reference, schedule, 100, seed=2)[-1]
    assert np.array_equal(x, samples["before"])
    assert samples[f"{name}_epochs"].shape == (EPOCHS + 1, 50, 2)


def test_training_leaves_the_reference_alone(tiny):
    torch.manual_seed(strict((tiny / "config.json").read_text())["seed"])
    reference = train_toy.MODELS["ddpm"].pretrain(worlds.MIXTURES["ring"])
    for weights in torch.load(tiny / "policy.pt").values():
        for name, value in reference.state_dict().items():
            assert torch.equal(weights[f"reference.denoiser.{name}"], value)


def test_the_table_is_that_of_the_samples(tmp_path, capsys):
    out = run(tmp_path / "run", "--preference", "direction", "--loss", "eq14", "chain")
    lines = capsys.readouterr().out.splitlines()
    heads = next(line for line in lines if line.endswith("exact optimum"))
    assert heads.split("  ")[-1].strip() == "exact optimum" and "Eq. 14  whole chain" in heads
    line = next(line for line in lines if line.startswith("mean score"))
    before, *after, means, star = map(float, line.split()[2:])
    samples = np.load(out / "samples.npz")
    numbers = strict((out / "config.json").read_text())["optimum"]
    # three digits
    assert before == pytest.approx(numbers["j_ref"], abs=6e-4)
    expected = [samples[name].sum(1).mean() / math.sqrt(2) for name in ("eq14", "chain")]
    assert after == pytest.approx(expected, abs=6e-4)
    assert means == pytest.approx(numbers["score_gauss"], abs=6e-4)
    assert star == pytest.approx(numbers["score_star"], abs=6e-4)
    assert samples["optimum"].shape == (100, 2)


def test_the_same_seed_gives_the_same_bytes_and_a_loss_alone_the_same_as_beside_another(
    tiny, tmp_path
):
    alone, other = run(tmp_path / "alone"), run(tmp_path / "other", "--seed", "1")
    for name in ("metrics.jsonl", "labels.jsonl"):
        both = (tiny / name).read_bytes()
        assert both.endswith((alone / name).read_bytes())
        assert not both.endswith((other / name).read_bytes())


@pytest.mark.parametrize(
    "flags",
    [
        "--loss eq12",
        "--replay 2",
        "--lr 1e-3",
        "--reference exact",
        "--model flow --reference exact --eta 0.5",
        "--mixture grid --preference avoid",
        "--num-steps 1",
    ],
)
def test_other_choices_run_the_same_loop(flags, tiny, tmp_path):
    out = run(tmp_path / "run", *flags.split())
    assert {path.name for path in out.iterdir()} == FILES - {"toy.png"}
    assert [list(row) for row in rows(out / "metrics.jsonl")] == [KEYS] * EPOCHS
    # a flag counts
    assert not (tiny / "metrics.jsonl").read_bytes().endswith((out / "metrics.jsonl").read_bytes())


@pytest.mark.parametrize(
    "name, steps", [("eq14", [0, 1, 2, 3]), ("eq12", [0]), ("chain", [0, 1, 2, 3])]
)
def test_each_loss_trains_its_steps(name, steps):
    schedule, times = d3po.make_schedule(worlds.ALPHA_BARS, 4), []
    slope = torch.ones((), requires_grad=True)

    def policy(x, time, cond=None):
        if torch.is_grad_enabled():
            times.append(int(time[0]))
        return slope * x

    trajectory = d3po.rollout(policy, schedule, torch.randn(2, 2))
    pairs, function = torch.tensor([[0, 1]]), train_toy.LOSSES[name].function
    losses = function(policy, schedule, trajectory, pairs, 1.0, trajectory.log_prob)
    assert len(list(losses)) == len(steps)
    assert sorted(times, reverse=True) == schedule.timesteps[steps].tolist()


def test_runs_that_are_there_are_kept_aside(tmp_path, capsys):
    out = tmp_path / "some" / "run"
    metrics = []
    for seed in (1, 2, 3):
        run(out, "--seed", str(seed), "--epochs", "1", "--reference", "exact")
        metrics.append((out / "metrics.jsonl").read_bytes())
    assert len(set(metrics)) == 3
    for name, seed in (("run.1", 1), ("run.2", 2), ("run", 3)):
        folder = out.with_name(name)
        assert strict((folder / "config.json").read_text())["seed"] == seed
        assert (folder / "metrics.jsonl").read_bytes() == metrics[seed - 1]
    assert "that one is now run.2" in capsys.readouterr().out


def test_other_files_in_the_folder_stay_and_no_git_is_no_revision(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.setenv("PATH", "")
    out = run(tmp_path, "--epochs", "1", "--reference", "exact")
    assert (out / "notes.txt").read_text() == "mine"
    assert strict((out / "config.json").read_text())["git_revision"] is None


# What is not finite


def stopped(out, *flags):
    """The message of a run that stops."""
    with pytest.raises(SystemExit) as stop:
        run(out, *flags)
    assert stop.value.code not in (0, None)
    return str(stop.value.code)  # Python prints it and exits with code 1


def test_a_loss_that_breaks_in_the_third_epoch(tmp_path, monkeypatch):
    out, weights = tmp_path / "run", []
    loss = train_toy.LOSSES["chain"]

    def function(*args):
        epochs = (out / "metrics.jsonl").read_text().count("\n")
        if epochs == 2 and not weights:
            weights.append(torch.load(out / "policy.pt")["chain"])
        return (piece * (math.nan if epochs == 2 else 1) for piece in loss.function(*args))

    monkeypatch.setitem(train_toy.LOSSES, "chain", loss._replace(function=function))
    message = stopped(out)
    assert "whole chain, epoch 3" in message and "--lr (now 0.01)" in message
    assert str(out) in message and "\n" not in message
    assert [row["epoch"] for row in rows(out / "metrics.jsonl")] == [1, 2]
    assert len(rows(out / "labels.jsonl")) == 2 * PAIRS
    for name, value in torch.load(out / "policy.pt")["chain"].items():
        assert value.isfinite().all() and torch.equal(value, weights[0][name])
