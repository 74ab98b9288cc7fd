"""What no source file of ours may hold: unpickling, evaluated text, assert as validation, 600 lines, stubs."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = sorted((REPOSITORY / "src").rglob("*.py"))
PYTHON = sorted(
    path for folder in ("src", "tests", "benchmarks", "scripts") for path in (REPOSITORY / folder).rglob("*.py")
)
MAX_LINES = 600
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
Rule = Callable[[ast.Module], Iterator[str]]


def _called(node: ast.Call) -> str:
    """The dotted name of what is called, as written; an empty string for anything else."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def pickle_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] in UNPICKLERS for name in names):
            yield f"line {node.lineno}: imports {names}"


def unpickling(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            loaders = {alias.name for alias in node.names} & {"load", "loads", "Unpickler"}
            if loaders and node.module in (UNPICKLERS | {"torch"}):
                yield f"line {node.lineno}: imports {sorted(loaders)} of {node.module} under a name of its own"
        if not isinstance(node, ast.Call):
            continue
        called = _called(node)
        options = {word.arg: word.value for word in node.keywords}
        if called.split(".")[0] in UNPICKLERS and called.split(".")[-1] in ("load", "loads", "Unpickler"):
            yield f"line {node.lineno}: calls {called}"
        if called == "torch.load" or called.endswith("load_state_dict_from_url"):
            safe = options.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                yield f"line {node.lineno}: {called} without weights_only=True"
        allow = options.get("allow_pickle")
        denied = isinstance(allow, ast.Constant) and allow.value is False
        if "load" in called and allow is not None and not denied:
            yield f"line {node.lineno}: {called} with allow_pickle"


def evaluation(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) in ("eval", "exec", "compile", "__import__", "builtins.eval"):
            yield f"line {node.lineno}: calls {_called(node)}"


def assertion(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield f"line {node.lineno}: assert vanishes under -O; raise an error of motte.errors"


def unfinished(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
            yield f"line {node.lineno}: raises NotImplementedError"


def unseeded_secret(tree: ast.Module) -> Iterator[str]:
    # Keys, nonces and bundle ids come from the operating system; `random` is for nothing here.
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names):
            yield f"line {node.lineno}: imports random; use secrets, or a seeded numpy Generator in measure"
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            yield f"line {node.lineno}: imports random; use secrets, or a seeded numpy Generator in measure"


RULES: list[Rule] = [pickle_modules, unpickling, evaluation, assertion, unfinished, unseeded_secret]


def broken(rule: Rule, paths: list[Path], root: Path) -> list[str]:
    trees = ((path, ast.parse(path.read_text(encoding="utf-8"), str(path))) for path in paths)
    return [f"{path.relative_to(root)}: {what}" for path, tree in trees for what in rule(tree)]


def too_long(paths: list[Path]) -> list[str]:
    return [str(path) for path in paths if len(path.read_text(encoding="utf-8").splitlines()) > MAX_LINES]


def of_forbidden_name(paths: list[Path]) -> list[str]:
    return [
        str(path)
        for path in paths
        if {"utils", "util", "common", "helpers", "misc"} & set(path.with_suffix("").parts[-3:])
    ]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_no_source_breaks_the_rule(rule: Rule) -> None:
    assert SOURCES
    assert broken(rule, SOURCES, REPOSITORY) == []


def test_nothing_is_unpickled_outside_src_either() -> None:
    # Tests may write a hostile pickle, to see it refused; nobody reads one.
    assert broken(unpickling, PYTHON, REPOSITORY) == []


def test_no_file_is_over_its_size() -> None:
    assert too_long(PYTHON) == []


def test_no_drawer_for_odds_and_ends() -> None:
    assert of_forbidden_name(SOURCES) == []


def test_file_names_of_tests_are_unique() -> None:
    names = [path.name for path in (REPOSITORY / "tests").rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


# --- the gates themselves can fail ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (pickle_modules, "import pickle"),
        (pickle_modules, "def f():\n    from cloudpickle import loads"),
        (pickle_modules, "import joblib.numpy_pickle"),
        (unpickling, "pickle.loads(data)"),
        (unpickling, "pickle.Unpickler(file)"),
        (unpickling, "from pickle import loads"),
        (unpickling, "import torch\ntorch.load(path)"),
        (unpickling, "import torch\ntorch.load(path, weights_only=False)"),
        (unpickling, "import torch\ntorch.load(path, weights_only=flag)"),
        (unpickling, "from torch import load"),
        (unpickling, "np.load(path, allow_pickle=flag)"),
        (unpickling, "np.load(path, allow_pickle=True)"),
        (evaluation, "eval('1')"),
        (evaluation, "def f():\n    exec(text)"),
        (evaluation, "__import__('os')"),
        (assertion, "assert x"),
        (unfinished, "raise NotImplementedError"),
        (unfinished, "raise NotImplementedError('later')"),
        (unseeded_secret, "import random"),
        (unseeded_secret, "from random import randbytes"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, rule: Rule, text: str) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(text, encoding="utf-8")
    assert len(broken(rule, [planted], tmp_path)) == 1


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_harmless_code_passes(tmp_path: Path, rule: Rule) -> None:
    planted = tmp_path / "harmless.py"
    planted.write_text(
        "import re, torch, numpy as np\n"
        "model.eval()\npattern = re.compile('x')\nengine.compile(graph)\n"
        "torch.load(path, weights_only=True)\nnp.load(path, allow_pickle=False)\nraise ValueError('no')\n",
        encoding="utf-8",
    )
    assert broken(rule, [planted], tmp_path) == []


def test_a_long_file_and_a_drawer_are_found(tmp_path: Path) -> None:
    long = tmp_path / "long.py"
    long.write_text("x = 1\n" * (MAX_LINES + 1), encoding="utf-8")
    just = tmp_path / "just.py"
    just.write_text("x = 1\n" * MAX_LINES, encoding="utf-8")
    assert too_long([long, just]) == [str(long)]
    drawers = [Path("src/motte/utils.py"), Path("src/motte/helpers/x.py"), Path("src/motte/plan/plan.py")]
    assert of_forbidden_name(drawers) == [str(path) for path in drawers[:2]]
