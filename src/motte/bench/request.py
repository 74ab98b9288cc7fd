"""What a bench is asked for, checked before anything is built: models, modes, part counts, batches, engines, repeats.

A combination that cannot exist (openvino on an accelerator) is no error of the caller: it becomes a :class:`Refused`
with its reason, and everything else is measured. A word that nobody knows is an error, at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from motte.bench.case import MODES, Case
from motte.engines.select import ENGINES
from motte.errors import InputError, SettingError, UnsupportedError
from motte.limits import MAX_PARTS
from motte.measure.compare import MIN_REPEATS
from motte.offload.settings import Asymmetric
from motte.offload.words import parse_noise, parse_rank
from motte.trusted.surroundings import KINDS
from motte.zoo import own_models
from motte.zoo.published_cuts import PUBLISHED_PARTS
from motte.zoo.registry import find
from motte.zoo.shipped_models import NAME as SHIPPED

VERBS: Final = ("infer", "train", "split", "open", "link", "start")
CUTS: Final = ("weights", "memory", "published")
"""``weights``, ``memory``: by the planner, the largest part as small as can be. ``published``: the earlier work's."""
SEALED: Final = ("resident", "streamed", "asymmetric")
"""Modes in which a worker opens a bundle."""
ALL_BUT_FIRST_LAST: Final = "all-but-first-last"
MAX_REPEATS: Final = 1000
MAX_BATCH: Final = 1024
MAX_THREADS: Final = 256
_SHORT: Final = {"resnet20": SHIPPED, "minilm": "minilm-l6-v2"}


@dataclass(frozen=True)
class Refused:
    """A case that was asked for and has no figures, and why. ``failed``: it should have worked."""

    case: Case
    why: str
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run of a bench.

    ``models``: names of the zoo, or ``file.py:factory``. ``threads``: compute threads of the native process, of the
    worker, and of the accelerator each. ``noise``, ``rank``, ``integrity``, ``layers``: the scheme of asymmetric cases.
    ``dims``: sizes of dynamic dimensions other than the batch. ``accelerator``: an address, or ``local`` for a process
    on ``device``. ``bundles``: where sealed bundles are kept for the next run, with their keys; None: in a folder that
    vanishes.

    Raises:
        SettingError: a word that nobody knows, a number out of its range, something twice.
        InputError: no such model. UnsupportedError: an engine that is not installed.
    """

    verb: str
    models: tuple[str, ...]
    modes: tuple[str, ...] = ("native", "resident")
    parts: tuple[int, ...] = (1,)
    batches: tuple[int, ...] = (1,)
    engines: tuple[str, ...] = ("torch",)
    enclaves: tuple[str, ...] = ("process",)
    image: Path | None = None
    vm: str | None = None
    repeats: int = 10
    warmup: int = 2
    seed: int = 0
    threads: int = 1
    cuts: str = "weights"
    random_weights: bool = False
    weights: Path | None = None
    input_shape: str | None = None
    dims: Mapping[str, int] = field(default_factory=dict)
    device: str = "cpu"
    accelerator: str = "local"
    noise: str = "none"
    rank: str = "schedule:2,2,32"
    integrity: str = "freivalds"
    layers: tuple[str, ...] = (ALL_BUT_FIRST_LAST,)
    bundles: Path | None = None
    trace: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(_SHORT.get(name, name) for name in self.models))
        _words("--model", self.models, None)
        _words("--modes", self.modes, MODES)
        _words("--engine", self.engines, ENGINES)
        _words("--cuts", (self.cuts,), CUTS)
        _words("--enclave", self.enclaves, KINDS)
        _words("verb", (self.verb,), VERBS)
        if any(kind.startswith("gramine") for kind in self.enclaves) != (self.image is not None):
            raise SettingError("the Gramine kinds start an image", where="--image", expected="both, or neither")
        if ("vm" in self.enclaves) != (self.vm is not None):
            raise SettingError("the kind vm has an address", where="--vm", expected="both, or neither")
        for word in self.layers:
            if not word:
                raise SettingError("an empty word", where="--layers", expected=f"{ALL_BUT_FIRST_LAST}, or layers")
        _counts("--parts", self.parts, MAX_PARTS)
        _counts("--batch", self.batches, MAX_BATCH)
        scheme_of(self.noise, self.rank, self.integrity)
        _range("--repeats", self.repeats, MIN_REPEATS, MAX_REPEATS)
        _range("--warmup", self.warmup, 0, MAX_REPEATS)
        _range("--threads", self.threads, 1, MAX_THREADS)
        _range("--seed", self.seed, 0, (1 << 31) - 1)
        for engine in self.engines:
            if find_spec(engine) is None:
                raise UnsupportedError(
                    "this engine is not installed", where="--engine", got=engine, hint=f"pip install {engine}"
                )
        if self.verb != "link":
            for name in self.models:
                _require_model(name)

    @property
    def scheme(self) -> Asymmetric:
        """Of asymmetric cases."""
        return scheme_of(self.noise, self.rank, self.integrity)

    def asked(self) -> dict[str, Any]:
        """As JSON values, for ``run.json``."""
        return {
            "verb": self.verb,
            "models": list(self.models),
            "modes": list(self.modes),
            "parts": list(self.parts),
            "batches": list(self.batches),
            "engines": list(self.engines),
            "enclaves": list(self.enclaves),
            "repeats": self.repeats,
            "warmup": self.warmup,
            "seed": self.seed,
            "threads": self.threads,
            "cuts": self.cuts,
            "device": self.device,
            "accelerator": self.accelerator,
            "layers": list(self.layers),
            "dims": dict(self.dims),
            "noise": self.noise,
            "rank": self.rank,
            "integrity": self.integrity,
        }


def scheme_of(noise: str, rank: str, integrity: str) -> Asymmetric:
    """The asymmetric scheme that these words state.

    Raises:
        SettingError: a word that states none.
    """
    if integrity not in ("freivalds", "off"):
        raise SettingError("unknown word", where="--integrity", expected="freivalds or off", got=repr(integrity)[:80])
    checked: Literal["freivalds", "off"] = "off" if integrity == "off" else "freivalds"
    return Asymmetric(noise=parse_noise(noise), rank=parse_rank(rank), integrity=checked)


def cases_of(request: Request, model: str, batch: int) -> tuple[list[Case], list[Refused]]:
    """The cases of one model at one batch, the native ones first, and those that no machine can run.

    Args:
        model: its name as a word, which for a file of one's own is the name of the built model.
    """
    wanted: list[Case] = []
    refused: list[Refused] = []
    for engine in request.engines:
        for mode in sorted(request.modes, key=MODES.index):
            # Nothing trusted runs in native and accelerator cases, and nothing is cut.
            places = [("none", 1)]
            if mode in SEALED:
                places = [(enclave, parts) for enclave in request.enclaves for parts in request.parts]
            for enclave, parts in places:
                case = Case(model=model, mode=mode, parts=parts, batch=batch, engine=engine, enclave=enclave)
                why = _impossible(request, case)
                if why is None:
                    wanted.append(case)
                else:
                    refused.append(Refused(case, why))
    return wanted, refused


def _impossible(request: Request, case: Case) -> str | None:
    if case.mode in ("asymmetric", "accelerator") and case.engine != "torch":
        return f"only the torch engine runs on an accelerator, not {case.engine}"
    if case.mode == "asymmetric" and case.enclave != "process":
        return f"a worker in {case.enclave} takes no accelerator yet"
    if case.mode == "streamed" and case.parts == 1:
        return "one part is never opened ahead: streamed in one part is resident"
    if request.cuts == "published" and case.mode in SEALED and case.parts not in (1, PUBLISHED_PARTS):
        return f"the published cuts make {PUBLISHED_PARTS} parts"
    return None


def _require_model(name: str) -> None:
    if own_models.is_path(name):
        path = Path(name.rpartition(":")[0])
        if not path.is_file():
            raise InputError("no such file of a model", where="--model", got=name)
        return
    find(name)


def _words(option: str, given: Sequence[str], known: Sequence[str] | None) -> None:
    if not given:
        raise SettingError("nothing is named", where=option, expected=", ".join(known or ("a model",)))
    for word in given:
        if known is not None and word not in known:
            raise SettingError("unknown word", where=option, expected=", ".join(known), got=repr(word)[:80])
    _once(option, given)


def _counts(option: str, given: Sequence[int], high: int) -> None:
    if not given:
        raise SettingError("no number is given", where=option)
    for count in given:
        _range(option, count, 1, high)
    _once(option, given)


def _once(option: str, given: Sequence[object]) -> None:
    if len(set(given)) != len(given):
        raise SettingError("named twice", where=option, got=", ".join(map(str, given))[:200])


def _range(option: str, value: int, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise SettingError("out of range", where=option, expected=f"{low} to {high}", got=repr(value)[:80])
