"""Trusted processes that meet as a star: every place once, everybody proved, and all do the same."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from motte.attest.configuration import RunConfiguration
from motte.errors import (
    AttestationError,
    FrameError,
    InputError,
    LinkError,
    MotteError,
    PeerClosed,
    PeerStalled,
    SettingError,
)
from motte.link.address import UnixAddress, connect_socket
from motte.link.attested import attested_client
from motte.link.wire import Deadline
from motte.train.attested_star import AttestedCollectives, Star, open_star
from motte.train.distributed import open_world

PLACE = "meet.sock"


def configuration(ranks: int, **changes: Any) -> RunConfiguration:
    usual: dict[str, Any] = {"scheme": "asymmetric", "placement": "all", "noise": None, "integrity": "freivalds"}
    return RunConfiguration(bundle_id=b"i" * 16, release=1, signer=b"s" * 32, ranks=ranks, **{**usual, **changes})


@pytest.fixture
def plan(trusted: Any, tmp_path: Path) -> Callable[..., AttestedCollectives]:
    def made(ranks: int, *, settings: dict[str, Any] | None = None, **changes: Any) -> AttestedCollectives:
        usual: dict[str, Any] = {
            "configuration": configuration(ranks, **(settings or {})),
            "issue": trusted.issue,
            "policy": trusted.policy,
            "anchors": trusted.anchors,
            "address": f"unix:{tmp_path / PLACE}",
            "connect_timeout_s": 30.0,
        }
        return AttestedCollectives(**{**usual, **changes})

    return made


Process = tuple[AttestedCollectives, int, int, Callable[[Star], Any]]


def run(*processes: Process) -> list[Any]:
    """Each process (plan, rank, size, what it does) in a thread; what it found or raised."""
    found: list[Any] = [None] * len(processes)

    def one(index: int) -> None:
        plan, rank, size, work = processes[index]
        try:
            with open_star(plan, rank=rank, size=size, timeout_s=30) as star:
                found[index] = work(star)
        except MotteError as problem:
            found[index] = problem

    threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found


def nothing(star: Star) -> str:
    star.gather(memoryview(b""))
    return "ran"


def sum_of(star: Star) -> tuple[bytes, list[bytes], bytes]:
    own = bytearray([star.rank + 1, 10 * star.rank])

    def add(theirs: memoryview) -> None:
        own[0], own[1] = own[0] * 2 + theirs[0], own[1] + theirs[1]  # order matters

    star.sum(memoryview(own), add)
    gathered = star.gather(memoryview(bytes([star.rank]) * 3))
    spread = bytearray(b"zero" if star.rank == 0 else b"none")
    star.spread(memoryview(spread))
    return bytes(own), [bytes(each) for each in gathered], bytes(spread)


def test_three_processes_hold_the_same(plan: Callable[..., AttestedCollectives]) -> None:
    found = run(*((plan(3), rank, 3, sum_of) for rank in (2, 0, 1)))
    assert found == [(bytes([(1 * 2 + 2) * 2 + 3, 30]), [b"\0\0\0", b"\1\1\1", b"\2\2\2"], b"zero")] * 3


def test_who_is_alone_meets_nobody(plan: Callable[..., AttestedCollectives]) -> None:
    assert run((plan(1), 0, 1, sum_of)) == [(b"\x01\x00", [b"\0\0\0"], b"zero")]


def test_a_process_that_proves_nothing_or_something_else_ends_the_run(
    trusted: Any, plan: Callable[..., AttestedCollectives]
) -> None:
    def refused(other: AttestedCollectives, own: AttestedCollectives | None = None) -> str | None:
        middle, _ = run((own or plan(2), 0, 2, nothing), (other, 1, 2, nothing))
        assert isinstance(middle, AttestationError), middle
        return middle.check

    def debug(report_data: bytes) -> Any:
        return trusted.issue(report_data, debug=True)

    assert refused(plan(2, issue=debug)) == "P-6"
    assert refused(plan(2, issue=lambda data: trusted.issue(data, measurement=b"x" * 32))) == "P-3"
    assert refused(plan(2), plan(2, policy=trusted.strict)) == "P-1"
    # Another configuration: other noise, or another number of processes, that the owner did not sign.
    assert refused(plan(2, settings={"noise": "gaussian"})) == "X-8"
    # And the other way round: the process in the middle is not believed either.
    _, joining = run((plan(2, issue=debug), 0, 2, nothing), (plan(2), 1, 2, nothing))
    assert isinstance(joining, AttestationError)
    assert joining.check == "P-6"


def test_who_speaks_no_tls_ends_the_run(plan: Callable[..., AttestedCollectives], tmp_path: Path) -> None:
    def stranger() -> None:
        sock = connect_socket(UnixAddress(tmp_path / PLACE), Deadline(30), loopback_only=True, wait=True)
        with sock:
            sock.sendall(b"gloo" * 20)
            with contextlib.suppress(OSError):
                sock.recv(1)

    thread = threading.Thread(target=stranger, daemon=True)
    thread.start()
    (middle,) = run((plan(2), 0, 2, nothing))
    thread.join(30)
    assert isinstance(middle, FrameError)
    assert "not an attested channel" in str(middle)


def test_missing_processes_are_named(plan: Callable[..., AttestedCollectives]) -> None:
    middle, joined = run((plan(4, connect_timeout_s=1.5), 0, 4, nothing), (plan(4), 2, 4, nothing))
    assert isinstance(middle, PeerStalled)
    assert "X-12" in middle.message
    assert middle.got == "none for 1, 3"
    assert isinstance(joined, PeerClosed)
    assert "did not start the run" in str(joined)
    (alone,) = run((plan(2, connect_timeout_s=0.2), 1, 2, nothing))
    assert isinstance(alone, PeerStalled)
    assert "process 0 of this run is missing (X-12)" in str(alone)


def test_a_place_is_taken_once(plan: Callable[..., AttestedCollectives]) -> None:
    middle, *others = run((plan(3), 0, 3, nothing), (plan(3), 1, 3, nothing), (plan(3), 1, 3, nothing))
    assert isinstance(middle, AttestationError)
    assert middle.check == "X-11"
    assert all(isinstance(each, LinkError) for each in others)


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (1, 3), (0, 1)])
def test_the_hosts_word_about_the_world_is_compared_with_the_signed_one(
    plan: Callable[..., AttestedCollectives], rank: int, size: int
) -> None:
    (found,) = run((plan(2), rank, size, nothing))
    assert isinstance(found, AttestationError)
    assert found.check == "X-10"


@pytest.mark.parametrize(("rank", "size"), [(0, 2), (2, 2), (1, 3)])
def test_a_genuine_process_that_takes_a_place_that_is_none(
    plan: Callable[..., AttestedCollectives], tmp_path: Path, rank: int, size: int
) -> None:
    """Its own check was skipped: it says over its attested channel what it should not."""
    from motte.train import attested_star

    ours = plan(2)
    answers: list[int] = []

    def joining() -> None:
        sock = connect_socket(UnixAddress(tmp_path / PLACE), Deadline(30), loopback_only=True, wait=True)
        channel, _ = attested_client(sock, ours.demand(), shown=ours.attester())
        channel.sendmsg([attested_star._word(attested_star._Kind.JOIN, rank, size)])
        channel.settimeout(30)
        with contextlib.suppress(OSError):  # a reset, or an end without a farewell
            answers.append(channel.recv_into(memoryview(bytearray(1))))
        channel.close()

    thread = threading.Thread(target=joining, daemon=True)
    thread.start()
    (middle,) = run((ours, 0, 2, nothing))
    thread.join(30)
    assert isinstance(middle, AttestationError)
    assert middle.check == "X-10"
    assert answers in ([], [0])  # nobody is welcomed


def test_processes_that_do_different_things_stop(plan: Callable[..., AttestedCollectives]) -> None:
    def spread(star: Star) -> None:
        star.spread(memoryview(bytearray(4)))
        star.gather(memoryview(b""))

    def sums(star: Star) -> None:
        star.sum(memoryview(bytearray(4)), lambda theirs: None)

    def longer(star: Star) -> None:
        star.sum(memoryview(bytearray(8)), lambda theirs: None)

    for middle, other in ((spread, sums), (sums, longer)):
        found = run((plan(2), 0, 2, middle), (plan(2), 1, 2, other))
        assert any(isinstance(each, FrameError) and "different things" in str(each) for each in found), found


def test_a_process_that_ends_is_named(plan: Callable[..., AttestedCollectives]) -> None:
    middle, ended = run((plan(2), 0, 2, nothing), (plan(2), 1, 2, lambda star: star.close()))
    assert ended is None
    assert isinstance(middle, PeerClosed)
    assert "process 1" in str(middle)


def test_what_contradicts_itself_is_refused(plan: Callable[..., AttestedCollectives]) -> None:
    with pytest.raises(SettingError, match="all can reach"):
        plan(2, address="fd:3")
    with pytest.raises(InputError):
        plan(2, address="somewhere")
    with (
        pytest.raises(SettingError, match="not both"),
        open_world(insecure_plaintext_collectives=True, attested=plan(2), environment={}),
    ):
        pass
    # A world of one, where two were signed: the other's share of the data would silently be missing.
    with (
        pytest.raises(AttestationError) as caught,
        open_world(insecure_plaintext_collectives=False, attested=plan(2), environment={}),
    ):
        pass
    assert caught.value.check == "X-10"
    with open_world(insecure_plaintext_collectives=False, attested=plan(1), environment={}) as world:
        assert (world.rank, world.size) == (0, 1)
