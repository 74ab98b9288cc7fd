"""Every error that motte raises on purpose. Whose fault it is = the class; the facts = fields; the help = ``hint``.

MotteError
|-- InputError            the caller gave something wrong: a file, an option, a tensor
|   |-- SettingError      an unknown or contradictory setting
|   `-- UnsupportedError  this platform, model or op cannot be handled; nothing is wrong with the file
|       |-- CaptureError  the model cannot be captured (names the op and the line of the user's model)
|       `-- PlanError     no plan satisfies the request, or a plan breaks a rule
|-- FormatError           bytes from outside do not follow the specification
|   |-- GraphError        ... of a graph or its weights
|   |-- EvidenceError     ... of attestation evidence (``check`` names the numbered check that failed)
|   |-- BundleError       ... of a sealed bundle (``check`` names the numbered check that failed)
|   |-- FrameError        ... of a frame on a link
|   `-- RecordError       ... of a record of a measured figure
|-- TrustError            well-formed, but not to be trusted
|   |-- SignatureError    not signed, or not by the demanded signer
|   |-- RollbackError     a release below the demanded minimum
|   |-- DecryptError      an authentication tag does not match
|   |-- KeyAccessError    no key that we hold opens it
|   |-- HandshakeError    a broker's answer: out of order, not its own, to another question (``check`` says which)
|   |-- AttestationError  evidence that does not verify, or that a policy refuses (``check`` names the check)
|   |-- MismatchError     the parts do not answer as the whole
|   `-- IntegrityError    the accelerator's answer is not the product that was asked for
|-- LinkError             the other side of a link
|   |-- PeerClosed        closed it, or ended
|   |-- PeerStalled       did not take or give a frame in time
|   `-- PeerRefused       answered with an error of its own
|       `-- BrokerRefused a key broker gave no keys (``kind`` and ``check`` are its reason)
|-- WorkerError           the trusted worker
|   |-- WorkerDied        ended, with its exit status or signal
|   |-- WorkerStalled     did not answer within its time limit, and was killed
|   |-- WorkerRefused     answered with an error of its own
|   `-- WorkerClosed      was used after it had been closed
|-- MeasureError          a figure cannot be stated: a value is missing, a clock was used out of order
|   `-- GateError         a named bound on a figure does not hold, or has no figure to hold for
|-- ContradictionError    a measurement refutes what motte states of itself: an error of ours
`-- ResourceError         this machine lacks something: memory, a file, the network
"""

from __future__ import annotations


class MotteError(Exception):
    """Root of the tree.

    Args:
        message: what was wrong, one sentence, no trailing full stop.
        expected, got: the two sides of a comparison, already readable.
        where: file, field, node or line.
        hint: what to do about it.
    """

    check: str | None = None
    """Number of the failed check in the specification, where one numbers its checks."""

    def __init__(
        self,
        message: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.expected = expected
        self.got = got
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        facts = [
            f"{name} {value}" for name, value in (("expected", self.expected), ("got", self.got)) if value is not None
        ]
        text = self.message
        if self.where is not None:
            text += f" ({self.where})"
        if facts:
            text += ": " + ", ".join(facts)
        if self.check is not None:
            text += f" [check {self.check}]"
        return text


class InputError(MotteError):
    """The caller gave something wrong: a file, an option, a tensor."""


class SettingError(InputError):
    """An unknown or contradictory setting."""


class UnsupportedError(InputError):
    """This platform, model or op cannot be handled."""


class CaptureError(UnsupportedError):
    """The model cannot be captured; ``op`` and ``where`` (line of the user's model) say what is in the way."""

    def __init__(self, message: str, *, op: str | None = None, **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.op = op


class PlanError(UnsupportedError):
    """No plan satisfies the request, or a plan breaks a rule."""


class FormatError(MotteError):
    """Bytes from outside do not follow their specification."""


class GraphError(FormatError):
    """A graph, or the weights beside it, is malformed."""


class BundleError(FormatError):
    """A sealed bundle is malformed; ``check`` is the number of the failed check in docs/spec/bundle.md."""

    def __init__(self, message: str, *, check: str | None = None, **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.check = check


class EvidenceError(FormatError):
    """Attestation evidence is malformed; ``check`` is the number of the failed check in docs/spec/evidence.md."""

    def __init__(self, message: str, *, check: str | None = None, **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.check = check


class FrameError(FormatError):
    """A frame on a link is malformed, out of sequence or too large."""


class RecordError(FormatError):
    """A record of a measured figure does not follow docs/spec/records.md."""


class TrustError(MotteError):
    """Well-formed, but not to be trusted; ``check`` is the number of the failed check, where a spec numbers it."""

    def __init__(self, message: str, *, check: str | None = None, **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.check = check


class SignatureError(TrustError):
    """Not signed, or not by the demanded signer."""


class RollbackError(TrustError):
    """A release below the demanded minimum."""


class DecryptError(TrustError):
    """An authentication tag does not match: altered, swapped, or sealed under another key."""


class KeyAccessError(TrustError):
    """No key that we hold opens it."""


class AttestationError(TrustError):
    """Evidence does not verify, or a policy refuses it; ``check`` is the number in docs/spec/evidence.md."""


class HandshakeError(TrustError):
    """A key broker's answer is not to be trusted, or a step is out of order; ``check``: docs/spec/broker.md."""


class MismatchError(TrustError):
    """The parts do not answer as the whole."""


class IntegrityError(TrustError):
    """The accelerator's answer is not the product that was asked for, or not finite. It lies, or it is broken."""


class LinkError(MotteError):
    """The other side of a link failed."""


class PeerClosed(LinkError):
    """The other side closed the link, or ended."""


class PeerStalled(LinkError):
    """The other side did not take or give a frame in time."""


class PeerRefused(LinkError):
    """The other side answered with an error of its own. Its words are **unverified**."""


class BrokerRefused(PeerRefused):
    """A key broker gave no keys. ``kind`` is the class name of its own error, ``check`` the check that failed there."""

    def __init__(self, message: str, *, kind: str | None = None, check: str | None = None, **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.kind = kind
        self.check = check


class WorkerError(MotteError):
    """The trusted worker failed."""


class WorkerDied(WorkerError):
    """The worker ended; the message carries its exit status or signal."""


class WorkerStalled(WorkerError):
    """The worker did not answer within its time limit, and was killed."""


class WorkerRefused(WorkerError):
    """The worker answered with an error of its own; ``kind`` is the class name of that error."""

    def __init__(self, message: str, *, kind: str | None = None, **facts: str | None) -> None:
        super().__init__(message, **facts)
        self.kind = kind


class WorkerClosed(WorkerError):
    """The worker was used after it had been closed."""


class MeasureError(MotteError):
    """A figure cannot be stated: a value is missing, or a clock was used out of order."""


class ContradictionError(MotteError):
    """A measurement refutes what motte states of itself, such as an epsilon. It is an error of ours."""


class GateError(MeasureError):
    """A named bound on a figure does not hold, or there is no figure that it could hold for."""


class ResourceError(MotteError):
    """This machine lacks something: memory, a file, the network."""
