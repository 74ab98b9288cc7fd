"""What the trusted processes of one run demand of each other, as its owner signed it.

Process 0 hands the others the keys of the data, so **whom it believes is the owner's word and not the host's**: the
digest of the policy, and of everything that its verifiers start from, stands in the signed terms of the run. A host
that gives another policy, or a root of its own, is refused before any evidence is made. Where the processes meet is the
host's to choose: nothing that crosses there is believed or readable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

from motte.attest.anchors import Anchors
from motte.attest.configuration import RunConfiguration
from motte.attest.policy import Policy
from motte.attest.policy_text import dumps
from motte.attest.ra_tls import Issue
from motte.digests import sha256
from motte.errors import SettingError
from motte.link.address import DescriptorAddress, parse_address
from motte.strict_json import canonical
from motte.train.attested_star import AttestedCollectives

_DOMAIN: Final = b"motte-ranks-policy-1\x00"
_SIGNED_ELSEWHERE: Final = (
    "intel_collateral",
    "intel_cache",
    "intel_pccs",
    "intel_pccs_timeout_s",
    "revocation_lists",
)
"""Anchors that change while a run goes on: signed by the vendors, or only the way to such documents."""
_CONNECT_S: Final = 300.0


def ranks_word(policy: Policy, anchors: Anchors | None) -> str:
    """``sha256:`` and the digest of what processes demand of each other, for the signed terms of a run.

    Args:
        anchors: what the policy's verifiers start from; None: the vendors' own roots.
    """
    given = Anchors() if anchors is None else anchors
    names = (each.name for each in fields(Anchors) if each.name not in _SIGNED_ELSEWHERE)
    roots = {name: _plain(getattr(given, name)) for name in names}
    return f"sha256:{sha256(_DOMAIN, canonical({'anchors': roots, 'policy': dumps(policy)})).hex()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """How this process meets the others of its run, and what each shows and demands.

    Attributes:
        issue: makes this process's evidence.
        policy, anchors: what each demands of the others; their digest is signed (:func:`ranks_word`).
        address: where process 0 listens and the others connect: ``tcp:HOST:PORT`` or ``unix:PATH``.
        connect_timeout_s: until all are there.

    Raises:
        SettingError: an address that not all can reach. InputError: none at all.
    """

    issue: Issue = field(repr=False)
    policy: Policy
    anchors: Anchors | None = None
    address: str
    connect_timeout_s: float = _CONNECT_S

    def __post_init__(self) -> None:
        if isinstance(parse_address(self.address), DescriptorAddress):
            raise SettingError("processes meet at a place that all can reach", where="meet", got=self.address)

    def word(self) -> str:
        """As it stands in the signed terms of a run."""
        return ranks_word(self.policy, self.anchors)

    def collectives(self, configuration: RunConfiguration) -> AttestedCollectives:
        """For :func:`motte.train.distributed.open_world`, under the configuration that the owner signed."""
        return AttestedCollectives(
            configuration=configuration,
            issue=self.issue,
            policy=self.policy,
            anchors=self.anchors,
            address=self.address,
            connect_timeout_s=self.connect_timeout_s,
        )


def _plain(value: object) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
