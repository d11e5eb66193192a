"""sd/bench_people.py: simulated people mean what they say, and the page has the numbers."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sd_helpers import read_rows

from sd import bench, bench_people, options
from sd.bench import BLANK_KB, CHAIN
from sd.bench_people import FILE, RECIPES, TASTES, SimulatedPerson, Taste

RED, GREY, BLUE = (200, 20, 20), (90, 90, 90), (20, 20, 200)


@pytest.fixture
def ask(tmp_path):
    """A function that asks somebody with a taste about images of one colour each."""

    def make(taste: Taste, *colours, times=1):
        pictures = [np.full((64, 64, 3), colour, np.uint8) for colour in colours]
        images = [Image.fromarray(picture) for picture in pictures]
        batch = SimpleNamespace(images=images, prompts=["a cat"] * len(images))
        batch.groups = [range(len(images))] * times
        person = SimulatedPerson(taste, seed=0, folder=tmp_path)
        ((*labels,),) = person.label([batch], 1)
        assert all(label.chains == range(len(images)) for label in labels)
        return [label.answer for label in labels]

    return make


def test_answers_follow_the_taste_and_one_in_ten_does_not(ask):
    sure = TASTES["warm"]._replace(random=0)
    assert ask(sure, RED, BLUE) == [1] and ask(sure, BLUE, RED) == [-1]
    assert ask(sure, GREY, GREY) == [0]
    answers = np.array(ask(TASTES["warm"], RED, BLUE, times=1000))
    assert set(answers) == {-1, 1} and np.mean(answers == -1) == pytest.approx(0.05, abs=0.02)


def test_noise_is_that_of_eq_3(ask):
    """Gumbel noise of scale s on both: the first wins with probability logistic(difference / s)."""
    taste = Taste(lambda images, prompts: bench_people.torch.tensor([0.3, 0.0]), noise=0.2)
    share = np.mean(np.array(ask(taste, GREY, GREY, times=4000)) == 1)
    assert share == pytest.approx(1 / (1 + np.exp(-0.3 / 0.2)), abs=0.02)


def test_what_is_no_animal_is_tagged(ask):
    assert ask(TASTES["right animal"]._replace(random=0), GREY, RED) == [[True, True]]


def test_the_lora_of_every_round_is_kept(tmp_path):
    lora = tmp_path / "run" / "lora" / bench_people.LORA_FILE
    lora.parent.mkdir(parents=True)
    batches = [SimpleNamespace(groups=range(3)), SimpleNamespace(groups=range(5))]
    person = SimulatedPerson(TASTES["warm"], seed=0, folder=tmp_path)
    person.answer = lambda *_: None
    for epoch in (1, 2, 3):
        person.label(batches, epoch)
        lora.write_text(f"after {epoch}")
    kept = {copy.parent.name: copy.read_text() for copy in tmp_path.glob("loras/*/*")}
    assert kept == {"8": "after 1", "16": "after 2"}


def test_means_compare_with_the_same_images_before_training():
    def judged(after, kb, animals):
        row = {"after": after, "score": 0.25, "win_rate": 0.5, "animals": animals}
        return row | {"kb": BLANK_KB + kb, "kl": 2.0}

    first = {"judged": [judged(0, 2, 1.0), judged(16, 1, 0.5)], "stopped_after": 8}
    second = {"judged": [judged(0, 4, 1.0), judged(16, 4, 0.75)], "stopped_after": None}
    start, end = bench_people.rows_of("warm", CHAIN, [first, second])
    assert (start["size"], end["size"]) == ("+0%", "-25%")
    assert (end["animals recognised"], end["worst seed"]) == ("62.5%", "50.0%")
    assert (start["stopped"], end["stopped"], end["seeds"]) == (0, 1, 2)
    assert "broken images" not in end
    (row,) = bench_people.rows_of("right animal", CHAIN, [{**second, "judged": [judged(24, 1, 1)]}])
    assert row["broken images"] == "75.0%"


def test_every_job_is_a_command():
    jobs = bench_people.make_jobs([*TASTES], [*RECIPES, *bench_people.LABEL_FILES], 5)
    assert len(jobs) == 5 * (3 * 4 + 1 + 3) and len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        if job.key["taste"] != FILE:
            args = options.make_settings(**job.settings, objective="human", device="cpu")
            clicks = args.epochs * args.prompts_per_epoch
            assert clicks == TASTES[job.key["taste"]].clicks[-1]


def test_the_committed_page_has_the_committed_numbers():
    groups = bench_people.group(bench.RESULTS / "people.json")
    page = (bench.RESULTS / "people.md").read_text()
    assert page.split(bench_people.MARK)[1] == bench_people.table(groups)


@pytest.mark.slow
@pytest.mark.parametrize("taste, recipe", [("warm", CHAIN), (FILE, "renderings")])
def test_a_run_is_judged_and_stands_on_the_page(tmp_path, monkeypatch, taste, recipe, no_figures):
    short = {"epochs": 2, "num_steps": 3, "eval_images": 2, "eval_every": 1}
    asked = {"prompts_per_epoch": 4, "images_per_prompt": 2} if taste != FILE else {}
    small = TASTES[taste]._replace(settings=short | asked, clicks=(4, 8), judged=4)
    monkeypatch.setitem(TASTES, taste, small)
    monkeypatch.setattr(bench_people, "LABELLED", {"prompts_per_epoch": 2, "images_per_prompt": 3})
    (job,) = bench_people.make_jobs([taste], [recipe], 1)
    run = bench.run_job(job, bench_people.measure, tmp_path / job.name)
    first, *others = run["judged"]
    assert first["after"] == 0 == first["kl"] and first["win_rate"] == 0.5
    assert [row["after"] for row in others] == ([8] if taste == FILE else [4, 8])
    assert all(row["kl"] != 0 for row in others)
    labels = "labelled" if taste == FILE else "run"
    assert len(read_rows(tmp_path / job.name / labels / "labels.jsonl")) == (
        2 * 3 if taste == FILE else 8
    )
    bench.add_run(tmp_path / "people.json", run, job.key)
    bench_people.write(tmp_path, tmp_path)
    assert f"| {taste} | {recipe} | 8 | 1 |" in (tmp_path / "people.md").read_text()
