"""The labelling page: people answer the questions of a run in a browser, on this machine only.

All addresses begin with http://127.0.0.1:PORT/TOKEN:

    GET  /                 the page, annotate.html
    GET  /state?name=Ann   what Ann is asked, what she answered, and what the run is doing
    GET  /images/KEY/K     image K of a question that is asked now
    GET  /held_out/E/N     image N of the same prompts and noises, after epoch E (0: before)
    POST /answer           {"id": ID, "name": "Ann" or null, "answer": as in sd/labels.py}
    POST /undo             {"id": ID, "name": as above}: take the last answer back before training
    POST /end              {"id": ID of a question, "end": "questions" or "run"}: skip what is left

ID is KEY and how often this person's answer has changed, so that a page that is behind is refused.
The server listens on 127.0.0.1. Who lacks the token, another user of the machine say, is refused,
and so is what a page of another site sends, under its own name (Origin, against CSRF) and under a
name that leads here (Host, against DNS rebinding).
"""

import json
import math
import os
import secrets
import socket
import threading
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as HTTPError  # HTTPError(status, message)
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.routing import Route
from tqdm import tqdm

from sd import UserError, labels
from sd.figures import held_out_file, held_out_numbers
from sd.files import read_lines, replace, save_lines
from sd.seeds import RandomPurpose, seeded_generator

PORTS = range(7860, 7960)  # tried in turn where no port is given
MAX_REQUEST_BYTES = 10_000  # far more than an answer needs
TOKEN_FILE = "token"  # in the run folder, for its owner's eyes; a page outlives a restart
NOBODY = "(nobody"  # stands for a person whose answer was not waited for
FAREWELL = "The run has finished. You can close this page."
UNDO_SECONDS = 4  # between the last answer and training
FAREWELL_SECONDS = 1.5  # open pages ask once a second, and learn that the run has ended
CONTENT_POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = [  # of every response, errors too
    ("Content-Security-Policy", CONTENT_POLICY),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
]


class Question(NamedTuple):
    row: dict  # line of labels.jsonl whose answer is null
    left: int  # which of two images stands on the left
    answers: dict  # by annotator
    changes: Counter  # of each annotator's answer, since this start


class AnnotationServer:
    """Asks people about images of a run, on a page that opens with the first question.

    run: the folder with labels.jsonl and images/. annotators: answers that each question needs,
    from as many people. seed: of left and right. port: None for the first free one from 7860.
    guide: what the page asks; None for its own words. story: of a blind test, the run whose images
    before and after training the page shows. `finished`: somebody wants the run to end.
    """

    def __init__(
        self,
        run: Path,
        annotators: int,
        seed: int,
        port: int | None = None,
        guide: str | None = None,
        story: Path | None = None,
    ):
        self.run, self.annotators, self.seed, self.port = run, annotators, seed, port
        self.story, self._blind = story or run, story is not None
        self.file, self.url, self.kappa = run / "labels.jsonl", None, math.nan
        self.guide, self.finished, self._progress = guide, False, {}
        self._story, self._code = {}, None
        self._server = self._thread = None
        self._changed = threading.Condition()  # guards the three below
        self._questions: dict[str, Question] = {}  # by id, in order
        self._status, self._ended = "", False

    def ask(self, questions: list[dict], progress: dict | None = None) -> list[dict]:
        """Wait until each question has its answers; return the questions as the majority answers.

        questions: lines of labels.jsonl, of one epoch, whose answer is null. Those that nobody
        wants to answer any more ("Train now") are skipped. progress: what the page shows of the
        whole run: epoch, epochs, before (answers), total. Sets `kappa`. Raises UserError for a
        labels.jsonl with flaws, and where no page can be opened.
        """
        self._progress = progress or {}
        if not questions:
            return []
        folder = (self.run / "images").resolve()
        for image in (image for row in questions for image in row["images"]):
            if folder not in (self.run / image).resolve().parents:
                raise ValueError(f"{image} is not in {folder}")
        answers = list(labels.read_labels(self.file, questions).values())
        if any(len(given) < self.annotators for given in answers):
            self._wait_for_people(questions, answers)

        field = labels.answer_field(questions[0])
        votes = [[v for v in given.values() if v is not None] for given in answers]
        if field == "bad":  # each image is an item to agree on
            votes = [list(image) for tags in votes for image in zip(*tags, strict=True)]
        self.kappa = labels.fleiss_kappa(votes)
        rows = [
            {**row, field: labels.majority(row, list(given.values()))}
            for row, given in zip(questions, answers, strict=True)
        ]
        if self.annotators > 1 and not any(map(labels.has_preference, rows)):
            words = "you agree on no question, so there is nothing to train on"
            self.status(f"Epoch {rows[0]['epoch']}: {words}")
            tqdm.write(self._status)
        return rows

    def status(self, text: str) -> None:
        """What the page says while it has no question, beside what the run has shown so far."""
        with self._changed:
            self._status, self._story = text, read_story(self.story)

    def close(self, farewell: str = FAREWELL, code: str | None = None) -> None:
        """Tell open pages how the run has ended, with code that uses it, and serve no more."""
        if self._server is not None:
            self.status(farewell)
            with self._changed:
                self._code, self._ended = code, True
            time.sleep(FAREWELL_SECONDS)
            self._server.should_exit = True
            self._thread.join()
            self._server = None

    def _wait_for_people(self, questions: list[dict], answers: list[dict]) -> None:
        epoch = questions[0]["epoch"]
        save_lines(self.run / "questions.jsonl", questions)
        with self.file.open("ab") as file:  # or the next answer would join a line cut short
            file.truncate(len(labels.whole_lines(self.file)))
        sides = seeded_generator(self.seed, RandomPurpose.SIDES, epoch)
        left = torch.randint(2, (len(questions),), generator=sides).tolist()
        asked = [
            Question(*parts, Counter()) for parts in zip(questions, left, answers, strict=True)
        ]
        start = secrets.token_hex(8)  # a page of an earlier start cannot answer in this one
        with self._changed:
            self._questions = {f"{start}-{n}": question for n, question in enumerate(asked)}
        self._open()
        self.status("")
        people = f"{self.annotators} to answer at {self.url}"
        what = "Blind test" if self._blind else f"Epoch {epoch}"
        tqdm.write(f"{what}: {len(questions)} questions for {people}")
        with self._changed:
            self._hurry = False
            while True:  # the last answer can be taken back for a moment
                self._changed.wait_for(lambda: self._missing() == 0)
                self._changed.wait_for(lambda: self._missing() > 0 or self._hurry, UNDO_SECONDS)
                if self._missing() == 0:
                    break
            self._questions = {}
            self._status = "Comparing" if self._blind else f"Training, epoch {epoch}"

    def _missing(self) -> int:
        """Answers that are still to come."""
        return sum(max(self.annotators - len(q.answers), 0) for q in self._questions.values())

    def _open(self) -> None:
        if self._server is not None:
            return
        listener = listen(self.port)
        port = listener.getsockname()[1]
        token = read_token(self.run / TOKEN_FILE)
        self.url = f"http://127.0.0.1:{port}/{token}/"
        page = HTMLResponse(Path(__file__).with_name("annotate.html").read_bytes())
        routes = [
            Route("/", page, methods=["GET"]),  # and HEAD
            Route("/state", self._get_state),
            Route("/images/{key}/{k}", self._get_image),
            Route("/held_out/{epoch:int}/{number:int}", self._get_held_out),
            Route("/answer", self._post_answer, methods=["POST"]),
            Route("/undo", self._post_undo, methods=["POST"]),
            Route("/end", self._post_end, methods=["POST"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPError: error_response})
        app.router.redirect_slashes = False
        app.add_middleware(GuardMiddleware, token=token)
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])
        http = {"http": "h11", "ws": "none", "lifespan": "off"}  # h11 refuses two Host headers
        quiet = {"log_config": None, "log_level": "error", "timeout_graceful_shutdown": 1}
        config = uvicorn.Config(app, headers=SECURITY_HEADERS, **http, **quiet)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listener],), daemon=True)
        self._thread.start()
        tqdm.write(f"From another machine: ssh -L {port}:127.0.0.1:{port} THIS-MACHINE")

    async def _get_state(self, request: Request):
        name = self._check_name(request.query_params.get("name") or None)
        several, asked = self.annotators > 1, []
        with self._changed:
            for key, (row, left, answers, changes) in self._questions.items():
                if name in answers or len(answers) < self.annotators:
                    images = [f"images/{key}/{k}" for k in range(len(row["images"]))]
                    question = {"id": f"{key}-{changes[name]}", "prompt": row["prompt"]}
                    question |= {"images": images, "left": left}
                    answer = {"answered": name in answers, "answer": answers.get(name)}
                    asked.append({**question, "kind": labels.answer_field(row), **answer})
            is_open = any(not question["answered"] for question in asked) and (name or not several)
            is_last = self._is_last(name)
            wait = f"Thank you. Others have {self._missing()} answers to give."
            if is_last:
                then = "The result comes" if self._blind else "Training starts"
                wait = f"Thank you. {then} in a moment."
            state = {
                "questions": asked if is_open else [],
                "status": wait if self._questions else self._status,
                "ended": self._ended,
                "named": several,
                "guide": self.guide,
                "last": self._id(next(reversed(self._questions)), name) if is_last else None,
                "progress": self._progress,
                "code": self._code,
                **self._story,
            }
        return JSONResponse(state, headers={"Cache-Control": "no-store"})

    async def _get_image(self, request: Request):
        images = self._find_question(request.path_params["key"]).row["images"]
        files = {str(k): self.run / image for k, image in enumerate(images)}
        return image_response(files.get(request.path_params["k"]))

    async def _get_held_out(self, request: Request):
        return image_response(held_out_file(self.story, **request.path_params))

    async def _post_answer(self, request: Request):
        """Keep an answer: it is on disk when the reply goes out."""
        sent = await read_json(request)
        if not isinstance(sent, dict) or sent.keys() != {"id", "name", "answer"}:
            raise HTTPError(400, "send an object of id, name and answer")
        with self._changed:
            name, answer = self._check_name(sent["name"]), sent["answer"]
            if name is None and self.annotators > 1:
                raise HTTPError(400, "say your name first")
            key, question = self._find_answerable(sent["id"], name)
            if problem := labels.validate_answer(question.row, answer):
                raise HTTPError(400, problem)
            left = {"left": question.left} if labels.answer_field(question.row) == "h" else {}
            self._keep(question, name, answer, **left)
            self._changed.notify_all()
            return JSONResponse({"saved": True, "id": self._id(key, name)})

    async def _post_end(self, request: Request):
        """Skip what is not answered: "Train now"; and let the run end after it: "Finish"."""
        sent = await read_json(request)
        if not isinstance(sent, dict) or sent.get("end") not in ("questions", "run"):
            raise HTTPError(400, 'send an object of id and end: "questions" or "run"')
        with self._changed:
            self._find_question(str(sent.get("id")).rpartition("-")[0])
            finished, questions = sent["end"] == "run", self._questions.values()
            forget = finished and not any(question.answers for question in questions)
            for question in questions:
                for missing in range(self.annotators - len(question.answers)):
                    name = f"{NOBODY} {missing + 1})" if self.annotators > 1 else None
                    if forget:  # a run that is resumed asks again
                        question.answers[name] = None
                    else:
                        self._keep(question, name, None)
            self.finished, self._hurry = finished, True
            self._changed.notify_all()
        return JSONResponse({"ended": True})

    def _keep(self, question: Question, name: str | None, answer, **more) -> None:
        annotator = {} if name is None else {"annotator": name}
        field = labels.answer_field(question.row)
        append_safely(self.file, {**question.row, field: answer, **annotator, **more})
        question.answers[name] = answer
        question.changes[name] += 1

    async def _post_undo(self, request: Request):
        sent = await read_json(request)
        if not isinstance(sent, dict) or sent.keys() != {"id", "name"}:
            raise HTTPError(400, "send an object of id and name")
        with self._changed:
            name = self._check_name(sent["name"])
            _, question = self._find_answerable(sent["id"], name)
            question.answers.pop(name, None)
            question.changes[name] += 1
            self._changed.notify_all()
        return JSONResponse({"undone": True})

    def _is_last(self, name: str | None) -> bool:
        """Whether all is answered, and this person may still take an answer back."""
        answered = [name in question.answers for question in self._questions.values()]
        return bool(answered) and answered[-1] and self._missing() == 0

    def _id(self, key: str, name: str | None) -> str:
        return f"{key}-{self._questions[key].changes[name]}"

    def _find_answerable(self, id, name: str | None) -> tuple[str, Question]:
        """A question by its ID, and its KEY. Raises HTTPError where this person's has changed."""
        key = str(id).rpartition("-")[0]
        question = self._find_question(key)
        if id != self._id(key, name):
            raise HTTPError(409, "This was answered on another page: here is what it says now.")
        return key, question

    def _find_question(self, key: str) -> Question:
        with self._changed:
            if key not in self._questions:
                late = "This answer came too late: training has begun without it. Thank you!"
                raise HTTPError(409, late)
            return self._questions[key]

    def _check_name(self, name) -> str | None:
        if name is None:
            return None
        if not (isinstance(name, str) and name.isprintable() and 0 < len(name.strip()) <= 40):
            raise HTTPError(400, "a name has 1 to 40 printable characters")
        if self.annotators == 1:
            raise HTTPError(400, "one person labels this run, without a name")
        name = " ".join(name.split())
        with self._changed:  # "ann " is Ann
            given = [n for q in self._questions.values() for n in q.answers]
        known = {n.casefold(): n for n in given if not n.startswith(NOBODY)}
        if name.casefold() not in known and len(known) >= self.annotators:
            people = ", ".join(sorted(known.values()))
            raise HTTPError(403, f"All {self.annotators} places are taken, by {people}. Thank you!")
        return known.get(name.casefold(), name)


class GuardMiddleware:
    """Refuses who lacks the token, and what a page of another site sends.

    A browser puts that site's name into Origin. The token is taken off the path.
    """

    def __init__(self, app, token: str):
        self.app, self.token = app, token.encode()

    async def __call__(self, scope, receive, send):
        headers = Request(scope).headers
        own = f"http://{headers['host']}"
        token, slash, path = scope["path"].removeprefix("/").partition("/")
        refusal = None
        if not secrets.compare_digest(token.encode(), self.token) or not slash:
            refusal = "open the whole address that the program printed: it has a token"
        if any(origin != own for origin in headers.getlist("origin")):
            refusal = "requests of other sites are refused"
        if refusal:
            await JSONResponse({"error": refusal}, 403)(scope, receive, send)
        else:
            await self.app({**scope, "path": f"/{path}"}, receive, send)


def read_token(file: Path) -> str:
    """The secret part of the page's address, made once a run. Only the user may read the file."""
    if not file.exists():
        replace(file, lambda part: part.write_text(secrets.token_urlsafe(16)), mode=0o600)
    return file.read_text()


def read_story(run: Path) -> dict:
    """What a run has shown so far, for its page.

    shown: addresses of held-out images before and now; agreement: [epoch, share of its answers
    that the model would have given before it was trained on them]; warnings of the last epoch.
    """
    rows = read_lines(run / "metrics.jsonl")
    drawn = [row["epoch"] for row in rows if held_out_file(run, row["epoch"], 0).exists()]
    shown = [
        [f"held_out/{epoch}/{n}" for n in held_out_numbers(run, epoch)]
        for epoch in ((0, drawn[-1]) if drawn else ())
    ]
    known = [[row["epoch"], row["accuracy"]] for row in rows if row["accuracy"] is not None]
    return {
        "shown": shown,
        "agreement": known,
        "warnings": rows[-1].get("warnings", []) if rows else [],
    }


def image_response(file: Path | None) -> FileResponse:
    if file is None or not file.is_file():
        raise HTTPError(404, "there is no such image")
    return FileResponse(file, media_type="image/png", headers={"Cache-Control": "private"})


async def error_response(request: Request, error: HTTPError):
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def read_json(request: Request):
    """What a request holds. Raises HTTPError unless it is JSON, also by its header, and small."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPError(415, "send application/json")  # pages of other sites cannot
    length = request.headers.get("content-length", "")
    if not length.isdecimal() or int(length) > MAX_REQUEST_BYTES:
        raise HTTPError(413, f"send at most {MAX_REQUEST_BYTES} bytes, and say how many")
    try:
        return json.loads((await request.body()).decode())
    except ClientDisconnect:
        raise HTTPError(400, "the request broke off") from None
    except (ValueError, RecursionError):
        raise HTTPError(400, "this is not JSON") from None


def append_safely(file: Path, row: dict) -> None:
    """Add a line to a file: on disk when this returns. Raises HTTPError, without half a line."""
    line, end = json.dumps(row).encode() + b"\n", file.stat().st_size
    try:
        with file.open("ab", buffering=0) as opened:
            if opened.write(line) < len(line):
                raise OSError(28, "the disk is full")
            os.fsync(opened.fileno())
    except OSError as error:
        os.truncate(file, end)
        raise HTTPError(500, f"{file} cannot be written ({error.strerror})") from error


def listen(port: int | None) -> socket.socket:
    """A socket of 127.0.0.1 at a port, or at the first free one. Raises UserError without any."""
    for number in PORTS if port is None else [port]:
        try:
            return socket.create_server(("127.0.0.1", number))
        except (OSError, OverflowError):
            continue
    wanted = f"{PORTS[0]} or after" if port is None else port
    raise UserError(f"no page opens at port {wanted}: give another --port")
