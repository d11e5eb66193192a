"""sd/memory.py: labelled groups, kept and drawn again; and runs that begin from a file."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sd_helpers import FLAGS, PROMPTS, Loaded, outcome, parse, read_rows, run

import d3po
import sd_demo
from sd import UserError, files, options, replay
from sd.model import RunningAverage
from sd.pipeline import decode

REPLAY = "--replay 2 --average-weights"


def groups_of(*sizes: int, x_T: bool = True) -> list[replay.Group]:
    """Group n has prompt n, and in all latents of its image k the number 10 n + k."""
    groups = []
    for n, K in enumerate(sizes):
        x_0 = (10 * n + torch.arange(K)).view(K, 1, 1).expand(K, 2, 3).float()
        pairs = torch.tensor([[K - 1, 0]])
        groups.append(replay.Group(PROMPTS[n], x_0, torch.ones(2, 3) if x_T else None, pairs))
    return groups


@pytest.fixture
def schedule():
    return d3po.make_schedule(torch.linspace(0.999, 0.01, 100), num_steps=4)


@pytest.fixture
def make_memory(tmp_path, schedule):
    def make(flags: str = "", groups=()):
        args = parse(options.EMOJI, flags)
        args.out = tmp_path
        (tmp_path / "latents").mkdir(exist_ok=True)
        found = replay.ReplayBuffer(args, Accelerator(), schedule, PROMPTS)
        found.groups = list(groups)
        return found

    return make


# Groups


def test_a_batch_is_kept_as_groups_with_pairs_of_their_own_images(make_memory, schedule):
    x = torch.randn(5, 9, 2, 3)  # three groups of three
    cond, pairs = torch.tensor([4, 4, 4, 0, 0, 0, 2, 2, 2]), torch.tensor([[2, 0], [7, 8], [6, 8]])
    batch = replay.LabelledBatch(d3po.Trajectory(x, torch.zeros(4, 9)), cond, pairs)
    kept = make_memory()
    kept.add(3, [batch], images_per_prompt=3)
    first, last = kept.groups  # nothing is to be learned from the one without pairs
    for group, own, expected in ((first, 0, [[2, 0]]), (last, 6, [[1, 2], [0, 2]])):
        assert group.prompt == PROMPTS[cond[own]] and group.pairs.tolist() == expected
        assert torch.equal(group.x_0, x[-1, own : own + 3])
        assert torch.equal(group.x_T, x[0, own])
    (again, other), expected = replay.load_groups(kept.folder, 3), kept.groups
    for one, before in ((again, expected[0]), (other, expected[1])):
        assert one.prompt == before.prompt and torch.equal(one.x_0, before.x_0)


@pytest.mark.parametrize("own_noise", [True, False])
def test_redrawn_trajectories_lead_from_one_noise_to_the_images_that_were_judged(
    make_memory, own_noise
):
    kept = make_memory("--batch-size 2", groups_of(2, 3, 2, x_T=own_noise))
    batch = kept.redraw([2, 1], epoch=1, n=0)
    x = batch.trajectory.x
    assert x.shape == (5, 5, 2, 3)
    assert x[-1, :, 0, 0].tolist() == [20, 21, 10, 11, 12]
    assert batch.cond.tolist() == [2, 2, 1, 1, 1]
    assert batch.pairs.tolist() == [[1, 0], [4, 2]]
    for group in (slice(0, 2), slice(2, 5)):  # one x_T, and from there ways of their own
        assert (x[0, group] == x[0, group][:1]).all()
        assert not torch.equal(x[2, group][0], x[2, group][1])
    assert (x[0] == 1).all() == own_noise


def test_a_draw_depends_on_epoch_and_number_alone(make_memory):
    kept = make_memory("--batch-size 2", groups_of(2, 2, 2, 2))

    def draw(epoch):
        return [batch.trajectory.x for batch in kept.draw(epoch, 3)]

    first, second = draw(5), draw(5)
    assert len(first) == 3 and all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, draw(6))) and not torch.equal(first[0], first[1])
    assert not list(make_memory().draw(1, 3))  # nothing is kept yet


def test_a_pass_takes_every_group_once(make_memory):
    kept = make_memory("--batch-size 2", groups_of(2, 2, 3, 2, 2))
    batches = list(kept.draw_given(1))
    ends = [value for batch in batches for value in batch.trajectory.x[-1, :, 0, 0].tolist()]
    assert [len(batch.cond) for batch in batches] != [2] * 5 and len(batches) == 3
    assert sorted(ends) == [0, 1, 10, 11, 20, 21, 22, 30, 31, 40, 41]
    order = [batch.cond.tolist() for batch in kept.draw_given(2)]
    assert order != [batch.cond.tolist() for batch in batches]


def test_the_epochs_of_a_large_file_make_a_pass_together(make_memory, monkeypatch):
    monkeypatch.setattr(replay, "EPOCH_GROUPS", 2)
    monkeypatch.setattr(replay, "epochs_of_pass", lambda groups: 3)
    kept = make_memory("--batch-size 2", groups_of(2, 2, 2, 2, 2))
    drawn = [[b.cond[::2].tolist() for b in kept.draw_given(epoch)] for epoch in range(1, 7)]
    assert [len(batches) for batches in drawn] == [1] * 6
    first, second = ([n for (batch,) in drawn[k : k + 3] for n in batch] for k in (0, 3))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4] and first != second


def test_a_process_without_a_share_gets_a_group_without_pairs(make_memory):
    kept = make_memory("--batch-size 1", groups_of(2, 2))

    class Second:
        process_index, num_processes, device = 1, 2, torch.device("cpu")

    kept.accelerator = Second()
    assert kept.redraw([0], 1, 0).pairs.shape == (0, 2)
    share = kept.redraw([0, 1], 1, 0)
    assert share.cond.tolist() == [1, 1] and share.pairs.tolist() == [[1, 0]]


# The running average


def test_the_average_is_the_mean_at_first_and_later_that_of_the_last_tenth():
    weight, values = torch.zeros(1), torch.arange(1.0, 101)
    average = RunningAverage([weight], enabled=True)
    assert average.values is None
    expected = None
    for epoch, value in enumerate(values.tolist(), 1):
        weight.fill_(value)
        average.update(epoch)
        pace = 10 / (epoch + 9)
        expected = value if expected is None else (1 - pace) * expected + pace * value
    assert average.values[0].item() == pytest.approx(expected) and 88 < expected < 94
    with average.applied():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 100
    plain = RunningAverage([weight], enabled=False)
    plain.update(1)
    with plain.applied():
        assert weight.item() == 100


def test_what_is_saved_is_the_average_and_the_training_goes_on_from_its_own_weights(
    tiny, scorers, tmp_path, no_figures
):
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", REPLAY)
    state = torch.load(out / "checkpoint" / "state.pt")
    loaded = Loaded(tiny)
    loaded.model.load_lora(state["lora"])
    own = [weight.detach().clone() for weight in loaded.model.lora]
    assert not any(map(torch.equal, own, state["average"]))
    loaded.run.args.out = out
    loaded.run.average.enabled = True
    assert loaded.run.load_checkpoint() == 2
    with loaded.run.average.applied():
        loaded.model.save_lora(tmp_path)
    (saved,) = tmp_path.glob("*.safetensors")
    assert saved.read_bytes() == (out / "lora" / saved.name).read_bytes()


# Runs with memory


def test_earlier_groups_are_trained_on_too(tiny, scorers, tmp_path, no_figures, monkeypatch):
    seen, update_batch = [], sd_demo.update_batch

    def watch(run, batch, **options):
        seen.append(batch.trajectory.log_prob.any().item())  # redrawn: nobody sampled it
        return update_batch(run, batch, **options)

    monkeypatch.setattr(sd_demo, "update_batch", watch)
    run(tiny, tmp_path / "run", f"{scorers}:brightness", "--replay 2 --batch-size 1")
    assert seen == 2 * [True, True, False, False]


def test_a_batch_that_was_sampled_is_not_sampled_again(tiny, tmp_path):
    loaded = Loaded(tiny)
    loaded.run.memory.folder = tmp_path
    (first,) = sd_demo.sample_epoch(loaded.run, 1)
    for weight in loaded.model.lora:
        weight.data.add_(0.1)
    (second,) = sd_demo.sample_epoch(loaded.run, 1)
    assert all(map(torch.equal, first.trajectory, second.trajectory))
    loaded.run.memory.drop_batches(1)
    (third,) = sd_demo.sample_epoch(loaded.run, 1)
    assert not torch.equal(first.trajectory.x, third.trajectory.x)


@pytest.mark.slow
def test_a_run_stops_before_its_kl_limit_and_goes_on_with_a_higher_one(
    tiny, scorers, tmp_path, no_figures, capsys
):
    objective, whole = f"{scorers}:brightness", f"{REPLAY} --max-kl 1e6 --epochs 3"
    unbroken = outcome(run(tiny, tmp_path / "unbroken", objective, whole))
    kl = [row["eval_kl"] for row in unbroken[0]]
    assert 0 < kl[0] < kl[1]
    limited = whole.replace("1e6", str((kl[0] + kl[1]) / 2))
    out = run(tiny, tmp_path / "run", objective, limited)
    assert (
        f"the run stops and keeps the model of epoch 1. On: python sd_demo.py --resume {out}"
        in (capsys.readouterr().out)
    )
    assert [row["epoch"] for row in read_rows(out / "metrics.jsonl")] == [1]
    assert torch.load(out / "checkpoint" / "state.pt")["epoch"] == 1
    assert "the run stops and keeps the model of epoch 1" in (out / "report.html").read_text()
    sd_demo.main(["--resume", str(out), "--max-kl", "1e6"])
    assert outcome(out) == unbroken
    assert "the run stops" not in (out / "report.html").read_text()


def test_a_run_that_stops_at_once_keeps_nothing_and_says_so(
    tiny, scorers, tmp_path, no_figures, capsys
):
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", "--max-kl 1e-9")
    assert "the run stops and keeps nothing: try a smaller --lr" in capsys.readouterr().out
    assert not any((out / "lora").iterdir()) and not read_rows(out / "metrics.jsonl")


# Images that were judged already


@pytest.fixture
def label_file(tmp_path):
    """Four groups: in each the brighter of two images is better. Sizes are not the model's."""
    folder, rows = tmp_path / "given", []
    folder.mkdir()
    for n, prompt in enumerate([*PROMPTS[:3], "a prompt of its own"]):
        for name, level in (("a", 200), ("b", 60)):
            picture = np.random.default_rng(n).integers(0, 40, (40, 60, 3)) + level
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"{n}{name}.png")
        rows.append({"prompt": prompt, "chosen": f"{n}a.png", "rejected": f"{n}b.png"})
    file = folder / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def learn(tiny, file, out, flags="", objective=()) -> None:
    start = ["--model", str(tiny), "--labels", str(file), "--out", str(out)]
    sd_demo.main([*start, *objective, *FLAGS.split(), *flags.split()])


def test_images_are_encoded_at_the_models_size_and_the_winner_comes_first(tiny, label_file):
    loaded = Loaded(tiny)
    args = options.parse(["--labels", str(label_file), "--model", str(tiny)])[1]
    given = replay.Given(args, Accelerator())
    assert given.prompts == [*PROMPTS[:3], "a prompt of its own"]
    assert (given.groups, given.pairs) == (4, 4)
    groups = given.encode(loaded.model.conditioning)
    for n, group in enumerate(groups):
        assert group.x_T is None and group.pairs.tolist() == [[0, 1]]
        assert group.x_0.shape == (2, *loaded.model.latent_shape)
        file = label_file.parent / f"{n}a.png"
        conditioning = loaded.model.conditioning
        size = decode(loaded.model.pipe, group.x_0, conditioning, names=["a", "b"])[0].size
        middle = Image.open(file).resize((60 * size[1] // 40, size[1]), Image.Resampling.BICUBIC)
        left = (middle.width - size[0]) // 2
        middle = middle.crop((left, 0, left + size[0], size[1]))
        opened = replay.open_image(file, size)
        assert np.abs(np.asarray(opened, float) - np.asarray(middle, float)).mean() < 3


def test_a_dry_run_counts_the_file(tiny, label_file, tmp_path, capsys):
    learn(tiny, label_file, tmp_path / "run", "--dry-run")
    printed = capsys.readouterr().out
    assert "prompts: 4, images: 8, pairs: 4, groups: 4, ties: 0" in printed
    assert "The first comparison as understood:" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_learns_from_the_images_of_a_file_alone(tiny, label_file, tmp_path, no_figures):
    out = tmp_path / "run"
    learn(tiny, label_file, out, "--max-kl 1e6 --epochs 12 --lr 0.002")
    rows = read_rows(out / "metrics.jsonl")
    assert [row["labels"] for row in rows] == [4] * 12
    assert all(row["score"] is None and row["eval_score"] is None for row in rows)
    assert all(row["kl"] is None and row["eval_kl"] != 0 for row in rows)
    assert np.mean([row["margin"] for row in rows[6:]]) > 0  # on trajectories not trained on yet
    assert not list((out / "images").glob("e001_p*")) and not (out / "labels.jsonl").read_text()
    assert [file.name for file in (out / "latents").iterdir()] == ["e000.pt"]


@pytest.mark.slow
def test_a_run_of_a_file_goes_on_without_the_file(tiny, label_file, tmp_path, no_figures):
    learn(tiny, label_file, tmp_path / "unbroken", "--epochs 3 --max-kl 1e6")
    learn(tiny, label_file, tmp_path / "run", "--epochs 1 --max-kl 1e6 --lr 0.005")
    label_file.rename(label_file.with_name("gone"))
    sd_demo.main(["--resume", str(tmp_path / "run"), "--epochs", "3"])
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["epoch"] for row in rows] == [1, 2, 3] and rows[-1]["labels"] == 4


def test_with_an_objective_the_file_comes_first(tiny, scorers, label_file, tmp_path, no_figures):
    objective = ["--objective", f"{scorers}:brightness", "--prompts", str(tiny / "prompts.txt")]
    flags = "--passes 2 --epochs 2 --replay 1 --max-kl 1e6"
    learn(tiny, label_file, tmp_path / "run", flags, objective)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["labels"] for row in rows] == [4, 4, 6, 8]
    assert [row["score"] is None for row in rows] == [True, True, False, False]
    labels = read_rows(tmp_path / "run" / "labels.jsonl")
    assert [row["epoch"] for row in labels] == [3, 3, 4, 4]
    assert {row["prompt"] for row in labels} <= set(PROMPTS)  # not the file's own
    assert sorted(file.name for file in (tmp_path / "run" / "latents").iterdir()) == [
        "e000.pt",
        "e003.pt",
        "e004.pt",
    ]


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_written(
    tiny, label_file, tmp_path, capsys
):
    (label_file.parent / "2b.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        learn(tiny, label_file, tmp_path / "run")
    message = capsys.readouterr().err
    assert "2b.png is no image that can be read" in message
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no image that can be read"):
        replay.open_image(label_file, (8, 8))
    label_file.write_bytes(b"F\0\1\1\0\0\1\0\1\0\0\xff\xdb\0C\0\x08\6" + bytes(400))
    with pytest.raises(UserError, match="no image that can be read .unknown raw mode"):
        replay.open_image(label_file, (8, 8))  # as another kind of file, it is worse


def test_the_labels_of_a_run_are_a_file_for_the_next(tiny, scorers, tmp_path, no_figures):
    earlier = run(tiny, tmp_path / "earlier", f"{scorers}:brightness")
    learn(tiny, earlier / "labels.jsonl", tmp_path / "run", "--max-kl 1e6")
    (first, _) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert first["labels"] == sum(row["h"] != 0 for row in read_rows(earlier / "labels.jsonl"))
    assert files.read_json(tmp_path / "run" / "config.json")["objective"] is None
