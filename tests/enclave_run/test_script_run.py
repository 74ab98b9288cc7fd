"""What an owner signs for a script's process, and what no host can change about it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from motte.enclave import script_run
from motte.enclave.script_run import ScriptRun
from motte.errors import FormatError, InputError, MotteError, ResourceError, SettingError, SignatureError
from motte.seal.keys import SignerPrivateKey

KEY = SignerPrivateKey.new()
PEERS = ("tcp:10.0.0.1:7000", "tcp:10.0.0.2:7000")
RUN = ScriptRun(
    script=b"s" * 32,
    arguments=("--epochs", "3", "ä"),
    rank=1,
    ranks=2,
    peers=PEERS,
    accelerator="tcp:127.0.0.1:9000",
    noise="gaussian:1.0,0.5",
    broker="https://broker",
    release=4,
    signer=KEY.public,
)


def test_it_comes_back_as_it_was_signed() -> None:
    assert ScriptRun.decode(RUN.encode(KEY), KEY.public) == RUN
    plain = ScriptRun(script=b"s" * 32, signer=KEY.public)
    assert ScriptRun.decode(plain.encode(KEY), KEY.public) == plain


@pytest.mark.parametrize(
    "change",
    [
        {"script": b"t" * 32},
        {"arguments": ("--epochs", "4")},
        {"arguments": ()},
        {"rank": 0},
        {"peers": (PEERS[0], "tcp:10.0.0.3:7000")},
        {"accelerator": "tcp:127.0.0.1:9001"},
        {"noise": None},
        {"noise": "gaussian:1.0,0.4"},
        {"integrity": "off"},
        {"broker": ""},
        {"bundle_id": b"b" * 16},
        {"release": 5},
    ],
    ids=str,
)
def test_evidence_for_one_run_speaks_for_no_other(change: dict[str, Any]) -> None:
    """Host-chosen scripts, arguments, ranks, peers, noise and checks each give another configuration's digest."""
    assert replace(RUN, **change).configuration().digest() != RUN.configuration().digest()


def test_what_the_owner_did_not_sign_is_refused() -> None:
    data = json.loads(RUN.encode(KEY))
    for name, value in data.items():
        changed: Any = value + 1 if isinstance(value, int) else value[:-1] if value else "x"
        with pytest.raises((SignatureError, FormatError)):
            ScriptRun.decode(json.dumps({**data, name: changed}).encode(), KEY.public)
    with pytest.raises(SignatureError):
        ScriptRun.decode(RUN.encode(KEY), SignerPrivateKey.new().public)
    with pytest.raises(InputError, match="another signer"):
        RUN.encode(SignerPrivateKey.new())
    for broken in (b"", b"{}", RUN.encode(KEY)[:-1], RUN.encode(KEY) + b"x"):
        with pytest.raises(MotteError):
            ScriptRun.decode(broken, KEY.public)


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 2},
        {"rank": -1},
        {"peers": PEERS[:1]},
        {"peers": (PEERS[0], PEERS[0])},
        {"peers": ("unix:/a", "unix:/b")},
        {"peers": (), "ranks": 1},
        {"noise": "gaussian"},
        {"noise": "a little"},
        {"accelerator": ""},
        {"integrity": "perhaps"},
        {"arguments": ("a\0b",)},
        {"arguments": ("a",) * 1025},
        {"script": b"short"},
        {"release": 0},
    ],
    ids=str,
)
def test_contradictions_cannot_be_signed(change: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        replace(RUN, **change)


def test_the_scheme_is_what_was_signed() -> None:
    scheme = RUN.asymmetric()
    assert scheme.noise is not None
    assert (scheme.noise.residual.clip, scheme.integrity) == (1.0, "freivalds")
    assert replace(RUN, noise=None, integrity="off").asymmetric().integrity == "off"
    with pytest.raises(SettingError, match="without an accelerator"):
        ScriptRun(script=b"s" * 32, signer=KEY.public).asymmetric()


def test_only_a_started_script_has_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="not started with"):
        script_run.current()
    monkeypatch.setattr(script_run, "_current", None)
    script_run.make_current(RUN)
    assert script_run.current() == RUN
    with pytest.raises(ResourceError, match="already"):
        script_run.make_current(RUN)
