"""Runs that something happens to: another start, files that are gone or cut short, a full disk.

What was there before is there after, the user reads one sentence, and --resume goes on.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save
from sd.feedback import HumanFeedback
from sd_helpers import outcome, run
from test_sd_demo import ENVIRONMENT

import sd_demo
from sd import UserError, files, options, run_folder


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def refusal(capsys, argv: list) -> str:
    """The sentence in which sd_demo.py refuses to start."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        sd_demo.main([*map(str, argv)])
    assert stop.value.code == 2
    return capsys.readouterr().err.split("sd_demo.py: error: ")[1]


@pytest.fixture(scope="module")
def done(tiny, scorers, tmp_path_factory):
    """A finished run of two epochs."""
    return run(tiny, tmp_path_factory.mktemp("done") / "run", f"{scorers}:brightness")


# Two starts on one run

HOLD = """
import sys, time
from pathlib import Path
from sd.files import Lock
with Lock() as lock:
    lock.acquire(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(done):
    """Another process that owns the run."""
    command = [sys.executable, "-c", HOLD, str(done)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_second_start_on_a_run_is_refused_and_a_kill_ends_the_lock(done, holder, capsys):
    before = contents(done)
    for flag in ("--resume", "--evaluate"):
        message = refusal(capsys, [flag, done])
        assert message.startswith(f"{done} is at work in another process: wait for it, or stop")
    sd_demo.main(["--resume", str(done), "--dry-run"])  # which only reads
    assert contents(done) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    sd_demo.main(["--evaluate", str(done), "--eval-images", "2"])


def test_a_run_lets_go_of_its_folder_however_it_ends(done, monkeypatch):
    def interrupt(*args):
        run_folder_is_held(done)
        raise KeyboardInterrupt

    monkeypatch.setattr(sd_demo, "train", interrupt)
    for _ in range(2):
        with pytest.raises(SystemExit, match="Stopped"):
            sd_demo.main(["--resume", str(done)])
    with files.Lock() as lock:
        lock.acquire(done)


def run_folder_is_held(out: Path) -> None:
    with pytest.raises(UserError, match="at work in another process"):
        with files.Lock() as lock:
            lock.acquire(out)


def test_new_runs_hold_their_folder_and_never_share_one(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    seen = []

    def first(run, *rest):
        run_folder_is_held(run.args.out)
        seen.append(run.args.out)

    monkeypatch.setattr(sd_demo, "train", first)
    exists = Path.exists  # as another start sees it, which looks at the same moment
    monkeypatch.setattr(Path, "exists", lambda path: exists(path) and path.parent.name != "runs")
    for _ in range(2):
        sd_demo.main(["--model", str(tiny), "--objective", "compressibility"])
    assert [path.name for path in seen] == ["compressibility-1", "compressibility-2"]


def test_a_given_folder_that_another_start_made_meanwhile_is_refused(tmp_path):
    out = tmp_path / "run"
    settings = {"resume": None, "out": out, "objective": "compressibility"}
    run_folder.create_or_resume(settings)
    before = contents(out)
    with pytest.raises(ValueError, match="cannot be written .File exists.: choose another"):
        run_folder.create_or_resume(settings)
    assert contents(out) == before


# A run folder that lost something


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "copy")


def lora_file(out: Path) -> Path:
    return out / "lora" / files.LORA_FILE


EVALUATE = ["--eval-images", "2", "--evaluate"]


def result_of(out: Path) -> dict:
    sd_demo.main([*EVALUATE, str(out)])
    return files.read_json(out / "evaluation.json")


LOST = {  # what happens to the checkpoint
    "the folder is gone": lambda file: shutil.rmtree(file.parent),
    "the file is gone": lambda file: file.unlink(),
    "it is cut short": lambda file: file.write_bytes(file.read_bytes()[:2000]),
    "it is empty": lambda file: file.write_bytes(b""),
    "it is of something else": lambda file: torch.save({"epoch": 2}, file),
    "it is of another rank": lambda file: other_rank(file),
}


def other_rank(file: Path) -> None:
    state = torch.load(file)
    state["lora"] = {name: weight[..., :1] for name, weight in state["lora"].items()}
    torch.save(state, file)


@pytest.mark.slow
@pytest.mark.parametrize("what", LOST)
def test_without_its_checkpoint_a_run_is_evaluated_by_its_lora_and_not_resumed(
    done, copy, capsys, what
):
    whole = result_of(copy)
    (copy / "evaluation.json").unlink()
    LOST[what](copy / "checkpoint" / "state.pt")
    assert result_of(copy) == whole and whole["initial"] != whole["tuned"]
    assert f"this is about {lora_file(copy)}" in capsys.readouterr().out
    assert "2 epochs of D3PO" in (copy / "README.md").read_text()

    before = contents(copy)
    message = refusal(capsys, ["--resume", copy, "--epochs", "3"])
    assert str(copy) in message and "state.pt" in message and "put a copy" in message
    assert contents(copy) == before


def test_a_run_that_lost_its_lora_too_is_refused(copy, capsys):
    for gone in ("checkpoint", "lora"):
        shutil.rmtree(copy / gone)
    before = contents(copy)
    assert "trained nothing yet: there is no model" in refusal(capsys, [*EVALUATE, copy])
    assert "has lost checkpoint/state.pt" in refusal(capsys, ["--resume", copy])
    assert contents(copy) == before


def test_a_run_that_lost_its_lora_alone_is_evaluated_by_its_checkpoint(copy):
    whole = result_of(copy)
    lora_file(copy).unlink()
    (copy / "evaluation.json").unlink()
    assert result_of(copy) == whole


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_lora_that_cannot_be_read_is_named(copy, capsys, content):
    (copy / "checkpoint" / "state.pt").unlink()
    other = {"unet.a.lora_A.weight": torch.zeros(2, 2)}
    content = content if content is not None else save(other)
    lora_file(copy).write_bytes(content)
    before = contents(copy)
    message = refusal(capsys, [*EVALUATE, copy])
    assert f"{lora_file(copy)} cannot be used" in message and contents(copy) == before


def test_a_run_that_was_killed_in_its_first_epoch_is_not_lost(tiny, scorers, tmp_path, no_figures):
    whole = run(tiny, tmp_path / "whole", f"{scorers}:brightness", "--epochs 1")
    for gone in (["checkpoint/state.pt"], ["checkpoint/state.pt", f"lora/{files.LORA_FILE}"]):
        out = shutil.copytree(whole, tmp_path / f"run{len(gone)}")
        for name in gone:
            (out / name).unlink()
        sd_demo.main(["--resume", str(out)])
        assert outcome(out) == outcome(whole)


@pytest.mark.parametrize("name", ["metrics.jsonl", "latents/e001.pt"])
def test_other_files_that_are_damaged_are_named(copy, capsys, name):
    file = copy / name
    file.write_bytes(b"{not this}\n" + file.read_bytes()[20:])
    before = contents(copy)
    assert str(file) in refusal(capsys, ["--resume", copy, "--epochs", "3"])
    assert contents(copy) == before


# Images that a kill cut short


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("answer", ["none", "skipped", "judged"])
@pytest.mark.parametrize("cut", [cut_short, lambda file: file.write_bytes(b"")])
def test_an_image_cut_short_is_made_again_unless_somebody_judged_it(tmp_path, cut, answer):
    (tmp_path / "images").mkdir()
    file, image = tmp_path / "images" / "a.png", Image.effect_noise((64, 64), 50).convert("RGB")
    row = {"epoch": 1, "prompt": "a cat", "images": ["images/b.png", "images/a.png"]}
    rows = {"none": [], "skipped": [row | {"h": None}], "judged": [row | {"h": 0}]}
    files.save_lines(tmp_path / "labels.jsonl", rows[answer])
    _, args = options.parse(["--objective", "human", "--model", "none"])
    feedback = HumanFeedback(args, [], Accelerator())
    feedback.save_image(image, file)
    whole = file.read_bytes()
    cut(file)
    if answer == "judged":
        before = file.read_bytes()
        with pytest.raises(UserError, match="a.png cannot be read, and people have judged it"):
            feedback.save_image(image, file)
        assert file.read_bytes() == before
    else:
        feedback.save_image(image, file)
        assert file.read_bytes() == whole


def test_an_image_of_another_size_is_not_what_people_saw(tmp_path):
    _, args = options.parse(["--objective", "human", "--model", "none"])
    feedback, file = HumanFeedback(args, [], Accelerator()), tmp_path / "a.png"
    Image.new("RGB", (16, 16)).save(file)
    with pytest.raises(UserError, match="cannot be sampled again as people saw it"):
        feedback.save_image(Image.new("RGB", (64, 64), "white"), file)


def test_files_have_the_modes_that_the_user_asks_for(done, tiny, scorers, tmp_path):
    old = os.umask(0o027)
    try:
        out = run(tiny, tmp_path / "run", f"{scorers}:brightness", "--epochs 1")
        result_of(out)
    finally:
        os.umask(old)
    modes = {path: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o640}, modes
    assert not list(out.rglob("*.part"))
