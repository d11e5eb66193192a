"""sd/bench_people.py: simulated people mean what they say, and the page has the numbers."""

import json
from argparse import Namespace
from itertools import product

import numpy as np
import pytest
from PIL import Image
from sd_helpers import read_rows

from sd import bench_people, files, options
from sd.bench import BLANK_KB
from sd.bench_people import FILE, TASTES, Job, SimulatedPerson, Taste

PLAIN = bench_people.RESULTS / "people.json"


@pytest.fixture
def person(tmp_path):
    """A person with a taste, and a function that asks about images of one colour each."""

    def make(taste: Taste):
        one = SimulatedPerson.__new__(SimulatedPerson)
        one.args, one.taste, one.clicks = Namespace(out=tmp_path, seed=0), taste, 0

        def ask(*colours, field="h", times=1):
            names = []
            for n, colour in enumerate(colours):
                picture = np.full((64, 64, 3), colour, np.uint8)
                Image.fromarray(picture).save(tmp_path / f"{n}.png")
                names.append(f"{n}.png")
            row = {"epoch": 1, "prompt": "a cat", "images": names, "scores": None, field: None}
            return [answer[field] for answer in one.collect_labels([row] * times)]

        return one, ask

    return make


RED, GREY, BLUE = (200, 20, 20), (90, 90, 90), (20, 20, 200)


def test_answers_follow_the_taste_and_one_in_ten_does_not(person):
    sure, ask = person(TASTES["warm"]._replace(random=0))
    assert ask(RED, BLUE) == [1] and ask(BLUE, RED) == [-1] and ask(GREY, GREY) == [0]
    assert sure.clicks == 3
    _, ask = person(TASTES["warm"])
    answers = np.array(ask(RED, BLUE, times=1000))
    assert set(answers) == {-1, 1} and np.mean(answers == -1) == pytest.approx(0.05, abs=0.02)


def test_noise_is_that_of_eq_3(person):
    """Gumbel noise of scale s on both: the first wins with probability logistic(difference / s)."""
    level = Taste(lambda images, prompts: np.array([0.3, 0.0]), noise=0.2)
    score = level._replace(score=lambda *args: bench_people.torch.tensor([0.3, 0.0]))
    _, ask = person(score)
    share = np.mean(np.array(ask(GREY, GREY, times=4000)) == 1)
    assert share == pytest.approx(1 / (1 + np.exp(-0.3 / 0.2)), abs=0.02)


def test_the_best_of_a_group_is_one_click(person):
    _, ask = person(TASTES["warm"]._replace(random=0))
    assert ask(GREY, BLUE, RED, GREY, field="bad") == [[True, True, False, True]]


def test_what_is_no_animal_is_tagged(person, monkeypatch):
    _, ask = person(TASTES["right animal"]._replace(random=0))
    assert ask(GREY, RED, field="bad") == [[True, True]]


def test_a_summary_compares_with_the_same_noises_before_training():
    def quality(scores, kb, trained_on=0):
        row = {"scores": scores, "kb": kb, "animals": 0.5, "kl": 2.0, "trained_on": trained_on}
        return {**row, "labels": 0 if kb == 2.69 else 16}

    before = quality([0.0, 0.0, 0.0, 0.0], BLANK_KB + 2)
    before["labels"] = 0
    after = quality([1.0, 1.0, 0.0, -1.0], BLANK_KB + 1, trained_on=8)
    start, end = bench_people.summary([{"quality": [before, after], "seconds": 7}])
    assert start["win_rate"] == 0.5 and start["size"] == 0 and start["stopped"] == 0
    assert end["win_rate"] == 0.625 and end["size"] == pytest.approx(-0.5)
    assert end["stopped"] == 1 and end["failures"] == 0.75 and end["seconds"] == 7


def test_a_part_that_runs_elsewhere_leaves_the_other_rows_of_the_page(tmp_path, no_figures):
    row = {"scores": [0.0], "kb": 2.0, "animals": 0.5, "kl": 2.0, "labels": 0, "trained_on": 0}
    jobs = [Job("small files", "default", 0), Job("warm", "default", 0), Job("warm", "Eq. 14", 0)]
    for job in jobs:
        result = {"flags": job.taste, "seconds": 1, "quality": [row]}
        folder = tmp_path / job.recipe / job.name
        folder.mkdir(parents=True)
        files.save_json(folder / "quality.json", result)
    for recipe in ("default", "Eq. 14", "previous"):  # of the last nothing is done
        bench_people.write(jobs, tmp_path / recipe, tmp_path)
    runs = json.loads((tmp_path / "people.json").read_text())["runs"]
    keys = [(run["taste"], run["recipe"]) for run in runs]
    assert keys == [("warm", "default"), ("warm", "Eq. 14"), ("small files", "default")]
    assert [run["flags"] for run in runs] == ["warm", "warm", "small files"]
    page = (tmp_path / "people.md").read_text()
    assert page.index("| warm | default") < page.index("| warm | Eq. 14") < page.index("| small")


def test_the_committed_page_has_the_committed_numbers():
    runs = json.loads(PLAIN.read_text())["runs"]
    found = {(run["taste"], run["recipe"]): run["rows"] for run in runs}
    page = (bench_people.RESULTS / "people.md").read_text()
    assert page.split(bench_people.MARK)[1] == bench_people.table(found)
    recipes = (*bench_people.RECIPES, "labels first")
    complete = [*product(("warm", "plain but intact", "small files"), recipes)]
    complete.remove(("small files", "Eq. 14, slow start"))  # one seed
    complete += [("right animal", "default"), *product([FILE], bench_people.LABELS_FIRST)]
    for key in complete:
        assert all(row["seeds"] == 5 for row in found[key]), key
    for run in runs:
        if run["recipe"] in bench_people.RECIPES:
            flags = f"{TASTES[run['taste']].flags} {bench_people.RECIPES[run['recipe']]}"
            assert run["flags"] == flags


def test_recipes_are_command_lines():
    for taste in TASTES.values():
        for flags in bench_people.RECIPES.values():
            options.parse(f"{taste.flags} {flags}".split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "taste, recipe", [("warm", "default"), ("warm", "labels first"), ("warm", "SFT + memory")]
)
def test_a_run_is_judged_and_stands_on_the_page(tmp_path, monkeypatch, taste, recipe, no_figures):
    short = "--epochs 2 --prompts-per-epoch 4 --num-steps 3 --eval-images 2"
    small = TASTES[taste]._replace(
        flags=f"{TASTES[taste].flags} {short}", labels=(4, 8), noises=4, groups=(4, 2)
    )
    monkeypatch.setitem(TASTES, taste, small)
    job = Job(taste, recipe, 0)
    (tmp_path / job.name / "images").mkdir(parents=True)  # killed on its way
    bench_people.run(job, tmp_path)
    file = tmp_path / job.name / "quality.json"
    before = file.stat().st_mtime_ns
    rows = json.loads(file.read_text())["quality"]
    assert rows[0]["labels"] == 0 and rows[0]["kl"] == 0
    counts = [8] if recipe == "labels first" else [4, 8]
    assert [row["labels"] for row in rows[1:]] == counts
    assert all(len(row["scores"]) == 4 and row["kl"] != 0 for row in rows[1:])
    labels = tmp_path / (f"{job.name}-labels" if recipe == "labels first" else job.name)
    assert len(read_rows(labels / "labels.jsonl")) == (4 if recipe == "labels first" else 8)

    bench_people.run(job, tmp_path)  # done: nothing is done again
    assert file.stat().st_mtime_ns == before
    page = tmp_path / "people.md"
    page.write_text(f"# By hand\n{bench_people.MARK}{bench_people.MARK}also by hand\n")
    bench_people.write([job, Job(taste, recipe, 1)], tmp_path, tmp_path)
    assert f"| {taste} | {recipe} | {counts[-1]} | 1 |" in page.read_text()
    assert page.read_text().endswith("also by hand\n") and (tmp_path / "people.png").exists()
