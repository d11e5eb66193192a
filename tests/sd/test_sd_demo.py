"""sd_demo.py on tiny pipelines: what training does, and what a run does and leaves."""

import json
import math
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from PIL import Image
from sd_helpers import (
    FLAGS,
    PROMPTS,
    Loaded,
    make_pipeline,
    outcome,
    read_rows,
    run,
    same_images,
    same_lora,
    start_python,
    typed,
)
from test_model import as_ddim, stock_images

import d3po
import sd_demo
from sd import UserError, figures, files, metrics, options
from sd import run as run_room
from sd.labels import Label
from sd.model import Batch, PipelinePolicy
from sd.replay import LabelledBatch
from sd.seeds import RandomPurpose, seeded_generator

pytestmark = pytest.mark.usefixtures("no_figures")

# Training

LOSSES = [
    ("eq14", "timestep"),
    ("eq14", "trajectory"),
    ("eq12", "timestep"),
    ("chain", "trajectory"),
]


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
    gradients, values = loaded.gradients(), []  # all updates are about the same weights
    losses, overflows = loaded.update(batch, pairs, order)
    assert overflows == [False] * len(updates) and len(losses) == sum(map(len, updates))
    for gradient, steps in zip(gradients, updates, strict=True):
        value = objective(steps)
        values.append(value.item())
        own, expected = (
            torch.cat([part.flatten() for part in parts])
            for parts in (gradient, torch.autograd.grad(value, lora))
        )
        # float32, and beta times a log-prob of 1e-3 nats' rounding
        assert (own - expected).norm() < 1e-3 * expected.norm()
    count = 1 if loss == "chain" else len(losses)  # a chain's loss is not cut into T
    assert np.mean(losses) == pytest.approx(sum(values) / count, rel=1e-3)


def test_training_changes_the_lora_and_nothing_else(tiny):
    loaded = Loaded(tiny)
    unet, batch = loaded.model.pipe.unet, loaded.sample()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    reference = loaded.reference_log_prob(batch)
    assert loaded.update(batch, []) == ([], [])  # without pairs nothing
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())
    loaded.update(batch, [[0, 1], [3, 2]])
    for name, weight in unet.state_dict().items():
        assert torch.equal(weight, before[name]) == ("lora_" not in name), name
    assert torch.equal(loaded.reference_log_prob(batch), reference)
    assert (loaded.log_prob(batch) - reference).abs().max() > 0.1


def test_the_gradient_is_clipped_to_its_norm_and_is_zero_beyond_the_clamp(tiny):
    loaded = Loaded(tiny, "--max-grad-norm 1e-3")
    gradients = loaded.gradients()
    loaded.update(loaded.sample(), [[0, 1]])
    norms = [torch.cat([part.flatten() for part in parts]).norm().item() for parts in gradients]
    assert norms == [pytest.approx(1e-3, rel=1e-2)] * 3
    loaded = Loaded(tiny, "--clip 1e-6")
    batch, gradients = loaded.sample(), loaded.gradients()
    reference = loaded.reference_log_prob(batch) - 1  # nats: the policy is far above it
    loaded.run.reference_log_prob = lambda batch: reference
    loaded.update(batch, [[0, 1]])
    assert len(gradients) == 3 and not any(part.any() for parts in gradients for part in parts)


@pytest.mark.parametrize("reference", ["initial", "previous"])
def test_metrics_of_a_batch_are_of_the_policy_before_it_trains_on_it(tiny, reference):
    loaded = Loaded(tiny, f"--reference {reference} --skip-last 1 --beta 0.2")
    loaded.update(loaded.sample(), [[0, 1], [3, 2]])
    batch = loaded.sample((2, 3))  # of a policy that is not the initial model any more
    sampled, initial = batch.trajectory.log_prob, loaded.reference_log_prob(batch)
    labelled = LabelledBatch(batch.trajectory, batch.cond, torch.tensor([[1, 0], [3, 2]]))
    ref_log_prob = loaded.run.reference_log_prob(labelled)
    assert torch.equal(ref_log_prob, sampled if reference == "previous" else initial)
    log_ratio = sampled - initial
    # Of trajectories that nobody sampled it asks the policy
    zeros = d3po.Trajectory(batch.trajectory.x, sampled * 0)
    drawn = labelled._replace(trajectory=zeros, sampled=False)
    sd_demo.learn(loaded.run, drawn, measured=True)
    sd_demo.learn(loaded.run, labelled, measured=True)
    asked, noted = loaded.run.log_ratios
    assert asked.chains == pytest.approx(log_ratio.sum(0).tolist(), rel=1e-3, abs=1e-3)
    assert noted.chains == log_ratio.sum(0).tolist()
    assert noted.trained == log_ratio[:2].sum(0).tolist()
    assert noted.winners == [noted.trained[1], noted.trained[3]]
    assert noted.losers == [noted.trained[0], noted.trained[2]]
    assert metrics.kl([noted])["kl"] > 0.1


def test_memory_is_that_of_one_step_and_checkpointing_halves_it(tiny):
    plain, gradients = bytes_held(tiny, "--skip-last 2")
    checkpointing = "--gradient-checkpointing"
    one, same_gradients = bytes_held(tiny, f"{checkpointing} --skip-last 2")
    chain, _ = bytes_held(tiny, f"{checkpointing} --loss chain")
    # A tiny UNet has few blocks: the benchmark on larger ones asks for a third
    assert one < plain / 2 and chain == pytest.approx(one, rel=0.01)  # of three steps
    torch.testing.assert_close(gradients, same_gradients, rtol=1e-4, atol=1e-7)


def bytes_held(tiny, flags: str) -> tuple[int, list]:
    """The most that autograd keeps in an update over some steps, and its gradients."""
    loaded, held = Loaded(tiny, f"{flags} --update-every trajectory"), Held()
    batch, gradients = loaded.sample(), loaded.gradients()
    with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda kept: kept.tensor):
        loaded.update(batch, [[1, 0], [3, 2]])
    return held.most, gradients[0]


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
    losses, skipped = loaded.update(batch, pairs, [0, 1, 2])
    assert skipped == [False, True, False] and np.isfinite(losses).all()
    overflows.clear()
    other = Loaded(tiny)
    other.update(batch, pairs, [0, 2])
    assert same_lora(loaded.lora(), other.lora())  # as if the step had not been


def test_a_grad_scaler_skips_the_update_and_halves_its_factor(tiny, overflows):
    """The path of fp16 on a GPU, with torch's scaler for CPUs."""
    norms, pairs = [], [[0, 1], [2, 3]]
    try:
        loaded = Loaded(tiny)
        accelerator = loaded.run.accelerator
        accelerator.scaler = torch.amp.GradScaler("cpu", 2.0**16)
        accelerator._optimizers.clear()
        loaded.run.optimizer = accelerator.prepare(loaded.optimizer.optimizer)
        # From here on it unscales
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        overflows.add(1)
        batch, clip = loaded.sample(), accelerator.clip_grad_norm_
        accelerator.clip_grad_norm_ = lambda *args: norms.append(clip(*args)) or norms[-1]
        assert loaded.update(batch, pairs, [0, 1, 2])[1] == [False, True, False]
        assert accelerator.scaler.get_scale() == 2.0**15
        overflows.clear()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    plain = Loaded(tiny)
    plain.update(batch, pairs, [0, 2])
    for name, weight in plain.lora().items():
        torch.testing.assert_close(weight, loaded.lora()[name])
    assert norms[0] < 100  # of the unscaled gradient


def test_the_last_ten_updates_of_all_epochs_decide_if_a_run_stops(tiny):
    loaded = Loaded(tiny)
    for fine in ([True] * 9, [False] + [True] * 9, [True] * 9 + [False], []):
        loaded.run.overflows = fine
        assert loaded.run.finish(sampled=True).skipped == sum(fine)
    loaded.run.begin(7)
    loaded.run.overflows = [True] * run_room.MAX_SKIPPED
    with pytest.raises(UserError, match="Epoch 7: .* lower --lr .now 0.005."):
        loaded.run.finish(sampled=True)
    loaded.run.last_overflows, loaded.run.overflows = [], []
    loaded.model.lora[-1].data.view(-1)[0] = math.inf
    with pytest.raises(UserError, match="weights are not finite any more"):
        loaded.run.finish(sampled=True)


# A run and what it leaves

GROUPS_OF_3 = "--images-per-prompt 3 --batch-size 1 --lr 0.02"


@pytest.fixture(scope="module")
def done(tiny, scorers, tmp_path_factory):
    """A finished run of two epochs, and how many it had at each call for figures."""
    out, drawn = tmp_path_factory.mktemp("done") / "run", []

    def note(run):
        drawn.append(len(read_rows(run / "metrics.jsonl")))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_run", note)
        run(tiny, out, f"{scorers}:brightness", f"{GROUPS_OF_3} --watch {scorers}:blue")
    return out, drawn


def test_a_run_leaves_its_folder_and_draws_its_figures_after_each_epoch(done, tiny):
    out, drawn = done
    config = files.read_json(out / "config.json")
    assert config["model"] == str(tiny) and config["seed"] == 0 and config["lr"] == 0.02
    assert config["versions"]["torch"] == torch.__version__
    assert set(config["initial"]) == {"eval_score", "watched"} and config["epochs"] == 2
    names = {str(path.relative_to(out)) for path in out.rglob("*") if "images" not in path.parts}
    assert names == {
        *("config.json", "metrics.jsonl", "labels.jsonl", "README.md", "report.html", ".lock"),
        *("lora", "lora/pytorch_lora_weights.safetensors", "checkpoint", "checkpoint/state.pt"),
        *("latents", "latents/e001.pt", "latents/e002.pt"),
    }
    assert drawn == [1, 2]


def test_metrics_have_the_keys_of_the_design(done):
    out, _ = done
    keys = """epoch labels preferences unscored score score_sem eval_score eval_win_rate eval_pairs
        watched
        accuracy margin kl kl_trained eval_kl loss skipped log_ratio_winners log_ratio_losers
        seconds_sample seconds_train peak_memory_mb bad_share warnings""".split()
    first, second = rows = read_rows(out / "metrics.jsonl")
    assert [set(row) for row in rows] == [set(keys)] * 2
    assert [row["epoch"] for row in rows] == [1, 2] and [row["labels"] for row in rows] == [6, 12]
    assert all(row.pop("bad_share") is None for row in rows)  # nobody tags
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


def test_images_are_those_of_the_seed_and_of_the_lora_in_a_fresh_pipeline(done, tiny, tmp_path):
    out, _ = done
    for seed in (0, 1):  # where the LoRA must come from the file
        loaded = Loaded(tiny, f"{GROUPS_OF_3} --seed {seed}")
        initial = figures.held_out_images(out, 0)
        own = loaded.sample((0, 1), 1, RandomPurpose.HELD_OUT).images
        loaded.run.replay.folder = tmp_path
        batch = loaded.run.sample(1 + seed)[1]
        stored = [Image.open(out / file) for file in batch.files]
        assert same_images(own, initial) == same_images(batch.images, stored, 0) == (seed == 0)
    loaded.run.folder = out
    loaded.run.load_checkpoint()
    assert loaded.run.epochs_done == 2
    tuned = loaded.sample((1, 3), 2, 1)
    initial = loaded.sample((1, 3), 2, 1, denoiser=loaded.model.reference)
    pipe, prompts = as_ddim(StableDiffusionPipeline.from_pretrained(tiny)), [PROMPTS[1], PROMPTS[3]]

    def images():
        return stock_images(pipe, loaded.args, prompts, 1, 1, K=2)

    assert same_images(initial.images, images())
    pipe.load_lora_weights(out / "lora")
    assert same_images(tuned.images, images())
    assert not same_images(tuned.images, initial.images, 3)


def test_one_epoch_of_the_emoji_model_from_command_line_to_lora(tmp_path):
    out, flags = tmp_path / "run", "--epochs 1 --num-steps 3 --images-per-prompt 2 --eval-images 1"
    flags += " --prompts-per-epoch 1 --batch-size 1"
    sd_demo.main(["--objective", "compressibility", "--out", str(out), *flags.split()])
    (row,) = read_rows(out / "metrics.jsonl")
    assert row["labels"] == 1 and 0 <= row["watched"] <= 1 and row["loss"] > 0
    stored = torch.load(out / "checkpoint" / "state.pt")["lora"]
    assert any(weight.abs().max() > 0 for name, weight in stored.items() if "lora_B" in name)


# From Python


def test_functions_a_loaded_pipeline_and_a_list_do_as_their_files_do(done, scorers, tmp_path):
    """With one pipeline, which comes back as it was, also from what fails."""
    pipe, functions = make_pipeline(), runpy.run_path(str(scorers))
    before = {name: weight.clone() for name, weight in pipe.unet.state_dict().items()}
    scheduler = pipe.scheduler
    new = {"model": pipe, "prompts": PROMPTS, **typed(GROUPS_OF_3)}
    for name in ("refused", "planned", "whole"):
        settings = new | {"out": tmp_path / name, "dry_run": name == "planned"}
        settings |= {"objective": functions["brightness"], "watch": functions["blue"]}
        if name == "refused":
            with pytest.raises(UserError, match=r"raised RuntimeError: no\sluck"):
                run(tmp_path, **settings | {"watch": functions["raises"]})
        else:
            folder = run(tmp_path, **settings)
        after = pipe.unet.state_dict()
        assert pipe.scheduler is scheduler and before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert folder == tmp_path / "whole" and outcome(folder) == outcome(done[0])
    assert not (tmp_path / "refused").exists() and not (tmp_path / "planned").exists()
    assert files.read_json(folder / "config.json")["model"] == "<StableDiffusionPipeline>"


class Brighter:
    """A labeller who prefers the brighter image, and leaves after some epochs."""

    def __init__(self, epochs: int):
        self.epochs = epochs

    def label(self, batches: list[Batch], epoch: int) -> list[list[Label]] | None:
        if epoch > self.epochs:
            return None
        return [[self.compare(batch, *group) for group in batch.groups] for batch in batches]

    def compare(self, batch, a, b):
        first, second = (np.asarray(batch.images[k]).mean() for k in (a, b))
        return Label((a, b), "h", 1 if first > second else -1)


def test_a_labeller_takes_the_place_of_the_page(tiny, tmp_path):
    folder = run(tiny, tmp_path / "run", "human", "--replay 1", labeller=Brighter(epochs=1))
    assert not (folder / "questions.jsonl").exists()
    sd_demo.run(resume=folder, labeller=Brighter(epochs=9))
    assert [row["epoch"] for row in read_rows(folder / "metrics.jsonl")] == [1, 2]
    labels = read_rows(folder / "labels.jsonl")
    for row in labels:
        first, second = (np.asarray(Image.open(folder / file)).mean() for file in row["images"])
        assert row["h"] == (1 if first > second else -1) and row["scores"] is None
    assert [row["epoch"] for row in labels] == [1, 1, 2, 2]
    whole = run(tiny, tmp_path / "whole", "human", "--replay 1", labeller=Brighter(epochs=2))
    assert outcome(folder) == outcome(whole)
    with pytest.raises(UserError, match="call sd_demo.run.resume=.*, labeller=Brighter."):
        options.parse(["--resume", str(folder)])


# Other settings

CHOICES = [
    "--loss eq12 --reference previous --skip-last 1",
    "--update-every trajectory --reference previous --clip 0.1 --batch-size 1",
    "--precision bf16 --gradient-checkpointing --num-steps 2",
    "--recipe paper --lr 1e-3",
    "--loss diffusion-dpo --replay 1",
    "--loss dpok",
]


@pytest.mark.parametrize("flags", CHOICES)
def test_other_choices_run_the_same_loop(tiny, scorers, tmp_path, flags):
    scorer = f"{scorers}:brightness"
    objective = scorer if "dpok" in flags else f"{scorer},{scorer}"  # never at odds
    out = run(tiny, tmp_path / "run", objective, f"{flags} --epochs 1")
    (row,), labels = read_rows(out / "metrics.jsonl"), read_rows(out / "labels.jsonl")
    assert row["score"] > 0 and row["labels"] == len(labels) == 2
    assert math.isfinite(row["loss"]) and row["skipped"] == 0
    if "dpok" not in flags:
        assert all(first == second > 0 for row in labels for first, second in row["scores"])
    lora = torch.load(out / "checkpoint" / "state.pt")["lora"]
    assert all(weight.any() for name, weight in lora.items() if "lora_B" in name)


def spy(monkeypatch, owner, name: str, note) -> None:
    """Show each call of a function to `note` before it is made."""
    original = getattr(owner, name)

    def shown(*args, **options):
        note(*args, **options)
        return original(*args, **options)

    monkeypatch.setattr(owner, name, shown)


def test_steps_rates_passes_and_metrics_of_each_epoch(tiny, scorers, tmp_path, monkeypatch):
    """Two new batches an epoch and one of earlier groups; the last of three steps is left out."""
    orders, rates, ratios, passes = [], [], [], []
    spy(monkeypatch, run_room, "step_losses", lambda *_, steps, **more: orders.append(steps))
    spy(
        monkeypatch,
        sd_demo,
        "learn",
        lambda run, *_, **more: rates.append(run.optimizer.param_groups[0]["lr"]),
    )
    spy(monkeypatch, metrics, "log_ratios", lambda ratio, pairs, _: ratios.append((ratio, pairs)))
    spy(monkeypatch, PipelinePolicy, "__call__", lambda *_: passes.append(1))
    flags = "--skip-last 1 --epochs 3 --eval-every 9 --batch-size 1 --replay 1"
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", flags)
    assert [sorted(steps) for steps in orders] == [[0, 1]] * 9 and len({*map(tuple, orders)}) == 2
    expected = [0.005 * share for share in (1, 0.75, 0.25) for _ in range(3)]  # a cosine
    assert rates == pytest.approx(expected)
    # T = 3 to sample, 3 of each batch's reference, one a loss; two evaluations, one with a KL
    assert len(passes) == 3 * (3 + 3 * 3 + 3 * 2) + 3 * 3
    rows = read_rows(out / "metrics.jsonl")
    for row, first, second in zip(rows, ratios[::2], ratios[1::2], strict=True):
        ratio = torch.cat([first[0], second[0]], 1)
        winner, loser = torch.cat([first[1], 2 + second[1]]).T
        trained = ratio[:2].sum(0)
        assert ratio.shape == (3, 4) and len(winner) == 2
        assert row["kl"] == pytest.approx(ratio.sum().item() / 4, abs=1e-4)
        assert row["kl_trained"] == pytest.approx(trained.mean().item(), abs=1e-4)
        if row["epoch"] > 1:
            gap = trained[winner] - trained[loser]
            assert row["accuracy"] == (gap > 0).double().mean()
            assert row["margin"] == pytest.approx(0.05 * gap.mean().item(), rel=1e-4)
        assert (row["eval_score"] is None) == (row["epoch"] < 3)


def test_epochs_of_ties_train_nothing_and_three_of_them_end_a_run(tiny, scorers, tmp_path, capsys):
    out = tmp_path / "run"
    flags = "--images-per-prompt 3 --prompts hand --batch-size 1 --epochs 9"
    sentence = f"No label of epochs 1 to 3 says which .* {out} keeps the model"
    with pytest.raises(UserError, match=sentence) as ended:
        run(tiny, out, f"{scorers}:same", flags)
    assert "\n" not in str(ended.value)
    rows = read_rows(out / "metrics.jsonl")
    nothing = ("accuracy", "margin", "log_ratio_winners", "log_ratio_losers", "loss")
    for row in rows:
        assert {row[key] for key in nothing} == {None}
        assert row["score"] == 1 and row["skipped"] == 0 and row["eval_win_rate"] == 0.5
        assert row["labels"] == row["preferences"] == 0  # a tie is no preference
    assert capsys.readouterr().out.count("WARNING: no label says which image is better") == 3
    # One prompt, one model: only noise makes images differ, in a group, between groups and epochs
    assert len({path.read_bytes() for path in out.glob("images/e00*_p*.png")}) == 18
    state = torch.load(out / "checkpoint" / "state.pt")
    untrained = [weight for name, weight in state["lora"].items() if "lora_B" in name]
    assert state["epoch"] == 3 and not any(weight.any() for weight in untrained)
    with pytest.raises(UserError, match="epochs 2 to 4"):  # resumed, it gets one more
        sd_demo.run(resume=out)


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
    assert capsys.readouterr().out.count("Images without a score, in no label: 4") == 2
    sd_demo.run(evaluate=out, eval_images=4)
    result = json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert result["pairs"] + result["unscored"] == 4 and result["unscored"] >= 2


def test_a_prompt_that_is_there_twice_keeps_its_images(tiny, scorers, tmp_path):
    (tmp_path / "p.csv").write_text('prompt\n"a cat,\nasleep"\na dog\na dog\n')
    flags = f"--prompts {tmp_path}/p.csv --prompts-per-epoch 8 --epochs 1 --num-steps 1"
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", flags)
    prompts = {"a cat,\nasleep", "a dog"}
    assert {row["prompt"] for row in read_rows(out / "labels.jsonl")} == prompts
    assert {group[0] for group in torch.load(out / "latents" / "e001.pt")} == prompts


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
    assert f"{100 * result['win_rate']:.0f} % are better than before" in capsys.readouterr().out
    assert result["pairs"] == 5 and "brightness" in result["objective"]
    low, high = result["win_rate_interval"]
    assert low <= result["win_rate"] <= high
    initial, tuned = result["initial"], result["tuned"]
    assert initial["score"] != tuned["score"] and tuned["watched"] > 0
    held_out = files.read_json(out / "config.json")["initial"]["eval_score"]
    assert initial["score"] != pytest.approx(held_out, rel=1e-6)
    # The initial model's part by hand, each image from noise of its own
    loaded = Loaded(tiny)
    images = loaded.sample(tuple(range(5)), 1, RandomPurpose.EVALUATION).images
    score = np.mean([np.asarray(image).mean() for image in images])
    assert initial["score"] == pytest.approx(score, abs=0.1)


# What is refused, and how runs end

REFUSED = {  # after the settings, whose refusals are in test_options.py
    "--model nobody/nothing": "network access; or give a folder",
    "--objective SCORERS:raises": "raised RuntimeError: no luck",
    "--watch SCORERS:same,SCORERS:blue": "give one scorer",
    "--prompts nothing": "give a file, or animals",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_run_that_cannot_be_is_refused_in_one_sentence_and_nothing_is_written(
    tiny, scorers, tmp_path, monkeypatch, flags
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        run(tiny, Path("run"), "compressibility", flags.replace("SCORERS", str(scorers)))
    assert REFUSED[flags] in " ".join(str(refused.value).split())
    assert not [*tmp_path.rglob("*")]


def test_main_says_a_users_mistake_and_lets_a_bug_show_its_traceback(
    tiny, scorers, tmp_path, monkeypatch
):
    flags = ["--model", str(tiny), "--objective", f"{scorers}:raises"]
    with pytest.raises(SystemExit, match="^sd_demo.py: the scorer .* raised RuntimeError: no luck"):
        sd_demo.main(flags)
    monkeypatch.setattr(sd_demo, "learn", lambda run, *_, **more: int("a bug"))
    flags = f"--model {tiny} --objective compressibility --out {tmp_path}/run {FLAGS}"
    with pytest.raises(ValueError, match="a bug"):
        sd_demo.main(shlex.split(flags))


def test_a_scorer_that_fails_in_the_middle_stops_with_a_sentence(tiny, scorers, tmp_path):
    file, out = tmp_path / "once.py", tmp_path / "run"
    file.write_text(scorers.read_text())
    # The calls: a trial, the initial model, two batches, an evaluation
    with pytest.raises(
        UserError, match=rf"raised RuntimeError: no\sluck. .* {out} has no model yet"
    ):
        run(tiny, out, f"{file}:later", "--epochs 1 --batch-size 1")
    file.write_text(scorers.read_text().replace("calls <= 4", "True"))
    sd_demo.run(resume=out)
    file.write_text(scorers.read_text().replace("calls <= 4", "calls <= 1"))
    with pytest.raises(UserError, match="raised RuntimeError"):
        sd_demo.run(evaluate=out)
    assert not (out / "evaluation.json").exists()


# Stopping and going on


def test_a_finished_run_is_resumed_with_more_epochs_and_is_as_an_unbroken_one(
    done, tiny, scorers, tmp_path
):
    flags = f"{GROUPS_OF_3} --watch {scorers}:blue --epochs 1"
    short = run(tiny, tmp_path / "short", f"{scorers}:brightness", flags)
    command = files.read_json(short / "config.json")["command"]
    sd_demo.main(["--resume", str(short), "--epochs", "2"])
    assert outcome(short) == outcome(done[0])
    config, unbroken = (files.read_json(out / "config.json") for out in (short, done[0]))
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
    write, calls = getattr(files, function), []

    def wrapped(path, content):
        calls.extend([path] * (path.name == moment))
        if path.name == moment and len(calls) == count:
            leave_half(path)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, content)

    setattr(files, function, wrapped)


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
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(tiny, scorers, tmp_path):
    """kill -9 at five moments; each run is resumed, and leaves what an unbroken run leaves."""
    flags = "--replay 2 --average-weights --max-kl 1e6"
    start_python(["-c", KILLS, tmp_path, tiny, scorers, flags], tmp_path)
    whole = run(tiny, tmp_path / "whole", f"{scorers}:brightness", flags)
    moments = {"labels.jsonl": 0, **dict.fromkeys(["metrics.jsonl", "state.pt"], 1)}
    moments |= dict.fromkeys(["e002_p00.pt", "e002.pt"], 1)
    for moment, epochs_done in moments.items():
        out = tmp_path / moment
        state = out / "checkpoint" / "state.pt"
        assert (torch.load(state)["epoch"] if state.exists() else 0) == epochs_done
        sd_demo.run(resume=out)
        assert outcome(out) == outcome(whole), moment
        assert files_of(out) == files_of(whole), moment
        state, unbroken = torch.load(state), torch.load(whole / "checkpoint" / "state.pt")
        torch.testing.assert_close(state, unbroken, rtol=0, atol=0)
        for file in whole.glob("latents/*"):
            assert torch.load(out / "latents" / file.name)[0][1].equal(torch.load(file)[0][1])


def files_of(out) -> set:
    return {path.relative_to(out) for path in out.rglob("*") if path.suffix != ".part"}


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


def keep(run):
    yield from train(run)
    lora = {str(n): weight.data for n, weight in enumerate(run.model.lora)}
    torch.save(lora, run.folder / f"rank{os.environ['RANK']}.pt")


sd_demo.train = keep
folder, model, scorers = sys.argv[1:]
for name, scorer, flags in (
    ("both", "brightness", ""),
    ("first", "first_only", ""),
    ("none", "same", ""),
    ("chain", "brightness", "--loss chain"),
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
    start_python(argv, tmp_path)
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

    flags = "--loss chain" if out.name == "chain" else ""
    loaded = Loaded(tiny, flags)
    before = [weight.clone() for weight in loaded.model.lora]
    numbers = torch.randint(5, (4,), generator=seeded_generator(0, RandomPurpose.PROMPTS, 1))
    batches = loaded.sample(numbers, 2, RandomPurpose.TRAINING, 1).split(2)
    losses = []
    for n, batch in enumerate(
        batches
    ):  # updates: process 0 has the groups 0 and 2, process 1 has 1 and 3
        answers = [
            h[f"images/e001_p{group:02}_k0.png", f"images/e001_p{group:02}_k1.png"]
            for group in (2 * n, 2 * n + 1)
        ]
        pairs = d3po.pairs_from_feedback(torch.tensor(answers)).tolist()
        steps = torch.randperm(3, generator=seeded_generator(0, RandomPurpose.STEPS, 1, n)).tolist()
        losses += loaded.update(batch, pairs, steps)[0]
    after = torch.cat([weight.flatten() for weight in loaded.model.lora])
    moved = after - torch.cat([weight.flatten() for weight in before])
    apart = after - torch.cat([weight.flatten() for weight in ranks[0].values()])
    if out.name == "none":
        assert not losses and row["loss"] is None and not moved.any() and not apart.any()
        return
    # AdamW turns gradients into signs: an element whose gradient is rounding moves either way
    assert apart.norm() < 0.02 * moved.norm()
    assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
