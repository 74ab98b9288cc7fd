"""Policies that a broker holds: the text, the anchors that it verifies against, the owners who may use it from afar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from motte.attest.anchors import Anchors
from motte.attest.policy import AllOf, AnyOf, InsecureAllowSimulated, Policy, demands_freshness
from motte.attest.policy_text import dumps, loads
from motte.errors import InputError, SettingError
from motte.limits import MAX_POLICY_TEXT_BYTES
from motte.provision.broker import log, tables
from motte.provision.broker.state import Broker, facts_of
from motte.provision.registration import check_name
from motte.seal.keys import SignerPublicKey
from motte.strict_json import canonical, parse


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """One policy of a broker."""

    name: str
    policy: Policy
    anchors: Anchors
    owners: tuple[SignerPublicKey, ...]


def read_policy(path: Path) -> Policy:
    """A policy file, checked to be one that a broker takes.

    Raises:
        InputError: no such file. FormatError, SettingError: not a policy, or one that allows everything.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_POLICY_TEXT_BYTES + 1)
    except OSError as problem:
        raise InputError("cannot read the policy", where=str(path), got=problem.strerror) from problem
    policy = loads(data)
    if not demands_freshness(policy):
        raise SettingError(
            "a policy without freshness: evidence once recorded would open the keys for ever",
            where=str(path),
            expected="fresh among the members of the outermost all_of",
            hint='add {"fresh": {"max_age_s": 60}}',
        )
    return policy


def allows_simulated(policy: Policy) -> bool:
    """Whether some evidence without hardware behind it could pass."""
    if isinstance(policy, AllOf | AnyOf):
        return any(map(allows_simulated, policy.members))
    return isinstance(policy, InsecureAllowSimulated)


def set_policy(
    broker: Broker, name: str, policy: Policy, *, anchors: Anchors, owners: Sequence[SignerPublicKey] = ()
) -> None:
    """Store ``policy`` as ``name``, in the place of the one that had the name; it counts from the next handshake on.

    Args:
        anchors: roots other than the vendors' own, enrolled keys; see :class:`motte.attest.anchors.Anchors`.
        owners: signers who may register bundles under this policy over the network.

    Raises:
        InputError: not a name.
    """
    check_name(name, "policy")
    table = tables.policies
    values = {
        "name": name,
        "text": dumps(policy),
        "anchors": canonical(_anchors_json(anchors)).decode("ascii"),
        "owners": facts_of([str(each) for each in owners]),
    }
    with broker.store.write() as db:
        db.execute(table.delete().where(table.c.name == name))
        db.execute(table.insert().values(**values))
        facts = {"name": name, "owners": [str(each) for each in owners], "simulated": allows_simulated(policy)}
        log.append(db, broker.signer, "policy set", {**facts, "digest": _digest(values)})


def get_policy(db: Connection, name: str) -> StoredPolicy:
    """The policy called ``name``.

    Raises:
        InputError: there is none.
    """
    row = db.execute(select(tables.policies).where(tables.policies.c.name == name)).one_or_none()
    if row is None:
        raise InputError("no policy of this name", got=name, hint="motte broker policy set")
    owners = tuple(SignerPublicKey.parse(each) for each in json.loads(row.owners))
    return StoredPolicy(name, loads(row.text), _read_anchors(row.anchors), owners)


def _digest(values: dict[str, str]) -> str:
    import hashlib

    return hashlib.sha256(canonical(values)).hexdigest()


def _anchors_json(anchors: Anchors) -> dict[str, Any]:
    """Every field that is not the default, bytes as hexadecimal."""
    plain: dict[str, Any] = {}
    for each in fields(anchors):
        value = getattr(anchors, each.name)
        if value == each.default:
            continue
        if isinstance(value, bytes):
            plain[each.name] = value.hex()
        elif isinstance(value, tuple):
            plain[each.name] = [item.hex() for item in value]
        else:
            plain[each.name] = str(value) if isinstance(value, Path) else value
    return plain


def _read_anchors(text: str) -> Anchors:
    plain = parse(text, max_bytes=1 << 26, what="anchors")
    given: dict[str, Any] = {}
    for name, value in plain.items():
        if name == "intel_cache":
            given[name] = Path(value)
        elif isinstance(value, list):
            given[name] = tuple(bytes.fromhex(item) for item in value)
        elif name in ("intel_root", "intel_collateral", "nvidia_root"):
            given[name] = bytes.fromhex(value)
        else:
            given[name] = value
    return Anchors(**given)
