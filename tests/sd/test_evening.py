"""One evening with people, from the command to a LoRA that loads: the emoji model in Chromium."""

import io
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sd_helpers import typed
from test_annotate import (  # noqa: F401, browser is a fixture
    Page,
    browser,
    free_port,
    is_serving,
    open_tab,
    read_rows,
    request,
    until,
)
from test_human_run import WAIT, kill, lora_of, start  # noqa: F401, the fixture

import sd_demo
from sd import annotate
from sd.files import read_lines, save_lines
from sd.labels import majority, read_labels

FLAGS = "--objective human --eval-images 2 --num-steps 4 --replay 1 --seed 0 --device cpu"
QUESTIONS, KILLED_AFTER, TRAINED_AFTER, FINISHED_AFTER = 8, 3, 6, 2  # in epochs 1, 1 and 3


def warmth(png: bytes) -> float:
    pixels = np.asarray(Image.open(io.BytesIO(png)), float)
    return (pixels[..., 0] - pixels[..., 2]).mean()


class Person:
    """Likes warm colours; one answer in ten is random. Presses the keys of the page."""

    def __init__(self, tab, page: Page):
        self.tab, self.page, self.random = tab, page, random.Random(0)
        self.answers = []  # h

    def wait_for(self, done: int, epoch: int) -> None:
        count = "state.questions.filter(q => q.answered).length"
        right = f"([done, epoch]) => at >= 0 && !busy && state.progress.epoch === epoch && {count}"
        self.tab.wait_for_function(f"{right} === done", arg=[done, epoch])

    def answer(self, first: int, last: int, epoch: int) -> None:
        """Answer the questions of an epoch from one number to before another, one by one."""
        for done in range(first, last):
            self.wait_for(done, epoch)
            self.answer_one()
        if last < QUESTIONS:
            self.wait_for(last, epoch)

    def answer_one(self) -> None:
        question = self.tab.evaluate("state.questions[at]")
        first, second = (warmth(request(self.page, "GET", url).body) for url in question["images"])
        h = 1 if first > second else -1
        if self.random.random() < 0.1:
            h = self.random.choice([1, -1])
        left = -h if question["left"] else h
        self.tab.keyboard.press("ArrowLeft" if left == 1 else "ArrowRight")
        self.answers.append(h)


@pytest.mark.slow
def test_an_evening(start, browser, tmp_path, monkeypatch):  # noqa: F811
    """Killed between labels, "Train now" in the first round, all answers, "Finish" in the third."""
    out, output = tmp_path / "run", tmp_path / "output.txt"
    page = Page(out, free_port())
    settings = typed(FLAGS)
    process = start(**settings, out=out, port=page.port)
    until(lambda: is_serving(page))
    address, tunnel = (re.search(sign, output.read_text()) for sign in (r"http://\S+", r"ssh -L.*"))
    assert address[0] == page.url and f"{page.port}:127.0.0.1:{page.port}" in tunnel[0]
    with open_tab(browser, page.url) as tab:
        person = Person(tab, page)
        person.answer(0, KILLED_AFTER, epoch=1)
        kill(process)
        tab.keyboard.press("ArrowLeft")
        tab.get_by_text("--resume").wait_for()
        process = start(resume=out, port=page.port)
        person.answer(KILLED_AFTER, TRAINED_AFTER, epoch=1)
        tab.get_by_role("button", name="Train now").click()
        tab.get_by_text("Training, ").wait_for()
        person.answer(0, QUESTIONS, epoch=2)
        tab.get_by_text("Undo the last answer").wait_for()
        tab.get_by_text("Training, ").wait_for()
        tab.get_by_text("Now, from the same starting noise").wait_for()
        person.answer(0, FINISHED_AFTER, epoch=3)
        tab.get_by_role("button", name="Finish").click()
        tab.get_by_text("The run has finished").wait_for()
        code = tab.locator("#code").text_content()
        # No other problem than the time when the program was dead
        assert all("CONNECTION_REFUSED" in problem for problem in tab.problems), tab.problems
    process.join(WAIT)
    assert process.exitcode == 0, output.read_text()

    rows = read_rows(out)
    assert [row["h"] for row in rows if row["h"] is not None] == person.answers
    assert len(rows) == 3 * QUESTIONS and len(read_lines(out / "metrics.jsonl")) == 3
    of_card = code.replace(repr(str(out / "lora")), "'lora'")
    assert of_card in (out / "README.md").read_text("utf-8")

    # The LoRA loads, by the code of the page
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    assert Image.open(tmp_path / "image.png").size == (64, 64)

    # The same answers from the file, without a page: the same bytes
    def ask(server, questions, progress):
        epoch = questions[0]["epoch"]
        save_lines(server.file, [row for row in rows if row["epoch"] == epoch])
        answers = read_labels(server.file, questions).values()
        server.finished = epoch == 3
        return [
            {**row, "h": majority(row, list(of_one.values()))}
            for row, of_one in zip(questions, answers, strict=True)
        ]

    monkeypatch.setattr(annotate.AnnotationServer, "ask", ask)
    again = sd_demo.run(**settings, out=tmp_path / "again")
    assert lora_of(again) == lora_of(out)
