"""Files that are at all times the old one or the new one; JSON lines; the lock of a run."""

import json
import math
import os
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError

from sd import UserError

ROOT = Path(__file__).resolve().parents[1]
LORA_FILE = "pytorch_lora_weights.safetensors"


@contextmanager
def writing(path: Path):
    """What goes wrong inside is a UserError about this file; torch and safetensors have others."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None)
        reason = reason or f"is the disk full? {str(error).partition(chr(10))[0]}"
        file = getattr(error, "filename", None) or path
        message = f"{file} cannot be written ({reason}): free disk space, or change its permissions"
        raise UserError(message) from error


def replace(path: Path, write: Callable[[Path], object], *, mode: int = 0o666) -> None:
    """Let `write` make a file beside `path`, then put it in its place; UserError if it cannot.

    mode: who may read and write the file, as far as the user's umask lets them.
    """
    part = path.with_name(path.name + ".part")
    with writing(path):
        try:
            part.unlink(missing_ok=True)
            part.touch(mode)
            mode = part.stat().st_mode  # without the umask; safetensors' own is 0600
            write(part)
            with suppress(OSError):  # some network drives refuse it
                part.chmod(mode)
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink()
            raise


def to_json(content, **layout) -> str:
    """JSON, in which a number that is not finite is null."""
    return json.dumps(finite(content), allow_nan=False, **layout)


def finite(content):
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def save_text(path: Path, content: str) -> None:
    replace(path, lambda part: part.write_text(content, "utf-8"))


def save_json(path: Path, content: dict) -> None:
    save_text(path, to_json(content, indent=2) + "\n")


def save_lines(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    save_text(path, "".join(to_json(row) + "\n" for row in rows))


def save_tensors(path: Path, content: dict) -> None:
    import torch  # slow, and --help needs none

    replace(path, lambda part: torch.save(content, part))


def save_image(path: Path, image: Image.Image) -> None:
    replace(path, lambda part: image.save(part, "PNG"))


def read_file(path: Path, read: Callable[[Path], object]):
    """What `read` makes of a file. Raises UserError where it is damaged, or another's."""
    try:
        return read(path)
    except Exception as error:  # of many kinds, as a damaged file may hold anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} cannot be used ({reason}): restore a copy of it") from error


def load_tensors(path: Path, device="cpu"):
    import torch

    return read_file(path, lambda file: torch.load(file, map_location=device))


def append(path: Path, rows: list[dict]) -> None:
    """Add one JSON object a line, and flush."""
    with writing(path), path.open("a") as file:
        file.writelines(to_json(row) + "\n" for row in rows)


def read_json(path: Path) -> dict:
    return json.loads(path.read_bytes())


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a file, if it is there, without a last line that a kill cut short."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append({**json.loads(line)})
        except (ValueError, TypeError) as error:
            message = f"{path}, line {number}: this is no JSON object ({error}): correct the line"
            raise UserError(message) from error
    return rows


def keep_rows(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop rows from a file of JSON lines, and with them a last line that a kill cut short."""
    save_lines(path, [row for row in read_lines(path) if keep(row)])


class Lock:
    """One process at a time owns a run. The system lets go of the lock of a killed process."""

    def __init__(self):
        self.lock = None

    def acquire(self, folder: Path) -> None:
        """Own a run, if it is not ours already; UserError where another process does."""
        if self.lock:
            return
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"{folder} is in use by another process: wait for it, or stop it; if there is "
                f"none, on no other machine either, delete {folder / '.lock'}"
            ) from None
        except OSError as error:
            raise UserError(
                f"{folder} cannot be written ({error.strerror}): change its permissions"
            ) from error
        self.lock = lock

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        if self.lock:
            self.lock.release()
