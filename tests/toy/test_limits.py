"""limits.py end to end with tiny budgets, and what its committed numbers must say."""

import json
import re
from functools import partial

import pytest

from toy import limits
from toy.compare import RESULTS


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "limits.json").read_text())


@pytest.mark.slow
def test_quick_leaves_numbers_and_tables(tmp_path, monkeypatch):
    for name in ("solve", "evaluate"):  # on a coarse grid
        function = getattr(limits.optimum, name)
        monkeypatch.setattr(limits.optimum, name, partial(function, spacing=0.2))
    limits.main(["--quick", "--processes", "1", "--work", str(tmp_path)])
    result = json.loads((tmp_path / "limits.json").read_text())
    assert [(row["beta"], row["T"]) for row in result["steps"]] == [(0.3, 5)]
    assert {row["method"] for row in result["many_labels"]} == set(limits.MANY_LABELS)
    assert [row["trains"] for row in result["blow_up"]] == ["all weights", "adapter"]
    assert [len(row["kl_by_epoch_and_step"]) for row in result["blow_up"]] == [3, 3]
    assert_has_tables_of(tmp_path / "limits.md", result)


def assert_has_tables_of(page, result):
    """Equal texts, and numbers equal but for rounding twice: to 5 digits, then to print."""
    a = page.read_text().split(limits.MARK)[1::2]
    b = [f"\n{table}\n" for table in limits.tables(result)]
    a, b = limits.MARK.join(a), limits.MARK.join(b)
    number = r"-?\d+(?:\.\d+)?"
    assert re.sub(number, "#", a) == re.sub(number, "#", b)
    left, right = (list(map(float, re.findall(number, text))) for text in (a, b))
    assert left == pytest.approx(right, rel=1e-5, abs=1.1e-3)


def test_the_committed_tables_are_those_of_the_committed_numbers(committed):
    assert_has_tables_of(RESULTS / "limits.md", committed)


def test_the_best_chain_of_gaussian_steps_tends_to_the_optimum_as_steps_grow(committed):
    for beta in limits.BETAS:
        rows = [row for row in committed["steps"] if row["beta"] == beta]
        assert [row["T"] for row in rows] == list(limits.STEPS)
        shares = [(r["j_gauss"] - r["j_ref"]) / (r["j_star"] - r["j_ref"]) for r in rows]
        assert shares == sorted(shares) and shares[-1] > 0.95


def test_training_the_references_own_weights_breaks_at_the_most_sensitive_step(committed):
    all_weights, adapter = committed["blow_up"]
    sensitivity = all_weights["slope_over_sigma"]
    assert sensitivity.index(max(sensitivity)) == 18
    assert max(sensitivity) > 5 * sorted(sensitivity)[-2]
    assert "ended" in all_weights and "ended" not in adapter
    last = all_weights["kl_by_epoch_and_step"][-1]
    assert last.index(max(last)) == 18
