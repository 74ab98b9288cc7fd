"""The trusted processes of one run, joined over attested channels: a star whose middle is process 0.

Every other process opens one mutual channel to process 0 and says which place it takes. The run starts when each place
of the owner-signed configuration is taken exactly once by a process that proved itself; until then nothing of the run
has crossed. How many there are comes from that configuration. Which place a process takes is its host's word: it
decides only which share of the data is whose.

Why not gloo over relayed sockets: gloo takes no socket of ours, so each end would speak plaintext to a relay over the
loopback, and an enclave's loopback is its host's. Why a star: the sum is formed in one order, by one process, so all
processes hold the same bits; its cost grows with the number of processes, which is small here.

Protocol and checks (X-10 to X-12): docs/spec/attested_channel.md.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Final

from motte.attest.configuration import RunConfiguration
from motte.attest.policy import Policy
from motte.attest.ra_tls import Attester, Issue
from motte.attest.ra_tls_verify import Demand
from motte.errors import AttestationError, FrameError, LinkError, PeerClosed, PeerStalled, SettingError
from motte.link.address import DescriptorAddress, connect_socket, listening, parse_address
from motte.link.attested import DEFAULT_TIMEOUT_S, attested_client, attested_mutual_server
from motte.link.wire import Deadline
from motte.seal.primitives import new_x25519

if TYPE_CHECKING:
    from motte.attest.anchors import Anchors
    from motte.link.standard_streams import ByteStream

_HEADER: Final = struct.Struct(">4sBIIQQ")
_MAGIC: Final = b"MOTC"
_CONNECT_S: Final = 300.0


class _Kind(IntEnum):
    JOIN = 1
    WELCOME = 2
    SUM = 3
    GATHER = 4
    SPREAD = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class AttestedCollectives:
    """How the trusted processes of a run find each other, and what each shows and demands. The same in all of them.

    Attributes:
        configuration: as the owner signed it; its ``ranks`` is how many there are.
        issue: makes this process's evidence.
        policy: what each demands of the others.
        anchors: what the policy's verifiers start from; None: the vendors' own roots.
        address: where process 0 listens and the others connect: ``tcp:HOST:PORT`` or ``unix:PATH``.
        connect_timeout_s: until all are there.

    Raises:
        SettingError: an address of another kind. InputError: none at all.
    """

    configuration: RunConfiguration
    issue: Issue
    policy: Policy
    address: str
    anchors: Anchors | None = None
    connect_timeout_s: float = _CONNECT_S

    def __post_init__(self) -> None:
        if isinstance(parse_address(self.address), DescriptorAddress):
            raise SettingError("processes meet at a place that all can reach", where="address", got=self.address)

    def attester(self) -> Attester:
        """What this process shows on one channel. Nothing is sealed to the key that is in it."""
        _, public = new_x25519()
        return Attester(self.issue, public, self.configuration.digest())

    def demand(self) -> Demand:
        """What it demands of the other end."""
        return Demand(self.policy, self.configuration.digest(), self.anchors)


class Star:
    """The channels of one process: from process 0 to all others, from each other one to process 0.

    Collectives block; all processes call the same ones with the same sizes in the same order, which every message is
    checked for. One thread at a time.

    Args:
        channels: attested streams by the number of the process at the other end; owned from now on.
        timeout_s: how long one message may take.
    """

    def __init__(self, rank: int, size: int, channels: dict[int, ByteStream], *, timeout_s: float) -> None:
        self.rank, self.size = rank, size
        self.timeout_s = timeout_s
        self._channels = channels
        self._calls = 0

    def sum(self, data: memoryview, add: Callable[[memoryview], None]) -> None:
        """Replace ``data`` by the sum over all processes; ``add`` adds another process's bytes to it, in their order.

        Raises:
            PeerClosed, PeerStalled: another process ended or stalled. FrameError: it does something else than we do.
        """
        self._calls += 1
        if self.rank:
            self._send(0, _Kind.SUM, data)
            self._receive(0, _Kind.SUM, data)
            return
        theirs = memoryview(bytearray(len(data)))
        for rank in range(1, self.size):
            self._receive(rank, _Kind.SUM, theirs)
            add(theirs)
        for rank in range(1, self.size):
            self._send(rank, _Kind.SUM, data)

    def gather(self, own: memoryview) -> list[memoryview]:
        """What each process has, by its number; all have as many bytes.

        Raises:
            As :meth:`sum`.
        """
        self._calls += 1
        size = len(own)
        whole = memoryview(bytearray(size * self.size))
        pieces = [whole[rank * size : (rank + 1) * size] for rank in range(self.size)]
        if self.rank:
            self._send(0, _Kind.GATHER, own)
            self._receive(0, _Kind.GATHER, whole)
            return pieces
        pieces[0][:] = own
        for rank in range(1, self.size):
            self._receive(rank, _Kind.GATHER, pieces[rank])
        for rank in range(1, self.size):
            self._send(rank, _Kind.GATHER, whole)
        return pieces

    def spread(self, data: memoryview) -> None:
        """Replace ``data`` by what process 0 has.

        Raises:
            As :meth:`sum`.
        """
        self._calls += 1
        if self.rank:
            self._receive(0, _Kind.SPREAD, data)
            return
        for rank in range(1, self.size):
            self._send(rank, _Kind.SPREAD, data)

    def close(self) -> None:
        """Close all channels. Safe to call again."""
        for channel in self._channels.values():
            channel.close()

    def _send(self, to: int, kind: _Kind, data: memoryview) -> None:
        head = _HEADER.pack(_MAGIC, kind, self.rank, self.size, self._calls, len(data))
        _send(self._channels[to], [memoryview(head), data], f"process {to}", self.timeout_s)

    def _receive(self, rank: int, kind: _Kind, into: memoryview) -> None:
        name = f"process {rank}"
        expected = _HEADER.pack(_MAGIC, kind, rank, self.size, self._calls, len(into))
        head = memoryview(bytearray(_HEADER.size))
        _receive(self._channels[rank], head, name, self.timeout_s)
        if head != expected:
            raise FrameError(
                "the trusted processes of this run do different things", where=name, expected=kind.name.lower()
            )
        _receive(self._channels[rank], into, name, self.timeout_s)


@contextlib.contextmanager
def open_star(plan: AttestedCollectives, *, rank: int, size: int, timeout_s: float) -> Iterator[Star]:
    """Meet the other processes of the run, each proving itself to process 0 and process 0 to each.

    Args:
        rank, size: as the host says; ``size`` is believed only where the signed configuration says the same.
        timeout_s: of each message afterwards.

    Raises:
        AttestationError: another number of processes than signed, a place that is none (X-10) or taken (X-11), or one
            that does not prove itself (its own check).
        PeerStalled: places stayed empty (X-12), or process 0 did not come. LinkError: a channel failed.
    """
    _demand_place(rank, size, plan.configuration.ranks, where="this process")
    channels: dict[int, ByteStream] = {}
    deadline = Deadline(plan.connect_timeout_s)
    try:
        if rank:
            channels[0] = _join(plan, rank, size, deadline)
        else:
            _admit_all(plan, size, channels, deadline)
        yield Star(rank, size, channels, timeout_s=timeout_s)
    finally:
        for channel in channels.values():
            channel.close()


def _admit_all(plan: AttestedCollectives, size: int, channels: dict[int, ByteStream], deadline: Deadline) -> None:
    address = parse_address(plan.address)
    if isinstance(address, DescriptorAddress):
        raise SettingError("processes meet at a place that all can reach", where="address", got=plan.address)
    with listening(address) as listener:
        while len(channels) < size - 1:
            listener.settimeout(_left_s(deadline))
            try:
                sock, _ = listener.accept()
            except TimeoutError as problem:
                missing = sorted(set(range(1, size)) - channels.keys())
                raise PeerStalled(
                    "trusted processes of this run are missing (X-12)",
                    where=plan.address,
                    expected=f"processes 1 to {size - 1} {deadline.expected()}",
                    got=f"none for {', '.join(map(str, missing))}",
                ) from problem
            channel: ByteStream
            channel, _ = attested_mutual_server(
                sock, plan.attester(), plan.demand(), timeout_s=_short(deadline), peer="joining process"
            )
            try:
                rank = _admit(channel, size, channels, deadline)
            except BaseException:
                channel.close()
                raise
            channels[rank] = channel
    for rank, channel in channels.items():
        _send(channel, [_word(_Kind.WELCOME, 0, size)], f"process {rank}", _short(deadline))


def _admit(channel: ByteStream, size: int, taken: dict[int, ByteStream], deadline: Deadline) -> int:
    head = memoryview(bytearray(_HEADER.size))
    _receive(channel, head, "joining process", _short(deadline))
    magic, kind, rank, its_size, number, more = _HEADER.unpack(head)
    if (magic, kind, number, more) != (_MAGIC, _Kind.JOIN, 0, 0):
        raise FrameError("not a process that joins a run", where="joining process", expected="JOIN")
    _demand_place(rank, its_size, size, where="joining process", lowest=1)
    if rank in taken:
        raise AttestationError(
            "two processes take one place of this run", check="X-11", where="joining process", got=f"process {rank}"
        )
    return int(rank)


def _join(plan: AttestedCollectives, rank: int, size: int, deadline: Deadline) -> ByteStream:
    name = "process 0"
    try:
        sock = connect_socket(parse_address(plan.address), deadline, loopback_only=False, wait=True)
    except LinkError as problem:
        raise PeerStalled(
            "process 0 of this run is missing (X-12)", where=plan.address, got=problem.got or problem.message
        ) from problem
    channel, _ = attested_client(sock, plan.demand(), shown=plan.attester(), timeout_s=_short(deadline), peer=name)
    try:
        _send(channel, [_word(_Kind.JOIN, rank, size)], name, _short(deadline))
        head = memoryview(bytearray(_HEADER.size))
        try:
            _receive(channel, head, name, _left_s(deadline))
        except PeerClosed as problem:
            hint = "see what process 0 said: it refuses places that are none or taken, and waits for all only so long"
            raise PeerClosed("process 0 did not start the run", where=plan.address, hint=hint) from problem
        if head != _word(_Kind.WELCOME, 0, size):
            raise FrameError("process 0 starts another run than ours", where=plan.address)
    except BaseException:
        channel.close()
        raise
    return channel


def _demand_place(rank: int, size: int, signed: int, *, where: str, lowest: int = 0) -> None:
    if size != signed or not lowest <= rank < signed:
        raise AttestationError(
            "not a place in this run",
            check="X-10",
            where=where,
            expected=f"process {lowest} to {signed - 1} of {signed}",
            got=f"process {rank} of {size}",
            hint="how many processes there are stands in the signed configuration",
        )


def _word(kind: _Kind, rank: int, size: int) -> memoryview:
    return memoryview(_HEADER.pack(_MAGIC, kind, rank, size, 0, 0))


def _left_s(deadline: Deadline) -> float:
    return max(1, deadline.left_ms() or 0) / 1000


def _short(deadline: Deadline) -> float:
    """For one handshake or message of the opening: one that stalls does not use up the time of all."""
    return min(DEFAULT_TIMEOUT_S, _left_s(deadline))


def _send(channel: ByteStream, parts: list[memoryview], peer: str, timeout_s: float) -> None:
    left = [part for part in parts if len(part)]
    try:
        channel.settimeout(timeout_s)
        while left:
            sent = channel.sendmsg(left)
            while left and sent >= len(left[0]):
                sent -= len(left.pop(0))
            if left:
                left[0] = left[0][sent:]
    except TimeoutError as problem:
        raise _stalled(peer, timeout_s) from problem
    except OSError as problem:
        raise _ended(peer, str(problem)) from problem


def _receive(channel: ByteStream, into: memoryview, peer: str, timeout_s: float) -> None:
    try:
        channel.settimeout(timeout_s)
        while into:
            got = channel.recv_into(into)
            if not got:
                raise _ended(peer, None)
            into = into[got:]
    except TimeoutError as problem:
        raise _stalled(peer, timeout_s) from problem
    except OSError as problem:
        raise _ended(peer, str(problem)) from problem


def _ended(peer: str, got: str | None) -> PeerClosed:
    hint = "see what it said; then continue the run with --resume"
    return PeerClosed("another trusted process of this run ended", where=peer, got=got, hint=hint)


def _stalled(peer: str, timeout_s: float) -> PeerStalled:
    return PeerStalled("another trusted process of this run stalled", where=peer, expected=f"within {timeout_s:g} s")
