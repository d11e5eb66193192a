"""sd/bench_emoji.py: what is committed is what its runs are, and one command makes the page."""

import pytest

from sd import bench, bench_emoji, options
from sd.bench import CHAIN, Job


def test_every_run_is_a_command_line():
    for job in bench_emoji.JOBS:
        typed = options.as_flags(job.settings).split()
        args = options.parse([*typed, "--device", "cpu"])
        assert job.settings.items() <= {**vars(args), **job.settings}.items()
        assert args.epochs * args.prompts_per_epoch * args.images_per_prompt <= 768


def test_the_committed_page_has_the_committed_numbers():
    runs = bench.finished(bench.RESULTS / "emoji_runs.json", bench_emoji.JOBS)
    page = (bench.RESULTS / "emoji_runs.md").read_text()
    assert page.split(bench_emoji.MARK)[1] == bench_emoji.section(runs)
    for figure in [*bench_emoji.FIGURES, "frontier"]:
        assert f"(emoji_{figure}.png)" in page
        assert (bench.RESULTS / f"emoji_{figure}.png").exists()


@pytest.mark.slow
def test_a_run_makes_page_figures_and_lora(tmp_path, monkeypatch):
    tiny = {"epochs": 1, "prompts_per_epoch": 4, "images_per_prompt": 2, "num_steps": 3}
    job = Job({"name": CHAIN}, {**bench_emoji.RUNS[CHAIN], **tiny, "eval_images": 8})
    monkeypatch.setattr(bench_emoji, "JOBS", [job])
    monkeypatch.setattr(bench_emoji, "JUDGED", 8)
    figures = {"curve": (CHAIN, "reward_curve.png"), "both": (CHAIN, "progress.png")}
    monkeypatch.setattr(bench_emoji, "FIGURES", figures)
    page = tmp_path / "emoji_runs.md"
    page.write_text(f"# By hand\n{bench_emoji.MARK}{bench_emoji.MARK}also by hand\n")
    run = bench.run_job(job, bench_emoji.measure, tmp_path / "work" / job.name)
    bench.add_run(tmp_path / "emoji_runs.json", run, job.key)
    bench_emoji.write(tmp_path, tmp_path / "work")
    before, section, after = page.read_text().split(bench_emoji.MARK)
    assert (before, after) == ("# By hand\n", "also by hand\n")
    assert section == bench_emoji.section([run]) and f"| {CHAIN} |" in section
    assert [point["images"] for point in run["curve"]] == [0, 8]
    figures = {f"emoji_{figure}.png" for figure in ("frontier", "curve", "both")}
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"emoji_runs.json", "emoji_runs.md", "emoji_lora", "work", *figures}
    assert (tmp_path / "emoji_lora" / bench_emoji.LORA_FILE).exists()
