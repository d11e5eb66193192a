"""Every command and every piece of Python of README.md is one that works."""

import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import d3po
from sd import options
from sd.run import open_folder
from sd.scorers import load_scorers
from toy.worlds import ALPHA_BARS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).splitlines()
TEXT = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", TEXT)]
PROGRAM = re.compile(r"(python|accelerate|torchrun|pytest|pip|jupyter)\b")
COMMANDS = {line.partition("#")[0].strip() for line in [*SHELL, *SPANS] if PROGRAM.match(line)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the files that the commands name are: a scorer, pairs, and two runs."""
    monkeypatch.chdir(tmp_path)
    for objective in ("compressibility", "human"):
        new = {"objective": objective, "model": options.EMOJI, "out": f"runs/{objective}-1"}
        open_folder(options.make_settings(**new))
    Path("mine.py").write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
    for name in ("1.png", "2.png"):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(name)
    Path("pairs.csv").write_text("prompt,chosen,rejected\na cat,1.png,2.png\n")
    return tmp_path


def test_each_command_of_sd_demo_is_understood(folder):
    commands = [command for command in COMMANDS if "sd_demo.py" in command]
    assert len(commands) > 5
    for command in commands:
        flags = shlex.split(command.partition("sd_demo.py")[2].replace("...", ""))
        if not {"--objective", "--labels", "--evaluate", "--resume"} & set(flags):
            flags += ["--objective", "compressibility"]
        args = options.parse(flags)
        for objective in (args.objective, args.watch):
            if objective and objective not in options.PEOPLE:
                load_scorers(objective, ["a cat"])


def test_each_other_program_is_there():
    for command in COMMANDS:
        words = command.split()
        if words[0] == "python" and "sd_demo.py" not in command:
            name = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
            with pytest.raises(SystemExit) as stop:
                importlib.import_module(name).main(["--help"])
            assert stop.value.code == 0


def python_with(word: str) -> str:
    (code,) = (code for code in PYTHON if word in code)
    return code


def test_the_loop_in_the_plane_trains(capsys):
    code = python_with("d3po.chain_dpo_losses").replace("steps=2000", "steps=200")
    names = {}
    exec(code.replace("range(40)", "range(10)"), names)
    distances = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(distances) == 10 and np.mean(distances[-3:]) < np.mean(distances[:3])


def test_a_network_of_ones_own_is_sampled_from():
    names = {"d3po": d3po, "torch": torch, "alpha_bars": ALPHA_BARS}
    exec(python_with("def denoiser"), names | {"my_network": lambda x, time, cond: x}, names)
    assert names["chains"].x.shape == (51, 16, 2)


def test_a_scorer_of_ones_own_and_the_call_from_python(folder):
    names = {}
    exec(python_with("def redness"), names)
    colours = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert names["redness"](colours, ["a cat"] * 2) == [255, 0]
    (call,) = (span for span in SPANS if span.startswith("sd_demo.run("))
    names |= {"my_function": names["redness"], "pipe": None}
    args = eval(call.replace("sd_demo.run", "make_settings"), {**vars(options), **names})
    assert args.objective is names["redness"] and args.prompts == ["a cat"] and args.epochs == 4
