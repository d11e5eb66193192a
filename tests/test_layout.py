"""The layout of the repository, read from its source: who imports whom."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEARCH_PATH = ".".join(("sys", "path"))  # written so that this file does not contain it
COLUMNS = 100


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


CODE = [ROOT / "d3po.py", ROOT / "sd_demo.py", *ROOT.glob("sd/*.py"), *ROOT.glob("toy/**/*.py")]
TREES = {path: ast.parse(path.read_text()) for path in [*CODE, *ROOT.glob("tests/**/*.py")]}
MODULES = {module_name(path): path for path in CODE}


def imports(module: str) -> set[str]:
    """The modules that a module imports, inside functions too.

    `from sd import model` is an import of sd.model, and of the package sd where that has no such
    module.
    """
    names = set()
    for node in ast.walk(TREES[MODULES[module]]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write imports in full"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {name if name in MODULES else node.module for name in members}
    return names


def test_no_circles():
    done = set()

    def visit(module: str, above: tuple[str, ...]):
        assert module not in above, " imports ".join([*above, module])
        if module not in done:
            for name in sorted(imports(module) & MODULES.keys()):
                visit(name, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_d3po_imports_torch_alone():
    libraries = {name.partition(".")[0] for name in imports("d3po")}
    assert libraries <= {"torch", "typing", "math", "collections"}


def test_the_toy_stands_alone():
    for module in MODULES:
        if module.startswith("toy"):
            own = imports(module) & MODULES.keys()
            assert all(name == "d3po" or name.startswith("toy") for name in own), module


def test_sd_takes_only_the_losses_from_the_toy():
    for module in MODULES:
        if module.startswith("sd") and not module.startswith("sd.bench"):
            from_toy = {name for name in imports(module) if name.startswith("toy")}
            assert from_toy <= {"toy.baselines"}, module


def test_two_files_alone_change_the_search_path():
    """A script finds the repository; a scorer of one's own finds what is beside it."""
    files = {ROOT / "toy" / "train_toy.py", ROOT / "sd" / "scorers.py"}
    module, name = SEARCH_PATH.split(".")
    for path in TREES:
        text = path.read_text()
        changes = SEARCH_PATH in text or f"from {module} import {name}" in text
        assert changes == (path in files), path


def test_no_line_is_longer_than_100_columns():
    for path in [*TREES, ROOT / "README.md"]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            is_table = path.suffix == ".md" and line.startswith("|")  # a row cannot be wrapped
            assert is_table or len(line) <= COLUMNS, f"{path}:{number} has {len(line)} columns"
