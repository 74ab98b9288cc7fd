"""Policies as text: strict JSON that a person writes, a broker takes and a log keeps.

    {"format": "motte-policy-1", "policy": {"all_of": [
        {"platform": ["sgx"]},
        {"measurement": {"allowed": ["33d8..."]}},
        {"not_debug": {}},
        {"tcb_status": ["UpToDate", "SWHardeningNeeded"]},
        {"fresh": {"max_age_s": 60}}]}}

Every policy is an object with one member, its name. A nonce never stands in a text: it is put into ``fresh`` when one
has been issued (:func:`motte.attest.policy.with_nonce`), and until then ``fresh`` refuses. The format's specification:
docs/spec/evidence.md.
"""

from __future__ import annotations

import json
from typing import Any, Final

from motte.attest.policy import (
    KINDS,
    MAX_ALLOWED,
    MAX_DEPTH,
    AllOf,
    AnyOf,
    Configuration,
    Fresh,
    InsecureAllowSimulated,
    Measurement,
    MinSvn,
    NotDebug,
    Platform,
    PlatformInstance,
    Policy,
    Signer,
    TcbStatus,
)
from motte.errors import FormatError, SettingError
from motte.limits import MAX_NAME_BYTES, MAX_POLICY_TEXT_BYTES
from motte.strict_json import Fields, parse

_FORMAT: Final = "motte-policy-1"
_SETS: Final[dict[str, type[Any]]] = {
    "platform": Platform,
    "tcb_status": TcbStatus,
    "platform_instance": PlatformInstance,
    "configuration": Configuration,
}
_NAMES: Final = {kind: name for name, kind in KINDS.items()}


def dumps(policy: Policy) -> str:
    """The one text of ``policy``: sorted keys and values, two spaces of indent, a line end. Nonces are left out.

    Raises:
        SettingError: a class of somebody else, which no text knows.
    """
    return json.dumps({"format": _FORMAT, "policy": _plain(policy)}, sort_keys=True, indent=2) + "\n"


def loads(text: str | bytes) -> Policy:
    """Read a policy from an **unverified** text. ``dumps(loads(text))`` is its one text.

    Raises:
        FormatError: not strict JSON, an unknown name or field, or too large.
        SettingError: a policy that allows nothing, or whose values are out of bounds.
    """
    fields = Fields(parse(text, max_bytes=MAX_POLICY_TEXT_BYTES, what="policy"), where="policy file")
    fields.choice("format", (_FORMAT,))
    policy = _read(fields.any("policy"), "policy", 1)
    fields.done()
    return policy


def _plain(policy: Policy) -> dict[str, Any]:
    name = _NAMES.get(type(policy))
    if name is None:
        raise SettingError("not a policy that has a text", got=type(policy).__name__)
    value: Any
    match policy:
        case Platform() | TcbStatus() | PlatformInstance() | Configuration():
            value = sorted(policy.allowed)
        case Measurement():
            value = {"allowed": sorted(policy.allowed)} | ({} if policy.name is None else {"name": policy.name})
        case Signer():
            value = {"allowed": sorted(policy.allowed)} | (
                {} if policy.product is None else {"product": policy.product}
            )
        case MinSvn():
            value = policy.svn
        case Fresh():
            value = {"max_age_s": policy.max_age_s}
        case AllOf() | AnyOf():
            value = [_plain(member) for member in policy.members]
        case _:  # the two that have nothing to say: not_debug, insecure_allow_simulated
            value = {}
    return {name: value}


def _read(value: Any, where: str, level: int) -> Policy:
    if level > MAX_DEPTH:
        raise FormatError("policies nested too deeply", where=where, expected=f"at most {MAX_DEPTH} levels")
    if not isinstance(value, dict) or len(value) != 1:
        raise FormatError("a policy is an object with one member, its name", where=where, got=repr(value)[:80])
    name = next(iter(value))
    fields = Fields(value, where=where)
    if name in _SETS:
        kind: type[Policy] = _SETS[name]
        return kind(_words(fields, name))  # type: ignore[call-arg]  # each of them takes one set
    if name in ("all_of", "any_of"):
        return _group(fields, name, level)
    if name == "min_svn":
        return MinSvn(fields.integer(name, low=0, high=(1 << 16) - 1))
    if name not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise FormatError("unknown policy", where=where, expected=known, got=repr(name)[:80])
    return _object(fields.fields(name), name)


def _object(fields: Fields, name: str) -> Policy:
    policy: Policy
    if name == "measurement":
        which = fields.text("name", max_bytes=MAX_NAME_BYTES) if fields.has("name") else None
        policy = Measurement(_words(fields, "allowed"), which)
    elif name == "signer":
        product = fields.integer("product", low=0, high=(1 << 16) - 1) if fields.has("product") else None
        policy = Signer(_words(fields, "allowed"), product)
    elif name == "fresh":
        policy = Fresh(fields.number("max_age_s"))
    else:
        policy = NotDebug() if name == "not_debug" else InsecureAllowSimulated()
    fields.done()
    return policy


def _group(fields: Fields, name: str, level: int) -> Policy:
    members = fields.items(name, max_items=MAX_ALLOWED, read=lambda item, where: _read(item, where, level + 1))
    return AllOf(*members) if name == "all_of" else AnyOf(*members)


def _words(fields: Fields, name: str) -> frozenset[str]:
    words = fields.items(name, max_items=MAX_ALLOWED, read=_word)
    if len(set(words)) != len(words):
        raise FormatError("a value stands twice", where=f"{fields.where}.{name}")
    return frozenset(words)


def _word(item: Any, where: str) -> str:
    if not isinstance(item, str) or not item.isprintable() or not 0 < len(item.encode()) <= MAX_NAME_BYTES:
        raise FormatError("not a word in bounds", where=where, got=repr(item)[:80])
    return item
