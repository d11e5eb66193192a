"""sd/bench_emoji.py: runs resume, and what is committed is what its commands and defaults say."""

import json

import pytest

from sd import bench, bench_emoji, options


def test_the_committed_page_has_the_committed_numbers():
    results = json.loads((bench_emoji.RESULTS / "emoji_runs.json").read_text())
    page = (bench_emoji.RESULTS / "emoji_runs.md").read_text()
    assert page.split(bench_emoji.MARK)[1] == bench_emoji.table(results)
    assert list(results) == list(bench_emoji.RUNS)
    for name, result in results.items():
        assert result["command"] == f"python sd_demo.py {bench_emoji.RUNS[name]}".strip()
    for figure in [*bench_emoji.FIGURES, "frontier"]:
        assert f"(emoji_{figure}.png)" in page
        assert (bench_emoji.RESULTS / f"emoji_{figure}.png").exists()


def test_the_committed_runs_have_the_defaults_of_today():
    results = json.loads((bench_emoji.RESULTS / "emoji_runs.json").read_text())
    _, args = options.parse(
        ["--model", str(options.EMOJI), *bench_emoji.RUNS[bench_emoji.DEFAULT].split()]
    )
    epochs = results[bench_emoji.DEFAULT]["epochs"]
    assert args.beta == 0.15 and args.reference == "initial"
    assert all(options.is_evaluated(args, row["epoch"]) for row in epochs)
    assert epochs[-1]["epoch"] == args.epochs


def test_sizes_are_compared_above_that_of_a_blank_image():
    assert bench.BLANK_KB == pytest.approx(0.69, abs=0.005)
    small, large = bench.BLANK_KB + 1, bench.BLANK_KB + 1.5
    assert bench.size_change(large, small) == pytest.approx(0.5)
    assert bench.size_change(-small, -large) == pytest.approx(-1 / 3)


@pytest.mark.slow
def test_one_command_makes_page_and_figures_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    tiny = "--epochs 1 --prompts-per-epoch 4 --images-per-prompt 2 --num-steps 3 --eval-images 8"
    name, results, work = bench_emoji.DEFAULT, tmp_path / "results", tmp_path / "work"
    results.mkdir()
    page = results / "emoji_runs.md"
    page.write_text(f"# By hand\n{bench_emoji.MARK}{bench_emoji.MARK}also by hand\n")
    changed = {
        "RESULTS": results,
        "NUM_EVALUATED": 8,
        "FRONTIER": [name],
        "RUNS": {name: f"{bench_emoji.RUNS[name]} {tiny}"},
        "FIGURES": {"curve": (name, "reward_curve.png"), "both": (name, "evaluation.png")},
    }
    for constant, value in changed.items():
        monkeypatch.setattr(bench_emoji, constant, value)
    out = bench_emoji.folder_of(work, name)
    (out / "images").mkdir(parents=True)  # killed in its first epoch
    bench_emoji.main(["--work", str(work)])

    found = json.loads((results / "emoji_runs.json").read_text())
    assert [row["epoch"] for row in found[name]["epochs"]] == [1]
    before, table, after = page.read_text().split(bench_emoji.MARK)
    assert (before, after) == ("# By hand\n", "also by hand\n")
    assert table == bench_emoji.table(found)
    figures = {f"emoji_{figure}.png" for figure in ("frontier", "curve", "both")}
    files = {path.name for path in results.iterdir()}
    assert files == {"emoji_runs.json", "emoji_runs.md", "emoji_lora", *figures}
    assert (results / "emoji_lora" / bench_emoji.LORA_FILE).exists()

    (out / "evaluation.json").unlink()  # killed before its evaluation
    trained = (out / "metrics.jsonl").read_text()
    bench_emoji.main(["--work", str(work)])
    again = json.loads((results / "emoji_runs.json").read_text())
    assert again == found
    assert (out / "metrics.jsonl").read_text() == trained  # its seconds too: not trained again
