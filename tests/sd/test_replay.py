"""sd/replay.py: labelled groups, kept and drawn again; and runs that begin from a file."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from sd_helpers import FLAGS, PROMPTS, Loaded, outcome, read_rows, run, typed

import d3po
import sd_demo
from sd import figures, images, label_files, options, replay
from sd.model import RunningAverage
from sd.pipeline import decode


def groups_of(*sizes: int, x_T: bool = True) -> list[replay.LatentGroup]:
    """Group n has prompt n, and in all latents of its image k the number 10 n + k."""
    groups = []
    for n, K in enumerate(sizes):
        x_0 = (10 * n + torch.arange(K)).view(K, 1, 1).expand(K, 2, 3).float()
        noise, pairs = torch.ones(2, 3) if x_T else None, torch.tensor([[K - 1, 0]])
        groups.append(replay.LatentGroup(PROMPTS[n], x_0, noise, pairs))
    return groups


def values(batch: replay.LabelledBatch) -> list[float]:
    """The numbers of the images that a batch leads to."""
    return batch.trajectory.x[-1, :, 0, 0].tolist()


@pytest.fixture
def make_buffer(tmp_path):
    def make(groups=(), *, batch_size: int = 2, process: int = 0, processes: int = 1):
        accelerator = Accelerator()
        if processes > 1:
            place = {"process_index": process, "num_processes": processes}
            accelerator = SimpleNamespace(**place, device=torch.device("cpu"))
        schedule = d3po.make_schedule(torch.linspace(0.999, 0.01, 100), num_steps=4)
        buffer = replay.ReplayBuffer(
            tmp_path, schedule, PROMPTS, seed=0, batch_size=batch_size, accelerator=accelerator
        )
        buffer.groups = list(groups)
        return buffer

    return make


# Groups


def test_a_batch_is_kept_as_groups_with_pairs_of_their_own_images(make_buffer):
    x = torch.randn(5, 9, 2, 3)  # three groups of three
    cond, pairs = torch.tensor([4, 4, 4, 0, 0, 0, 2, 2, 2]), torch.tensor([[2, 0], [7, 8], [6, 8]])
    batch = replay.LabelledBatch(d3po.Trajectory(x, torch.zeros(4, 9)), cond, pairs)
    buffer, again = make_buffer(), make_buffer()
    buffer.add(3, [batch], images_per_prompt=3)
    again.load(3, [])
    assert buffer.labels == again.labels == 3
    for groups in (buffer.groups, again.groups):
        first, last = groups  # nothing is to be learned from the one without pairs
        for group, own, expected in ((first, 0, [[2, 0]]), (last, 6, [[1, 2], [0, 2]])):
            assert group.prompt == PROMPTS[cond[own]] and group.pairs.tolist() == expected
            assert torch.equal(group.x_0, x[-1, own : own + 3])
            assert torch.equal(group.x_T, x[0, own])


def test_groups_of_epochs_that_are_not_done_are_not_loaded(make_buffer):
    buffer = make_buffer()
    for epoch in (1, 2, 3):
        buffer.keep(epoch, groups_of(2)[:1])
    again = make_buffer()
    again.load(2, groups_of(2, 2, x_T=False))
    assert [group.x_T is None for group in again.groups] == [True, True, False, False]
    assert len(replay.load_groups(again.folder, 0)) == 2  # those of --labels
    assert replay.load_groups(again.folder, 4) == []


@pytest.mark.parametrize("own_noise", [True, False])
def test_redrawn_trajectories_lead_from_one_noise_to_the_images_that_were_judged(
    make_buffer, own_noise
):
    batch = make_buffer(groups_of(2, 3, 2, x_T=own_noise)).redraw([2, 1], epoch=1, n=0)
    x = batch.trajectory.x
    assert x.shape == (5, 5, 2, 3) and not batch.sampled
    assert values(batch) == [20, 21, 10, 11, 12]
    assert batch.cond.tolist() == [2, 2, 1, 1, 1]
    assert batch.pairs.tolist() == [[1, 0], [4, 2]]
    for group in (slice(0, 2), slice(2, 5)):  # one x_T, and from there ways of their own
        assert (x[0, group] == x[0, group][:1]).all()
        assert not torch.equal(x[2, group][0], x[2, group][1])
    assert (x[0] == 1).all() == own_noise


def test_a_draw_depends_on_epoch_and_number_alone(make_buffer):
    buffer = make_buffer(groups_of(2, 2, 2, 2))

    def draw(epoch):
        return [batch.trajectory.x for batch in buffer.draw(epoch, 3)]

    assert len({tuple(batch.cond.tolist()) for batch in buffer.draw(5, 3)}) > 1
    first, second = draw(5), draw(5)
    assert len(first) == 3 and all(map(torch.equal, first, second))
    assert not any(map(torch.equal, first, draw(6))) and not torch.equal(first[0], first[1])
    assert not list(make_buffer().draw(1, 3))  # nothing is kept yet


def test_a_pass_takes_every_group_once_in_an_order_of_its_own(make_buffer):
    buffer = make_buffer(groups_of(2, 2, 3, 2, 2))
    first, second = (list(buffer.draw_part(epoch, 1)) for epoch in (1, 2))
    assert [batch.weight for batch in first] == [1, 1, 0.5]  # the last has one group of two
    ends = [value for batch in first for value in values(batch)]
    assert sorted(ends) == [0, 1, 10, 11, 20, 21, 22, 30, 31, 40, 41]
    assert [batch.cond.tolist() for batch in first] != [batch.cond.tolist() for batch in second]


def test_the_epochs_of_a_large_file_make_a_pass_together(make_buffer, monkeypatch):
    monkeypatch.setattr(label_files, "EPOCH_GROUPS", 2)
    parts = replay.parts_of_pass(5)
    assert parts == 3
    buffer = make_buffer(groups_of(2, 2, 2, 2, 2))
    drawn = [[b.cond[::2].tolist() for b in buffer.draw_part(n, parts)] for n in range(1, 7)]
    assert [len(batches) for batches in drawn] == [1] * 6
    first, second = ([n for (batch,) in drawn[k : k + 3] for n in batch] for k in (0, 3))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4] and first != second


def test_processes_share_the_groups_and_one_without_a_share_has_no_pairs(make_buffer):
    share = {"batch_size": 1, "processes": 2}
    first, second = (make_buffer(groups_of(2, 2), process=n, **share) for n in (0, 1))
    assert [values(one.redraw([0, 1], 1, 0)) for one in (first, second)] == [[0, 1], [10, 11]]
    assert second.redraw([0, 1], 1, 0).pairs.tolist() == [[1, 0]]
    spare = second.redraw([0], 1, 0)
    assert spare.pairs.shape == (0, 2) and values(spare) == [0, 1]


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


@pytest.fixture(scope="module")
def kept(tiny, scorers, tmp_path_factory):
    """A run that averages its weights, and what each of its batches was."""
    out, batches, learn = tmp_path_factory.mktemp("kept") / "run", [], sd_demo.learn

    def watch(run, batch, *, measured=False):
        batches.append((run.epoch, batch.sampled, measured))
        learn(run, batch, measured=measured)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd_demo, "learn", watch)
        patch.setattr(figures, "draw_run", lambda run: None)
        flags = "--replay 2 --average-weights --batch-size 1"
        return run(tiny, out, f"{scorers}:brightness", flags), batches


def test_earlier_groups_are_trained_on_too(kept):
    of_epoch = [(True, True), (True, True), (False, False), (False, False)]
    assert kept[1] == [(epoch, *kind) for epoch in (1, 2) for kind in of_epoch]


def test_what_is_saved_is_the_average_and_the_training_goes_on_from_its_own_weights(
    kept, tiny, tmp_path
):
    out, _ = kept
    state = torch.load(out / "checkpoint" / "state.pt")
    loaded = Loaded(tiny, "--average-weights")
    loaded.run.folder = out
    loaded.run.load_checkpoint()
    assert loaded.run.epochs_done == 2
    own = [weight.detach().clone() for weight in loaded.model.lora]
    assert not any(map(torch.equal, own, state["average"]))
    with loaded.run.average.applied():
        loaded.model.save_lora(tmp_path)
    (saved,) = tmp_path.glob("*.safetensors")
    assert saved.read_bytes() == (out / "lora" / saved.name).read_bytes()


# Runs that keep their labels

FAR = "--loss eq14 --batch-size 1 --replay 2 --lr 0.01"  # the KL is clearly above 0


def test_a_batch_that_was_sampled_is_not_sampled_again(tiny, tmp_path):
    loaded = Loaded(tiny)
    loaded.run.replay.folder = tmp_path
    (first,) = loaded.run.sample(1)
    for weight in loaded.model.lora:
        weight.data.add_(0.1)
    (second,) = loaded.run.sample(1)
    assert all(map(torch.equal, first.trajectory, second.trajectory))
    loaded.run.replay.drop_batches(0)  # those of epoch 1 may still be needed
    (second,) = loaded.run.sample(1)
    assert torch.equal(first.trajectory.x, second.trajectory.x)
    loaded.run.replay.drop_batches(1)
    (third,) = loaded.run.sample(1)
    assert not torch.equal(first.trajectory.x, third.trajectory.x)


@pytest.mark.slow
def test_a_run_stops_before_its_kl_limit_and_goes_on_with_a_higher_one(
    tiny, scorers, tmp_path, no_figures, capsys
):
    objective, flags = f"{scorers}:brightness", f"{FAR} --average-weights"
    unbroken = outcome(run(tiny, tmp_path / "unbroken", objective, f"{flags} --max-kl 1e6"))
    kl = [row["eval_kl"] for row in unbroken[0]]
    assert 0 < kl[0] < kl[1]
    capsys.readouterr()
    out = run(tiny, tmp_path / "run", objective, flags, max_kl=(kl[0] + kl[1]) / 2)
    sentence = "the run stops and keeps the model of epoch 1"
    assert f"{sentence}. To allow more: python sd_demo.py --resume {out}" in capsys.readouterr().out
    assert [row["epoch"] for row in read_rows(out / "metrics.jsonl")] == [1]
    assert torch.load(out / "checkpoint" / "state.pt")["epoch"] == 1
    assert sentence in (out / "report.html").read_text("utf-8")
    sd_demo.run(resume=out, max_kl=1e6)
    assert outcome(out) == unbroken
    assert "the run stops" not in (out / "report.html").read_text("utf-8")


def test_a_run_that_stops_at_once_keeps_nothing_and_says_so(
    tiny, scorers, tmp_path, no_figures, capsys
):
    out = run(tiny, tmp_path / "run", f"{scorers}:brightness", f"{FAR} --max-kl 1e-9")
    assert "the run stops and keeps nothing: try a smaller --lr" in capsys.readouterr().out
    assert not any((out / "lora").iterdir()) and not read_rows(out / "metrics.jsonl")


# Images that were judged already

BOTH = ("chosen", "rejected")


@pytest.fixture
def label_file(tmp_path):
    """Four groups: in each the brighter of two images is better. Sizes are not the model's."""
    folder, rows = tmp_path / "images of others", []
    folder.mkdir()
    for n, prompt in enumerate([*PROMPTS[:3], "a prompt of its own"]):
        for name, level in (("a", 200), ("b", 60)):
            picture = np.random.default_rng(n).integers(0, 40, (40, 60, 3)) + level
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"{n}{name}.png")
        rows.append({"prompt": prompt} | dict(zip(BOTH, (f"{n}a.png", f"{n}b.png"), strict=True)))
    file = folder / "labels.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def learn_from(file, model, out, flags: str = "", **settings):
    """A run of sd_demo.py that learns from a label file, first or alone."""
    start = {"labels": file, "model": str(model), "out": out}
    return sd_demo.run(**start, **typed(f"{FLAGS} --max-kl 1e6 {flags}"), **settings)


def test_images_are_encoded_at_the_models_size_and_the_winner_comes_first(tiny, label_file):
    model, prompts = Loaded(tiny).model, [*PROMPTS[:3], "a prompt of its own"]
    groups = replay.encode_groups(
        label_files.read_label_file(label_file).groups, model.conditioning
    )
    assert [group.prompt for group in groups] == prompts
    for n, group in enumerate(groups):
        assert group.x_T is None and group.pairs.tolist() == [[0, 1]]
        assert group.x_0.shape == (2, *model.latent_shape)
        again = decode(model.pipe, group.x_0, model.conditioning, names=["a", "b"])
        size, file = again[0].size, label_file.parent / f"{n}a.png"
        middle = Image.open(file).resize((60 * size[1] // 40, size[1]), Image.Resampling.BICUBIC)
        left = (middle.width - size[0]) // 2
        middle = middle.crop((left, 0, left + size[0], size[1]))
        opened = images.open_image(file, size)
        assert np.abs(np.asarray(opened, float) - np.asarray(middle, float)).mean() < 3


def test_a_dry_run_counts_the_file(tiny, label_file, tmp_path, capsys):
    learn_from(label_file, tiny, tmp_path / "run", "--dry-run")
    printed = capsys.readouterr().out
    assert "prompts: 4, images: 8, votes: 4, pairs: 4," in printed
    assert "The first comparison as understood:" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_trains_on_the_images_of_a_file_alone_and_goes_on_without_it(
    tiny, label_file, tmp_path, no_figures
):
    whole = learn_from(label_file, tiny, tmp_path / "whole", "--epochs 3")
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["labels"] for row in rows] == [4] * 3
    assert all(row["score"] is None and row["eval_score"] is None for row in rows)
    assert all(row["kl"] is None and row["eval_kl"] != 0 for row in rows)
    assert not list((whole / "images").glob("e001_p*")) and not read_rows(whole / "labels.jsonl")
    assert [file.name for file in (whole / "latents").iterdir()] == ["e000.pt"]

    part = learn_from(label_file, tiny, tmp_path / "part", "--epochs 1")
    label_file.rename(label_file.with_name("gone"))
    sd_demo.run(resume=part, epochs=3)
    assert outcome(part) == outcome(whole)


def test_with_an_objective_the_file_comes_first(
    tiny, scorers, label_file, tmp_path, monkeypatch, no_figures
):
    monkeypatch.setattr(options, "LABEL_PASSES", 1)
    objective = {"objective": f"{scorers}:brightness", "prompts": PROMPTS}
    out = learn_from(label_file, tiny, tmp_path / "run", "--replay 1 --epochs 1", **objective)
    rows = read_rows(out / "metrics.jsonl")
    assert [row["labels"] for row in rows] == [4, 6]
    assert [row["score"] is None for row in rows] == [True, False]
    labels = read_rows(out / "labels.jsonl")
    assert [row["epoch"] for row in labels] == [2, 2]
    assert {row["prompt"] for row in labels} <= set(PROMPTS)  # not the file's own
    kept = sorted(file.name for file in (out / "latents").iterdir())
    assert kept == ["e000.pt", "e002.pt"]


def test_bytes_in_a_parquet_are_trained_on_as_the_same_images_in_files(
    tiny, label_file, tmp_path, no_figures
):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table
    rows = [
        {"caption": row["prompt"], "label_0": 1, "label_1": 0}
        | {f"jpg_{k}": (label_file.parent / row[name]).read_bytes() for k, name in enumerate(BOTH)}
        for row in read_rows(label_file)
    ]
    parquet.write_table(table.from_pylist(rows), tmp_path / "pairs.parquet")
    out = learn_from(tmp_path / "pairs.parquet", tiny, tmp_path / "run", "--epochs 1")
    expected = replay.encode_groups(
        label_files.read_label_file(label_file).groups, Loaded(tiny).model.conditioning
    )
    groups = replay.load_groups(out / "latents", 0)
    assert [group.prompt for group in groups] == [group.prompt for group in expected]
    for one, other in zip(groups, expected, strict=True):
        assert torch.equal(one.x_0, other.x_0) and torch.equal(one.pairs, other.pairs)
    assert len(list((out / "label_images").iterdir())) == 8
    assert read_rows(out / "metrics.jsonl")[0]["loss"] > 0
