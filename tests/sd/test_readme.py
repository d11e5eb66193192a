"""Every command and every piece of Python of README.md is one that works."""

import copy
import importlib
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from sd_helpers import run

import d3po
import sd_demo
from sd.label_files import read_label_file
from toy import ddpm
from toy.worlds import ALPHA_BARS

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).splitlines()
TEXT = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
SPANS = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", TEXT)]
PROGRAM = re.compile(r"(python|accelerate|torchrun|pytest|pip|jupyter)\b")
COMMANDS = {line.partition("#")[0].strip() for line in [*SHELL, *SPANS] if PROGRAM.match(line)}


def test_there_are_commands_of_each_kind():
    starts = {" ".join(command.split()[:2]).partition(" --")[0] for command in COMMANDS}
    assert starts >= {"python sd_demo.py", "python toy/train_toy.py", "python -m", "torchrun"}


@pytest.fixture
def folder(tiny, scorers, tmp_path, no_figures, monkeypatch):
    """Where the files that the commands name are: a scorer, pairs, and two runs."""
    monkeypatch.chdir(tmp_path)
    done = run(tiny, tmp_path / "runs" / "compressibility-1", "compressibility")
    shutil.copytree(done, tmp_path / "runs" / "human-1")
    Path("mine.py").write_text("def score(images, prompts):\n    return [1.0] * len(images)\n")
    for name in ("1.png", "2.png"):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(name)
    Path("pairs.csv").write_text("prompt,chosen,rejected\na cat,1.png,2.png\n")
    return tmp_path


def test_each_command_of_sd_demo_is_understood(folder):
    commands = [command for command in COMMANDS if "sd_demo.py" in command]
    assert len(commands) > 8
    for command in commands:
        flags = shlex.split(command.partition("sd_demo.py")[2].replace("...", ""))
        if not {"--objective", "--labels", "--evaluate", "--resume"} & set(flags):
            flags += ["--objective", "compressibility"]
        sd_demo.main([*flags, "--dry-run"])


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


def test_eq_14_is_one_line():
    names = {"F": F}
    exec(f"def loss(beta, log_ratio_w, log_ratio_l):\n    {python_with('F.logsigmoid')}", names)
    ratios = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(names["loss"](0.3, *ratios), d3po.d3po_loss(*ratios, 0.3))


def test_training_takes_one_update_a_step():
    policy, schedule = ddpm.MLP(1.0), d3po.make_schedule(ALPHA_BARS, 5)
    before, steps = copy.deepcopy(policy), []
    optimizer = torch.optim.SGD(policy.parameters(), 0.01)
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    names = {"d3po": d3po, "policy": policy, "reference": before, "optimizer": optimizer}
    names |= {"schedule": schedule, "x_T": torch.randn(8, 2), "beta": 0.1}
    exec(python_with("d3po.rollout"), names | {"score_a": torch.ones(8), "score_b": torch.zeros(8)})
    vectors = (torch.nn.utils.parameters_to_vector(net.parameters()) for net in (policy, before))
    assert len(steps) == 5 and not torch.equal(*vectors)


def test_the_converter_writes_a_label_file(folder):
    votes = ("a cat;1.png;2.png;left", "a dog;2.png;1.png;right", "a cow;1.png;2.png;tie")
    Path("votes.txt").write_text("\n".join(votes))
    exec(python_with("votes.txt"), {})
    found = read_label_file(Path("pairs.jsonl"))
    images = {group.prompt: [image.name for image in group.images] for group in found.groups}
    assert images == {"a cat": ["1.png", "2.png"], "a dog": ["1.png", "2.png"]}  # the winner first
    assert [group.pairs for group in found.groups] == [[(0, 1)]] * 2 and found.ties == 1


def test_the_version_is_that_of_the_code():
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    citation = yaml.safe_load(block)
    assert citation["version"] == d3po.__version__ and citation["cff-version"] == "1.2.0"
    assert f"Version {d3po.__version__}" in README
    assert {"message", "title", "authors"} <= citation.keys()
