"""What a run is at one moment: where it stands, what it found so far, and everything that its next step depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, cast

from motte.errors import FormatError
from motte.limits import MAX_CHECKPOINT_EPOCHS, MAX_GRAPH_WEIGHTS, MAX_NAME_BYTES, MAX_RECORD_TEXT_BYTES, MAX_RELEASE
from motte.offload.releases import KINDS, Kind, ReleaseCount
from motte.seal.kinds import CHECKPOINT, check_kind
from motte.strict_json import Fields

if TYPE_CHECKING:
    from torch import Tensor

    from motte.offload.session import SessionState

FORMAT: Final = "motte-checkpoint/1"
_MAX_COUNT: Final = (1 << 53) - 1
_MAX_FACTS: Final = 256
Fact = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Position:
    """The next batch to be trained on: ``epoch`` and ``batch`` from 0; ``step`` optimizer steps were made."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over the batches of an epoch so far, all processes together."""

    loss_sum: float = 0.0
    correct: int = 0
    samples: int = 0

    def plus(self, loss_sum: float, correct: int, samples: int) -> Tally:
        """With one more batch."""
        return Tally(self.loss_sum + loss_sum, self.correct + correct, self.samples + samples)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats; NaN where there was no sample."""
        return self.loss_sum / self.samples if self.samples else float("nan")

    @property
    def accuracy(self) -> float:
        """Share of samples whose largest logit is the label; NaN where there was no sample."""
        return self.correct / self.samples if self.samples else float("nan")


@dataclass(frozen=True, slots=True)
class EpochResult:
    """One epoch. Losses are mean cross-entropy in nats, accuracies shares from 0 to 1.

    ``train_*`` are over the batches as they were trained on, each under the weights before its step.
    """

    epoch: int
    steps: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything that a run continues from. **Secret** for private data: weights, and the key of the noise.

    Attributes:
        run_id: 16 bytes that name the run.
        facts: what decides the arithmetic; whoever continues must agree.
        tensors: weights, buffers, momentum and generator states, by name.
        session: noise key, step and ledger of releases of the first process; None where nothing is split.
        best: the best test accuracy so far.
    """

    run_id: bytes
    facts: Mapping[str, Fact]
    position: Position
    tally: Tally
    history: tuple[EpochResult, ...]
    best: float | None
    session: SessionState | None
    tensors: Mapping[str, Tensor] = field(repr=False)

    def state(self, release: int) -> dict[str, Any]:
        """All but the tensors, as plain values for canonical JSON."""
        return {
            "kind": CHECKPOINT,
            "format": FORMAT,
            "release": release,
            "run_id": self.run_id.hex(),
            "facts": dict(self.facts),
            "position": asdict(self.position),
            "tally": asdict(self.tally),
            "history": [asdict(each) for each in self.history],
            "best": self.best,
            "session": None if self.session is None else _session_json(self.session),
        }


def read_state(value: object, tensors: Mapping[str, Tensor], *, where: str) -> tuple[Snapshot, int]:
    """The inverse of :meth:`Snapshot.state`, strictly: the snapshot and its release.

    Raises:
        FormatError: a field that is missing, unknown or of another type, or another kind of sealed file.
    """
    fields = Fields(value, where=where)
    check_kind(fields, CHECKPOINT)
    fields.choice("format", (FORMAT,))
    release = fields.integer("release", low=0, high=MAX_RELEASE)
    best = fields.any("best")
    session = fields.any("session")
    snapshot = Snapshot(
        run_id=fields.hexadecimal("run_id", length_bytes=16),
        facts=_read_facts(fields.any("facts"), f"{where}.facts"),
        position=_read_position(fields.fields("position")),
        tally=_read_tally(fields.fields("tally")),
        history=tuple(fields.items("history", max_items=MAX_CHECKPOINT_EPOCHS, read=_read_epoch)),
        best=None if best is None else _number(best, f"{where}.best"),
        session=None if session is None else _read_session(session, f"{where}.session"),
        tensors=tensors,
    )
    fields.done()
    return snapshot, release


def _session_json(session: SessionState) -> dict[str, Any]:
    releases = [[layer, kind, each.total, each.privatised] for (layer, kind), each in session.releases.items()]
    return {"noise_key": session.noise_key.hex(), "step": session.step, "releases": releases}


def _read_session(value: object, where: str) -> SessionState:
    from motte.offload.session import SessionState

    fields = Fields(value, where=where)
    key = fields.hexadecimal("noise_key", length_bytes=32)
    step = fields.integer("step", low=0, high=_MAX_COUNT)
    releases = dict(fields.items("releases", max_items=3 * MAX_GRAPH_WEIGHTS, read=_read_release))
    fields.done()
    return SessionState(key, step, releases)


def _read_release(value: object, where: str) -> tuple[tuple[str, Kind], ReleaseCount]:
    if not isinstance(value, list) or len(value) != 4:
        raise FormatError("not a count of releases", where=where, expected="layer, kind, total, privatised")
    fields = Fields(dict(zip(("layer", "kind", "total", "privatised"), value, strict=True)), where=where)
    layer = fields.text("layer", max_bytes=MAX_NAME_BYTES)
    kind = cast(Kind, fields.choice("kind", KINDS))
    total = fields.integer("total", low=0, high=_MAX_COUNT)
    return (layer, kind), ReleaseCount(total, fields.integer("privatised", low=0, high=total))


def _read_facts(value: object, where: str) -> dict[str, Fact]:
    if not isinstance(value, dict) or len(value) > _MAX_FACTS:
        raise FormatError("not an object in bounds", where=where, expected=f"at most {_MAX_FACTS} entries")
    fields = Fields(value, where=where)
    return {name: _fact(fields, name) for name in value}


def _fact(fields: Fields, name: str) -> Fact:
    value = fields.any(name)
    if isinstance(value, str) and len(value) <= MAX_RECORD_TEXT_BYTES:
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    raise FormatError("not a plain value", where=f"{fields.where}.{name}", got=type(value).__name__)


def _read_position(fields: Fields) -> Position:
    found = Position(*(fields.integer(name, low=0, high=_MAX_COUNT) for name in ("epoch", "batch", "step")))
    fields.done()
    return found


def _read_tally(fields: Fields) -> Tally:
    loss = fields.number("loss_sum")
    found = Tally(loss, *(fields.integer(name, low=0, high=_MAX_COUNT) for name in ("correct", "samples")))
    fields.done()
    return found


def _read_epoch(value: object, where: str) -> EpochResult:
    fields = Fields(value, where=where)
    found = EpochResult(
        epoch=fields.integer("epoch", low=0, high=_MAX_COUNT),
        steps=fields.integer("steps", low=0, high=_MAX_COUNT),
        lr=fields.number("lr"),
        train_loss=fields.number("train_loss"),
        train_accuracy=fields.number("train_accuracy"),
        test_loss=fields.number("test_loss"),
        test_accuracy=fields.number("test_accuracy"),
    )
    fields.done()
    return found


def _number(value: object, where: str) -> float:
    return Fields({"number": value}, where=where).number("number")
