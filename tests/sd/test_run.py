"""sd/run.py: the folder of a run, and runs that something happens to.

What was there before is there after, the user reads one sentence, and --resume goes on.
"""

import errno
import io
import os
import re
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from sd_helpers import FLAGS, Loaded, outcome, parse, read_rows, run, start_python

import d3po
import sd_demo
from sd import UserError, figures, files, report
from sd.files import ROOT
from sd.run import (
    drop_unfinished,
    image_files,
    labels_of_epoch,
    make_folder,
    memory_gb,
    open_folder,
)

EMOJI = ROOT / "toy" / "emoji_sd"

# The plan


@pytest.mark.parametrize(
    "objective, K, labels",
    [("compressibility", 7, 42), ("tags", 7, 2), ("human", 2, 2), ("human", 4, 8)],
)
def test_labels_of_an_epoch_are_all_pairs_of_a_group_or_what_people_are_asked(objective, K, labels):
    assert labels_of_epoch(parse(EMOJI, images_per_prompt=K, objective=objective)) == labels


def test_memory_is_that_of_weights_adam_and_what_autograd_holds(tiny):
    loaded = Loaded(tiny)
    model, args = loaded.model, replace(loaded.args, gradient_checkpointing=True)
    parts = (model.network, model.pipe.vae)
    weights = sum(p.nbytes for part in parts for p in part.parameters())
    weights += 3 * 4 * sum(weight.numel() for weight in model.lora)
    held = 1e9 * memory_gb(model, args) - weights
    first_map = 16 * 16 * 16 * 4  # bytes of 16 channels
    assert held == pytest.approx(90 * first_map * (2 * 2 * 2))  # two groups of two, with guidance
    one = 1e9 * memory_gb(model, replace(args, batch_size=1)) - weights
    assert one == pytest.approx(held / 2)
    assert 1e9 * memory_gb(model, loaded.args) > weights + 4 * held


def test_a_dry_run_prints_the_plan_and_writes_nothing(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = "--objective compressibility --recipe paper --out run --dry-run".split()
    sd_demo.main(["--model", str(tiny), *flags])
    text = capsys.readouterr().out
    for part in (
        "on cpu, as there is no CUDA GPU; fp32; LoRA rank 16",
        "Objective compressibility. An epoch: 160 images in 80 groups, 80 labels.",
        "Its beta: 9.77e-05 per nat of a log-ratio summed over 1,024 latent elements (0.1 for",
        "Memory: about ",
    ):
        assert part in text
    assert not list(tmp_path.iterdir())


# A folder


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def new_run(tmp_path, monkeypatch):
    """Opens the folder of a run, from an empty folder."""
    monkeypatch.chdir(tmp_path)
    settings = parse(EMOJI)
    return lambda **changes: open_folder(replace(settings, **changes))


def test_a_new_run_has_a_config_and_empty_tables(new_run):
    out = new_run(out=Path("some/where"), beta=0.3)
    config = files.read_json(out / "config.json")
    assert out == Path("some/where") and config["beta"] == 0.3 and config["out"] == "some/where"
    assert config["versions"]["torch"] == torch.__version__ and "git_revision" in config
    assert config["versions"]["d3po"] == d3po.__version__
    for name in ("metrics.jsonl", "labels.jsonl"):
        assert (out / name).read_bytes() == b""
    assert all((out / name).is_dir() for name in ("images", "latents", "lora", "checkpoint"))
    before = contents(out)
    with pytest.raises(UserError, match="^--out some/where cannot be written .File exists"):
        new_run(out=out)  # which another start made meanwhile
    assert contents(out) == before


def test_the_default_folder_is_named_after_the_objective(new_run):
    for objective in ("compressibility", "a/scorers.py:same", "a/scorers.py:same"):
        make_folder(None, objective)
    names = ["compressibility-1", "scorers-py-same-1", "scorers-py-same-2"]
    assert sorted(path.name for path in Path("runs").iterdir()) == names


def test_without_git_the_revision_is_unknown(new_run, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert files.read_json(new_run(out=Path("run")) / "config.json")["git_revision"] is None


def test_a_resumed_run_keeps_what_it_has_and_gets_what_a_kill_left_out(new_run, tmp_path):
    files.save_json(tmp_path / "config.json", {"seed": 7})
    files.append(tmp_path / "labels.jsonl", [{"epoch": 1}])
    assert new_run(resume=tmp_path) == tmp_path
    assert files.read_json(tmp_path / "config.json") == {"seed": 7}
    assert read_rows(tmp_path / "labels.jsonl") == [{"epoch": 1}]
    assert (tmp_path / "metrics.jsonl").exists() and (tmp_path / "images").is_dir()


@pytest.mark.parametrize("below", ["run", "deep/run"])
def test_a_folder_that_cannot_be_made_is_refused_in_a_sentence(new_run, below):
    Path("file").write_text("")
    with pytest.raises(UserError, match="^--out file.* cannot be written .* choose another"):
        new_run(out=Path("file") / below)


@pytest.mark.parametrize("keep_labels", [False, True])
def test_an_unfinished_epoch_is_dropped_but_not_what_people_answered(tmp_path, keep_labels):
    for name in ("metrics.jsonl", "labels.jsonl"):
        files.append(tmp_path / name, [{"epoch": 1}, {"epoch": 2}])
    drop_unfinished(tmp_path, 1, keep_labels=keep_labels)
    assert read_rows(tmp_path / "metrics.jsonl") == [{"epoch": 1}]
    assert len(read_rows(tmp_path / "labels.jsonl")) == 1 + keep_labels


def test_images_are_named_by_epoch_group_and_number():
    names = ["images/e003_p08_k0.png", "images/e003_p08_k1.png", "images/e003_p09_k0.png"]
    assert image_files(3, range(8, 10), 2)[:3] == names


# Runs


@pytest.fixture
def undrawn(monkeypatch, no_figures):
    monkeypatch.setattr(figures, "draw_pairs", lambda *args: None)


@pytest.fixture(scope="module")
def first(tiny, scorers, tmp_path_factory):
    """A run of one epoch."""
    out, flags = tmp_path_factory.mktemp("first") / "run", "--replay 1 --average-weights --epochs 1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_run", lambda run: None)
        return run(tiny, out, f"{scorers}:brightness", flags)


@pytest.fixture(scope="module")
def done(first, tmp_path_factory):
    """The same, with a second epoch."""
    out = shutil.copytree(first, tmp_path_factory.mktemp("done") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "draw_run", lambda run: None)
        return sd_demo.run(resume=out, epochs=2)


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done, tmp_path / "copy")


def evaluation_of(out: Path) -> dict:
    sd_demo.run(evaluate=out, eval_images=2)
    return files.read_json(out / "evaluation.json")


def refusal(**settings) -> str:
    with pytest.raises(UserError) as error:
        sd_demo.run(**settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# Every write of a run


class Writes:
    """What happens to the files below a folder, by the audit events of Python.

    torch and safetensors write by themselves, without an event: what they write must have been
    renamed, and not be touched after that.
    """

    def __init__(self):
        self.folder, self.renamed, self.others = None, {}, []

    def audit(self, event: str, args: tuple) -> None:
        if self.folder and isinstance(args[0] if args else None, str | os.PathLike):
            path = Path(os.path.abspath(args[0]))
            if path.is_relative_to(self.folder) and not self.is_fine(event, path, *args[1:]):
                self.others.append((event, path.name, *args[1:]))

    def is_fine(self, event: str, path: Path, *args) -> bool:
        is_part, is_table = path.suffix == ".part", path.suffix == ".jsonl"
        if event == "open":
            mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            appends = is_table and not flags & os.O_TRUNC
            return not writes or is_part or appends or path.name == ".lock"
        if event == "os.rename":
            status, new = path.stat(), Path(os.path.abspath(args[0]))
            self.renamed[new] = status.st_ino, status.st_mtime_ns
            return path.name == f"{new.name}.part"
        if event == "os.remove":  # trajectories of an epoch that is done
            return is_part or re.fullmatch(r"e\d+_p\d+\.pt", path.name) is not None
        if event == "os.utime":
            return is_part or is_table
        if event in ("os.chmod", "os.truncate", "os.link", "os.symlink", "os.rmdir"):
            return is_part
        return True

    def of_libraries(self) -> list[Path]:
        """Files that something wrote in their place."""
        return [
            path
            for path in self.folder.rglob("*")
            if path.is_file() and path.suffix != ".jsonl" and path.name != ".lock"
            if (path.stat().st_ino, path.stat().st_mtime_ns) != self.renamed.get(path)
        ]


WRITES = Writes()
sys.addaudithook(WRITES.audit)  # for good; it does nothing without a folder


@pytest.fixture
def writes(tmp_path):
    WRITES.folder, WRITES.renamed, WRITES.others = tmp_path / "run", {}, []
    yield WRITES
    WRITES.folder = None


def test_all_that_a_run_writes_gets_its_name_when_it_is_whole(tiny, scorers, writes):
    """A new run, one that goes on, and its evaluation, with all figures."""
    flags = "--replay 1 --average-weights --max-kl 1e6 --epochs 1 --batch-size 1 --num-steps 2"
    out = run(tiny, writes.folder, f"{scorers}:brightness", flags)
    sd_demo.run(resume=out, epochs=2)
    sd_demo.run(evaluate=out, eval_images=2)
    names = {"config.json", "state.pt", files.LORA_FILE, "e002.pt", "e002_p00_k0.png"}
    names |= {"reward_curve.png", "evaluation.png", "README.md", "report.html", "evaluation.json"}
    assert names <= {path.name for path in writes.renamed}
    assert writes.others == [] and writes.of_libraries() == []


def test_the_watch_on_writes_sees_others(writes):
    writes.folder.mkdir()
    file = writes.folder / "a.pt"
    files.save_tensors(file, {})
    assert writes.others == [] and writes.of_libraries() == []
    torch.save({"n": 1}, file)
    assert writes.others == [] and writes.of_libraries() == [file]
    (writes.folder / "rows.jsonl").write_text("")
    (writes.folder / "b.json").touch()
    assert {name for _, name, *_ in writes.others} == {"rows.jsonl", "b.json"}


FAILS = [("state.pt", 2), (files.LORA_FILE, 2), ("e002.pt", 2), ("evaluation.json", None)]
FAILS.append(("e002_p01_k1.png", 2))  # written beside the training


@pytest.mark.slow
@pytest.mark.parametrize("name, epochs", FAILS)
def test_where_a_write_fails_the_run_keeps_what_it_had_and_goes_on(
    first, done, tmp_path, monkeypatch, undrawn, name, epochs
):
    """The second epoch, or the evaluation, without room for one of its files."""
    out = shutil.copytree(first if epochs else done, tmp_path / "run")
    command = {"resume": out, "epochs": epochs} if epochs else {"evaluate": out, "eval_images": 2}
    before, rename = contents(out), os.replace

    def fail(part, path):
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        rename(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        message = refusal(**command)
    assert f"{name} cannot be written (No space left on device)" in message
    verb = "--resume" if epochs else "--evaluate"
    assert message.endswith(f"Go on with: python sd_demo.py {verb} {out}")
    for path, content in before.items():
        if re.match("e001|state|held_out_e000", path.name) or name == "evaluation.json":
            assert path.read_bytes() == content, path
    assert not list(out.rglob("*.part"))
    sd_demo.run(**command)
    assert outcome(out) == outcome(done)
    if epochs:
        assert {path.relative_to(out) for path in contents(out)} == {
            path.relative_to(done) for path in contents(done)
        }


@pytest.mark.parametrize("room, name", [(figures, "draw_run"), (report, "write")])
def test_figures_and_report_come_after_the_checkpoint_and_may_fail(
    first, done, tmp_path, monkeypatch, capsys, undrawn, room, name
):
    out = shutil.copytree(first, tmp_path / "run")

    def fail(folder, *rest):
        assert torch.load(folder / "checkpoint" / "state.pt")["epoch"] == 2
        raise UserError("reward_curve.png cannot be written")

    monkeypatch.setattr(room, name, fail)
    sd_demo.run(resume=out, epochs=2)
    assert "WARNING: the figures or the report could not be written" in capsys.readouterr().out
    assert outcome(out) == outcome(done)


# Text that a console, or the encoding of files, does not have


@pytest.mark.slow
def test_text_is_utf8_whatever_the_encoding_of_console_and_files(tiny, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("一只猫\nein Kätzchen\n", "utf-8")
    command = ["--model", tiny, "--prompts", prompts, "--objective", "compressibility"]
    command += [*FLAGS.split(), "--epochs", "1", "--out", tmp_path / "run"]
    output = start_python(
        [ROOT / "sd_demo.py", *command],
        tmp_path,
        PYTHONUTF8="0",
        LC_ALL="C",
        PYTHONCOERCECLOCALE="0",
        PYTHONIOENCODING="cp1252",
    )
    assert "first: ???" in output and "WARNING" not in output
    for name in ("README.md", "report.html"):
        assert "一只猫" in (tmp_path / "run" / name).read_text("utf-8"), name


def test_a_console_gets_what_it_can_show(tiny, tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_text("一只猫", "utf-8")
    console = {name: io.TextIOWrapper(io.BytesIO(), "cp1252") for name in ("stdout", "stderr")}
    for name, stream in console.items():
        monkeypatch.setattr(sys, name, stream)
    start = ["--model", str(tiny), "--objective", "compressibility", "--dry-run"]
    sd_demo.main([*start, "--prompts", str(tmp_path / "p.txt")])
    print("猫", file=sys.stderr)
    for stream, text in zip(console.values(), (b"first: ???", b"?"), strict=True):
        stream.flush()
        assert text in stream.buffer.getvalue()


# One start at a time


def test_a_second_start_on_a_run_is_refused_and_changes_nothing(done, capsys):
    before = contents(done)
    with files.Lock() as lock:
        lock.acquire(done)
        for command in ("resume", "evaluate"):
            assert refusal(**{command: done}).startswith(f"{done} is in use by another process")
        sd_demo.run(resume=done, dry_run=True)  # which only reads
    assert contents(done) == before


@pytest.mark.parametrize("earlier, stop", [(True, signal.SIGINT), (False, signal.SIGTERM)])
def test_a_run_holds_its_folder_and_lets_go_of_it_when_it_is_stopped(
    copy, tiny, tmp_path, monkeypatch, earlier, stop
):
    out = copy if earlier else tmp_path / "new"

    def train(run):
        with pytest.raises(UserError, match="in use by another process"), files.Lock() as lock:
            lock.acquire(out)
        signal.raise_signal(stop)
        yield

    monkeypatch.setattr(sd_demo, "train", train)
    before, new = signal.getsignal(signal.SIGTERM), ["--objective", "compressibility"]
    argv = ["--resume", out] if earlier else ["--model", tiny, *new, *FLAGS.split(), "--out", out]
    kept = "keeps the model of the last good epoch" if earlier else "has no model yet"
    try:
        with pytest.raises(SystemExit) as end:
            sd_demo.main([*map(str, argv)])
    finally:
        signal.signal(signal.SIGTERM, before)
    go_on = f"Go on with: python sd_demo.py --resume {out}"
    assert end.value.code == f"sd_demo.py: Stopped. {out} {kept}. {go_on}"
    with files.Lock() as lock:
        lock.acquire(out)


# A run folder that lost something


def lora_file(out: Path) -> Path:
    return out / "lora" / files.LORA_FILE


def other_rank(file: Path) -> None:
    state = torch.load(file)
    state["lora"] = {name: weight[..., :1] for name, weight in state["lora"].items()}
    torch.save(state, file)


LOST = {  # what happens to the checkpoint
    "gone with its folder": lambda file: shutil.rmtree(file.parent),
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:2000]),
    "of another rank": other_rank,
}


@pytest.mark.slow
def test_without_its_checkpoint_a_run_is_evaluated_by_its_lora_and_not_resumed(
    done, tmp_path, capsys, undrawn
):
    whole = evaluation_of(shutil.copytree(done, tmp_path / "whole"))
    assert whole["initial"] != whole["tuned"]
    for what, damage in LOST.items():
        out = shutil.copytree(done, tmp_path / what)
        damage(out / "checkpoint" / "state.pt")
        assert evaluation_of(out) == whole
        assert f"this is about {lora_file(out)}" in capsys.readouterr().out
        assert "2 epochs" in (out / "README.md").read_text("utf-8")
        before = contents(out)
        message = refusal(resume=out, epochs=3)
        assert str(out) in message and "state.pt" in message and "restore a copy" in message
        assert contents(out) == before


def test_a_run_that_lost_its_lora_too_is_refused(copy):
    for gone in ("checkpoint", "lora"):
        shutil.rmtree(copy / gone)
    before = contents(copy)
    assert "trained nothing yet: there is no model" in refusal(evaluate=copy)
    assert "has lost checkpoint/state.pt" in refusal(resume=copy)
    assert contents(copy) == before


@pytest.mark.parametrize("content", [b"junk", save({"unet.a.lora_A.weight": torch.ones(2)})])
def test_a_lora_that_cannot_be_read_is_named(copy, content):
    (copy / "checkpoint" / "state.pt").unlink()
    lora_file(copy).write_bytes(content)
    before = contents(copy)
    assert f"{lora_file(copy)} cannot be used" in refusal(evaluate=copy)
    assert contents(copy) == before


def test_a_run_that_was_killed_before_its_first_checkpoint_is_not_lost(first, tmp_path, undrawn):
    out = shutil.copytree(first, tmp_path / "run")
    (out / "checkpoint" / "state.pt").unlink()
    sd_demo.run(resume=out)
    assert outcome(out) == outcome(first)


@pytest.mark.parametrize("name", ["metrics.jsonl", "latents/e001.pt"])
def test_other_files_that_are_damaged_are_named(copy, name):
    file = copy / name
    file.write_bytes(b"{not this}\n" + file.read_bytes()[20:])
    before = contents(copy)
    assert str(file) in refusal(resume=copy, epochs=3)
    assert contents(copy) == before
