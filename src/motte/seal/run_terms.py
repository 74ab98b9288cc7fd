"""What a bundle's owner signed about its runs, in clear in the header: whom keys come from, and what may leave.

Evidence of a run binds these words (:mod:`motte.attest.configuration`), so they must be readable before any key is
there. The worker compares them with the encrypted plan as soon as it can read that (check M-6), so they cannot say
anything else than what is then done.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

from motte.digests import sha256
from motte.errors import BundleError, InputError
from motte.limits import MAX_NAME_BYTES, MAX_RUN_PEERS
from motte.plan.offload import OffloadPlan
from motte.plan.offload_text import offload_lines
from motte.strict_json import Fields, canonical

TRUSTED: Final = "trusted"
"""The scheme of a run that offloads nothing."""
_ALL_INSIDE: Final = "all inside"
_NOT_CHECKED: Final = "off"
MAX_RUN_RANKS: Final = 65_536


@dataclass(frozen=True, slots=True)
class RunTerms:
    """The terms of every run of one bundle.

    Attributes:
        broker: where keys come from, as :class:`motte.provision.address.BrokerAddress` spells it; empty: no broker.
        scheme: ``trusted``, or the offload scheme.
        placement: ``all inside``, or the SHA-256 of the plan's offload section, which holds every setting.
        noise: of every release, as canonical JSON; None: **none is added** (or nothing leaves).
        integrity: how answers of an accelerator are checked; ``off``: not at all (or there are none).
        peers: accelerators that may be used, by address; empty: any, since none is believed.
        ranks: trusted processes that work together. Only training data names more than one.
        ranks_policy: what they demand of each other, as ``sha256:`` and a digest
            (:meth:`motte.train.meeting.Meeting.word`); empty where there is one process.

    Raises:
        InputError: a word is empty or too long, or there are too many peers or processes.
    """

    broker: str
    scheme: str
    placement: str
    noise: str | None
    integrity: str
    peers: tuple[str, ...] = ()
    ranks: int = 1
    ranks_policy: str = ""

    def __post_init__(self) -> None:
        needed = (
            self.scheme,
            self.placement,
            self.integrity,
            *self.peers,
            *([] if self.noise is None else [self.noise]),
        )
        for text in (self.broker, self.ranks_policy, *needed):
            if len(text.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES or not text.isprintable():
                raise InputError("not a word of a run's terms", where="run", got=repr(text)[:80])
        if not all(needed) or len(self.peers) > MAX_RUN_PEERS:
            raise InputError(
                "a run's terms are empty or too many", where="run", expected=f"at most {MAX_RUN_PEERS} peers"
            )
        if not 1 <= self.ranks <= MAX_RUN_RANKS or bool(self.ranks_policy) != (self.ranks > 1):
            expected = f"1 to {MAX_RUN_RANKS}, and what they demand of each other where there are several"
            raise InputError("not trusted processes of a run", where="run", expected=expected, got=str(self.ranks))

    def to_json(self) -> dict[str, Any]:
        """As the header's field. Of one process nothing is said, as before there could be several."""
        fields = {**asdict(self), "peers": list(self.peers)}
        several = {"ranks": fields.pop("ranks"), "ranks_policy": fields.pop("ranks_policy")}
        return fields | several if self.ranks > 1 else fields

    @staticmethod
    def from_json(value: object, *, where: str) -> RunTerms:
        """Read the **unverified** field.

        Raises:
            BundleError: malformed.
        """
        fields = Fields(value, where=where, error=BundleError)
        noise = fields.any("noise")
        peers = fields.items("peers", max_items=MAX_RUN_PEERS, read=_text)
        texts = {
            name: _text(fields.any(name), f"{where}.{name}") for name in ("broker", "scheme", "placement", "integrity")
        }
        ranks = fields.integer("ranks", low=2, high=MAX_RUN_RANKS) if fields.has("ranks") else 1
        policy = _text(fields.any("ranks_policy"), f"{where}.ranks_policy") if ranks > 1 else ""
        fields.done()
        try:
            return RunTerms(
                noise=None if noise is None else _text(noise, f"{where}.noise"),
                peers=tuple(peers),
                ranks=ranks,
                ranks_policy=policy,
                **texts,
            )
        except InputError as problem:
            raise BundleError(problem.message, where=where, got=problem.got) from problem


def terms_of(section: OffloadPlan | None, *, broker: str = "", peers: tuple[str, ...] = ()) -> RunTerms:
    """The terms that a plan's offload section means; None: nothing leaves.

    Raises:
        InputError: ``broker`` or a peer is no word for it.
    """
    if section is None:
        return RunTerms(broker, TRUSTED, _ALL_INSIDE, None, _NOT_CHECKED, peers)
    digest = sha256("\n".join(offload_lines(section)).encode("utf-8")).hex()
    noise = None if section.noise is None else canonical(asdict(section.noise)).decode("ascii")
    return RunTerms(broker, section.scheme, f"sha256:{digest}", noise, section.integrity, peers)


def check_terms(terms: RunTerms | None, section: OffloadPlan | None) -> None:
    """Check M-6: the **verified** header says of the run what the plan does. None: the header says nothing.

    Raises:
        BundleError: it says something else.
    """
    if terms is None:
        return
    meant = terms_of(section, broker=terms.broker, peers=terms.peers)
    if meant != terms:
        raise BundleError(
            "the signed terms of the run are not those of the plan",
            check="M-6",
            where="header.run",
            expected=str(meant.to_json())[:300],
            got=str(terms.to_json())[:300],
        )


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BundleError("not a text", where=where, got=repr(value)[:80])
    return value
