"""Policies: small objects that decide on verified claims, and refuse whatever they do not know.

Every policy has ``check(claims, now)``, which returns only if the claims are wanted and otherwise raises with the
number of the check (docs/spec/evidence.md, P-1 to P-13). What fails closed:

* An empty set of allowed values, an ``AllOf`` or ``AnyOf`` without members, or one whose members state no condition,
  is refused when it is made.
* A fact that the claims do not state (no signer, no instance, no binding) is never an allowed one.
* SIMULATED claims are refused by every policy, one that is asked alone included, unless they are asked inside an
  ``AllOf`` that has ``InsecureAllowSimulated()`` as its own member.

``InsecureAllowSimulated`` is a permission and no condition. It may stand only as a direct member of an ``AllOf`` that
has at least one other member, and it permits simulated claims for the other members of that ``AllOf``, however deeply
they are nested, and for nothing beside it. As a policy of its own it refuses everything; in an ``AnyOf`` it would let
everything simulated pass, so making one is an error. ``AnyOf(AllOf(InsecureAllowSimulated(), A), B)`` therefore takes
simulated claims by ``A`` only.
"""

from __future__ import annotations

import hmac
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from motte.attest.claims import Claims
from motte.attest.evidence import PLATFORMS
from motte.attest.report_data import DIGEST_BYTES, NONCE_BYTES
from motte.errors import AttestationError, SettingError

MAX_ALLOWED: Final = 4096
"""Values of one set of allowed ones, and members of one ``AllOf`` or ``AnyOf``."""
MAX_DEPTH: Final = 16
"""How deeply ``AllOf`` and ``AnyOf`` may nest."""
MAX_AGE_S: Final = 86_400.0
"""Largest ``max_age_s``: a nonce is for one handshake."""
_HEX: Final = frozenset("0123456789abcdef")


class Policy(ABC):
    """A decision on verified claims. The subclasses of this file are all there are; texts know no others."""

    __slots__ = ()

    def check(self, claims: Claims, now: datetime) -> None:
        """Return only if ``claims``, which must be **verified**, are wanted at ``now`` (aware, UTC).

        Raises:
            AttestationError: they are not; ``check`` has the number, ``expected`` and ``got`` the two sides.
        """
        self._ask(claims, now, simulated_allowed=False)

    @abstractmethod
    def _ask(self, claims: Claims, now: datetime, *, simulated_allowed: bool) -> None:
        """As :meth:`check`, perhaps inside an ``AllOf`` that permits simulated claims."""


class _Condition(Policy):
    """A policy on one fact; it refuses simulated claims first (check P-1)."""

    __slots__ = ()

    def _ask(self, claims: Claims, now: datetime, *, simulated_allowed: bool) -> None:
        if claims.simulated and not simulated_allowed:
            raise AttestationError(
                "SIMULATED evidence: no hardware stands behind it",
                check="P-1",
                expected="evidence of hardware under its vendor's root",
                got=f"simulated {claims.platform}",
                hint="only a policy for development permits it, with insecure_allow_simulated as its own member",
            )
        self._decide(claims, now)

    @abstractmethod
    def _decide(self, claims: Claims, now: datetime) -> None: ...


def _refuse(check: str, message: str, expected: object, got: object, hint: str | None = None) -> AttestationError:
    return AttestationError(message, check=check, expected=str(expected)[:300], got=str(got)[:300], hint=hint)


def _words(owner: Policy, field: str, values: Iterable[object], known: tuple[str, ...] | None = None) -> None:
    kind = type(owner).__name__
    if isinstance(values, str):
        raise SettingError("allowed values must be a set", where=f"{kind}.{field}", got=repr(values)[:80])
    found = frozenset(values)
    if not found:
        raise SettingError("a policy that allows nothing", where=f"{kind}.{field}", hint="name at least one value")
    if len(found) > MAX_ALLOWED:
        raise SettingError("too many allowed values", where=f"{kind}.{field}", expected=f"at most {MAX_ALLOWED}")
    for value in found:
        if not isinstance(value, str) or not value or (known is not None and value not in known):
            expected = "a word" if known is None else " or ".join(known)
            raise SettingError(
                "not a value that can be allowed", where=f"{kind}.{field}", expected=expected, got=repr(value)[:80]
            )
    object.__setattr__(owner, field, found)


def _digests(owner: Policy, field: str, values: frozenset[str]) -> None:
    _words(owner, field, values)
    for value in getattr(owner, field):
        if len(value) % 2 or not set(value) <= _HEX:
            where = f"{type(owner).__name__}.{field}"
            raise SettingError("not lower-case hexadecimal", where=where, got=repr(value)[:80])


def _among(value: str | None, allowed: frozenset[str], check: str, message: str) -> None:
    if value is None or value not in allowed:
        raise _refuse(check, message, " or ".join(sorted(allowed)), "none stated" if value is None else value)


@dataclass(frozen=True, slots=True)
class Platform(_Condition):
    """Check P-2: the kind of evidence is one of ``allowed`` (:data:`motte.attest.evidence.PLATFORMS`)."""

    allowed: frozenset[str]

    def __post_init__(self) -> None:
        _words(self, "allowed", self.allowed, PLATFORMS)

    def _decide(self, claims: Claims, now: datetime) -> None:
        _among(claims.platform, self.allowed, "P-2", "evidence of another platform")


@dataclass(frozen=True, slots=True)
class Measurement(_Condition):
    """Check P-3: a measurement (lower-case hexadecimal) is one of ``allowed``.

    Attributes:
        name: which one, such as ``rtmr1`` or ``pcr11``; None: the one that names the code, the first of the claims. In
            a TDX guest that first one, ``mrtd``, is the firmware alone: name ``rtmr1`` and ``rtmr2`` too.
    """

    allowed: frozenset[str]
    name: str | None = None

    def __post_init__(self) -> None:
        _digests(self, "allowed", self.allowed)
        if self.name == "":
            raise SettingError("a measurement without a name", where="Measurement.name")

    def _decide(self, claims: Claims, now: datetime) -> None:
        name = next(iter(claims.measurements), None) if self.name is None else self.name
        value = None if name is None else claims.measurements.get(name)
        _among(value, self.allowed, "P-3", f"another {name or 'measurement'}")


@dataclass(frozen=True, slots=True)
class Signer(_Condition):
    """Check P-4: the code's signer (lower-case hexadecimal) is one of ``allowed``.

    A signer signs many programs: add ``MinSvn``, and the ``product`` where the platform has product numbers.

    Attributes:
        product: the product number that the evidence must state (``isvprodid``); None: any product of the signer.
    """

    allowed: frozenset[str]
    product: int | None = None

    def __post_init__(self) -> None:
        _digests(self, "allowed", self.allowed)
        if self.product is not None and (type(self.product) is not int or not 0 <= self.product < 1 << 16):
            raise SettingError("not a product number", where="Signer.product", expected="0 to 65535")

    def _decide(self, claims: Claims, now: datetime) -> None:
        _among(claims.signer, self.allowed, "P-4", "code of another signer")
        if self.product is not None:
            product = claims.details.get("isvprodid")
            _among(product, frozenset([str(self.product)]), "P-4", "another product of the signer")


@dataclass(frozen=True, slots=True)
class MinSvn(_Condition):
    """Check P-5: the code's security version is at least ``svn`` (0 to 65535)."""

    svn: int

    def __post_init__(self) -> None:
        if type(self.svn) is not int or not 0 <= self.svn < 1 << 16:
            raise SettingError("not a security version", where="MinSvn.svn", expected="0 to 65535")

    def _decide(self, claims: Claims, now: datetime) -> None:
        if claims.svn is None or claims.svn < self.svn:
            raise _refuse("P-5", "a security version below the lowest allowed one", f"at least {self.svn}", claims.svn)


@dataclass(frozen=True, slots=True)
class NotDebug(_Condition):
    """Check P-6: nobody outside can debug the environment, that is read all of its memory."""

    def _decide(self, claims: Claims, now: datetime) -> None:
        if claims.debug is not False:
            raise _refuse("P-6", "a debug enclave: its host can read and change its memory", "no debug", "debug")


@dataclass(frozen=True, slots=True)
class TcbStatus(_Condition):
    """Check P-7: the platform vendor's word for the state of its firmware is one of ``allowed``."""

    allowed: frozenset[str]

    def __post_init__(self) -> None:
        _words(self, "allowed", self.allowed)

    def _decide(self, claims: Claims, now: datetime) -> None:
        _among(claims.tcb_status, self.allowed, "P-7", "the platform's firmware is in a state that is not allowed")


@dataclass(frozen=True, slots=True)
class PlatformInstance(_Condition):
    """Check P-8: the machine is one of ``allowed`` (lower-case hexadecimal).

    Why: whoever holds a machine can put an interposer on its memory bus and forge quotes of **that** machine; naming
    machines whose keepers are known is what is left against it.
    """

    allowed: frozenset[str]

    def __post_init__(self) -> None:
        _digests(self, "allowed", self.allowed)

    def _decide(self, claims: Claims, now: datetime) -> None:
        _among(claims.instance, self.allowed, "P-8", "a machine that is not on the list")


@dataclass(frozen=True, slots=True)
class Configuration(_Condition):
    """Check P-9: the evidence is bound to a run configuration whose digest is in ``allowed`` (hexadecimal)."""

    allowed: frozenset[str]

    def __post_init__(self) -> None:
        _digests(self, "allowed", self.allowed)
        for value in self.allowed:
            if len(value) != 2 * DIGEST_BYTES:
                raise SettingError("not a digest", where="Configuration.allowed", expected=f"{DIGEST_BYTES} bytes")

    def _decide(self, claims: Claims, now: datetime) -> None:
        found = None if claims.binding is None else claims.binding.configuration_digest.hex()
        _among(found, self.allowed, "P-9", "a configuration that the owner did not sign")


@dataclass(frozen=True, slots=True)
class Fresh(_Condition):
    """Checks P-10 and P-11: the evidence was made for ``nonce``, which was issued at most ``max_age_s`` seconds ago.

    ``issued_at`` is the time that the issuer of the nonce noted itself, never one that came with the evidence: so old
    evidence has another nonce, and an old nonce is known to be old. That a nonce is taken once is the issuer's
    business (:class:`motte.attest.fresh.NonceBook`). Without a nonce, as read from a text, it refuses everything until
    :func:`with_nonce` has put one in.
    """

    max_age_s: float
    nonce: bytes | None = None
    issued_at: datetime | None = None

    def __post_init__(self) -> None:
        age: object = self.max_age_s
        if isinstance(age, bool) or not isinstance(age, int | float) or not 0 < age <= MAX_AGE_S:
            raise SettingError(
                "not an age in seconds", where="Fresh.max_age_s", expected=f"above 0, at most {MAX_AGE_S}"
            )
        object.__setattr__(self, "max_age_s", float(age))
        if (self.nonce is None) != (self.issued_at is None):
            raise SettingError("a nonce and the time of its issue belong together", where="Fresh")
        if self.nonce is not None and len(self.nonce) != NONCE_BYTES:
            raise SettingError("not a nonce", where="Fresh.nonce", expected=f"{NONCE_BYTES} bytes")
        if self.issued_at is not None and self.issued_at.tzinfo is None:
            raise SettingError("a time without its zone", where="Fresh.issued_at", expected="aware, UTC")

    def _decide(self, claims: Claims, now: datetime) -> None:
        if self.nonce is None or self.issued_at is None:
            raise _refuse("P-10", "no nonce was issued for this evidence", "a nonce of ours", "none")
        if claims.binding is None:
            raise _refuse("P-10", "the evidence is bound to no nonce", self.nonce.hex(), "none stated")
        if not hmac.compare_digest(claims.binding.nonce, self.nonce):
            hint = "replayed evidence, or an answer to another request"
            raise _refuse("P-10", "another nonce", self.nonce.hex(), claims.binding.nonce.hex(), hint)
        age = (now - self.issued_at).total_seconds()
        if not 0 <= age <= self.max_age_s:
            hint = "ask for a new nonce; a negative age means that the clock went back"
            raise _refuse("P-11", "the nonce is too old", f"0 to {self.max_age_s:g} s", f"{age:g} s", hint)


@dataclass(frozen=True, slots=True)
class InsecureAllowSimulated(Policy):
    """Permission for SIMULATED claims inside the ``AllOf`` of which it is a direct member; see the top of this file.

    Check P-12: asked as a policy of its own it refuses everything, because it states no condition.
    """

    def _ask(self, claims: Claims, now: datetime, *, simulated_allowed: bool) -> None:
        hint = "put it into an all_of beside the conditions"
        raise _refuse("P-12", "insecure_allow_simulated alone is no policy", "a condition beside it", "none", hint)


class _Group(Policy):
    __slots__ = ()
    members: tuple[Policy, ...]


def _members(owner: _Group) -> None:
    kind = type(owner).__name__
    members = tuple(owner.members)
    if not members:
        raise SettingError("an empty policy", where=kind, hint="an empty policy would check nothing; add a condition")
    if len(members) > MAX_ALLOWED:
        raise SettingError("too many members", where=kind, expected=f"at most {MAX_ALLOWED}")
    for member in members:
        if type(member) not in KINDS.values():
            raise SettingError("not a policy", where=kind, got=type(member).__name__)
    if depth(owner) > MAX_DEPTH:
        raise SettingError("policies nested too deeply", where=kind, expected=f"at most {MAX_DEPTH} levels")


@dataclass(frozen=True, slots=True, init=False)
class AllOf(_Group):
    """Every member is satisfied, asked in order; the first refusal is raised. Permits simulated claims, for its members
    alone, if ``InsecureAllowSimulated()`` is one of them; then at least one other member must state a condition."""

    members: tuple[Policy, ...]

    def __init__(self, *members: Policy) -> None:
        object.__setattr__(self, "members", members)
        _members(self)
        if all(isinstance(member, InsecureAllowSimulated) for member in members):
            raise SettingError("a policy without a condition", where="AllOf", hint="a permission alone checks nothing")

    def _ask(self, claims: Claims, now: datetime, *, simulated_allowed: bool) -> None:
        allowed = simulated_allowed or any(isinstance(member, InsecureAllowSimulated) for member in self.members)
        for member in self.members:
            if not isinstance(member, InsecureAllowSimulated):
                member._ask(claims, now, simulated_allowed=allowed)


@dataclass(frozen=True, slots=True, init=False)
class AnyOf(_Group):
    """At least one member is satisfied (check P-13); the error lists why each one is not."""

    members: tuple[Policy, ...]

    def __init__(self, *members: Policy) -> None:
        object.__setattr__(self, "members", members)
        _members(self)
        if any(isinstance(member, InsecureAllowSimulated) for member in members):
            hint = "everything simulated would pass; put it into an all_of beside the conditions of one member"
            raise SettingError("insecure_allow_simulated in an AnyOf", where="AnyOf", hint=hint)

    def _ask(self, claims: Claims, now: datetime, *, simulated_allowed: bool) -> None:
        reasons = []
        for member in self.members:
            try:
                member._ask(claims, now, simulated_allowed=simulated_allowed)
            except AttestationError as problem:
                reasons.append(problem)
            else:
                return
        if len(reasons) == 1:
            raise reasons[0]
        text = "; ".join(str(reason) for reason in reasons)
        raise AttestationError("none of the alternatives is satisfied", check="P-13", got=text[:2000])


KINDS: Final[dict[str, type[Policy]]] = {
    "platform": Platform,
    "measurement": Measurement,
    "signer": Signer,
    "min_svn": MinSvn,
    "not_debug": NotDebug,
    "tcb_status": TcbStatus,
    "platform_instance": PlatformInstance,
    "configuration": Configuration,
    "fresh": Fresh,
    "insecure_allow_simulated": InsecureAllowSimulated,
    "all_of": AllOf,
    "any_of": AnyOf,
}
"""Every policy by its name in a text."""


def depth(policy: Policy) -> int:
    """Levels of nesting: 1 for a condition."""
    return 1 + max(map(depth, policy.members)) if isinstance(policy, AllOf | AnyOf) else 1


def with_nonce(policy: Policy, nonce: bytes, issued_at: datetime) -> Policy:
    """``policy`` with this nonce in every ``Fresh`` of it. ``issued_at`` is the issuer's own note, never the peer's."""
    if isinstance(policy, Fresh):
        return replace(policy, nonce=nonce, issued_at=issued_at)
    if isinstance(policy, AllOf | AnyOf):
        return type(policy)(*(with_nonce(member, nonce, issued_at) for member in policy.members))
    return policy


def demands_freshness(policy: Policy) -> bool:
    """Whether nothing satisfies ``policy`` without a ``Fresh``: a broker refuses a policy for which this is false."""
    if isinstance(policy, AllOf):
        return any(map(demands_freshness, policy.members))
    if isinstance(policy, AnyOf):
        return all(map(demands_freshness, policy.members))
    return isinstance(policy, Fresh)
