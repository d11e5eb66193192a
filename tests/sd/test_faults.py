"""Runs that something happens to: another start, files that are gone or cut short, a full disk.

What was there before is there after, the user reads one sentence, and --resume goes on.
"""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sd_helpers import run
from test_sd_demo import ENVIRONMENT

import sd_demo
from sd import run_folder


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
from sd.run_folder import Lock
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
    with run_folder.Lock() as lock:
        lock.acquire(done)


def run_folder_is_held(out: Path) -> None:
    with pytest.raises(run_folder.RunError, match="at work in another process"):
        with run_folder.Lock() as lock:
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
