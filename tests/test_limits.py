"""limits.py end to end with tiny budgets, and what its committed numbers must say."""

import json

import pytest

from toy import limits, runs

COMMITTED = runs.ROOT / "toy" / "results" / "limits.json"


@pytest.mark.slow
def test_quick_leaves_numbers_and_tables(tmp_path):
    limits.main(["--quick", "--work", str(tmp_path)])
    result = json.loads((tmp_path / "limits.json").read_text())
    assert {row["method"] for row in result["many_labels"]} == set(limits.MANY_LABELS)
    assert limits.tables(result).count("\n| ") == len((tmp_path / "limits.md").read_text().split("\n| ")) - 1


def test_the_best_chain_of_gaussian_steps_tends_to_the_optimum_as_steps_grow():
    rows = json.loads(COMMITTED.read_text())["steps"]
    for beta in limits.BETAS:
        shares = [(r["j_gauss"] - r["j_ref"]) / (r["j_star"] - r["j_ref"]) for r in rows if r["beta"] == beta]
        assert shares == sorted(shares) and shares[-1] > 0.95


def test_training_the_references_own_weights_breaks_at_the_step_that_is_most_sensitive():
    all_weights, adapter = json.loads(COMMITTED.read_text())["blow_up"]
    sensitivity = all_weights["slope_over_sigma"]
    assert sensitivity.index(max(sensitivity)) == 18 and max(sensitivity) > 5 * sorted(sensitivity)[-2]
    assert "ended" in all_weights and "ended" not in adapter
    last = all_weights["kl_by_epoch_and_step"][-1]
    assert last.index(max(last)) == 18
