"""compare.py end to end with tiny budgets, its resume, and the committed numbers that the README quotes."""

import json
import math
from pathlib import Path

import pytest

from toy import compare, runs

RESULTS = runs.ROOT / "toy" / "results"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick comparison, run twice: its folder, and the change times of the single runs before the second start."""
    work = tmp_path_factory.mktemp("compare")
    compare.main(["--quick", "--work", str(work)])
    first = {path: path.stat().st_mtime_ns for path in work.glob("run_*")}
    (work / "first.json").write_text((work / "compare.json").read_text())
    compare.main(["--quick", "--work", str(work)])
    return work, first


@pytest.mark.slow
def test_quick_leaves_numbers_table_and_figures(quick):
    work, _ = quick
    result = json.loads((work / "compare.json").read_text())
    assert set(result["methods"]) == set(compare.METHODS)
    for name, method in result["methods"].items():
        assert method["failed"] == 0
        assert method["curve"][-1]["labels"] == 48  # every method sees the same number of pairs
        assert math.isfinite(method["final"]["share"]["mean"])
        assert f"| {name} |" in (work / "compare.md").read_text()
    for figure in ("compare_score.png", "compare_frontier.png", "compare_samples.png"):
        assert (work / figure).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_second_start_repeats_no_run_and_tells_the_same(quick):
    work, first = quick
    assert {path: path.stat().st_mtime_ns for path in work.glob("run_*")} == first
    assert (work / "first.json").read_text() == (work / "compare.json").read_text()


@pytest.mark.parametrize("flags", [["--beta", "0"], ["--pairs", "0"], ["--num-steps", "1000"], ["--processes", "0"]])
def test_bad_input_is_refused_in_one_line(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        compare.main([*flags, "--work", str(tmp_path)])
    assert exit_.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_failed_run_never_wins_a_sweep():
    good = {"curve": [{"share": -3.0}]}
    assert compare.final_share({"curve": [{"share": 0.9}], "failed": "epoch 3: the loss is not finite any more"}) < -3
    assert compare.final_share({"curve": [{"share": math.nan}]}) < compare.final_share(good)


def test_the_readme_quotes_the_committed_tables():
    readme = Path(runs.ROOT / "README.md").read_text()
    for name in ("compare.md", "limits.md"):
        for table in (RESULTS / name).read_text().strip().split("\n\n"):
            assert table in readme, f"{name} and README.md differ: paste the table again"


def test_the_committed_comparison_is_the_one_this_code_makes():
    result = json.loads((RESULTS / "compare.json").read_text())
    assert set(result["methods"]) == set(compare.METHODS) and tuple(result["seeds"]) == compare.SEEDS
    assert compare.table(result) == (RESULTS / "compare.md").read_text()
