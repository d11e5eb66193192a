"""Runs that people label: the page and the training together, a person in a thread beside them."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sd_helpers import outcome, typed
from test_annotate import (
    AS_JSON,
    WAIT,
    Page,
    free_port,
    is_serving,
    open_questions,
    post_answer,
    read_rows,
    request,
    until,
)

import sd_demo
from sd import UserError, annotate, figures, files, metrics
from sd.scorers import jpeg_kb

TRAINING = """
    --precision fp32 --num-steps 3 --skip-last 0 --lr 0.01 --lora-rank 4 --guidance-scale 3
    --epochs 2 --prompts-per-epoch 4 --images-per-prompt 2 --batch-size 2
    --eval-images 2 --eval-every 1 --seed 3 --device cpu
    --loss eq14 --update-every timestep --beta 0.06 --replay 1 --average-weights --max-kl 1e6
    --warm-up 2
"""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, no_figures):
    monkeypatch.setattr(figures, "draw_pairs", lambda *args: None)
    monkeypatch.setattr(annotate, "FAREWELL_SECONDS", 0)
    monkeypatch.setattr(annotate, "UNDO_SECONDS", 0)


def new_run(model: Path, page: Page, flags: str) -> dict:
    return {"model": model, "out": page.run, "port": page.port, **typed(f"{TRAINING} {flags}")}


# A person at the page


@contextlib.contextmanager
def somebody(script: Callable) -> Iterator[None]:
    """Somebody does this meanwhile; what goes wrong there ends the run."""
    problems = []

    def at_the_page():
        try:
            script()
        except BaseException as error:
            problems.append(error)
            interrupt()

    thread = threading.Thread(target=at_the_page, daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of xdist ignore it
    thread.start()
    try:
        yield
    finally:
        thread.join(WAIT)
        signal.signal(signal.SIGINT, before)
        if problems:
            raise problems[0]


def interrupt() -> None:
    """Ctrl-C."""
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def answer(page: Page, choose: Callable, count: int | None = None) -> list[dict]:
    """Wait for questions, answer the first ones; return all that were open."""
    until(lambda: is_serving(page) and open_questions(page))
    questions = open_questions(page)
    for question in questions[:count]:
        assert post_answer(page, question["id"], choose(question)).status == 200
    return questions


def end(page: Page, question: dict, what: str) -> None:
    """Train now ("questions"), or finish ("run")."""
    body = json.dumps({"id": question["id"], "end": what}).encode()
    assert request(page, "POST", "/end", body, AS_JSON).status == 200


def first_is_better(question: dict) -> int:
    return 1


def prefer_plain(page: Page) -> Callable:
    """A person who likes the plainer image: the smaller JPEG."""

    def choose(question: dict) -> int:
        pngs = [io.BytesIO(request(page, "GET", url).body) for url in question["images"]]
        sizes = [jpeg_kb(Image.open(png)) for png in pngs]
        return int(np.sign(sizes[1] - sizes[0]))

    return choose


# What is left


def last_metrics(run: Path) -> dict:
    return files.read_lines(run / "metrics.jsonl")[-1]


def lora_of(run: Path) -> bytes:
    return (run / "lora" / files.LORA_FILE).read_bytes()


# Processes that are killed: a server that has imported everything forks them

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["test_human_run"])


def demo(settings: dict, log: Path) -> None:
    """sd_demo.run, in a process of its own."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sd_demo.run(**settings)


@pytest.fixture
def start(tmp_path):
    """Start sd_demo.run beside the test."""
    processes = []

    def starter(**settings):
        process = PROCESSES.Process(target=demo, args=(settings, tmp_path / "output.txt"))
        process.start()
        processes.append(process)
        return process

    yield starter
    for process in processes:
        kill(process)


def kill(process) -> None:
    process.kill()  # SIGKILL
    process.join(WAIT)


def test_people_who_prefer_nothing_read_why_the_run_ends(tiny, tmp_path, monkeypatch):
    farewells, close = [], annotate.AnnotationServer.close
    monkeypatch.setattr(
        annotate.AnnotationServer, "close", lambda *args: farewells.append(args[1]) or close(*args)
    )
    monkeypatch.setattr(
        metrics, "nothing_to_learn", lambda run, objective: f"{run} teaches nothing"
    )
    page = Page(tmp_path / "run", free_port())
    flags = "--objective human --epochs 5 --prompts-per-epoch 2"
    with somebody(lambda: answer(page, lambda question: 0)):
        with pytest.raises(UserError, match="teaches nothing"):
            sd_demo.run(**new_run(tiny, page, flags))
    assert len(read_rows(page.run)) == 2 and last_metrics(page.run)["preferences"] == 0
    assert "teaches nothing" in farewells[0] and lora_of(page.run)


@pytest.mark.slow
def test_who_likes_plain_images_trains_the_weights_of_compressibility(tiny, start, tmp_path):
    """And kill -9 at three moments changes nothing: between labels, in training, an epoch later."""
    page = Page(tmp_path / "people", free_port())
    likes_plain, port = prefer_plain(page), {"port": page.port}
    automatic = new_run(tiny, Page(tmp_path / "automatic", 1), "--objective compressibility")
    sd_demo.run(**automatic)
    begin = new_run(tiny, page, "--objective human --watch compressibility")
    resume = {"resume": page.run, **port}
    for settings, answers in ((begin, 2), (resume, 2), (resume, 1)):
        process = start(**settings)
        answer(page, likes_plain, answers)
        if len(read_rows(page.run)) == 4:  # all of the first epoch
            until(lambda: "Training, " in request(page, "GET", "/state").json()["status"])
        kill(process)
    assert len(read_rows(page.run)) == 5
    with somebody(lambda: answer(page, likes_plain)):
        sd_demo.run(**resume)

    (_, labels, lora), (_, labels_of_scorer, lora_of_scorer) = map(
        outcome, (page.run, tmp_path / "automatic")
    )
    rows, rows_of_scorer = (
        {tuple(row["images"]): row["h"] for row in map(json.loads, lines.splitlines())}
        for lines in (labels, labels_of_scorer)
    )
    assert rows == rows_of_scorer and len(rows) == len(labels.splitlines()) == 8
    assert set(rows.values()) >= {1, -1} and lora == lora_of_scorer
    by_people, by_score = last_metrics(page.run), last_metrics(tmp_path / "automatic")
    assert by_people["watched"] == by_score["eval_score"]
    assert by_people["score"] is by_people["eval_score"] is None
    assert by_people["loss"] == by_score["loss"]
    assert by_people["accuracy"] == by_score["accuracy"]


def test_labels_of_another_tool_train_without_a_page(tiny, tmp_path):
    page = Page(tmp_path / "run", free_port())
    flags = "--objective tags --images-per-prompt 3 --prompts-per-epoch 2 --epochs 1"

    def give_up():
        until(lambda: is_serving(page) and open_questions(page))
        interrupt()

    with somebody(give_up), pytest.raises(UserError, match="^Stopped. .* has no model yet"):
        sd_demo.run(**new_run(tiny, page, flags))
    questions = files.read_lines(page.run / "questions.jsonl")
    assert [len(row["images"]) for row in questions] == [3, 3] and not read_rows(page.run)

    def write(*answers):
        rows = [row | {"bad": bad} for row, bad in zip(questions, answers, strict=True)]
        files.save_lines(page.run / "labels.jsonl", rows)

    resume, state = {"resume": page.run}, page.run / "checkpoint" / "state.pt"
    write([True, False, False], 1)
    with pytest.raises(UserError, match="labels.jsonl, line 2: 'bad' is 1: .* 3 booleans"):
        sd_demo.run(**resume)
    assert not state.exists()

    write([True, False, False], [True, False, False])
    with socket.create_server(("127.0.0.1", 0)) as taken:  # no page could open there
        sd_demo.run(**resume, port=taken.getsockname()[1])
    row = last_metrics(page.run)
    assert row["labels"] == 4 and row["bad_share"] == 1 / 3 and row["loss"] > 0
    assert row["score"] is row["eval_score"] is None and lora_of(page.run)


def test_train_now_takes_the_answers_so_far_and_finish_ends_the_run(tiny, tmp_path):
    """Epoch 1: two of four answers, train; epoch 2 of 5: one answer, finish."""
    page, states = Page(tmp_path / "run", free_port()), []
    flags = "--objective human --epochs 5 --question 'Which is friendlier?'"

    def script():
        for answers, what in ((2, "questions"), (1, "run")):
            questions = answer(page, first_is_better, answers)
            states.append(request(page, "GET", "/state").json())
            end(page, questions[answers], what)

    with somebody(script):
        assert sd_demo.run(**new_run(tiny, page, flags)) == page.run and not is_serving(page)
    labels = [(row["epoch"], row["h"]) for row in read_rows(page.run)]
    assert labels == [(1, 1)] * 2 + [(1, None)] * 2 + [(2, 1)] + [(2, None)] * 3
    assert last_metrics(page.run)["epoch"] == 2 and lora_of(page.run)
    assert (page.run / "report.html").exists()
    assert [state["guide"] for state in states] == ["Which is friendlier?"] * 2
    assert [state["progress"]["epoch"] for state in states] == [1, 2]


@pytest.mark.slow
def test_a_blind_test_shows_no_name_goes_on_and_may_stop_early(tiny, tmp_path, monkeypatch):
    """Stopped after two of five answers; then two more, and the last one is skipped."""
    run, questions, states, images = tmp_path / "run", [], [], []
    pages = [Page(run / "blind_e001", free_port()) for _ in range(2)]
    answers = iter([1, -1, 0, 1])
    sd_demo.run(**new_run(tiny, Page(run, 1), "--objective compressibility --epochs 1"))
    blind = {"evaluate": run, "objective": "human", "eval_images": 5}

    def stop():
        questions.extend(answer(pages[0], lambda question: next(answers), 2))
        interrupt()

    def finish():
        page = pages[1]
        left = answer(page, lambda question: next(answers), 2)
        assert [q["prompt"] for q in left] == [q["prompt"] for q in questions[2:]]
        end(page, left[2], "run")
        state = until(lambda: (now := request(page, "GET", "/state").json())["ended"] and now)
        states.append(state)
        images.extend(request(page, "GET", f"/{url}") for urls in state["shown"] for url in urls)

    with somebody(stop), pytest.raises(UserError, match=f"--evaluate {run}$"):
        sd_demo.run(**blind, port=pages[0].port)
    monkeypatch.setattr(annotate, "FAREWELL_SECONDS", 2)
    with somebody(finish):
        sd_demo.run(**blind, port=pages[1].port)
    assert not any(word in json.dumps(questions) for word in ("tuned", "initial"))
    assert len({question["left"] for question in questions}) == 2
    result = files.read_json(run / "evaluation.json")
    assert result["objective"] == "human" and result["win_rate"] == (2 + 0.5) / 4
    assert (result["pairs"], result["votes"], result["skipped"]) == (4, 4, 1)
    (state,) = states
    assert repr(str(run / "lora")) in state["code"]  # the page may be anywhere, the card is there
    assert [urls[0] for urls in state["shown"]] == ["held_out/0/0", "held_out/1/0"]
    assert len(images) == 4 and {image.status for image in images} == {200}
