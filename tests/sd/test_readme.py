"""Every command, every flag and every piece of Python of README.md is one that works."""

import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sd_helpers import make_pipeline, run

import d3po
import sd_demo
from sd import options
from sd.files import ROOT
from sd.scorers import load_scorers
from toy.worlds import ALPHA_BARS

README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).splitlines()
COMMANDS = [line.partition("  #")[0].strip() for line in SHELL if line]
TEXT = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", TEXT)]


def python_with(word: str) -> str:
    (code,) = (code for code in PYTHON if word in code)
    return code


@pytest.fixture
def folder(tiny, tmp_path, no_figures, monkeypatch):
    """Where the files that the commands name are: a scorer, pairs, and two runs."""
    monkeypatch.chdir(tmp_path)
    done = run(tiny, tmp_path / "runs" / "compressibility-1", "compressibility", "--epochs 1")
    shutil.copytree(done, tmp_path / "runs" / "human-1")
    Path("mine.py").write_text(python_with("def redness"))
    for name in ("1.png", "2.png"):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(name)
    Path("pairs.csv").write_text("prompt,chosen,rejected\na cat,1.png,2.png\n")
    return tmp_path


def test_each_command_of_sd_demo_is_understood_and_so_are_the_settings_of_its_call(folder):
    commands = [line for line in COMMANDS if line.startswith("python sd_demo.py ")]
    assert len(commands) > 6
    for command in commands:
        sd_demo.main([*shlex.split(command)[2:], "--dry-run"])
    (call,) = (span for span in SPANS if span.startswith("sd_demo.run("))
    names = {"my_function": load_scorers("mine.py:redness", ["a"])[0], "pipe": make_pipeline()}
    settings = eval(call.replace("sd_demo.run", "dict"), names)
    assert sd_demo.run(**settings, dry_run=True) is None


def test_the_scorer_measures_red(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(python_with("def redness"))
    (score,) = load_scorers("mine.py:redness", ["a cat"])
    images = [Image.new("RGB", (8, 8), colour) for colour in ((200, 9, 9), (3, 200, 200))]
    assert score(images, ["a cat"] * 2) == [200, 3]


def test_each_other_program_is_there():
    for command in COMMANDS:
        program, script, *_ = command.split()
        if program == "python" and script != "sd_demo.py":
            name = script.removesuffix(".py").replace("/", ".")
            with pytest.raises(SystemExit) as stop:
                importlib.import_module(name).main(["--help"])
            assert stop.value.code == 0


def test_each_flag_exists_and_takes_what_it_is_given():
    flags = [shlex.split(span) for span in SPANS if span.startswith("--")]
    assert len(flags) > 15
    for words in flags:
        assert words[0][2:].replace("-", "_") in options.FLAGS
        if len(words) > 1:
            options.build_parser().parse_args(words)


def test_each_file_exists():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in link]
    paths = [span for span in SPANS if re.fullmatch(r"[\w/]+(\.py|/)", span)]
    assert len(links) > 8 < len(paths)
    for name in links:
        assert (ROOT / name.partition("#")[0]).exists(), name
    for name in paths:
        assert any((ROOT / part / name).exists() for part in (".", "sd", "toy")), name


def test_the_whole_method_runs_as_it_is_printed(capsys):
    code, names = python_with("chain_dpo_losses"), {}
    for long, short in (("steps=2000", "steps=50"), ("range(40)", "range(3)")):
        assert long in code
        code = code.replace(long, short)
    exec(code, names)
    assert len(re.findall(r"mean distance to \(2, 0\): \d", capsys.readouterr().out)) == 3
    assert all(weight.any() for weight in names["policy"].correction.parameters())


def test_any_function_is_a_denoiser():
    names = {"d3po": d3po, "torch": torch, "alpha_bars": ALPHA_BARS}
    names["my_network"] = lambda x, time, cond: x * time[:, None] / len(ALPHA_BARS)
    exec(python_with("def denoiser"), names)
    assert names["chains"].x.shape == (51, 16, 2)


def test_the_version_is_that_of_the_code():
    assert f"Version {d3po.__version__}" in README


def test_readme_help_and_start_up_name_the_method_in_the_same_words():
    plain = " ".join(README.replace("*", "").replace("`", "").split())
    assert options.METHOD in plain
    assert options.METHOD in " ".join(options.epilog().split())
