"""Which weights a model gets, and loading them strictly: the same names, the same shapes, nothing silently left over.

Nothing is unpickled: safetensors, or a torch checkpoint read with ``weights_only=True``. A torch checkpoint may hold
the tensors directly, or under ``state_dict``, ``model_state_dict`` or ``model`` beside other things; a ``module.``
in front of every name (DistributedDataParallel) is taken off.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motte.errors import InputError, SettingError

if TYPE_CHECKING:
    from torch import Tensor, nn

_NESTED = ("state_dict", "model_state_dict", "model")
_SHOWN = 6
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True, slots=True)
class WeightsChoice:
    """Where the weights come from. The default: those that belong to the model (shipped, published, the factory's).

    Args:
        file: a safetensors file or a ``weights_only`` checkpoint.
        random_seed: untrained weights from this seed; every later output says so.
        published: the name of one published set, ``IMAGENET1K_V1``; None is the set that torchvision calls default.
    """

    file: Path | None = None
    random_seed: int | None = None
    published: str | None = None

    def __post_init__(self) -> None:
        if self.file is not None and self.random_seed is not None:
            raise SettingError(
                "weights are given twice", got="--weights and --random-weights", hint="keep one of the two"
            )


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a torch checkpoint, by name. Runs no code of the file.

    Raises:
        InputError: no such file, neither of the two formats, objects other than tensors in it, or no tensors at all.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as problem:
        raise InputError("cannot read the weights", where=str(path), got=problem.strerror or str(problem)) from problem
    # A safetensors file starts with the length of its JSON header, and the header with a brace.
    if len(start) == 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return _read_safetensors(path)
    return _tensors(_read_checkpoint(path), path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as problem:
        raise InputError("not a readable safetensors file", where=str(path), got=str(problem)[:200]) from problem


def _read_checkpoint(path: Path) -> object:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # a hostile or broken pickle can make the reader raise nearly anything
        raise InputError(
            "not a checkpoint that can be read without running code",
            where=str(path),
            expected="safetensors, or a checkpoint of tensors only",
            got=(str(problem).splitlines() or [type(problem).__name__])[0][:200],
            hint="save the weights again: safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from problem


def _tensors(found: object, path: Path) -> dict[str, Tensor]:
    from torch import Tensor

    if isinstance(found, Mapping):
        for key in _NESTED:
            inner = found.get(key)
            if isinstance(inner, Mapping) and inner and all(isinstance(value, Tensor) for value in inner.values()):
                found = inner
                break
    if not isinstance(found, Mapping) or not found:
        raise InputError("no weights in the file", where=str(path), got=type(found).__name__)
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                "something else than a named tensor in the weights",
                where=str(path),
                got=f"{name!r}: {type(value).__name__}",
                hint="save model.state_dict() alone",
            )
    state: OrderedDict[str, Tensor] = OrderedDict(found)
    if all(name.startswith("module.") for name in state):
        state = OrderedDict((name.removeprefix("module."), value) for name, value in state.items())
    # Versions of the modules at the time of saving, which a few torchvision models need to read their older files.
    metadata = getattr(found, "_metadata", None)
    if isinstance(metadata, dict):
        state._metadata = metadata  # type: ignore[attr-defined]
    return state


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str) -> None:
    """Copy ``state`` into ``model``: every name and shape must match; element types may only widen without loss.

    Two things may be missing: further names of a tied weight, and batch-norm's counter of training steps, which
    older checkpoints lack and inference never reads.

    Raises:
        InputError: the difference, as names and shapes.
    """
    import torch

    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    full: OrderedDict[str, Tensor] = OrderedDict(state)
    present = {id(own[name]): name for name in full if name in own}
    for name, value in own.items():
        if name not in full and id(value) in present:
            full[name] = full[present[id(value)]]
        elif name not in full and name.rpartition(".")[2] == _COUNTER:
            full[name] = value.detach()
    problems = _difference(own, full)
    if problems:
        text = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise InputError("the weights do not fit the model", where=where, got=text + more)
    full._metadata = getattr(state, "_metadata", None) or model.state_dict()._metadata  # type: ignore[attr-defined]
    with torch.no_grad():
        model.load_state_dict(full, strict=True)


def _difference(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """What does not match, one line each: missing names, unknown names, shapes, element types."""
    import torch

    missing = [f"{name} is missing" for name in own if name not in given]
    unknown = [f"{name} is not in the model" for name in given if name not in own]
    changed = []
    for name in own:
        if name not in given:
            continue
        want, have = own[name], given[name]
        if want.shape != have.shape:
            changed.append(f"{name} has shape {list(have.shape)} instead of {list(want.shape)}")
        elif torch.promote_types(want.dtype, have.dtype) != want.dtype:
            changed.append(f"{name} has {_short(have.dtype)}, which {_short(want.dtype)} cannot hold")
    return changed + missing + unknown


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run a block under the CPU generator seeded with ``seed`` (None: 0) and put the caller's generator back after."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0 if seed is None else seed)
        yield
