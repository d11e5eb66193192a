"""The layout of the repository, read from its source: who imports whom, and how long files are."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP = 6
FLOORS = {
    "d3po": 0,
    "sd": 0,
    "sd.files": 1,
    "sd.seeds": 1,
    "sd.run_folder": 2,
    "sd.tables": 1,
    "sd.prompts": 2,
    "sd.scorers": 1,
    "sd.labels": 1,
    "sd.label_files": 2,
    "sd.figures": 1,
    "sd.pipeline": 1,
    "sd.model": 2,
    "sd.replay": 3,
    "sd.losses": 3,
    "sd.metrics": 2,
    "sd.annotate": 2,
    "sd.feedback": 3,
    "sd.cost": 3,
    "sd.options": 4,
    "sd.report": 2,
    "sd.bench": 2,
    "sd.run": 4,
    "sd_demo": 5,
}
SEARCH_PATH = ".".join(("sys", "path"))  # written so that this file does not contain it
COLUMNS = 100
LINES = {"d3po.py": 420, "sd_demo.py": 300, "README.md": 220}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_files() -> list[Path]:
    """The Python files that git knows, so that a scorer of your own may stand here.

    None where git is not there, or knows none.
    """
    command = ["git", "ls-files", "-z", "*.py"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return []
    return [path for name in done.stdout.split("\0") if (path := ROOT / name).is_file()]


def files_in(*folders: str) -> list[Path]:
    """The Python files beside README.md, and those in these folders."""
    found = []
    for path in own_files() or ROOT.rglob("*.py"):
        top, *inside = path.relative_to(ROOT).parts
        if not inside or top in folders:
            found.append(path)
    return sorted(found)


FILES = files_in("sd", "toy", "tests", "notebooks")
TREES = {path: ast.parse(path.read_text()) for path in FILES}
MODULES = {module_name(path): path for path in files_in("sd", "toy")}


def imports(path: Path) -> set[str]:
    """The modules that a file imports, inside functions too; of the repository, each by its file.

    `from sd import model` is an import of sd.model, and of the package sd only if that has code.
    """
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            package = ".".join([*relative_to(path, node.level), *(node.module or "").split(".")])
            package = package.strip(".")
            names = [f"{package}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else package for name in names}
    return found


def relative_to(path: Path, level: int) -> tuple[str, ...]:
    """The package that the dots of a relative import mean."""
    return path.relative_to(ROOT).parts[:-level] if level else ()


def own_imports(module: str) -> set[str]:
    """The modules of the repository that a module imports, without packages that are empty."""
    return {name for name in imports(MODULES[module]) if name in MODULES and not is_empty(name)}


def is_empty(module: str) -> bool:
    """A package whose __init__.py has nothing, or only a docstring."""
    return all(isinstance(node, ast.Expr) for node in TREES[MODULES[module]].body)


def is_benchmark(module: str) -> bool:
    return module.rpartition(".")[2].startswith("bench_")


def floor(module: str) -> int:
    return TOP if is_benchmark(module) else FLOORS[module]


IN_SD = sorted(name for name in MODULES if name.startswith("sd.") and not is_empty(name))
IN_TOY = sorted(name for name in MODULES if name.startswith("toy"))


def test_each_file_of_the_table_is_there_and_each_other_has_a_floor():
    at_the_top = {name for name in MODULES if "." not in name and not is_empty(name)}
    assert at_the_top == {"d3po", "sd", "sd_demo"}
    rooms = {name for name in IN_SD if not is_benchmark(name)}
    assert rooms | at_the_top == FLOORS.keys()


@pytest.mark.parametrize("module", sorted({*FLOORS, *IN_SD}))
def test_imports_point_down(module):
    for name in own_imports(module):
        if not name.startswith("toy"):
            benchmarks = is_benchmark(name) and is_benchmark(module)
            assert floor(name) < floor(module) or benchmarks, f"{module} imports {name}"


def test_no_circles():
    done = set()

    def visit(module: str, above: tuple[str, ...]):
        assert module not in above, " imports ".join([*above, module])
        if module not in done:
            for name in own_imports(module):
                visit(name, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("module", IN_TOY)
def test_toy_stands_alone(module):
    for name in own_imports(module):
        assert name == "d3po" or name.startswith("toy"), f"{module} imports {name}"


@pytest.mark.parametrize("module", [name for name in IN_SD if not is_benchmark(name)])
def test_sd_takes_only_the_losses_from_the_toy(module):
    for name in own_imports(module):
        is_room = name.startswith("sd.") and not is_benchmark(name)
        assert is_room or name in ("d3po", "toy.baselines"), f"{module} imports {name}"


def test_d3po_needs_only_torch():
    libraries = {name.partition(".")[0] for name in imports(MODULES["d3po"])}
    assert libraries <= {"torch", "typing", "math", "collections", "dataclasses"}


def test_one_script_alone_changes_the_search_path():
    has_it = {
        str(path.relative_to(ROOT))
        for path in FILES
        if SEARCH_PATH in path.read_text() or SEARCH_PATH in from_imports(path)
    }
    assert has_it == {"toy/train_toy.py"}


def from_imports(path: Path) -> set[str]:
    """What `from MODULE import NAME` takes, as MODULE.NAME."""
    nodes = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom)]
    return {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}


@pytest.mark.parametrize("name", LINES)
def test_files_are_as_short_as_promised(name):
    assert len((ROOT / name).read_text().splitlines()) <= LINES[name]


def test_no_line_is_longer_than_100_columns():
    long = [
        f"{path.relative_to(ROOT)}:{number} has {len(line)}"
        for path in [*FILES, ROOT / "README.md"]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert not long, "\n".join(long)
