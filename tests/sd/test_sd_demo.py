"""sd_demo.py on tiny pipelines: what training does, and what a run does and leaves."""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from sd_helpers import (
    FLAGS,
    PROMPTS,
    Loaded,
    outcome,
    read_rows,
    run,
    same_images,
    same_lora,
)
from test_model import as_ddim, stock_images

import d3po
import sd_demo
from sd import cost, figures, files, metrics, options
from sd.files import ROOT
from sd.losses import SCORED
from sd.model import Batch, PipelinePolicy
from sd.replay import LabelledBatch
from sd.seeds import RandomPurpose, seeded_generator

# Of processes that a test starts
ENVIRONMENT = os.environ | {
    **{"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "sd")]),
}

# Training

LOSSES = [
    ("eq14", "timestep"),
    ("eq14", "trajectory"),
    ("eq12", "timestep"),
    ("chain", "trajectory"),
]


@pytest.mark.parametrize("loss, every", [LOSSES[0], LOSSES[-1]])
def test_training_raises_winners_over_losers(tiny, loss, every):
    loaded = Loaded(tiny, f"--loss {loss} --update-every {every}")
    batch, pairs = loaded.sample(), torch.tensor([[1, 0], [2, 3]])
    losses = [np.mean(loaded.update(batch, pairs.tolist())[0]) for _ in range(3)]
    log_ratio = (loaded.log_prob(batch) - loaded.reference_log_prob(batch)).sum(0)
    of_batch = metrics.LogRatios(*log_ratio[pairs.T].tolist(), [], [])
    found = metrics.preference_metrics([of_batch], beta=1.0)
    assert found["accuracy"] == 1 and found["margin"] > 1
    assert losses[-1] < losses[0] < math.log(2) + 0.01


@pytest.mark.parametrize("loss, every", LOSSES)
def test_each_loss_has_its_steps_updates_and_gradient(tiny, loss, every):
    """The gradients that reach the optimiser, against plain autograd of the loss."""
    flags = f"--loss {loss} --update-every {every} --max-grad-norm 1e9 --beta 0.2"
    loaded = Loaded(tiny, flags)
    batch = loaded.sample()
    loaded.update(batch, [[1, 0], [3, 2]])  # away from theta = ref, where Eq. 5 is Eq. 14
    schedule, lora = loaded.model.schedule, loaded.model.lora
    ref, order = loaded.reference_log_prob(batch), [2, 0, 1]
    pairs = [[0, 1], [0, 3], [2, 3]]  # chain 0 twice
    winner, loser = torch.tensor(pairs).T

    def objective(steps):
        differences = []
        for i in steps:
            state, action = batch.trajectory.x[i : i + 2]
            mean = d3po.policy_mean(loaded.model.sampler, schedule, i, state, batch.cond)
            log_ratio = d3po.log_prob(action, mean, schedule.sigma[i]) - ref[i]
            differences.append(0.2 * (log_ratio[winner] - log_ratio[loser]))
        differences = torch.stack(differences)
        if loss == "chain":
            differences = differences.sum(0, keepdim=True)
        return -torch.nn.functional.logsigmoid(differences).mean(1).sum()

    updates = [[i] for i in order] if every == "timestep" else [order]
    updates = [[0]] if loss == "eq12" else updates
    gradients, values = [], []
    # In place of the optimiser's step: all updates are about the same weights
    loaded.optimizer.step = lambda: gradients.append(
        torch.cat([weight.grad.flatten() for weight in lora])
    )
    losses, overflows = loaded.update(batch, pairs, ref, order)
    assert overflows == [False] * len(updates) and len(losses) == sum(map(len, updates))
    for gradient, steps in zip(gradients, updates, strict=True):
        value = objective(steps)
        values.append(value.item())
        expected = torch.cat([part.flatten() for part in torch.autograd.grad(value, lora)])
        # float32, and beta times a log-prob of 1e-3 nats' rounding
        assert (gradient - expected).norm() < 1e-3 * expected.norm()
    count = 1 if loss == "chain" else len(losses)  # a chain's loss is not cut into T
    assert np.mean(losses) == pytest.approx(sum(values) / count, rel=1e-3)


def test_training_changes_the_lora_and_nothing_else(tiny):
    loaded = Loaded(tiny)
    unet, batch = loaded.model.pipe.unet, loaded.sample()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    reference = loaded.reference_log_prob(batch)
    loaded.update(batch, [[0, 1], [3, 2]], reference)
    for name, weight in unet.state_dict().items():
        assert torch.equal(weight, before[name]) == ("lora_" not in name), name
    assert torch.equal(loaded.reference_log_prob(batch), reference)
    assert (loaded.log_prob(batch) - reference).abs().max() > 0.1


def test_the_gradient_is_clipped_to_its_norm(tiny):
    loaded, norms = Loaded(tiny, "--max-grad-norm 1e-3"), []
    lora = loaded.model.lora
    loaded.optimizer.step = lambda: norms.append(
        torch.cat([weight.grad.flatten() for weight in lora]).norm().item()
    )
    loaded.update(loaded.sample(), [[0, 1]])
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * 3


def test_beyond_the_clamp_there_is_no_gradient(tiny):
    loaded, norms = Loaded(tiny, "--clip 1e-6"), []
    batch, lora = loaded.sample(), loaded.model.lora
    reference = loaded.reference_log_prob(batch) - 1  # nats: the policy is far above it
    loaded.optimizer.step = lambda: norms.append(sum(w.grad.abs().sum().item() for w in lora))
    loaded.update(batch, [[0, 1]], reference)
    assert norms == [0] * 3


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_metrics_of_a_batch_are_of_the_policy_before_it_trains_on_it(tiny, reference):
    loaded = Loaded(tiny, f"--reference {reference} --skip-last 1 --beta 0.2")
    loaded.update(loaded.sample(), [[0, 1], [3, 2]])
    batch = loaded.sample((2, 3))  # of a policy that is not the initial model any more
    ref_log_prob = sd_demo.reference_log_prob(loaded.run, batch)
    sampled, initial = batch.trajectory.log_prob, loaded.reference_log_prob(batch)
    assert torch.equal(ref_log_prob, sampled if reference == "previous" else initial)
    labelled = LabelledBatch(batch.trajectory, batch.cond, torch.tensor([[1, 0], [3, 2]]))
    found = loaded.run.log_ratios(labelled, ref_log_prob, sampled=True)
    log_ratio = sampled - initial
    assert found.chains == log_ratio.sum(0).tolist()
    assert found.trained == log_ratio[:2].sum(0).tolist()
    assert found.winners == [found.trained[1], found.trained[3]]
    assert found.losers == [found.trained[0], found.trained[2]]
    assert metrics.kl([found])["kl"] > 0.1
    # Of trajectories that nobody sampled it asks the policy
    drawn = labelled._replace(trajectory=d3po.Trajectory(batch.trajectory.x, sampled * 0))
    found = loaded.run.log_ratios(drawn, ref_log_prob, sampled=False)
    assert found.chains == pytest.approx(log_ratio.sum(0).tolist(), rel=1e-3, abs=1e-3)


def test_accuracy_and_kl_are_of_all_new_pairs_and_chains(
    tiny, scorers, tmp_path, monkeypatch, no_figures
):
    seen, pairs, kl = [], metrics.preference_metrics, metrics.kl

    def watch(batches):
        seen.append([len(batch.winners) + len(batch.chains) for batch in batches])
        return batches

    monkeypatch.setattr(metrics, "preference_metrics", lambda all, beta: pairs(watch(all), beta))
    monkeypatch.setattr(metrics, "kl", lambda all: kl(watch(all)))
    run(tiny, tmp_path / "run", f"{scorers}:brightness", "--batch-size 1 --replay 2")
    both = [1 + 2, 1 + 2]  # a pair and two chains of each new batch, and nothing of earlier ones
    assert seen == [[], both, both, both]


def test_without_pairs_nothing_is_trained(tiny):
    loaded = Loaded(tiny)
    before = loaded.lora()
    assert loaded.update(loaded.sample(), []) == ([], [])
    assert same_lora(loaded.lora(), before)


def test_memory_is_that_of_one_step_and_checkpointing_halves_it(tiny):
    plain, gradients = bytes_held(tiny, "", [0])
    checkpointing = "--gradient-checkpointing"
    one, same_gradients = bytes_held(tiny, checkpointing, [0])
    three, _ = bytes_held(tiny, checkpointing, [0, 1, 2])
    chain, _ = bytes_held(tiny, f"{checkpointing} --loss chain", [0, 1, 2])
    # A tiny UNet has few blocks: the benchmark on larger ones asks for a third
    assert one < plain / 2 and three == one
    assert chain == pytest.approx(one, rel=0.01)
    torch.testing.assert_close(gradients, same_gradients, rtol=1e-4, atol=1e-7)


def bytes_held(tiny, flags: str, steps: list[int]) -> tuple[int, list]:
    """The most that autograd keeps in an update over some steps, and the first gradients."""
    loaded, held = Loaded(tiny, f"{flags} --update-every trajectory"), Held()
    loaded.optimizer.step = lambda: None
    loaded.optimizer.zero_grad = lambda: None
    batch = loaded.sample()
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda kept: kept.tensor):
        loaded.update(batch, [[1, 0], [3, 2]], steps=steps)
    return held.most, [weight.grad for weight in loaded.model.lora]


class Held:
    """Counts the bytes of tensors that autograd keeps, as long as it keeps them."""

    def __init__(self):
        self.bytes = self.most = 0

    def pack(self, tensor):
        self.bytes += tensor.nbytes
        self.most = max(self.most, self.bytes)
        return Kept(tensor, self)


class Kept:
    def __init__(self, tensor, held):
        self.tensor, self.held = tensor, held

    def __del__(self):
        self.held.bytes -= self.tensor.nbytes


# Overflow


def test_an_update_that_overflows_is_skipped(tiny, overflows):
    loaded = Loaded(tiny)
    overflows.add(1)
    batch, pairs = loaded.sample(), [[0, 1], [2, 3]]
    losses, skipped = loaded.update(batch, pairs)
    assert skipped == [False, True, False] and np.isfinite(losses).all()
    overflows.clear()
    other = Loaded(tiny)
    other.update(batch, pairs, steps=[0, 2])
    assert same_lora(loaded.lora(), other.lora())  # as if the step had not been


def test_a_grad_scaler_skips_the_update_and_halves_its_factor(tiny, overflows):
    """The path of fp16 on a GPU, with torch's scaler for CPUs."""
    accelerator, norms, pairs = Accelerator(), [], [[0, 1], [2, 3]]
    try:
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        loaded = Loaded(tiny, accelerator=accelerator)
        # From here on it unscales
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        overflows.add(1)
        batch, clip = loaded.sample(), accelerator.clip_grad_norm_
        accelerator.clip_grad_norm_ = lambda *args: norms.append(clip(*args)) or norms[-1]
        assert loaded.update(batch, pairs)[1] == [False, True, False]
        assert accelerator.scaler.get_scale() == 2.0**15
        overflows.clear()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    plain = Loaded(tiny)
    plain.update(batch, pairs, steps=[0, 2])
    for name, weight in plain.lora().items():
        torch.testing.assert_close(weight, loaded.lora()[name])
    assert norms[0] < 100  # of the unscaled gradient


def test_the_last_ten_updates_decide_if_a_run_stops(tiny):
    loaded = Loaded(tiny)
    for fine in ([], [True] * 9, [False] + [True] * 9, [True] * 9 + [False]):
        sd_demo.check_finite(loaded.run, 7, fine)
    with pytest.raises(FloatingPointError, match="Epoch 7: .* lower --lr .now 0.005."):
        sd_demo.check_finite(loaded.run, 7, [True] * sd_demo.MAX_SKIPPED)
    loaded.model.lora[-1].data.view(-1)[0] = math.inf
    with pytest.raises(FloatingPointError, match="weights are not finite any more"):
        sd_demo.check_finite(loaded.run, 7, [])


@pytest.mark.slow
def test_ten_overflows_over_two_epochs_stop_a_run_and_it_can_be_resumed(
    tiny, scorers, tmp_path, no_figures, overflows, capsys
):
    overflows |= set(range(2, 12))  # of 6 updates an epoch
    objective, flags = f"{scorers}:brightness", "--batch-size 1"
    with pytest.raises(SystemExit) as stop:
        run(tiny, tmp_path / "run", objective, flags)
    message = stop.value.code
    assert "Epoch 2" in message and "--lr" in message and str(tmp_path / "run") in message
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["epoch"] == 1 and row["skipped"] == 4
    assert "4 updates skipped" in capsys.readouterr().out
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt")
    assert state["epoch"] == 1 and all(w.isfinite().all() for w in state["lora"].values())

    sd_demo.main(["--resume", str(tmp_path / "run")])  # the overflows are over
    first, second = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert first == row and second["skipped"] == 0


def test_overflows_that_ended_do_not_stop_a_run(tiny, scorers, tmp_path, no_figures, overflows):
    overflows |= set(range(10))  # the last two of 12 updates are good
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", "--num-steps 12 --epochs 1")
    assert read_rows(out / "metrics.jsonl")[0]["skipped"] == 10


def test_weights_that_are_not_finite_stop_a_run(tiny, scorers, tmp_path, monkeypatch):
    update_batch = sd_demo.update_batch

    def broken(run, *rest, **options):
        done = update_batch(run, *rest, **options)
        run.model.lora[0].data.view(-1)[0] = math.nan
        return done

    monkeypatch.setattr(sd_demo, "update_batch", broken)
    with pytest.raises(SystemExit, match="not finite any more"):
        run(tiny, tmp_path / "run", f"{scorers}:brightness")
    assert not read_rows(tmp_path / "run" / "metrics.jsonl")


# A run and what it leaves

GROUPS_OF_3 = "--images-per-prompt 3 --batch-size 1 --lr 0.02"


@pytest.fixture(scope="module")
def done(tiny, scorers, tmp_path_factory):
    """A finished run of two epochs, and the bytes of its figures after each."""
    out, drawn = tmp_path_factory.mktemp("done") / "run", []
    draw_run = figures.draw_run

    def draw_and_keep(run):
        drawn.append([path.read_bytes() for path in draw_run(run)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_run", draw_and_keep)
        run(tiny, out, f"{scorers}:brightness", f"{GROUPS_OF_3} --watch {scorers}:blue")
    return out, drawn


def test_a_run_leaves_its_folder(done, tiny):
    out, _ = done
    config = files.read_json(out / "config.json")
    assert config["model"] == str(tiny) and config["seed"] == 0 and config["lr"] == 0.02
    assert config["versions"]["torch"] == torch.__version__
    assert set(config["initial"]) == {"eval_score", "watched"} and config["epochs"] == 2
    names = {str(path.relative_to(out)) for path in out.rglob("*") if "images" not in path.parts}
    assert names == {
        *("config.json", "metrics.jsonl", "labels.jsonl", "README.md", "report.html", ".lock"),
        *("reward_curve.png", "progress.png", "before_after.png"),
        *("lora", "lora/pytorch_lora_weights.safetensors", "checkpoint", "checkpoint/state.pt"),
        *("latents", "latents/e001.pt", "latents/e002.pt"),
    }
    card = (out / "README.md").read_text()
    assert "--objective" in card and "load_lora_weights" in card and "2 epochs" in card
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card)
    assert len(pictures) == 2 and all((out / name).is_file() for name in pictures)


def test_metrics_have_the_keys_of_the_design(done):
    out, _ = done
    keys = """epoch labels preferences unscored score score_sem eval_score eval_win_rate watched
        accuracy margin kl kl_trained eval_kl loss skipped log_ratio_winners log_ratio_losers
        seconds_sample seconds_train peak_memory_mb bad_share warnings""".split()
    first, second = rows = read_rows(out / "metrics.jsonl")
    assert [set(row) for row in rows] == [set(keys)] * 2
    assert [row["epoch"] for row in rows] == [1, 2] and [row["labels"] for row in rows] == [6, 12]
    for key in ("eval_kl", "bad_share"):  # there is no --max-kl, and nobody tags
        assert all(row.pop(key) is None for row in rows)
    learned = ("accuracy", "margin", "log_ratio_winners", "log_ratio_losers")
    assert {first.pop(key) for key in learned} == {None}  # the policy was the initial model
    assert all(isinstance(row.pop("warnings"), list) for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert abs(first["kl"]) < 0.01 < second["kl"]  # of the policy that samples: first the initial
    assert 0 <= second["accuracy"] <= 1 and second["margin"] and first["skipped"] == 0
    assert 0 < first["loss"] < math.log(2) + 0.1 and 0 <= first["eval_win_rate"] <= 1
    initial = files.read_json(out / "config.json")["initial"]
    assert first["eval_score"] != initial["eval_score"] and initial["watched"] > 0


def test_labels_say_what_the_stored_images_are(done):
    out, _ = done
    labels = read_rows(out / "labels.jsonl")
    assert len({tuple(row["images"]) for row in labels}) == len(labels) == 12
    for row in labels:
        scores = [np.asarray(Image.open(out / file)).mean() for file in row["images"]]
        assert row["scores"] == pytest.approx(scores, rel=1e-12)
        assert row["h"] == np.sign(scores[0] - scores[1])
        assert row["images"][0].startswith(f"images/e{row['epoch']:03}_p")
        assert row["prompt"] in PROMPTS
    first = [row for row in labels if row["epoch"] == 1]
    score = read_rows(out / "metrics.jsonl")[0]["score"]
    assert metrics.mean_score(first)["score"] == score


def test_figures_are_drawn_after_each_epoch(done):
    _, drawn = done
    assert len(drawn) == 2 and all(len(figures) == 3 for figures in drawn)
    assert all(before != after for before, after in zip(*drawn, strict=True))


def test_held_out_images_are_the_initial_models_and_the_tuned_models(done, tiny):
    initial, tuned = (figures.held_out_images(done[0], epoch) for epoch in (0, 2))
    loaded = Loaded(tiny, "--images-per-prompt 3")
    assert same_images(loaded.sample((0, 1), 1, RandomPurpose.HELD_OUT, 0).images, initial)
    assert not same_images(initial, tuned, 3)


def test_the_trained_lora_gives_the_same_images_in_a_fresh_pipeline(done, tiny):
    out, _ = done
    loaded = Loaded(tiny, "--seed 1")  # another seed: the LoRA must come from the file
    loaded.args.out = out
    assert loaded.run.load_checkpoint() == 2
    tuned = loaded.sample((1, 3), 2, 1)
    initial = loaded.sample((1, 3), 2, 1, denoiser=loaded.model.reference)
    pipe, prompts = as_ddim(StableDiffusionPipeline.from_pretrained(tiny)), [PROMPTS[1], PROMPTS[3]]

    def images():
        return stock_images(pipe, loaded.args, prompts, K=2, noise=seeded_generator(1, 1))

    assert same_images(initial.images, images())
    pipe.load_lora_weights(out / "lora")
    assert same_images(tuned.images, images())
    assert not same_images(tuned.images, initial.images, 3)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    done, tiny, scorers, tmp_path, no_figures
):
    flags = f"{GROUPS_OF_3} --watch {scorers}:blue"
    same = run(tiny, tmp_path / "same", f"{scorers}:brightness", flags)
    assert outcome(same) == outcome(done[0])
    for seed in (0, 1):
        loaded = Loaded(tiny, f"{GROUPS_OF_3} --seed {seed}")
        loaded.run.memory.folder = tmp_path / f"latents_{seed}"
        loaded.run.memory.folder.mkdir()
        batch = sd_demo.sample_epoch(loaded.run, 1)[1]
        images = [Image.open(done[0] / file) for file in batch.files]
        assert same_images(batch.images, images, 0) == (seed == 0)


def test_one_epoch_of_the_emoji_model_from_command_line_to_lora(tmp_path, no_figures):
    out, flags = tmp_path / "run", "--epochs 1 --num-steps 4 --images-per-prompt 2 --eval-images 2"
    sd_demo.main(["--objective", "compressibility", "--out", str(out), *flags.split()])
    (row,) = read_rows(out / "metrics.jsonl")
    assert row["labels"] == 4 and 0 <= row["watched"] <= 1 and row["loss"] > 0
    loaded = Loaded(options.EMOJI, "--num-steps 4 --lora-rank 16 --guidance-scale 1 --skip-last 2")
    pipe = as_ddim(StableDiffusionPipeline.from_pretrained(options.EMOJI))
    pipe.load_lora_weights(out / "lora")
    stored = torch.load(out / "checkpoint" / "state.pt")["lora"]
    loaded.model.load_lora(stored)
    assert any(weight.abs().max() > 0 for name, weight in stored.items() if "lora_B" in name)
    images = stock_images(pipe, loaded.args, PROMPTS[:2], K=1, noise=seeded_generator(0))
    assert same_images(loaded.sample((0, 1), 1).images, images)


# Other settings

CHOICES = [
    "--loss eq12 --reference previous --skip-last 1",
    "--loss chain --update-every trajectory",
    "--step-fraction 0.5 --replay 1",
    "--update-every trajectory --reference previous --clip 0.1 --batch-size 1",
    "--precision bf16 --gradient-checkpointing --eval-images 9 --prompts-per-epoch 4",
    "--recipe paper --lr 1e-3",
    "--recipe alg1 --prompts-per-epoch 2",
    "--loss sft",
    "--loss sft --beta 0.3 --replay 1",
    "--loss diffusion-dpo",
    "--loss reward-weighted",
    "--loss ddpo",
    "--loss dpok",
]


@pytest.mark.parametrize("flags", CHOICES)
def test_other_choices_run_the_same_loop_with_the_passes_of_the_plan(
    tiny, scorers, tmp_path, monkeypatch, no_figures, flags
):
    rows_without_gradient, rows_with_gradient, costs = [], [], []
    call, estimate = PipelinePolicy.__call__, cost.estimate

    def counted(policy, x, *rest):
        rows = rows_with_gradient if torch.is_grad_enabled() else rows_without_gradient
        rows.append(2 * len(x))
        return call(policy, x, *rest)

    monkeypatch.setattr(PipelinePolicy, "__call__", counted)
    monkeypatch.setattr(cost, "estimate", lambda *a: costs.append(estimate(*a)) or costs[0])
    sees_scores = bool(set(flags.split()) & SCORED)
    scorer = f"{scorers}:brightness"
    objective = scorer if sees_scores else f"{scorer},{scorer}"  # never at odds
    out = run(tiny, tmp_path / "run", objective, f"{flags} --epochs 1")
    (row,), labels = read_rows(out / "metrics.jsonl"), read_rows(out / "labels.jsonl")
    assert row["score"] > 0 and row["labels"] == len(labels) == costs[0].labels
    if not sees_scores:
        assert all(first == second > 0 for row in labels for first, second in row["scores"])

    assert sum(rows_with_gradient) == costs[0].rows_with_gradient
    evaluations = 2 * costs[0].calls_eval  # of the initial model, and at the end
    passes = len(rows_with_gradient) + len(rows_without_gradient)
    assert passes == costs[0].calls + evaluations


def test_the_last_steps_are_left_out_and_the_learning_rate_falls_as_a_cosine(
    tiny, scorers, tmp_path, monkeypatch, no_figures
):
    orders, rates, ratios = [], [], []
    update_batch, log_ratios = sd_demo.update_batch, metrics.log_ratios

    def update(run, *args, steps, **options):
        orders.append(steps)
        rates.append(run.optimizer.param_groups[0]["lr"])
        return update_batch(run, *args, steps=steps, **options)

    monkeypatch.setattr(sd_demo, "update_batch", update)

    def watch(ratio, *rest):
        ratios.append(ratio)
        return log_ratios(ratio, *rest)

    monkeypatch.setattr(metrics, "log_ratios", watch)
    flags = "--skip-last 1 --epochs 3 --eval-every 9"
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", flags)
    assert [sorted(steps) for steps in orders] == [[0, 1]] * 3
    assert rates == pytest.approx([0.005, 0.005 * 0.75, 0.005 * 0.25])
    for row, ratio in zip(read_rows(out / "metrics.jsonl"), ratios, strict=True):
        assert ratio.shape == (3, 4)
        assert row["kl"] == pytest.approx(ratio.sum().item() / 4, abs=1e-4)
        assert row["kl_trained"] == pytest.approx(ratio[:2].sum().item() / 4, abs=1e-4)
        assert (row["eval_score"] is None) == (row["epoch"] < 3)


def test_a_share_of_the_steps_is_drawn_anew_for_each_batch(
    tiny, scorers, tmp_path, monkeypatch, no_figures
):
    drawn, update_batch = [], sd_demo.update_batch

    def update(run, *args, steps, **options):
        drawn.append(frozenset(steps))
        return update_batch(run, *args, steps=steps, **options)

    monkeypatch.setattr(sd_demo, "update_batch", update)
    flags = "--num-steps 4 --step-fraction 0.5 --epochs 3 --prompts-per-epoch 8"
    run(tiny, tmp_path / "run", f"{scorers}:brightness", flags)
    assert [len(steps) for steps in drawn] == [2] * 12
    assert set().union(*drawn) == {0, 1, 2, 3} and len(set(drawn)) > 2


def test_an_epoch_of_ties_trains_nothing_and_goes_on(tiny, scorers, tmp_path, no_figures):
    flags = "--images-per-prompt 3 --prompts hand --batch-size 1"
    out = run(tiny, tmp_path / "run", f"{scorers}:same", flags)
    rows = read_rows(out / "metrics.jsonl")
    nothing = ("accuracy", "margin", "log_ratio_winners", "log_ratio_losers", "loss")
    for row in rows:
        assert {row[key] for key in nothing} == {None}
        assert row["score"] == 1 and row["skipped"] == 0 and row["eval_win_rate"] == 0.5
    assert [row["labels"] for row in rows] == [0, 0]  # a tie is no preference
    # One prompt, one model: only noise makes images differ, in a group, between groups and epochs
    assert len({path.read_bytes() for path in out.glob("images/e00*.png")}) == 12
    state = torch.load(out / "checkpoint" / "state.pt")
    untrained = [weight for name, weight in state["lora"].items() if "lora_B" in name]
    assert state["epoch"] == 2 and not any(weight.any() for weight in untrained)


@pytest.mark.parametrize("scorer", ["same", "nothing"])
def test_three_epochs_without_a_preference_end_a_run(
    tiny, scorers, tmp_path, no_figures, capsys, scorer
):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        run(tiny, out, f"{scorers}:{scorer}", "--epochs 9")
    assert "No label of the epochs 1 to 3 says which image is better" in stop.value.code
    assert f"{out} keeps the model" in stop.value.code and "\n" not in stop.value.code
    rows = read_rows(out / "metrics.jsonl")
    assert [(row["epoch"], row["preferences"]) for row in rows] == [(1, 0), (2, 0), (3, 0)]
    assert capsys.readouterr().out.count("WARNING: no label says which image is better") == 3
    assert torch.load(out / "checkpoint" / "state.pt")["epoch"] == 3
    with pytest.raises(SystemExit, match="epochs 2 to 4"):  # resumed, it gets one more
        sd_demo.main(["--resume", str(out)])


@pytest.mark.slow
def test_a_run_ends_whose_scorer_gives_some_images_no_score(tiny, scorers, tmp_path, capsys):
    flags = "--images-per-prompt 4 --batch-size 1 --eval-images 4"
    objective, watch = f"{scorers}:in_part", f"--watch {scorers}:nothing"
    out = run(tiny, tmp_path / "run", objective, f"{flags} {watch}")
    labels, rows = read_rows(out / "labels.jsonl"), read_rows(out / "metrics.jsonl")
    for row in labels:
        assert (row["h"] is None) == (None in row["scores"])
    assert [(row["preferences"], row["unscored"], row["watched"]) for row in rows] == [
        (2, 4, None)  # of four images the two brighter have scores: one pair a group
    ] * 2
    assert all(row["score"] > 0 and row["loss"] > 0 and row["eval_score"] > 0 for row in rows)
    assert capsys.readouterr().out.count("4 images without a score, in no label") == 2
    sd_demo.main(["--evaluate", str(out), "--eval-images", "4"])
    result = json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert result["pairs"] + result["unscored"] == 4 and result["unscored"] >= 2
    assert (out / "reward_curve.png").exists()


def test_the_run_says_how_many_prompts_it_read(tiny, scorers, tmp_path, capsys):
    (tmp_path / "p.csv").write_text('prompt\n"a cat,\nasleep"\na dog\na dog\n')
    flags = f"--prompts {tmp_path}/p.csv --dry-run"
    run(tiny, tmp_path / "run", f"{scorers}:brightness", flags)
    found = f"Prompts of {tmp_path}/p.csv: 3, first: a cat, asleep\n"
    assert capsys.readouterr().out.count(found) == 1


def test_a_prompt_that_is_there_twice_keeps_its_images(tiny, scorers, tmp_path, no_figures):
    (tmp_path / "p.txt").write_text("a cat\na cat\na dog\n")
    flags = f"--prompts {tmp_path}/p.txt --prompts-per-epoch 8 --epochs 1"
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", flags)
    assert {row["prompt"] for row in read_rows(out / "labels.jsonl")} == {"a cat", "a dog"}
    groups = torch.load(out / "latents" / "e001.pt")
    assert {group[0] for group in groups} == {"a cat", "a dog"}


# Evaluation


@pytest.mark.slow
def test_evaluation_compares_with_the_initial_model_on_new_noises(done, tiny, tmp_path, capsys):
    out = shutil.copytree(done[0], tmp_path / "run")
    reports = {out / "README.md", out / "report.html"}  # where the result is added
    before = {path: path.read_bytes() for path in {*out.rglob("*")} - reports if path.is_file()}
    sd_demo.main(["--evaluate", str(out), "--eval-images", "5"])
    assert {path: path.read_bytes() for path in before} == before
    assert (out / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    result = files.read_json(out / "evaluation.json")
    assert json.dumps(result, indent=2) in capsys.readouterr().out
    assert result["pairs"] == 5 and "brightness" in result["objective"]
    low, high = result["win_rate_interval"]
    assert low <= result["win_rate"] <= high
    initial, tuned = result["initial"], result["tuned"]
    assert initial["score"] != tuned["score"] and tuned["watched"] > 0
    held_out = files.read_json(out / "config.json")["initial"]["eval_score"]
    assert initial["score"] != pytest.approx(held_out, rel=1e-6)
    # The initial model's part by hand, in the batches of the run
    loaded = Loaded(tiny, "--images-per-prompt 3")
    batches = [((0, 1, 2), 0), ((3, 4), 3)]
    parts = [
        loaded.sample(numbers, 1, RandomPurpose.EVALUATION, n).images for numbers, n in batches
    ]
    score = np.mean([np.asarray(image).mean() for part in parts for image in part])
    assert initial["score"] == pytest.approx(score, abs=0.1)


# What is refused, and how runs end


REFUSED = {  # of a model, after it was loaded: options are refused in test_options.py
    "--model nobody/nothing": "network access; or give a folder",
    "--model EMPTY": "give another folder",
    "--eta 1.5": "eta = 1.5: choose 0 < eta <= 1",
    "--objective SCORERS:raises": "raised RuntimeError: no luck",
    "--prompts-per-epoch 3": "give a multiple of 2",
    "--out FILE/below": "cannot be written",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_run_that_cannot_be_is_refused_in_one_sentence_and_nothing_is_written(
    tiny, scorers, tmp_path, monkeypatch, capsys, flags
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    names = {"SCORERS": scorers, "EMPTY": tmp_path / "empty", "FILE": tmp_path / "file"}
    typed = flags
    for name, path in names.items():
        typed = typed.replace(name, str(path))
    start = ["--model", str(tiny), "--objective", "compressibility", *FLAGS.split()]
    with pytest.raises(SystemExit) as stop:
        sd_demo.main(start + typed.split())
    usage, message = own_lines(capsys.readouterr().err)
    assert stop.value.code == 2 and usage.startswith("usage: ")
    assert message.startswith("sd_demo.py: error: ") and REFUSED[flags] in message
    assert sorted(tmp_path.rglob("*")) == before


def own_lines(errors: str) -> list[str]:
    """Without the progress of loading, which diffusers and transformers rewrite by returns."""
    lines = errors.split("\n")
    return [line for line in lines if line and "\r" not in line and "it/s]" not in line]


def test_a_scorer_that_fails_in_the_middle_stops_with_a_sentence(
    tiny, scorers, tmp_path, no_figures
):
    file, out = tmp_path / "once.py", tmp_path / "run"
    file.write_text(scorers.read_text())
    # The calls: a trial, the initial model, two batches, an evaluation
    with pytest.raises(SystemExit) as stop:
        run(tiny, out, f"{file}:later", "--epochs 1 --batch-size 1")
    assert "raised RuntimeError: no" in stop.value.code
    assert f"The run stops; {out} has no model yet" in stop.value.code
    file.write_text(scorers.read_text().replace("calls <= 4", "True"))
    sd_demo.main(["--resume", str(out)])
    file.write_text(scorers.read_text().replace("calls <= 4", "calls <= 1"))
    with pytest.raises(SystemExit, match="raised RuntimeError"):
        sd_demo.main(["--evaluate", str(out)])
    assert not (out / "evaluation.json").exists()


def test_who_stops_a_run_learns_how_to_go_on(tiny, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(sd_demo, "train", interrupt)
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        run(tiny, out, "compressibility")
    assert f"Go on with: python sd_demo.py --resume {out}" in stop.value.code


# Stopping and going on


def test_a_finished_run_is_resumed_with_more_epochs(tiny, scorers, tmp_path, no_figures):
    objective = f"{scorers}:brightness"
    short = run(tiny, tmp_path / "short", objective, "--epochs 1")
    command = files.read_json(short / "config.json")["command"]
    sd_demo.main(["--resume", str(short), "--epochs", "2"])
    long = run(tiny, tmp_path / "long", objective)
    assert outcome(short) == outcome(long)
    config, unbroken = (files.read_json(out / "config.json") for out in (short, long))
    assert config["initial"] == unbroken["initial"]
    assert config["epochs"] == 2 and config["command"] == command


KILLS = """
import os, signal, sys
from pathlib import Path

import torch
from sd_helpers import run

from sd import figures, files

torch.set_num_threads(1)
figures.draw_run = lambda run: []
folder, model, scorers, flags = sys.argv[1:]


def half_a_line(path):
    with path.open("a") as file:
        file.write('{"epoch": 1, "prompt": "a c')


def half_a_file(path):
    path.with_name(path.name + ".part").write_bytes(b"half")


def kill_at(moment, function, count, leave_half):
    # kill -9 when this file is written for the count-th time, after half of the work
    write, calls = getattr(run_folder, function), []

    def wrapped(path, content):
        calls.extend([path] * (path.name == moment))
        if path.name == moment and len(calls) == count:
            leave_half(path)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    setattr(run_folder, function, wrapped)


for kill in (
    ("labels.jsonl", "append", 1, half_a_line),  # of the first epoch
    ("metrics.jsonl", "append", 2, half_a_line),  # of the second
    ("state.pt", "save_tensors", 2, half_a_file),  # between LoRA and checkpoint
    ("e002_p00.pt", "save_tensors", 1, half_a_file),  # while the second is sampled
    ("e002.pt", "save_tensors", 1, half_a_file),  # when it is labelled
):
    if os.fork() == 0:
        kill_at(*kill)
        run(Path(model), Path(folder) / kill[0], f"{scorers}:brightness", flags)
        os._exit(0)
    assert os.WTERMSIG(os.wait()[1]) == signal.SIGKILL, kill
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tiny, scorers, tmp_path, no_figures):
    """kill -9 at five moments; each run is resumed, and leaves what an unbroken run leaves."""
    flags = "--replay 2 --average-weights --max-kl 1e6"
    start(["-c", KILLS, tmp_path, tiny, scorers, flags], tmp_path)
    whole = run(tiny, tmp_path / "whole", f"{scorers}:brightness", flags)
    moments = {"labels.jsonl": 0, **dict.fromkeys(["metrics.jsonl", "state.pt"], 1)}
    moments |= dict.fromkeys(["e002_p00.pt", "e002.pt"], 1)
    for moment, epochs_done in moments.items():
        out = tmp_path / moment
        state = out / "checkpoint" / "state.pt"
        assert (torch.load(state)["epoch"] if state.exists() else 0) == epochs_done
        sd_demo.main(["--resume", str(out)])
        assert outcome(out) == outcome(whole), moment
        assert files_of(out) == files_of(whole), moment
        state, unbroken = torch.load(state), torch.load(whole / "checkpoint" / "state.pt")
        torch.testing.assert_close(state, unbroken, rtol=0, atol=0)
        for file in whole.glob("latents/*"):
            assert torch.load(out / "latents" / file.name)[0][1].equal(torch.load(file)[0][1])


def files_of(out) -> set:
    return {path.relative_to(out) for path in out.rglob("*") if path.suffix != ".part"}


def start(argv: list, folder, **environment) -> None:
    """Run Python in a process of its own; it must succeed."""
    with (folder / "log").open("w") as log:
        command = [sys.executable, *map(str, argv)]
        options = {"env": ENVIRONMENT | environment, "stdout": log, "stderr": log}
        code = subprocess.run(command, **options, timeout=600).returncode
    assert code == 0, (folder / "log").read_text()[-3000:]


# Several processes

RANKS = """
import os, sys
from pathlib import Path

import torch
from sd_helpers import run

import sd_demo
from sd import figures

torch.set_num_threads(1)
figures.draw_run = lambda run: []
train = sd_demo.train


def keep(run, *rest):
    train(run, *rest)
    lora = {str(n): weight.data for n, weight in enumerate(run.model.lora)}
    torch.save(lora, run.args.out / f"rank{os.environ['RANK']}.pt")


sd_demo.train = keep
folder, model, scorers = sys.argv[1:]
chain = "--loss chain --update-every trajectory"
for name, scorer, flags in (
    ("both", "brightness", ""),
    ("first", "first_only", ""),
    ("none", "same", ""),
    ("chain", "brightness", chain),
):
    flags += " --epochs 1 --prompts-per-epoch 4 --batch-size 1 --device cpu"
    run(Path(model), Path(folder) / name, f"{scorers}:{scorer}", flags)
"""


@pytest.mark.slow
def test_two_processes_end_as_one_that_has_both_halves(tiny, scorers, tmp_path):
    """One epoch of four groups, in two batches on each process; the last may have ties only."""
    (tmp_path / "ranks.py").write_text(RANKS)
    launch = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    argv = [*launch, tmp_path / "ranks.py", tmp_path, tiny, scorers]
    start(argv, tmp_path)
    names = {"both", "first", "none", "chain"}
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == names
    for name in names:
        check_two_processes(tiny, tmp_path / name)


def check_two_processes(tiny, out):
    ranks = [torch.load(out / f"rank{n}.pt") for n in (0, 1)]
    assert same_lora(*ranks)
    for file in ("checkpoint/state.pt", "lora/pytorch_lora_weights.safetensors", "README.md"):
        assert (out / file).exists()
    assert len(list(out.glob("images/e001_*.png"))) == 8
    labels, (row,) = read_rows(out / "labels.jsonl"), read_rows(out / "metrics.jsonl")
    h = {tuple(label["images"]): label["h"] for label in labels}
    assert len(h) == len(labels) == 4 and row["skipped"] == 0
    assert row["labels"] == 4 - list(h.values()).count(0)
    ties = [h[images] == 0 for images in sorted(h)]
    assert ties == {"first": [False, True] * 2, "none": [True] * 4}.get(out.name, [False] * 4)

    flags = "--loss chain --update-every trajectory" if out.name == "chain" else ""
    loaded = Loaded(tiny, flags)
    before = [weight.clone() for weight in loaded.model.lora]
    numbers = torch.randint(5, (4,), generator=seeded_generator(0, RandomPurpose.PROMPTS, 1))
    groups = [loaded.sample(numbers[n : n + 1], 2, RandomPurpose.TRAINING, 1, n) for n in range(4)]
    losses = []
    for n in (0, 1):  # updates: process 0 has the groups 0 and 2, process 1 has 1 and 3
        batch = join(groups[2 * n : 2 * n + 2])
        answers = [
            h[f"images/e001_p{group:02}_k0.png", f"images/e001_p{group:02}_k1.png"]
            for group in (2 * n, 2 * n + 1)
        ]
        pairs = d3po.pairs_from_feedback(torch.tensor(answers)).tolist()
        steps = torch.randperm(3, generator=seeded_generator(0, RandomPurpose.STEPS, 1, n)).tolist()
        losses += loaded.update(batch, pairs, steps=steps)[0]
    after = torch.cat([weight.flatten() for weight in loaded.model.lora])
    moved = after - torch.cat([weight.flatten() for weight in before])
    apart = after - torch.cat([weight.flatten() for weight in ranks[0].values()])
    if out.name == "none":
        assert not losses and row["loss"] is None and not moved.any() and not apart.any()
        return
    # AdamW turns gradients into signs: an element whose gradient is rounding moves either way
    assert apart.norm() < 0.02 * moved.norm()
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def join(batches: list[Batch]) -> Batch:
    states = zip(*(batch.trajectory for batch in batches), strict=True)
    trajectory = d3po.Trajectory(*(torch.cat(both, 1) for both in states))
    cond = torch.cat([batch.cond for batch in batches])
    return Batch(trajectory, cond, [], [], images_per_prompt=2)
