"""The labelling page: its file format, what several people say together, its endpoints, and a real browser."""

import io
import json
import math
import os
import random
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import feedback as page
from toy.emoji_sd.render import NAMES, render

HERE = Path(page.__file__).parent
ROOT = Path(sys.modules["toy"].__file__).parents[1]
CHROMIUM = shutil.which("chromium")
WAIT = 300  # seconds that nothing here should take, even where the machine is busy


def questions(run: Path, kind: str = "h", epoch: int = 3, N: int = 4, K: int = 2) -> list[dict]:
    """N questions about images that are drawn into a run folder."""
    (run / "images").mkdir(exist_ok=True)
    asked = []
    for p in range(N):
        files = [f"images/e{epoch:03}_p{p:02}_k{k}.png" for k in range(K)]
        for k, file in enumerate(files):
            Image.fromarray(render(NAMES[p], (epoch, p, k))).save(run / file)
        empty = {"scores": None, "h": None} if kind == "h" else {"bad": None}
        asked.append({"epoch": epoch, "prompt": f"a {NAMES[p]}", "images": files, **empty})
    return asked


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "labels.jsonl").read_text().splitlines()]


class Run:
    """A page that asks in a thread, and a person's requests to it."""

    def __init__(self, run: Path, asked: list[dict], annotators: int = 1, port: int | None = None):
        (run / "labels.jsonl").touch()
        self.page, self.rows = page.Page(run, annotators, 0, port), None
        self.ask(asked)
        self.http = httpx.Client(base_url=self.page.url, timeout=WAIT, trust_env=False)

    def ask(self, asked):
        def target():
            self.rows = self.page.ask(asked)

        self.thread = threading.Thread(target=target, daemon=True)
        self.thread.start()
        until(lambda: self.page.url and self.page._asked or not self.thread.is_alive())

    def state(self, name=None):
        return self.http.get("/state", params={"name": name} if name else {}).json()

    def open(self, name=None):
        return [q for q in self.state(name)["questions"] if not q["answered"]]

    def send(self, number, answer, name=None):
        return self.http.post("/answer", json={"id": number, "answer": answer, "name": name})

    def answer(self, answer, name=None):
        """The first open question."""
        return self.send(self.open(name)[0]["id"], answer, name)

    def finish(self):
        self.thread.join(WAIT)
        assert not self.thread.is_alive()
        return self.rows


def until(condition):
    end = time.monotonic() + WAIT
    while not (found := condition()):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)
    return found


@pytest.fixture
def start(tmp_path):
    started = []

    def starter(asked, **kwargs):
        started.append(Run(tmp_path, asked, **kwargs))
        return started[-1]

    yield starter
    for run in started:
        run.http.close()
        run.page._app and run.page._app.get_blocks().close(verbose=False)


# The file

PAIR = {"epoch": 3, "prompt": "a cat", "images": ["images/a.png", "images/b.png"], "scores": None, "h": None}
TAGS = {"epoch": 3, "prompt": "a cat", "images": ["images/a.png", "images/b.png", "images/c.png"], "bad": None}


def read(tmp_path, text: str, *asked):
    (tmp_path / "labels.jsonl").write_text(text)
    return page.read_labels(tmp_path / "labels.jsonl", list(asked))


def test_answers_are_read_by_annotator_and_the_last_one_counts(tmp_path):
    given = [{"h": 1}, {"h": -1, "annotator": "Ann"}, {"h": None, "annotator": "Bob"}, {"h": 0}]
    text = "".join(json.dumps(PAIR | row) + "\n" for row in given)
    found = read(tmp_path, text, PAIR, PAIR | {"images": ["images/c.png", "images/d.png"]})
    assert found == {
        ("images/a.png", "images/b.png"): {None: 0, "Ann": -1, "Bob": None},
        ("images/c.png", "images/d.png"): {},
    }
    assert read(tmp_path, json.dumps(TAGS | {"bad": [True, False, False]}) + "\n", TAGS) == {
        tuple(TAGS["images"]): {None: [True, False, False]}
    }
    assert page.read_labels(tmp_path / "none.jsonl", [PAIR]) == {tuple(PAIR["images"]): {}}


def test_images_in_another_order_mean_the_same(tmp_path):
    swapped = PAIR | {"images": PAIR["images"][::-1], "h": 1}
    assert read(tmp_path, json.dumps(swapped) + "\n", PAIR)[tuple(PAIR["images"])] == {None: -1}
    turned = TAGS | {"images": ["images/c.png", "images/a.png", "images/b.png"], "bad": [True, False, False]}
    assert read(tmp_path, json.dumps(turned) + "\n", TAGS)[tuple(TAGS["images"])] == {None: [False, False, True]}


def test_earlier_epochs_are_passed_over_and_a_line_cut_short_is_dropped(tmp_path):
    old = json.dumps(PAIR | {"epoch": 2, "h": 1, "images": ["images/x.png", "images/y.png"]}) + "\n"
    new = json.dumps(PAIR | {"h": -1}) + "\n"
    for cut in (new[:40], new[:-1], '{"'):
        assert read(tmp_path, old + new + cut, PAIR) == {tuple(PAIR["images"]): {None: -1}}


BAD_LINES = {
    "not JSON": ("{'epoch': 3}", "not JSON"),
    "empty": ("", "not JSON"),
    "binary": ("\udcff", "not JSON"),
    "too deep": ("[" * 100_000, "not JSON"),
    "no object": ("[1, 2]", "object"),
    "no epoch": ({"epoch": ...}, "'epoch' is missing"),
    "no prompt": ({"prompt": ...}, "'prompt' is missing"),
    "no images": ({"images": ...}, "'images' is missing"),
    "no h": ({"h": ...}, "'h' is missing"),
    "epoch as text": ({"epoch": "3"}, "'epoch' is '3'"),
    "epoch true": ({"epoch": True}, "'epoch' is True"),
    "epoch to come": ({"epoch": 4}, "asks nothing"),
    "another prompt": ({"prompt": "a dog"}, "'a dog'"),
    "an unknown image": ({"images": ["images/a.png", "images/z.png"]}, "images/z.png"),
    "one image twice": ({"images": ["images/a.png", "images/a.png"]}, "asks nothing"),
    "three of two": ({"images": ["images/a.png", "images/b.png", "images/a.png"]}, "asks nothing"),
    "images as numbers": ({"images": [0, 1]}, "asks nothing"),
    "lists for images": ({"images": [[], []]}, "asks nothing"),
    "h 2": ({"h": 2}, "'h' is 2"),
    "h true": ({"h": True}, "'h' is True"),
    "h 1.0": ({"h": 1.0}, "'h' is 1.0"),
    "h as text": ({"h": "1"}, "'h' is '1'"),
    "h NaN": ({"h": math.nan}, "'h' is nan"),
    "h list": ({"h": [1]}, "'h' is"),
    "annotator 5": ({"annotator": 5, "h": 1}, "'annotator' is 5"),
}


@pytest.mark.parametrize("what", BAD_LINES)
def test_bad_lines_are_refused_with_file_and_line_number(tmp_path, what):
    line, why = BAD_LINES[what]
    if isinstance(line, dict):
        row = PAIR | {"h": 1} | line
        line = json.dumps({key: value for key, value in row.items() if value is not ...})
    good = json.dumps(PAIR | {"h": 1}) + "\n"
    (tmp_path / "labels.jsonl").write_bytes((good + line + "\n").encode(errors="surrogateescape"))
    with pytest.raises(page.LabelError) as refused:
        page.read_labels(tmp_path / "labels.jsonl", [PAIR])
    assert f"{tmp_path / 'labels.jsonl'}, line 2: " in str(refused.value) and why in str(refused.value)
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize("bad", [[True, False], [True] * 4, [1, 0, 0], "yes", True, [None] * 3, {}])
def test_bad_tags_are_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="line 1: 'bad' is .*3 booleans"):
        read(tmp_path, json.dumps(TAGS | {"bad": bad}) + "\n", TAGS)
    with pytest.raises(ValueError, match="line 1: 'bad' is missing"):
        read(tmp_path, json.dumps({k: v for k, v in TAGS.items() if k != "bad"} | {"h": 1}) + "\n", TAGS)


# Several people

@pytest.mark.parametrize("votes, h", [
    ([1], 1), ([-1], -1), ([0], 0), ([], 0), ([None], 0), ([None, -1], -1), ([1, -1], 0), ([1, 0], 0), ([1, 1, -1], 1),
    ([0, 0, 1], 0), ([1, 0, -1], 0), ([1, 1, -1, 0], 1), ([1, 1, -1, -1, 0], 0), ([-1, -1, None, 1], -1),
])  # fmt: skip
def test_majority_of_pairs(votes, h):
    assert page.majority(PAIR, votes) == h
    assert page.majority(PAIR, votes[::-1]) == h


def test_majority_of_tags():
    a, b, c = [True, True, False], [True, False, False], [False, False, True]
    assert page.majority(TAGS, [a]) == a
    assert page.majority(TAGS, [a, b, c]) == [True, False, False]
    assert page.majority(TAGS, [a, b]) == [True, False, False]  # one of two is not more than half
    assert page.majority(TAGS, [a, None, None]) == a  # of those who answered
    assert page.majority(TAGS, [None]) == page.majority(TAGS, []) == [False] * 3


def test_kappa():
    # by hand: P = 3/4, shares 5/8 and 3/8, P_e = 34/64
    assert page.kappa([[1, 1], [1, 1], [-1, -1], [1, -1]]) == pytest.approx((3 / 4 - 34 / 64) / (1 - 34 / 64))
    assert page.kappa([[1, 1], [0, 0], [-1, -1]]) == 1
    assert page.kappa([[1, -1], [-1, 1]]) == -1
    # unequal numbers of votes, by hand: P = (1/3 + 1)/2, shares 3/5 and 2/5; what has one vote or none does not count
    uneven = [[1, 1, 0], [0, 1][1:] * 2, [0], []]
    assert page.kappa(uneven) == pytest.approx((2 / 3 - (16 + 1) / 25) / (1 - (16 + 1) / 25))
    assert math.isnan(page.kappa([[1, 1], [1, 1]])) and math.isnan(page.kappa([])) and math.isnan(page.kappa([[1]]))
    # the worked example of Fleiss (1971) in the form of Wikipedia's page: 10 items, 14 raters, 5 answers, 0.210
    counts = ["0 0 0 0 14", "0 2 6 4 2", "0 0 3 5 6", "0 3 9 2 0", "2 2 8 1 1", "7 7 0 0 0", "3 2 6 3 0", "2 5 3 2 2",
              "6 5 2 1 0", "0 2 2 3 7"]  # fmt: skip
    votes = [[k for k, n in enumerate(row.split()) for _ in range(int(n))] for row in counts]
    assert page.kappa(votes) == pytest.approx(0.210, abs=5e-4)


# The endpoints

def test_a_person_labels_an_epoch(start, tmp_path):
    asked = questions(tmp_path)
    run = start(asked)
    opened = run.open()
    assert [q["prompt"] for q in opened] == [q["prompt"] for q in asked]
    for k, (q, h) in enumerate(zip(opened, [1, 0, -1, None], strict=True)):
        for image, file in zip(q["images"], asked[k]["images"], strict=True):
            assert run.http.get(image).content == (tmp_path / file).read_bytes()
        assert run.send(q["id"], h).json() == {"saved": True}
        assert lines(tmp_path)[-1] == asked[k] | {"h": h, "left": q["left"]}  # on disk before the reply
    assert run.finish() == [q | {"h": h} for q, h in zip(asked, [1, 0, -1, 0], strict=True)]
    assert run.state() == {"questions": [], "status": "Training, epoch 3", "ended": False, "named": False}
    run.page.status("Sampling, epoch 4")
    assert run.state()["status"] == "Sampling, epoch 4"
    assert run.http.get(opened[0]["images"][0]).status_code == 409  # not a current question any more

    run.ask(more := questions(tmp_path, epoch=4, N=1))
    assert run.answer(-1).status_code == 200
    assert run.finish() == [more[0] | {"h": -1}]


def test_tags(start, tmp_path):
    run = start(asked := questions(tmp_path, "bad", N=2, K=7))
    marks = [True, False, False, True, False, False, False]
    assert run.answer([True]).status_code == run.answer(1).status_code == 400
    assert run.answer(marks).status_code == run.answer(None).status_code == 200
    assert run.finish() == [asked[0] | {"bad": marks}, asked[1] | {"bad": [False] * 7}]
    assert lines(tmp_path) == [asked[0] | {"bad": marks}, asked[1]]


def test_undo_is_a_second_line_and_the_last_counts(start, tmp_path):
    run = start(asked := questions(tmp_path, N=2))
    first, second = (q["id"] for q in run.open())
    run.send(first, 1), run.send(first, -1)
    assert [q["answer"] for q in run.state()["questions"]] == [-1, None]
    run.send(second, 0)
    assert [row["h"] for row in run.finish()] == [-1, 0]
    assert [row["h"] for row in lines(tmp_path)] == [1, -1, 0]
    assert asked[0]["h"] is None


def test_sides_are_random_and_reproducible(start, tmp_path):
    asked = questions(tmp_path, N=40)
    left = [q["left"] for q in start(asked).open()]
    assert left == [q["left"] for q in start(asked).open()] and 8 < sum(left) < 32


def test_a_restart_goes_on_at_the_first_unanswered_question(start, tmp_path):
    asked = questions(tmp_path)
    run = start(asked)
    old = run.open()[2]["id"]
    run.answer(1), run.answer(None)
    with (tmp_path / "labels.jsonl").open("a") as file:
        file.write('{"epoch": 3, "pro')  # a kill in mid-write
    again = start(asked)
    assert [q["prompt"] for q in again.open()] == [q["prompt"] for q in asked[2:]]
    assert again.send(old, 1).status_code == 409  # from a page of the old start
    assert again.send(again.open()[0]["id"], -1).status_code == 200
    assert [row["h"] for row in lines(tmp_path)] == [1, None, -1]
    again.answer(0)
    assert [row["h"] for row in again.finish()] == [1, 0, -1, 0]


def test_ask_returns_at_once_where_labels_are_complete(tmp_path):
    asked = questions(tmp_path)
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(q | {"h": 1}) + "\n" for q in asked))
    whole = page.Page(tmp_path, 1, 0)
    assert whole.ask(asked) == [q | {"h": 1} for q in asked] and whole.url is None
    assert whole.ask([]) == []
    whole.close()
    (tmp_path / "labels.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="line 1: 'epoch' is missing"):
        whole.ask(asked)
    with pytest.raises(ValueError, match="is not in"):
        whole.ask([asked[0] | {"images": ["images/../labels.jsonl", "images/b.png"]}])


def test_questions_are_listed_for_other_tools(start, tmp_path):
    asked = questions(tmp_path, N=3)
    start(asked)
    listed = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row | {"h": 1}) + "\n" for row in listed))
    assert [row["h"] for row in page.Page(tmp_path, 1, 0).ask(asked)] == [1, 1, 1]


def test_two_annotators(start, tmp_path):
    run = start(questions(tmp_path, N=3), annotators=2)
    assert run.state()["named"] and run.open() == []
    for name in ("", " ", "x" * 41, "a\nb", 5, ["Ann"], "\ud800"):
        body = json.dumps({"id": next(iter(run.page._asked)), "answer": 1, "name": name})
        assert run.http.post("/answer", content=body, headers={"content-type": "application/json"}).status_code == 400
    assert lines(tmp_path) == []
    for h in (1, 1, 0):
        run.answer(h, "Ann")
    assert run.open("Ann") == [] and "3 answers to give" in run.state("Ann")["status"]
    assert run.thread.is_alive()
    for h in (1, -1, None):
        run.answer(h, "Zoë")
    assert [row["h"] for row in run.finish()] == [1, 0, 0]
    assert [row["annotator"] for row in lines(tmp_path)] == ["Ann"] * 3 + ["Zoë"] * 3
    assert run.page.kappa == pytest.approx((1 / 2 - 10 / 16) / (1 - 10 / 16))  # P = 1/2, shares 3/4 and 1/4


def test_a_third_annotator_is_asked_only_what_is_open(start, tmp_path):
    run = start(asked := questions(tmp_path, N=2), annotators=2)
    run.answer(1, "Ann"), run.answer(1, "Ann"), run.answer(1, "Bob")
    assert [q["prompt"] for q in run.open("Cid")] == [asked[1]["prompt"]]
    run.answer(-1, "Cid")
    assert [row["h"] for row in run.finish()] == [1, 0]


# What is refused

def raw(run, request: bytes, seconds: float | None = None) -> bytes:
    """The reply to bytes that need not be HTTP: all of it, or what begins within some seconds."""
    with socket.create_connection(("127.0.0.1", httpx.URL(run.page.url).port), timeout=WAIT) as connection:
        try:
            connection.sendall(request)
            connection.settimeout(seconds)
            return connection.recv(65536) if seconds else b"".join(iter(lambda: connection.recv(65536), b""))
        except OSError:
            return b""


def intact(run, before: bytes) -> bool:
    alive = run.http.get("/").status_code == 200 and len(run.open()) == 4
    return alive and (run.page.run / "labels.jsonl").read_bytes() == before


@pytest.fixture
def guarded(start, tmp_path):
    run = start(questions(tmp_path, N=5))
    run.answer(1)
    before = (tmp_path / "labels.jsonl").read_bytes()
    yield run
    assert intact(run, before)


def refused(reply, *codes) -> bool:
    return reply.status_code in codes and isinstance(reply.json()["error"], str)


def test_foreign_hosts_and_origins_are_refused(guarded):
    good = {"id": guarded.open()[0]["id"], "answer": 1, "name": None}
    port = httpx.URL(guarded.page.url).port
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "0.0.0.0",
                 "", "localhost:", "[::1]"):  # fmt: skip
        for path in ("/", "/state", "/gradio_api/startup-events"):
            assert refused(guarded.http.get(path, headers={"host": host}), 403), host
        assert refused(guarded.http.post("/answer", json=good, headers={"host": host}), 403)
    for origin in ("http://evil.example", "null", f"https://127.0.0.1:{port}", "http://127.0.0.1:1", "http://localhost"):
        for method in ("GET", "POST", "OPTIONS"):
            reply = guarded.http.request(method, "/answer", json=good, headers={"origin": origin})
            assert refused(reply, 403) and "access-control-allow-origin" not in reply.headers, origin
    assert guarded.http.get("/", headers={"host": "localhost:9000"}).status_code == 200  # an ssh tunnel


def test_own_origin_is_answered(start, tmp_path):
    run = start(questions(tmp_path, N=1))
    good = {"id": run.open()[0]["id"], "answer": 1, "name": None}
    assert run.http.post("/answer", json=good, headers={"origin": run.page.url.rstrip("/")}).status_code == 200


def test_only_loopback_and_no_telemetry(guarded):
    assert guarded.page._app.get_blocks().analytics_enabled is False
    port = httpx.URL(guarded.page.url).port
    listening = [line.split()[1] for name in ("tcp", "tcp6") for line in open(f"/proc/net/{name}") if " 0A " in line]
    assert f"0100007F:{port:04X}" in listening
    assert [place for place in listening if place.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


@pytest.mark.parametrize("path", [
    "/images/e003_p00_k0.png", "/images/../labels.jsonl", "/images/{id}/../../labels.jsonl", "/images/{id}/0/../../..",
    "/images/%2e%2e/labels.jsonl", "/images/{id}%2f..%2f..%2flabels.jsonl", "/images/{id}/2", "/images/{id}/-1",
    "/images/{id}/99", "/images/{id}/1000", "/images/{id}/٠", "/images/{id}/0%00", "/images/{id}/0%0a", "//etc/passwd",
    "/images//etc/passwd", "/labels.jsonl", "/gradio_api/file=labels.jsonl", "/gradio_api/file=/etc/passwd",
    "/gradio_api/info", "/gradio_api/upload", "/config", "/docs", "/openapi.json", "/monitoring", "/answer", "/state/",
    "/static/../../etc/passwd", "/%5b", "//[",
    "/gradio_api/vibe-code", "/theme.css", "/manifest.json",
])  # fmt: skip
def test_nothing_else_is_served(guarded, path):
    path = path.replace("{id}", guarded.open()[0]["id"])
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    head, _, body = raw(guarded, request).partition(b"\r\n\r\n")
    assert int(head.split()[1]) in (400, 404, 409), head
    assert b"PNG" not in body and b"root:" not in body and b"prompt" not in body
    if int(head.split()[1]) != 400:  # which is the HTTP server's own
        assert "error" in json.loads(body)


def test_wrong_answers_are_refused(guarded):
    ids = [q["id"] for q in guarded.open()]
    for answer in (2, True, 1.0, "1", [1], {}, [True, False], 10**30):
        assert refused(guarded.send(ids[0], answer), 400), answer
    for number in ("", "0", ids[0] + "0", ids[0].split("-")[0], None, 0, [], {}, ids):
        assert refused(guarded.send(number, 1), 409), number
    assert refused(guarded.send(ids[0], 1, "Ann"), 400)
    assert refused(guarded.http.get("/state?name=Ann"), 400)
    post = guarded.http.post
    good = json.dumps({"id": ids[0], "answer": 1, "name": None})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        assert refused(post("/answer", content=good, headers={"content-type": kind}), 415)
    as_json = {"content-type": "application/json"}
    for body in ("", "{", "null", "[]", "[" * 9000, good[:-1], 2 * good, '{"id": 1}', good.replace('"name"', '"nom"')):
        assert refused(post("/answer", content=body, headers=as_json), 400), body[:80]
    assert refused(post("/answer", content=b"\xff\xfe", headers=as_json), 400)
    assert refused(post("/answer", content=good + " " * 10_000, headers=as_json), 413)
    assert refused(post("/answer", content=iter([good.encode()]), headers=as_json), 413)  # chunked: no length
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "GET"):
        assert refused(guarded.http.request(method, "/answer"), 404)


def test_a_thousand_random_malformed_requests(guarded, capfd):
    chance = random.Random(0)
    ids = [q["id"] for q in guarded.open()]
    port, replies = httpx.URL(guarded.page.url).port, 0
    words = [
        b"GET", b"POST", b"PUT", b"/", b"/answer", b"/state?name=", b"/images/", b"..", b"%2e%2e", b"\x00", b"\xff\xfe",
        b"HTTP/1.1", b"HTTP/9.9", b"\r\n", b"\n", b" ", b"Host: localhost", b"Host: evil", b"Content-Length: ",
        b"99999", b"-1", b"Content-Type: application/json", b"Transfer-Encoding: chunked", b"{", b"}", b'"id": ',
        b'"answer": ', b'"name": ', b"null", b"1", b"[" * 50, *(number.encode() for number in ids),
    ]  # fmt: skip
    head = f"POST /answer HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Type: application/json\r\n".encode()
    values = [None, 1, -1, 0, 2, 0.5, True, "1", "", "\x00", [], [1], {}, {"h": 1}, 10**40, "é" * 50, *ids[:1]]
    for n in range(1000):
        if n % 3 == 0:  # noise
            request = b"".join(chance.choices(words, k=chance.randrange(1, 20)))
        elif n % 3 == 1:  # a good request with a byte changed, removed, or cut
            body = json.dumps({"id": ids[0], "answer": 3, "name": None}).encode()
            request = bytearray(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            place = chance.randrange(len(request))
            request[place : place + chance.randrange(20)] = chance.randbytes(chance.randrange(3))
        else:  # well-formed HTTP with a body of the wrong kind
            keys = chance.sample(["id", "answer", "name", "images", "h", "annotator"], chance.randrange(1, 5))
            sent = {key: chance.choice(values) for key in keys}
            if sent.keys() == {"id", "answer", "name"}:
                sent["id"] = ids[0][::-1]
            body = json.dumps(sent).encode()
            request = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        reply = raw(guarded, bytes(request), 0.1)
        assert not reply or reply[9:10] in b"45" or request.startswith((b"GET / ", b"GET /state")), (request, reply)
        replies += reply.startswith(b"HTTP/1.1 4")
    assert replies > 500
    assert "Traceback" not in capfd.readouterr().err


def test_a_full_disk_is_told_and_leaves_no_half_line(start, tmp_path, monkeypatch):
    run = start(questions(tmp_path, N=2))
    run.answer(1)
    before = (tmp_path / "labels.jsonl").read_bytes()

    def fail(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(page.os, "fsync", fail)
        assert refused(run.answer(1), 500)
    assert (tmp_path / "labels.jsonl").read_bytes() == before and len(run.open()) == 1
    run.answer(0)
    assert [row["h"] for row in run.finish()] == [1, 0]


def test_a_taken_port_is_told(tmp_path):
    asked = questions(tmp_path, N=1)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(page.LabelError, match=f"{port}: give another --port"):
            page.Page(tmp_path, 1, 0, port).ask(asked)


def test_answers_reach_the_disk_itself(start, tmp_path, monkeypatch):
    run, synced = start(questions(tmp_path, N=2)), []
    real = os.fsync
    monkeypatch.setattr(page.os, "fsync", lambda number: synced.append(os.fstat(number).st_size) or real(number))
    assert run.answer(1).status_code == 200
    assert synced == [(tmp_path / "labels.jsonl").stat().st_size]


# A kill, and a browser

PROGRAM = """
    import json, sys
    sys.path[:0] = {paths!r}
    import feedback as page
    from pathlib import Path
    run = Path(sys.argv[1])
    shown = page.Page(run, 1, 0, {port})
    for epoch in (1, 2):
        rows = shown.ask(json.loads((run / f"asked{{epoch}}.json").read_text()))
        (run / f"rows{{epoch}}.json").write_text(json.dumps(rows))
        {between}
    shown.close()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def program(tmp_path):
    started = []

    def starter(port: int, between: str = "pass"):
        code = textwrap.dedent(PROGRAM).format(paths=[str(HERE), str(ROOT)], port=port, between=between)
        with (tmp_path / "out.txt").open("a") as out:
            started.append(subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=out, stderr=out))
        return started[-1]

    yield starter
    for process in started:
        process.kill()
        process.wait()


def answering(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def test_kill_9_loses_no_label(program, tmp_path):
    port, given, chance = free_port(), [], random.Random(1)
    asked = questions(tmp_path, epoch=1, N=30)
    (tmp_path / "asked1.json").write_text(json.dumps(asked))
    (tmp_path / "asked2.json").write_text("[]")
    (tmp_path / "labels.jsonl").touch()
    for stop in (9, 17, None):
        process = program(port)
        until(lambda: answering(port))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT, trust_env=False) as http:
            opened = [q for q in http.get("/state").json()["questions"] if not q["answered"]]
            assert [q["prompt"] for q in opened] == [q["prompt"] for q in asked[len(given) :]]
            if stop:  # the kill comes while somebody answers
                threading.Timer(chance.uniform(0.02, 0.2), process.kill).start()  # SIGKILL
            for q in opened[: stop and stop - len(given)]:
                h = chance.choice([1, -1, 0])
                try:
                    reply = http.post("/answer", json={"id": q["id"], "answer": h, "name": None})
                except httpx.TransportError:
                    break
                assert reply.status_code == 200
                given.append(h)
        if stop:
            process.wait(WAIT)
            kept = [row["h"] for row in lines(tmp_path)]
            assert kept[: len(given)] == given  # a label more can be there, whose reply the kill swallowed
            given = kept
    assert process.wait(WAIT) == 0, (tmp_path / "out.txt").read_text()
    rows = json.loads((tmp_path / "rows1.json").read_text())
    assert [row["h"] for row in rows] == given == [row["h"] for row in lines(tmp_path)] and len(given) == 30


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("there is no chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium):
    tabs = []

    def opener(url, wide=1280, high=800, **kwargs):
        context = chromium.new_context(viewport={"width": wide, "height": high}, **kwargs)
        context.set_default_timeout(WAIT * 1000)
        opened = context.new_page()
        opened.problems = []
        opened.on("pageerror", lambda error: opened.problems.append(str(error)))
        opened.on("console", lambda said: said.type == "error" and opened.problems.append(said.text))
        opened.on("request", lambda sent: sent.url.startswith((url, "data:")) or opened.problems.append(sent.url))
        opened.goto(url)
        tabs.append(opened)
        return opened

    yield opener
    for opened in tabs:
        opened.context.close()


def prompt(tab, text: str):
    tab.wait_for_function("text => document.getElementById('prompt').textContent === text && !busy", arg=text)


def test_chromium_labels_epochs_by_keyboard_alone(tab, program, tmp_path):
    for epoch, N in ((1, 7), (2, 2)):
        (tmp_path / f"asked{epoch}.json").write_text(json.dumps(questions(tmp_path, epoch=epoch, N=N)))
    port = free_port()
    (tmp_path / "labels.jsonl").touch()
    process = program(port, "import time; time.sleep(2.5)")
    until(lambda: answering(port))
    shown = tab(f"http://127.0.0.1:{port}/")
    asked = json.loads((tmp_path / "asked1.json").read_text())
    prompt(shown, "a cat")
    left = [row["left"] for row in shown.evaluate("state.questions")]
    assert shown.locator("main img").evaluate_all("all => all.every(image => image.naturalWidth === 64)")
    assert shown.locator("main img").first.get_attribute("src").endswith(f"/{left[0]}")  # the side that is recorded

    seconds = []
    for n, key in enumerate(["ArrowLeft", "ArrowRight", " ", "s", "ArrowRight", "u", "u"]):
        began = time.perf_counter()
        shown.keyboard.press(key)
        n = {5: 4, 6: 3}.get(n, n + 1)
        prompt(shown, asked[n]["prompt"])
        seconds.append(time.perf_counter() - began)
    shown.keyboard.press("ArrowLeft")  # in place of the skip, and back to the first open one
    prompt(shown, asked[5]["prompt"])
    assert shown.locator("#done").text_content() == "5 done, 2 left"
    assert shown.locator("#left").text_content().startswith("about ")
    shown.keyboard.press("ArrowLeft")
    prompt(shown, asked[6]["prompt"])
    shown.keyboard.press("ArrowRight")
    shown.get_by_text("Training, epoch 1").wait_for()
    prompt(shown, "a cat")  # the next epoch, by itself
    asked = json.loads((tmp_path / "asked2.json").read_text())
    assert shown.locator("#done").text_content() == "0 done, 2 left"
    shown.keyboard.press(" "), prompt(shown, "a dog"), shown.keyboard.press(" ")
    shown.get_by_text("The run has finished").wait_for()
    assert process.wait(WAIT) == 0, (tmp_path / "out.txt").read_text()
    assert shown.problems == []

    def pressed(side, n):
        return 1 if (side == "left") == (left[n] == 0) else -1

    rows = [row["h"] for row in json.loads((tmp_path / "rows1.json").read_text())]
    assert rows == [pressed("left", 0), pressed("right", 1), 0, pressed("left", 3), pressed("right", 4),
                    pressed("left", 5), pressed("right", 6)]  # fmt: skip
    assert len(lines(tmp_path)) == 7 + 1 + 2
    print(f"seconds from key to next question: {sorted(seconds)[len(seconds) // 2]:.3f} (median), {max(seconds):.3f}")
    assert sorted(seconds)[len(seconds) // 2] < 1


def test_chromium_tags_by_keyboard(tab, start, tmp_path):
    run = start(questions(tmp_path, "bad", N=2, K=7))
    shown = tab(run.page.url)
    prompt(shown, "a cat")
    for key in ("2", "7", "3", "3", "9", "Enter"):
        shown.keyboard.press(key)
    prompt(shown, "a dog")
    shown.keyboard.press("u")
    prompt(shown, "a cat")
    assert shown.locator("main .bad b").all_text_contents() == ["2", "7"]
    shown.keyboard.press("1"), shown.keyboard.press("Enter")
    prompt(shown, "a dog")
    shown.keyboard.press("Tab"), shown.keyboard.press("Tab"), shown.keyboard.press(" ")  # for those beyond ten
    shown.keyboard.press("Enter")
    shown.get_by_text("Training, epoch 3").wait_for()
    assert [[k for k, bad in enumerate(row["bad"]) if bad] for row in run.finish()] == [[0, 1, 6], [1]]
    assert shown.problems == []


def test_chromium_two_people_on_one_machine(tab, start, tmp_path):
    run = start(questions(tmp_path, N=2), annotators=2)
    shown = tab(run.page.url)
    for name in ("Ann", "<b>Bob</b>"):
        shown.get_by_label("Your name").fill(name)
        shown.keyboard.press("Enter")
        prompt(shown, "a cat")
        shown.keyboard.press("ArrowLeft")
        prompt(shown, "a dog")
        shown.keyboard.press("s")
        if name == "Ann":
            shown.get_by_text("2 answers to give").wait_for()
            shown.get_by_text("Someone else").click()
    shown.get_by_text("Training, epoch 3").wait_for()
    assert [row["annotator"] for row in lines(tmp_path)] == ["Ann"] * 2 + ["<b>Bob</b>"] * 2
    assert {row["h"] for row in lines(tmp_path)[::2]} == {run.finish()[0]["h"]}
    assert shown.problems == []


def test_chromium_finds_the_page_again_after_a_restart(tab, program, tmp_path):
    (tmp_path / "asked1.json").write_text(json.dumps(questions(tmp_path, epoch=1, N=3)))
    (tmp_path / "asked2.json").write_text("[]")
    (tmp_path / "labels.jsonl").touch()
    port = free_port()
    process = program(port)
    until(lambda: answering(port))
    shown = tab(f"http://127.0.0.1:{port}/")
    prompt(shown, "a cat")
    shown.keyboard.press("ArrowLeft")
    prompt(shown, "a dog")
    process.kill()
    process.wait()
    shown.keyboard.press("ArrowLeft")
    shown.get_by_text("--resume").wait_for()
    assert len(lines(tmp_path)) == 1
    program(port)
    prompt(shown, "a dog")
    assert shown.locator("#done").text_content() == "1 done, 2 left"


@pytest.mark.parametrize("kind", ["h", "bad"])
@pytest.mark.parametrize("wide, high, scheme", [(1280, 800, "light"), (390, 844, "dark"), (844, 390, "light")])
def test_chromium_layout_fits_without_scrolling(tab, start, tmp_path, kind, wide, high, scheme):
    run = start(questions(tmp_path, kind, N=1, K=2 if kind == "h" else 7))
    phone = min(wide, high) < 500
    shown = tab(run.page.url, wide, high, color_scheme=scheme, is_mobile=phone, has_touch=phone)
    prompt(shown, "a cat")
    shown.screenshot(path=os.environ.get("SHOTS", str(tmp_path)) + f"/{kind}_{wide}_{scheme}.png")
    boxes = [one.bounding_box() for one in shown.locator("main button, footer button").all()]
    for box in boxes:
        assert 0 <= box["x"] and box["x"] + box["width"] <= wide and 0 <= box["y"]
        assert box["y"] + box["height"] <= high and box["width"] >= 44 and box["height"] >= 44
    if kind == "h":
        a, b = boxes[:2]
        assert a["y"] == b["y"] and a["x"] < b["x"] and (a["width"] > 0.4 * wide or a["height"] > 0.4 * high)
    shown.locator("main button").first.click() if kind == "h" else shown.get_by_text("Confirm").click()
    assert len(run.finish()) == 1 and shown.problems == []


# The page and the training


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from test_sd_demo import make_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    make_pipeline().save_pretrained(folder)
    return folder


TRAINING = "--precision fp32 --num-steps 3 --skip-last 0 --lr 0.01 --lora-rank 4 --eval-images 2 --eval-every 1"
TRAINING += " --seed 3 --epochs 2 --pairs-per-epoch 4 --images-per-prompt 2 --batch-size 2 --guidance-scale 3"


def sd_demo(*flags) -> list[str]:
    kept = {"--resume", "--evaluate"} & set(flags)  # these runs have their settings
    return [sys.executable, str(HERE / "sd_demo.py"), *([] if kept else TRAINING.split()), *map(str, flags)]


@pytest.fixture
def training(tmp_path):
    """Start sd_demo.py beside the test."""
    started = []

    def starter(*flags):
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with (tmp_path / "said.txt").open("a") as said:
            started.append(subprocess.Popen(sd_demo(*flags), stdout=said, stderr=said, cwd=tmp_path, env=env))
        return started[-1]

    yield starter
    for process in started:
        process.kill()
        process.wait()


def finished(process, tmp_path):
    assert process.wait(WAIT) == 0, (tmp_path / "said.txt").read_text()


def plainer(http, question) -> int:
    """What a person says who likes the plainer image: the smaller JPEG."""
    images = [Image.open(io.BytesIO(http.get(url).content)) for url in question["images"]]
    return int(np.sign(page.jpeg_kb(images[1]) - page.jpeg_kb(images[0])))


def label(port, answers, process, stop=None) -> int:
    """Answer every question of a run, or the first `stop` ones, as `answers(http, question)` says."""
    given = 0
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=WAIT, trust_env=False) as http:
        while given != stop and process.poll() is None:
            try:
                asked = [q for q in http.get("/state").json()["questions"] if not q["answered"]]
                for q in asked[: stop and stop - given]:
                    reply = http.post("/answer", json={"id": q["id"], "answer": answers(http, q), "name": None})
                    assert reply.status_code == 200
                    given += 1
            except httpx.TransportError:
                pass  # not open yet, or closed at the end
            time.sleep(0.05)
    return given


def what_training_left(out: Path):
    return (out / "lora" / "pytorch_lora_weights.safetensors").read_bytes(), json.loads(
        (out / "metrics.jsonl").read_text().splitlines()[-1]
    )


def test_a_person_who_likes_plain_images_trains_the_weights_of_the_automatic_objective(tiny, training, tmp_path):
    """And no kill -9 changes that: it comes in the middle of the first epoch's labels, and of the second's."""
    automatic, people, port = tmp_path / "automatic", tmp_path / "people", free_port()
    flags = ["--model", tiny, "--reference", "previous"]
    finished(training(*flags, "--objective", "compressibility", "--out", automatic), tmp_path)
    asks = ["--objective", "human", "--watch", "compressibility"]
    process = training(*flags, *asks, "--port", port, "--out", people)
    given = label(port, plainer, process, 3)
    process.kill(), process.wait()
    assert len(lines(people)) == given == 3
    process = training("--resume", people, "--port", port)
    given += label(port, plainer, process, 3)
    process.kill(), process.wait()
    assert len(lines(people)) == given == 6
    process = training("--resume", people, "--port", port)
    given += label(port, plainer, process)
    finished(process, tmp_path)
    assert given == 8 == len(lines(people))
    stored = {tuple(row["images"]): row["h"] for row in lines(people)}
    assert stored == {tuple(row["images"]): row["h"] for row in lines(automatic)} and set(stored.values()) >= {1, -1}
    (weights, told), (expected, score) = what_training_left(people), what_training_left(automatic)
    assert weights == expected
    assert told["watched"] == score["eval_score"] and told["score"] is told["eval_score"] is None
    assert told["loss"] == score["loss"] and told["accuracy"] == score["accuracy"]
    assert all((people / f"{name}.png").exists() for name in ("reward_curve", "progress", "before_after"))


def test_labels_of_another_tool_train_without_a_page(tiny, training, tmp_path):
    out, port = tmp_path / "run", free_port()
    asks = ["--objective", "tags", "--images-per-prompt", "3", "--pairs-per-epoch", "2", "--epochs", "1"]
    process = training("--model", tiny, *asks, "--port", port, "--out", out)
    until(lambda: answering(port))
    process.kill(), process.wait()
    asked = [json.loads(line) for line in (out / "questions.jsonl").read_text().splitlines()]
    assert [len(row["images"]) for row in asked] == [3, 3] and not lines(out)
    rows = [row | {"bad": [True, False, False]} for row in asked]
    (out / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [rows[0], rows[1] | {"bad": 1}]))
    process = training("--resume", out, "--port", port)
    assert process.wait(WAIT) == 1 and not (out / "checkpoint" / "state.pt").exists()
    assert "labels.jsonl, line 2: 'bad' is 1: give a list of 3 booleans" in (tmp_path / "said.txt").read_text()

    (out / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with socket.create_server(("127.0.0.1", port)):  # no page could open there
        finished(training("--resume", out, "--port", port), tmp_path)
    _, told = what_training_left(out)
    assert told["labels"] == 2 and told["accuracy"] is not None and told["loss"] > 0

    # what people saw is never replaced by another image
    file = out / rows[0]["images"][0]
    Image.new("RGB", (64, 64), "red").save(file)
    (out / "checkpoint" / "state.pt").unlink()
    assert training("--resume", out, "--port", port).wait(WAIT) == 1
    assert "cannot be sampled again as people saw it" in (tmp_path / "said.txt").read_text()
    assert Image.open(file).getpixel((0, 0)) == (255, 0, 0)


def test_a_blind_test_shows_no_name_and_counts_wins(tiny, training, tmp_path):
    out, port = tmp_path / "run", free_port()
    finished(training("--model", tiny, "--objective", "compressibility", "--out", out, "--epochs", 1), tmp_path)
    blind = ["--evaluate", out, "--objective", "human", "--eval-images", "5", "--port", port]
    seen = []

    def answers(http, question):
        seen.append(question)
        return [1, -1, 0, None, 1][len(seen) - 1]

    process = training(*blind)
    assert label(port, answers, process, 2) == 2
    process.kill(), process.wait()
    process = training(*blind)  # goes on where it stopped
    assert label(port, answers, process) == 3
    finished(process, tmp_path)
    assert not any(word in json.dumps(seen) for word in ("tuned", "initial"))
    assert len({question["left"] for question in seen}) == 2
    result = json.loads((out / "evaluation.json").read_text())
    assert result["objective"] == "human" and result["pairs"] == 5 and result["votes"] == 4
    assert result["win_rate"] == pytest.approx((2 + 0.5 + 0.5) / 5) and result["more_than_half_of_votes"] == 2 / 5
    assert result["win_rate_interval"][0] < 0.6 < result["win_rate_interval"][1]
    assert (out / "evaluation.png").exists()


def test_chromium_labels_an_epoch_of_the_emoji_model_and_the_next_one_appears(tab, training, tmp_path):
    out, port = tmp_path / "run", free_port()
    process = training("--objective", "human", "--port", port, "--out", out)
    until(lambda: answering(port))
    shown = tab(f"http://127.0.0.1:{port}/")

    def press(key, left):
        shown.wait_for_function("left => state.questions.filter(q => !q.answered).length === left && !busy", arg=left)
        shown.keyboard.press(key)

    press("ArrowLeft", 4), press("ArrowRight", 3)
    shown.wait_for_function("() => state.questions.filter(q => !q.answered).length === 2 && !busy")
    process.kill(), process.wait()
    shown.keyboard.press("ArrowLeft")
    shown.get_by_text("--resume").wait_for()
    assert len(lines(out)) == 2
    process = training("--resume", out, "--port", port)
    press(" ", 2), press("s", 1)
    shown.get_by_text("Training, epoch 1").wait_for()
    press("ArrowLeft", 4)  # the second epoch
    assert (out / "checkpoint" / "state.pt").exists()
    press("ArrowLeft", 3), press("ArrowLeft", 2)
    shown.screenshot(path=os.environ.get("SHOTS", str(tmp_path)) + "/emoji.png")
    press("ArrowLeft", 1)
    shown.get_by_text("The run has finished").wait_for()
    finished(process, tmp_path)
    assert [row["epoch"] for row in lines(out)] == [1] * 4 + [2] * 4
    assert [row["h"] for row in lines(out)[2:4]] == [0, None]
    assert all("CONNECTION_REFUSED" in problem for problem in shown.problems)  # while the program was dead
