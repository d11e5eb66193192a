"""compare.py end to end with tiny budgets, its resume, and its committed numbers."""

import json
import math

import pytest
import torch

from toy import compare, flow
from toy.compare import METHODS, RESULTS


@pytest.mark.slow
def test_quick_leaves_numbers_table_and_figures_and_a_second_start_repeats_no_run(
    tmp_path, monkeypatch
):
    """One method that knows labels, one that knows scores, a variant; processes, none, one row."""
    names = ("reward model, then DPOK", "GRPO", "GRPO, flow")
    monkeypatch.setattr(compare, "METHODS", {name: METHODS[name] for name in names})
    compare.main(["--quick", "--processes", "2", "--work", str(tmp_path)])
    result = json.loads((tmp_path / "compare.json").read_text())
    assert set(result["methods"]) == set(names)
    for name, method in result["methods"].items():
        assert method["failed"] == 0
        assert method["curve"][-1]["labels"] == 48  # every method sees the same number of pairs
        assert math.isfinite(method["final"]["share"]["mean"])
        assert f"| {name} |" in (tmp_path / "compare.md").read_text()
    for figure in ("compare_score.png", "compare_frontier.png", "compare_samples.png"):
        assert (tmp_path / figure).read_bytes().startswith(b"\x89PNG")

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("r*_*")}
    assert len(times) == 3 + 2 + 3  # references, runs of the sweep, and after it
    files = [tmp_path / f"compare{end}" for end in (".json", ".md", "_samples.png")]
    first = [path.read_bytes() for path in files]
    compare.main(["--quick", "--processes", "1", "--work", str(tmp_path)])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("r*_*")} == times
    assert [path.read_bytes() for path in files] == first

    kept = result["methods"]["GRPO"] | {"lr": 2e-3}  # as if from elsewhere
    result["methods"]["GRPO"] = kept
    (tmp_path / "compare.json").write_text(json.dumps(result))
    argv = ["--quick", "--processes", "1", "--work", str(tmp_path), "--methods", names[0]]
    compare.main(argv)
    again = json.loads((tmp_path / "compare.json").read_text())["methods"]
    assert again == result["methods"] and list(again) == list(names)
    assert (tmp_path / "compare_samples.png").read_bytes() == first[2]  # of all methods, as it was
    compare.main([*argv[:-1], "GRPO, flow"])
    variant = json.loads((tmp_path / "compare.json").read_text())["methods"]["GRPO, flow"]
    assert variant["lr"] == 2e-3 and variant["sweep"] == []  # the settings of its method
    assert variant["final"] != result["methods"]["GRPO, flow"]["final"]


def test_a_variant_changes_its_method_and_nothing_else():
    assert METHODS["GRPO, own x_T"] == METHODS["GRPO"]._replace(
        settings_of="GRPO", chains_per_x_T=1
    )
    settings = {"num_steps": 20}
    ddpm, flow_steps = compare.make_schedule(settings), flow.make_schedule(20, 1.0)
    by_model = compare.make_schedule(settings | METHODS["GRPO, flow"].world)
    assert torch.equal(by_model.sigma, flow_steps.sigma)
    quiet = compare.make_schedule(settings | METHODS["whole chain (Eq. 5), eta 0.2"].world)
    torch.testing.assert_close(quiet.sigma, 0.2 * ddpm.sigma)


@pytest.mark.parametrize(
    "flags",
    [
        "--beta 0",
        "--pairs 0",
        "--pairs 3",
        "--epochs 0",
        "--num-steps 1000",
        "--processes 0",
        "--method DDPO",
    ],
)
def test_bad_input_is_refused_in_one_sentence(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main([*flags.split(), "--work", str(tmp_path)])
    assert stop.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and flags.split()[0].strip("-")[:3] in error


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        compare.main(["--work", str(tmp_path / "file" / "work")])
    assert stop.value.code == 2 and "choose another --work" in capsys.readouterr().err


def test_a_failed_run_never_wins_a_sweep():
    good = {"curve": [{"share": -3.0}]}
    failed = {"curve": [{"share": 0.9}], "failed": "epoch 3: the loss is not finite any more"}
    assert compare.final_share(failed) < -3
    assert compare.final_share({"curve": [{"share": math.nan}]}) < compare.final_share(good)


def test_the_committed_comparison_is_the_one_this_code_makes():
    result = json.loads((RESULTS / "compare.json").read_text())
    assert set(result["methods"]) <= set(METHODS) and tuple(result["seeds"]) == compare.SEEDS
    page = (RESULTS / "compare.md").read_text()
    assert page.split(compare.MARK)[1::2] == [f"\n{table}\n" for table in compare.tables(result)]
    for figure in ("score", "frontier", "samples"):
        assert f"(compare_{figure}.png)" in page
        assert (RESULTS / f"compare_{figure}.png").exists()
    for name, method in result["methods"].items():
        tried = {(row["lr"], row["hyperparameter"]) for row in method["sweep"]}
        grid = (compare.STEP_SIZES[METHODS[name].update_every], METHODS[name].values)
        swept = METHODS[name].settings_of is None
        assert tried == {(lr, value) for lr in grid[0] for value in grid[1] if swept}
        assert list(method["hyperparameter"]) == [METHODS[name].hyperparameter]


def test_tables_are_replaced_and_the_text_around_them_stays(tmp_path):
    page, mark = tmp_path / "page.md", "<!-- mark -->\n"
    page.write_text(f"# By hand\n{mark}old\n{mark}between\n{mark}{mark}at the end\n")
    for _ in range(2):
        compare.write_tables(page, mark, ["| a |\n", "| b |\n"])
        expected = ["# By hand\n", "\n| a |\n\n", "between\n", "\n| b |\n\n", "at the end\n"]
        assert page.read_text().split(mark) == expected
    with pytest.raises(ValueError):
        compare.write_tables(page, mark, ["| a |\n"])
    assert page.read_text().split(mark) == expected

    compare.write_tables(tmp_path / "new.md", mark, ["| a |\n"])
    assert (tmp_path / "new.md").read_text() == f"{mark}\n| a |\n\n{mark}"
