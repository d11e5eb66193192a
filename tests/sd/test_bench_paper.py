"""sd/bench_paper.py and its sweep: what is counted, compared and chosen, and the committed page."""

from pathlib import Path

import numpy as np
import pytest

from sd import bench, bench_paper, bench_sweep, options, prompts
from sd.bench import CHAIN
from sd.bench_paper import PANELS, SEEDS, TUNED, make_jobs, rows_per_image


def result(curve, after, before=None, **key):
    """A run: scores by images sampled, and what its end and its start are."""
    judged = {"prompts": "animals", "animals": 1.0, "log_prob": -0.1, "kl": 1.0, "score": -2.0}
    points = [{"images": n, "score": s, "animals": 1.0, "kl": 0.0} for n, s in curve.items()]
    rows = [judged | {"after": 0} | (before or {}), judged | {"after": 1} | after]
    return {"curve": points, "judged": rows, **key}


def test_rows_are_counted_from_the_settings():
    base = {"num_steps": 10, "skip_last": 2, "prompts_per_epoch": 4, "images_per_prompt": 8}
    plain = {**base, "batch_size": 4, "replay": 0, "lr": 1e-3, "beta": 0.1}
    assert rows_per_image({**plain, "loss": "eq14"}) == 10 + 10 + 3 * 8
    assert rows_per_image({**plain, "loss": "eq14", "reference": "previous"}) == 10 + 3 * 8
    assert rows_per_image({**plain, "loss": "ddpo", "clip": 0.1}) == 10 + 3 * 8
    assert rows_per_image({**plain, "loss": "dpok"}) == 10 + 8 + 3 * 8
    assert rows_per_image({**plain, "loss": "sft", "beta": 0}) == 10 + 3 * 8 * 7 / 8
    chain = {**base, "batch_size": 1, "loss": "chain", "lr": 1e-3, "beta": 0.1}
    assert rows_per_image({**chain, "replay": 0}) == 10 + 10 + 8 + 3 * 8
    assert rows_per_image({**chain, "replay": 4}) == 10 + 2 * (10 + 8 + 3 * 8)  # as many again


def test_methods_are_compared_at_equal_images_and_equal_rows():
    name = "compressibility"
    line = {0: -2.0, 128: -1.8, 256: -1.7, 384: -1.6}
    runs = {method: [] for method in PANELS[name].methods}
    runs[CHAIN] = [result(line, {}), result({0: -2.0, 128: -1.6}, {})]  # the second stopped early
    _, _, *lines = bench_paper.curve_table(name, runs).strip().splitlines()
    cells = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert cells[0] == CHAIN
    assert [cell.split()[0] for cell in cells[2:5]] == ["-1.700", "-1.650", "-1.600"]
    per_image = {m: rows_per_image(bench_paper.settings_of(name, m)) for m in runs}
    share = min(per_image.values()) / per_image[CHAIN]
    at_rows = np.interp(384 * share, [*line], [*line.values()])
    other = np.interp(384 * share, [0, 128], [-2.0, -1.6])
    assert float(cells[5].split()[0]) == pytest.approx((at_rows + other) / 2, abs=6e-4)


def test_the_best_keeps_the_animals_and_scores_are_seen_apart():
    runs = {
        CHAIN: [result({0: -2.0}, {"score": -1.8, "animals": 0.98})],
        TUNED: [result({0: -2.0}, {"score": -1.5, "animals": 0.96})],  # too few animals
        "DPOK": [result({0: -2.0}, {"score": -1.7, "animals": 0.99})],
    }
    said = bench_paper.best(runs)
    assert "97% of the animals: DPOK" in said and "pairs alone: whole chain." in said


def test_every_run_is_a_call_and_methods_sample_equally_many_images():
    for panel in PANELS:
        jobs, images = make_jobs([panel], SEEDS), {}
        assert len({job.name for job in jobs}) == len(jobs)
        for job in jobs:
            given = {"objective": "tags"} if panel == "tags" else {}
            args = options.make_settings(**job.settings, **given, device="cpu")
            count = args.epochs * args.prompts_per_epoch * args.images_per_prompt
            images[job.key["method"]] = count
            assert count == bench_paper.images_of(panel, job.key["method"])
            assert {n % (args.eval_every * 32) for n in PANELS[panel].counts} <= {0}
        if PANELS[panel].settings.get("num_steps") == 3:  # Table 1: the whole chain has a quarter
            assert images.pop(CHAIN) == 320
        assert len(set(images.values())) == 1, panel


def test_a_person_prefers_as_eq_3_says():
    """Of two images whose log-probabilities differ by 1, the better in logistic(1) = 73 %."""
    run = result({0: 0.0}, {"each": [0.0] * 4000}, before={"each": [-1.0] * 4000})
    shares = bench_paper.preferred({CHAIN: [run, run]})
    share = float(shares[CHAIN].partition("%")[0]) / 100
    assert share == pytest.approx(1 / (1 + np.exp(-1)), abs=0.015)
    assert shares["none"].startswith(f"{1 - share:.1%}")


def test_bad_images_have_a_row_for_each_number_of_clicks():
    runs = {CHAIN: [result({}, {"score": score, "after": 16}) for score in (0.1, 0.3)]}
    *_, last = bench_paper.tags_table(runs).strip().splitlines()
    assert last == f"| {CHAIN} | 2 | 16 | 112 | 20.0% | 30.0% | 100.0% |"
    assert "Not measured yet" in bench_paper.tags_table({CHAIN: []})


def test_the_unseen_animals_are_a_fifth_of_the_45_and_no_others():
    seen, unseen = (prompts.load_prompts(name) for name in (bench_paper.SEEN, bench_paper.UNSEEN))
    animals = prompts.load_prompts("animals")
    assert unseen == animals[4::5] and seen == [a for a in animals if a not in unseen]


def sweep_runs(lr, beta, gains, *, animals=1.0):
    """Of a point: every task and seed; gains: of the tasks."""
    runs = []
    for task, gain in zip(bench_sweep.TASKS, gains, strict=True):
        for seed in bench_sweep.SEEDS:
            end = {"score": -2.0 + gain, "animals": animals if task == "warm" else 1.0}
            point = {"lr": lr, "beta": beta, "replay": 4, "warm_up": 3}
            runs.append(result({}, end, task=task, seed=seed, **point))
    return runs


def test_the_sweep_chooses_by_all_tasks_together_and_keeps_the_animals_in_each():
    points = bench_sweep.summary(
        sweep_runs(1e-3, 0.1, (0.4, 0.1, 1, 1, 1))
        + sweep_runs(1e-3, 0.2, (0.2, 0.4, 1, 1, 1))
        + sweep_runs(5e-3, 0.1, (9, 9, 9, 9, 9), animals=0.96)
        + sweep_runs(5e-3, 0.2, (9, 9, 9, 9, 9))[1:]  # not complete
    )
    scores = bench_sweep.scores(points)
    assert len(points) == 4 and len(scores) == 3
    expected = np.mean([0.2 / 9, 0.4 / 9, *[1 / 9] * 3])
    assert scores[1e-3, 0.2, 4, 3] == pytest.approx(expected)
    assert bench_sweep.best(points) == (1e-3, 0.2, 4, 3)
    page = bench_sweep.page(points)
    assert page.count("| x |") == len(bench_sweep.TASKS)
    assert "| 0.005 | 0.1 | 4 | 3 | warm | +9.000 | 96.0% | 1.0 | 2 | 1.00 |" in page


def test_a_point_that_loses_animals_in_one_run_is_dropped():
    runs = sweep_runs(1e-3, 0.1, [1] * 5, animals=0.96) + sweep_runs(
        5e-3, 0.1, [1] * 5, animals=0.94
    )
    assert not bench_sweep.dropped({"lr": 1e-3, "beta": 0.1}, runs)
    assert bench_sweep.dropped({"lr": 5e-3, "beta": 0.1}, runs)
    assert not bench_sweep.dropped({"lr": 5e-3, "beta": 0.3}, runs)


def test_every_point_of_the_sweep_is_a_call():
    around = [bench_sweep.GRID[0] | values for values in bench_sweep.AROUND]
    for point in (*bench_sweep.GRID, *around):
        for task in bench_sweep.TASKS:
            job = bench_sweep.job_at(point, task, 5)
            person = {"objective": "human"} if task in bench_sweep.PEOPLE else {}
            args = options.make_settings(**job.settings, **person, device="cpu")
            assert (args.loss, args.eval_every) == ("chain", 1)
            assert point.items() <= vars(args).items()


def test_the_committed_page_has_the_committed_numbers():
    page = (bench.RESULTS / "paper.md").read_text()
    runs = bench.finished(bench.RESULTS / "paper.json", make_jobs([*PANELS], SEEDS))
    assert page.split(bench_paper.MARK)[1] == bench_paper.page(runs)
    points = bench_sweep.summary(bench_sweep.runs_that_ended())
    assert page.split(bench_sweep.MARK)[1] == bench_sweep.page(points)
    for figure in bench_paper.FIGURES:
        assert (f"({figure})" in page) <= (bench.RESULTS / figure).exists()


@pytest.mark.slow
def test_a_run_is_judged_and_stands_on_the_page(tmp_path, monkeypatch, no_figures):
    monkeypatch.setitem(bench_paper.QUICK, "lora_rank", 4)
    chosen, runs = [("alignment", "Reward Weighted"), ("unseen animals", CHAIN)], []
    for job in make_jobs(["alignment", "unseen animals"], 1, quick=True):
        if (job.key["panel"], job.key["method"]) in chosen:
            run = bench_paper.measure(job, tmp_path / job.name, quick=True)
            panel = PANELS[job.key["panel"]]
            names = [Path(name).stem for name in panel.prompts for _ in range(2)]
            assert [row["prompts"] for row in run["judged"]] == names
            assert all(("each" in row) == panel.compared for row in run["judged"])
            assert run["judged"][0]["kl"] == 0 != run["judged"][-1]["kl"]
            runs.append({**run, **job.key})
    page = bench_paper.page(runs)
    assert "| Reward Weighted | 1 | 32 |" in page
    assert all(f"| {CHAIN} | {name} | 1 | 32 |" in page for name in ("seen_36", "unseen_9"))
