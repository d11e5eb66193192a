"""sd/bench_paper.py: what a sweep chooses, what the tables count, and the committed page."""

import builtins
import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from sd import bench_paper, options, prompts
from sd.bench_paper import PANELS, Job


def job(value, method="DDPO", seed=5):
    return Job("compressibility", method, 1.5e-3, value, seed)


def ended(score, animals):
    curve = [
        {"images": 0, "score": -2.0, "animals": 0.9, "kl": 0.0},
        {"images": 32, "score": score, "animals": animals, "kl": 1.0},
    ]
    return {"curve": curve, "judged": []}


def test_a_sweep_chooses_the_best_score_of_those_that_keep_the_animals():
    sweep = {
        job(0.1): ended(-1.0, 0.5),  # the best score, and half of the animals gone
        job(0.2): ended(-1.5, 0.86),
        job(0.3): ended(-1.8, 0.9),
        job(0.4): {"curve": [], "judged": [], "failed": "not finite"},
        job(0.5, "DPOK"): ended(-1.1, 0.9),
    }
    assert bench_paper.best(sweep, "DDPO") == job(0.2)
    assert bench_paper.best({job(0.1): sweep[job(0.1)]}, "DDPO") == job(0.1)
    assert bench_paper.best({job(0.4): sweep[job(0.4)]}, "DDPO") is None
    points = bench_paper.collect(sweep)["compressibility"]["sweep"]
    assert [point["chosen"] for point in points] == [False, True, False, False, True]
    finals = bench_paper.final_jobs("incompressibility", sweep)
    chosen = [final for final in finals if final.method == "DDPO"]
    assert [final.seed for final in chosen] == [0, 1, 2, 3, 4]
    assert {final.value for final in chosen} == {0.2}  # by the sweep of compressibility


def test_a_part_that_runs_elsewhere_leaves_the_rest_and_finds_the_sweep(
    tmp_path, monkeypatch, no_figures
):
    monkeypatch.setattr(bench_paper, "RESULTS", tmp_path)
    sweep = {job(0.01): ended(-1.6, 0.9), job(0.1): ended(-1.5, 0.9)}
    bench_paper.write(bench_paper.collect(sweep), tmp_path)
    started = []

    def run(one, work, quick):
        started.append(one)
        (work / one.name).mkdir()
        (work / one.name / "result.json").write_text(json.dumps(ended(-1.9, 0.9)))
        return ended(-1.9, 0.9)

    monkeypatch.setattr(bench_paper, "run", run)
    monkeypatch.setattr(bench_paper, "ProcessPoolExecutor", lambda *_, **__: nullcontext(builtins))
    where = ["--work", str(tmp_path / "work")]
    bench_paper.main([*where, "--panels", "incompressibility", "--seeds", "1"])
    assert not {*sweep} & {*started}
    finals = [one for one in started if one.panel == "incompressibility"]
    assert [one.value for one in finals if one.method == "DDPO"] == [0.1]
    bench_paper.main([*where, "--panels", "tags", "--seeds", "1"])
    kept = json.loads((tmp_path / "paper.json").read_text())["compressibility"]["sweep"]
    assert [point["value"] for point in kept if point["method"] == "DDPO"][:2] == [0.01, 0.1]
    started.clear()
    bench_paper.main([*where, "--panels", "compressibility", "--seeds", "1"])
    assert {*sweep} <= {*started}  # who asks for a panel measures its sweep too
    started.clear()
    bench_paper.main([*where, "--panels", "compressibility", "--seeds", "1"])
    assert not started


def test_every_run_is_a_command_line_with_equally_many_images():
    for panel in PANELS:
        jobs = bench_paper.sweep_jobs(panel, quick=False) + bench_paper.final_jobs(panel, {})
        images = set()
        assert len({job.name for job in jobs}) == len(jobs)
        for one in jobs:
            _, args = options.parse(["--model", str(options.EMOJI), *one.flags.split()])
            images.add(args.epochs * args.prompts_per_epoch * args.images_per_prompt)
        assert len(images) == 1, panel


def test_failures_are_halved_at_the_first_clicks_where_the_mean_is():
    def result(*shares):
        rows = [
            {"after": 16 * n, "prompts": "animals", "score": share, "animals": 0.9, "kl": 1.0}
            for n, share in enumerate(shares)
        ]
        return {"judged": rows}

    runs = {"default": [result(0.2, 0.16, 0.08, 0.04, 0.04, 0.04), result(0.2, 0.12, 0.1)]}
    assert bench_paper.bad_shares(runs["default"])[80] == [0.04, 0.1]  # one stopped early
    page = bench_paper.tags_table(runs)
    assert (
        "| default | 2 | 20.0% | 14.0% | 9.0% | 7.0% | 7.0% | 7.0% | 32 clicks, 224 tags |" in page
    )
    assert "| Eq. 14 | 0 |" in page and "not measured yet" in page


def test_a_curve_that_stopped_early_stays_as_it_was():
    lines = [
        [{"images": 0, "score": -2.0}, {"images": 32, "score": -1.5}],
        [{"images": 0, "score": -2.1}, {"images": 32, "score": -1.6}, {"images": 64, "score": -1}],
    ]
    images, curves = bench_paper.held(lines, "score")
    assert images == [0, 32, 64]
    assert curves.tolist() == [[-2.0, -1.5, -1.5], [-2.1, -1.6, -1.0]]


def test_a_person_prefers_as_eq_3_says():
    """Of two images whose log-probabilities differ by 1, the better in logistic(1) = 73 %."""

    def run(seed):
        rows = [
            {"after": after, "prompts": "animals", "each": [value] * 4000}
            for after, value in ((0, -1.0), (1, 0.0))
        ]
        return {"judged": rows, "seed": seed}

    said = bench_paper.preferred({"default": [run(0), run(1)]})
    share = float(said["default"].partition("%")[0]) / 100
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=0.015)
    assert said["none"].startswith(f"{1 - share:.1%}")


def test_the_unseen_animals_are_a_fifth_of_the_45_and_no_others():
    seen, unseen = (prompts.load_prompts(name) for name in (bench_paper.SEEN, bench_paper.UNSEEN))
    animals = prompts.load_prompts("animals")
    assert unseen == animals[4::5] and seen == [a for a in animals if a not in unseen]


def test_the_committed_page_has_the_committed_numbers():
    content = json.loads((bench_paper.RESULTS / "paper.json").read_text())
    page = (bench_paper.RESULTS / "paper.md").read_text()
    assert page.split(bench_paper.MARK)[1] == bench_paper.page(content)
    for figure in bench_paper.FIGURES.values():
        assert (f"({figure})" in page) == (bench_paper.RESULTS / figure).exists()


@pytest.mark.slow
def test_a_run_is_judged_and_found_again(tmp_path, monkeypatch, no_figures):
    monkeypatch.setattr(bench_paper, "QUICK", f"{bench_paper.QUICK} --lora-rank 4")
    for one in (
        Job("alignment", "Reward Weighted", 5e-4, 0.3, 0),
        Job("tags", "default", 1.5e-3, None, 0),
        Job("unseen animals", "default", 1.5e-3, None, 0),
    ):
        (tmp_path / one.name / "images").mkdir(parents=True)  # killed on its way
        result = bench_paper.run(one, tmp_path, quick=True)
        names = [Path(name).stem for name in PANELS[one.panel].prompts]
        assert [row["prompts"] for row in result["judged"]] == [n for n in names for _ in (0, 1)]
        assert result["judged"][0]["kl"] == 0 != result["judged"][-1]["kl"]
        assert bench_paper.done([one], tmp_path) == {one: result}
        content = bench_paper.collect({one: result})
        bench_paper.write(content, tmp_path)
        assert f"| {one.method}" in (tmp_path / "paper.md").read_text()
