"""The order of the stages: a module imports only what stands at its own place or to its left, and nobody imports cli.

The order is read from the one line of ARCHITECTURE.md that starts with ``import order:``; names are separated by
`` < ``. A name is a package (``plan``) or one module of it (``capture.graph``); the most specific fitting one counts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCE = REPOSITORY / "src"
EXEMPT = {"motte", "motte.__main__"}
"""The root re-exports lazily from every stage; ``python -m motte`` is the command line."""


@dataclass(frozen=True)
class Import:
    """``importer`` (a module) names ``imported`` (a module) in ``line``."""

    importer: str
    imported: str
    line: int


def read_order(architecture: str) -> list[str]:
    lines = [line for line in architecture.splitlines() if line.startswith("import order:")]
    if len(lines) != 1:
        raise ValueError(f"ARCHITECTURE.md needs exactly one line that starts with 'import order:', found {len(lines)}")
    names = [name.strip().strip("`") for name in lines[0].removeprefix("import order:").split(" < ")]
    if len(set(names)) != len(names) or not all(names):
        raise ValueError("a name is empty or stands twice in the import order")
    return names


def modules_of(source: Path) -> dict[str, Path]:
    found = {}
    for path in sorted((source / "motte").rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, modules: set[str]) -> Iterator[Import]:
    """Every module of ours that ``path`` names: in import statements, at any depth, or as a string that is exactly a
    module's dotted name (what ``import_module`` and lazy ``__getattr__`` tables use)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "motte":
                    yield Import(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: relative imports hide the stage; write the full name")
            if node.module is None or node.module.split(".")[0] != "motte":
                continue
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield Import(module, inner if inner in modules else node.module, node.lineno)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in modules - {"motte"}:
            yield Import(module, node.value, node.lineno)


def place(module: str, order: list[str]) -> int | None:
    """Where ``module`` stands in the order, by the longest name that fits; None when no name does."""
    parts = module.split(".")[1:]
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in order:
            return order.index(name)
    return None


def violations(source: Path, order: list[str]) -> list[str]:
    modules = modules_of(source)
    found = []
    for module, path in modules.items():
        here = place(module, order)
        if here is None and module not in EXEMPT:
            found.append(f"{module}: not in the import order")
        for item in imports_of(module, path, set(modules)):
            at = f"{path.relative_to(source)}:{item.line}"
            if module != "motte.__main__" and _inside_cli(item.imported) and not _inside_cli(module):
                found.append(f"{at}: {module} imports {item.imported}: nobody imports cli")
            elif module in EXEMPT:
                continue
            elif item.imported == "motte":
                if not module.startswith("motte.cli"):
                    found.append(f"{at}: {module} imports the root package, which stands for every stage")
            elif here is not None:
                there = place(item.imported, order)
                if there is None or there > here:
                    found.append(f"{at}: {module} imports {item.imported}, which stands to its right")
    return list(dict.fromkeys(found))


def _inside_cli(module: str) -> bool:
    return module == "motte.cli" or module.startswith("motte.cli.")


def test_every_module_imports_only_to_its_left() -> None:
    order = read_order((REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert violations(SOURCE, order) == []


def test_every_name_of_the_order_exists() -> None:
    order = read_order((REPOSITORY / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    modules = modules_of(SOURCE)
    assert [name for name in order if f"motte.{name}" not in modules] == []


# --- the gate itself can fail --------------------------------------------------------------------------------------
ORDER = ["errors", "capture.graph", "plan", "capture", "cli"]


def plant(tmp_path: Path, files: dict[str, str]) -> Path:
    base = {
        "motte/__init__.py": "",
        "motte/errors.py": "",
        "motte/capture/__init__.py": "",
        "motte/capture/graph.py": "",
    }
    base |= {"motte/plan/__init__.py": "", "motte/cli/__init__.py": ""}
    for name, text in (base | files).items():
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("motte/errors.py", "import motte.plan"),
        ("motte/errors.py", "from motte import plan"),
        ("motte/errors.py", "from motte.plan import thing"),
        ("motte/errors.py", "def f():\n    from motte.capture.graph import Graph"),
        ("motte/errors.py", "if TYPE_CHECKING:\n    import motte.plan"),
        ("motte/errors.py", "import_module('motte.capture.graph')"),
        ("motte/capture/graph.py", "from motte.capture import thing"),
        ("motte/plan/x.py", "from motte.capture import thing"),
        ("motte/plan/x.py", "from motte import capture"),
        ("motte/capture/x.py", "import motte"),
        ("motte/capture/x.py", "from motte import load"),
        ("motte/capture/x.py", "from motte.cli import main"),
        ("motte/__init__.py", "from motte.cli import main"),
        ("motte/stray.py", ""),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, file: str, text: str) -> None:
    found = violations(plant(tmp_path, {file: text}), ORDER)
    assert len(found) == 1, found


def test_allowed_imports_pass(tmp_path: Path) -> None:
    files = {
        "motte/__init__.py": "from motte.capture import thing",
        "motte/__main__.py": "from motte.cli import main",
        "motte/plan/x.py": "from motte.capture.graph import Graph\nfrom motte import errors\nfrom motte.plan import y",
        "motte/cli/__init__.py": "import motte\nimport motte.capture\n'the word motte.nowhere is no module'",
    }
    assert violations(plant(tmp_path, files), ORDER) == []


def test_a_relative_import_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relative imports"):
        violations(plant(tmp_path, {"motte/plan/x.py": "from . import y"}), ORDER)


@pytest.mark.parametrize(
    "text", ["", "import order: a < a", "import order: a <  < b", "import order: a\nimport order: b"]
)
def test_a_missing_or_muddled_order_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="import order"):
        read_order(text)


def test_the_order_is_read() -> None:
    text = "words\n\nimport order: errors < `capture.graph` < plan\nmore"
    assert read_order(text) == ["errors", "capture.graph", "plan"]
