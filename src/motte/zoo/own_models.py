"""A user's own model: ``path/to/file.py:factory``, a function or class that takes no argument and returns an nn.Module.

Importing the file **runs it**, with all the rights of whoever typed the command. It happens at the owner's only, when a
model is captured; neither a bundle nor a worker ever holds or runs Python code of a model.

Optional companions in the same file, all read by name:

``example_inputs``
    a function -> one tensor, a tuple of tensors, or a dict of tensors by parameter name of ``forward``.
``preprocessing``
    a dict as in the signature (``{"kind": "image", "colour": "rgb", ...}``) or the dataclass itself.
``labels``
    a list of the class names of the first output.
``dims``
    which axes may change: ``{"x": {0: "batch"}}``, by parameter of ``forward``. ``{}``: none. Without it, axis 0 of
    every input is the batch where all inputs have the same extent there.
``dim_ranges``
    inclusive ranges of named dimensions: ``{"batch": (1, 64)}``.

The example comes from ``example_inputs``, from ``input_shape`` (one input without its batch axis, float32), or from an
image ``preprocessing``, in this order.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from motte.capture.graph import Dim
from motte.capture.signature import ImagePreprocessing, Signature, TextPreprocessing, from_json
from motte.errors import GraphError, InputError, MotteError
from motte.limits import MAX_GRAPH_DIMS, MAX_NAME_BYTES
from motte.zoo.models import BATCH, DEFAULT_RANGE, EXAMPLE_BATCH, Axes, BuiltModel, image_example
from motte.zoo.weights import WeightsChoice, load_state, read_state, seeded

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
Preprocessing = ImagePreprocessing | TextPreprocessing | None
_SHAPE_HINT = "add example_inputs() to the file, or give --input-shape 3,224,224"


def is_path(name: str) -> bool:
    """Whether ``name`` is meant as a file of the user's and not as a name of the zoo."""
    return ".py:" in name or name.endswith(".py")


def parse_shape(text: str) -> tuple[int, ...]:
    """``"3,224,224"`` -> (3, 224, 224), the shape of one input without its batch axis.

    Raises:
        InputError: not positive integers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < len(part) < 9 and int(part) > 0 for part in parts):
        raise InputError("not a shape", expected="positive integers such as 3,224,224", got=repr(text)[:80])
    if len(parts) >= MAX_GRAPH_DIMS:
        raise InputError("too many dimensions", expected=f"at most {MAX_GRAPH_DIMS - 1}", got=str(len(parts)))
    return tuple(int(part) for part in parts)


def build(name: str, weights: WeightsChoice, *, input_shape: tuple[int, ...] | None = None) -> BuiltModel:
    """Import the file, call the factory, load the chosen weights; **runs the user's code**.

    Without a choice the weights are those that the factory gave the model (origin ``file``). ``random_seed`` seeds
    torch before the factory is called (origin ``random``).

    Raises:
        InputError: no such file or factory, an exception in it (with its line), or companions of another form.
    """
    path, _ = _split(name)
    with _importable(path.parent):
        module, model = _made(name, weights.random_seed)
        example = _example_of(module, path)
    model.eval()
    origin = "file" if weights.random_seed is None else "random"
    if weights.file is not None:
        load_state(model, read_state(weights.file), where=str(weights.file))
    return _assemble(name, model, module, example, origin, input_shape)


def make(name: str, *, seed: int) -> nn.Module:
    """Import the file and call the factory under torch's seed ``seed``; **runs the user's code**. No companion is read.

    Raises:
        InputError: no such file or factory, an exception in it (with its line), or no module from it.
    """
    with _importable(_split(name)[0].parent):
        return _made(name, seed)[1]


def _made(name: str, seed: int | None) -> tuple[ModuleType, nn.Module]:
    path, factory_name = _split(name)
    module = _import(path)
    factory = getattr(module, factory_name, None)
    if not callable(factory) or _is_module(factory):
        raise InputError(
            "no factory of that name",
            where=f"{path}:{factory_name}",
            expected="a function or class that returns an nn.Module",
            got=type(factory).__name__ if factory is not None else "nothing",
        )
    with seeded(seed):
        model = _call(factory, f"{path}:{factory_name}")
    if not _is_module(model):
        raise InputError("the factory returned no nn.Module", where=name, got=type(model).__name__)
    return module, model


def _assemble(
    name: str, model: nn.Module, module: ModuleType, example: object, origin: str, input_shape: tuple[int, ...] | None
) -> BuiltModel:
    path, factory_name = _split(name)
    title = f"{path.stem}.{factory_name}"
    signature = Signature(title, origin, _preprocessing(module, path), _labels(module, path))
    args, kwargs = _inputs(example, signature.preprocessing, input_shape, name)
    parameters = list(inspect.signature(model.forward).parameters)
    if len(args) > len(parameters) or not set(kwargs) <= set(parameters):
        raise InputError(
            "example inputs do not fit forward()",
            where=name,
            expected=", ".join(parameters),
            got=f"{len(args)} by position" + "".join(f", {key}" for key in kwargs),
        )
    named = dict(zip(parameters, args, strict=False)) | kwargs
    return BuiltModel(title, model, args, _dims(module, named, path), signature, kwargs)


def _split(name: str) -> tuple[Path, str]:
    file, colon, factory = name.rpartition(":")
    if not colon or not file.endswith(".py") or not factory.isidentifier():
        raise InputError("not a model of one's own", expected="path/to/file.py:factory", got=repr(name)[:200])
    return Path(file).absolute(), factory


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let the user's file import its neighbours, as ``python file.py`` would."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    spec = importlib.util.spec_from_file_location(f"motte_own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError("not a Python file", where=str(path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickled annotations look their module up by name
    loader = spec.loader
    try:
        _call(lambda: loader.exec_module(module), str(path))
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    return module


def _call(function: Callable[[], T], where: str) -> T:
    """Run the user's code; an exception in it becomes one error that names its line."""
    try:
        return function()
    except MotteError:
        raise
    except (Exception, SystemExit) as problem:
        frames = traceback.extract_tb(problem.__traceback__)
        line = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else where
        if isinstance(problem, SyntaxError) and problem.filename:
            line = f"{problem.filename}:{problem.lineno}"
        text = f"{type(problem).__name__}: {problem}"
        raise InputError("the model's own code failed", where=line, got=text[:300]) from problem


def _is_module(value: object) -> bool:
    from torch import nn

    return isinstance(value, nn.Module)


def _example_of(module: ModuleType, path: Path) -> object:
    maker = getattr(module, "example_inputs", None)
    if maker is None:
        return None
    if not callable(maker):
        raise InputError("example_inputs is no function", where=str(path), got=type(maker).__name__)
    with seeded(None):
        return _call(maker, f"{path}:example_inputs")


def _preprocessing(module: ModuleType, path: Path) -> Preprocessing:
    given = getattr(module, "preprocessing", None)
    if given is None or isinstance(given, ImagePreprocessing | TextPreprocessing):
        return given
    if isinstance(given, dict):
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in given.items()}
        try:
            probe = {"model": path.stem, "weights_origin": "file", "labels": [], "preprocessing": plain}
            return from_json(probe, where=f"{path}").preprocessing
        except GraphError as problem:
            raise InputError(
                f"preprocessing: {problem.message}",
                where=problem.where,
                expected=problem.expected,
                got=problem.got,
                hint="docs/zoo.md lists the fields",
            ) from problem
    raise InputError("preprocessing is no dict", where=str(path), got=type(given).__name__)


def _labels(module: ModuleType, path: Path) -> tuple[str, ...]:
    given = getattr(module, "labels", ())
    strings = isinstance(given, list | tuple) and all(isinstance(label, str) for label in given)
    if not strings or any(len(label) > MAX_NAME_BYTES for label in given):
        raise InputError("labels is no list of strings", where=str(path), got=repr(given)[:80])
    return tuple(given)


def _inputs(
    example: object, preprocessing: Preprocessing, input_shape: tuple[int, ...] | None, name: str
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The example call: positional tensors and tensors by name."""
    import torch

    if example is not None:
        if input_shape is not None:
            raise InputError("two examples given", where=name, got="example_inputs() and --input-shape")
        if isinstance(example, torch.Tensor):
            example = (example,)
        positional = tuple(example) if isinstance(example, tuple | list) else ()
        by_name = dict(example) if isinstance(example, Mapping) else {}
        every = [*positional, *by_name.values()]
        if not every or not all(isinstance(value, torch.Tensor) for value in every):
            raise InputError(
                "example_inputs() returned something else",
                where=name,
                expected="a tensor, a tuple of tensors or a dict of tensors",
                got=type(example).__name__ if not every else ", ".join(type(value).__name__ for value in every),
            )
        return positional, by_name
    if input_shape is not None:
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(EXAMPLE_BATCH, *input_shape, generator=generator),), {}
    if isinstance(preprocessing, ImagePreprocessing) and preprocessing.crop:
        return (image_example(preprocessing),), {}
    raise InputError("no example of an input", where=name, hint=_SHAPE_HINT)


def _dims(module: ModuleType, named: Mapping[str, Tensor], path: Path) -> dict[str, Axes]:
    given = getattr(module, "dims", None)
    if given is None:
        sizes = {tuple(value.shape[:1]) for value in named.values()}
        same = len(sizes) == 1 and sizes != {()}
        given = {key: {0: BATCH.name} for key in named} if same else {}
    if not isinstance(given, dict):
        raise InputError("dims is no dict", where=str(path), got=type(given).__name__)
    ranges = _dim_ranges(module, path)
    found: dict[str, Axes] = {}
    for key, axes in given.items():
        if key not in named or not isinstance(axes, dict):
            raise InputError("dims names no input", where=str(path), expected=", ".join(named), got=repr(key)[:80])
        for axis, name in axes.items():
            _check_axis(axis, name, named[key], f"{path}: {key}")
        found[key] = {axis: Dim(name, *ranges.get(name, DEFAULT_RANGE)) for axis, name in axes.items()}
    return found


def _check_axis(axis: object, name: object, value: Tensor, where: str) -> None:
    if type(axis) is not int or not 0 <= axis < value.dim():
        raise InputError("dims names no axis", where=where, expected=f"0 to {value.dim() - 1}", got=repr(axis)[:80])
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError("not the name of a dimension", where=where, expected='such as "batch"', got=repr(name)[:80])


def _dim_ranges(module: ModuleType, path: Path) -> dict[str, tuple[int, int]]:
    given = getattr(module, "dim_ranges", {})
    if not isinstance(given, dict):
        raise InputError("dim_ranges is no dict", where=str(path), got=type(given).__name__)
    found: dict[str, tuple[int, int]] = {}
    for name, limits in given.items():
        match limits:
            case (int(low), int(high)) if isinstance(name, str) and 0 < low < high:
                found[name] = (low, high)
            case _:
                raise InputError(
                    "not the range of a dimension",
                    where=str(path),
                    expected='such as {"batch": (1, 64)}',
                    got=f"{name!r}: {limits!r}"[:80],
                )
    return found
