"""torchvision imports whether or not its compiled operations load, and nothing is declared where they do."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest


def run(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    paths = [*map(str, folders), *sys.path]
    program = f"import sys; sys.path[:] = {paths!r}\n" + textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_torchvision_imports_and_the_operation_exists_exactly_once() -> None:
    done = run(
        """
        from motte.zoo import vision_ops
        import torch
        torchvision = vision_ops.import_torchvision()
        assert str(torch.ops.torchvision.nms.default._schema).count("Tensor dets") == 1
        # Declared by us exactly where torchvision's own extension did not load.
        assert vision_ops.declared() != torchvision.extension._has_ops()
        assert vision_ops.declare_missing() is None, "a second declaration after the import"
        """
    )
    assert done.returncode == 0, done.stderr


def test_nothing_is_declared_where_the_extension_loads(tmp_path: Path) -> None:
    """A package beside which ``load_library`` succeeds: ours must then leave the names alone."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("loaded = True\n")
    (package / "_C.so").write_bytes(b"")
    done = run(
        """
        import torch
        asked = []
        torch.ops.load_library = asked.append
        from motte.zoo import vision_ops
        assert [path.rsplit("/", 1)[1] for path in asked] == ["_C.so"], asked
        assert not vision_ops.declared()
        assert not hasattr(torch.ops.torchvision, "nms")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("extension", [b"not a library", None])
def test_the_names_are_declared_where_it_does_not_load(tmp_path: Path, extension: bytes | None) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\n@torch.library.register_fake('torchvision::nms')\ndef _(dets, scores, t): return dets\n"
    )
    if extension is not None:
        (package / "_C.so").write_bytes(extension)
    done = run(
        """
        from motte.zoo import vision_ops
        import torch
        assert vision_ops.declared()
        vision_ops.import_torchvision()
        assert hasattr(torch.ops.torchvision, "qnms")
        try:
            torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
        except NotImplementedError:
            pass
        else:
            raise SystemExit("an operation without implementation answered")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_torchvision_of_another_torch_is_refused_in_words(tmp_path: Path) -> None:
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('compiled for another version')\n")
    done = run(
        """
        from motte.errors import UnsupportedError
        from motte.zoo import vision_ops
        try:
            vision_ops.import_torchvision()
        except UnsupportedError as problem:
            assert "compiled for another version" in str(problem) and problem.hint
        else:
            raise SystemExit("imported")
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_an_absent_torchvision_is_refused_in_words() -> None:
    done = run(
        """
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "torchvision" else find(name, *rest)
        class Absent:
            def find_spec(self, name, path=None, target=None):
                if name == "torchvision":
                    raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")
        sys.meta_path.insert(0, Absent())
        from motte.errors import UnsupportedError
        from motte.zoo import vision_ops
        assert not vision_ops.declared()
        try:
            vision_ops.import_torchvision()
        except UnsupportedError as problem:
            assert problem.hint == "pip install torchvision"
        else:
            raise SystemExit("imported")
        """
    )
    assert done.returncode == 0, done.stderr
