"""A run's books at its key broker: releases are charged before they leave, and only the newest checkpoint has a key.

What counts as a release is what the accountant counts (:mod:`motte.offload.releases`): one kind of tensor of one split
layer in one pass, its pieces being one; the same bytes again are none. They are **charged before the step**, layers
times kinds for every process of the run, and for up to eight steps at once: an order takes the broker milliseconds, and
an entry of its log. What a step lets out beyond that is charged by itself, before it leaves. What was charged and did
not leave stays charged, as after a crash: the broker's total is never too low.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from motte.errors import BrokerRefused, HandshakeError, KeyAccessError, RollbackError
from motte.offload.releases import KINDS, Kind, ReleaseCount, Releases
from motte.provision.client import BrokerClient
from motte.provision.handshake import Handshake
from motte.provision.messages import Resume
from motte.provision.release import Release
from motte.provision.runs import RunSession
from motte.seal.keys import SignerPublicKey

if TYPE_CHECKING:
    from motte.offload.session import Session
    from motte.train.distributed import World

_RENEW_AT: Final = 0.75
"""Share of a lease after which the next order asks for a new one."""
_STEPS_AHEAD: Final = 8
"""Steps that are charged at once, where so many are left. So many are charged in vain when a run is killed."""

Begin = Callable[[Resume], Handshake]
"""Makes a new handshake for the run, from one of its checkpoints on."""


class Books:
    """The books of one run, kept by its process 0. Not safe from several threads.

    A lease that comes to its end is followed by another handshake, with fresh evidence. That is the same enclave asking
    again: a second one that was given the run meanwhile ends this one's lease, and the next order here is refused.

    Args:
        client: to the broker; owned by the caller.
        begin: makes the handshakes that follow.
        release, private: of the handshake that was made.
        clock: seconds since 1970, for the end of leases; the host's, where there is no other.
    """

    def __init__(
        self,
        client: BrokerClient,
        broker: SignerPublicKey,
        begin: Begin,
        release: Release,
        private: bytes,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._client, self._broker, self._begin, self._clock = client, broker, begin, clock
        self._take(release, private)

    @property
    def charged(self) -> int:
        """Releases charged in all, since the run was enrolled."""
        return self._session.state.charged

    @property
    def checkpoint(self) -> int:
        """Number of the newest checkpoint that was committed; 0: none."""
        return self._session.state.checkpoint

    def charge(self, releases: int) -> None:
        """Charge ``releases`` more. Only when this returns may they leave.

        Raises:
            KeyAccessError: the owner's budget is used up (K-13). BrokerRefused: another refusal, such as the lease of
            an enclave that went on meanwhile (K-12). HandshakeError, RollbackError, LinkError: no answer to believe.
        """
        try:
            self._current().charge(releases)
        except BrokerRefused as problem:
            if problem.check != "K-13":
                raise
            raise KeyAccessError(
                "the run has released all that the owner of its data allowed",
                check="K-13",
                expected=problem.expected,
                got=problem.got,
                hint="its last checkpoint stands; the owner enrolls another run: motte broker run enroll",
            ) from problem

    def prepare(self, checkpoint: int) -> bytes:
        """The key (32 secret bytes) of checkpoint number ``checkpoint``, the newest and one. Raises: as
        :meth:`charge`.
        """
        return self._current().prepare(checkpoint)

    def commit(self, checkpoint: int) -> None:
        """Say that this checkpoint lies whole on disk: no older one gets a key any more. Raises: as :meth:`charge`."""
        self._current().commit(checkpoint)

    def _current(self) -> RunSession:
        if self._clock() >= self._renew_at:
            resume = Resume(self._run, self.checkpoint)
            release, private = self._client.obtain(self._begin(resume))
            if release.data_keys != self._data_keys:
                raise HandshakeError("the broker released other keys of the same data", check="H-6")
            self._take(release, private)
        return self._session

    def _take(self, release: Release, private: bytes) -> None:
        self._session = RunSession(release, private, self._broker, self._client.run)
        self._run = b"" if release.resume is None else release.resume.run
        self._data_keys = release.data_keys
        now = self._clock()
        self._renew_at = now + _RENEW_AT * max(0.0, release.lease.expires_at - now)


class Charges:
    """What this process may still let out: charged by process 0, and spent here before each release leaves.

    Args:
        books: process 0's; None in the others, which may let out what process 0 charged for them at each step.
    """

    def __init__(self, books: Books | None, world: World) -> None:
        if world.size > 1 and not world.attested:
            raise KeyAccessError("who keeps the books cannot be heard over plaintext", where=f"process {world.rank}")
        self._books, self._world = books, world
        self._credit = 0
        self._paid = 0
        self._ahead = _STEPS_AHEAD
        self._failed = False

    @property
    def charged(self) -> int | None:
        """Releases charged in all; None in a process that does not keep the books."""
        return None if self._books is None else self._books.charged

    def begin_step(self, session: Session, left: int) -> None:
        """See that one step of all processes is charged. All of them come here before the step, and none goes on
        before it is paid.

        Args:
            left: steps that the run has left, this one included.

        Raises:
            KeyAccessError: the budget is used up. Others as :meth:`Books.charge`.
        """
        block = len(session.layers) * len(KINDS)
        if self._books is not None and block:
            if not self._paid:
                self._paid = self._pay_steps(block * self._world.size, max(1, min(left, self._ahead)))
            self._paid -= 1
        if self._world.size > 1:
            self._world.from_main(b"\x01")  # process 0 sends it when it has paid: it is what the others wait for
        self._credit = max(self._credit, block)

    def spend(self) -> None:
        """One release is about to leave.

        Raises:
            KeyAccessError: nobody charged it: the budget is used up, or this process lets out more than a step does.
        """
        if self._failed:
            # After a failure nobody knows what was charged: the bytes of a second try would leave unpaid.
            raise KeyAccessError("a release after its charge failed", where=f"process {self._world.rank}")
        if not self._credit:
            if self._books is None:
                raise KeyAccessError(
                    "a release that process 0 did not charge",
                    where=f"process {self._world.rank}",
                    hint="without noise a second try is another release; continue the run with --resume",
                )
            self._pay(1)
            self._credit += 1
        self._credit -= 1

    def watch(self, session: Session) -> None:
        """From now on every release of ``session`` is spent here before it leaves."""
        session.releases = ChargedReleases(session.releases.counts, self)

    def _pay_steps(self, releases: int, steps: int) -> int:
        """Pay ``releases`` for each of ``steps``, or for one where the budget has no room for all; for how many."""
        if steps > 1:
            try:
                self._pay(releases * steps)
                return steps
            except KeyAccessError:  # the broker's plain no: nothing was charged
                self._failed, self._ahead = False, 1
        self._pay(releases)
        return 1

    def _pay(self, releases: int) -> None:
        if self._books is None:
            raise KeyAccessError("only process 0 keeps the books", where=f"process {self._world.rank}")
        self._failed = True
        self._books.charge(releases)
        self._failed = False


class ChargedReleases(Releases):
    """The ledger of releases of a session, each spent from ``charges`` when it is counted, so before it leaves."""

    def __init__(self, counts: Mapping[tuple[str, Kind], ReleaseCount], charges: Charges) -> None:
        super().__init__(counts)
        self._charges = charges
        self._times: dict[tuple[str, Kind, int], int] = {}
        self._most: dict[tuple[str, Kind], int] = {}

    def count(self, layer: str, kind: Kind, release_id: bytes | None, *, piece: int = 0) -> bool:
        """As :meth:`Releases.count`. Pieces of one pass are one release: only the piece that left most often counts.

        Raises:
            KeyAccessError, and as :meth:`Books.charge`: it was not charged, and must not leave.
        """
        if not super().count(layer, kind, release_id, piece=piece):
            return False
        times = self._times[layer, kind, piece] = self._times.get((layer, kind, piece), 0) + 1
        if times > self._most.get((layer, kind), 0):
            self._most[layer, kind] = times
            self._charges.spend()
        return True


def refused_rollback(problem: BrokerRefused) -> RollbackError | None:
    """The refusal of a checkpoint that is not the run's newest (K-11) as an error of that name; None: another one."""
    if problem.kind != "RollbackError" or problem.check != "K-11":
        return None
    return RollbackError(
        "the broker gives no key to this checkpoint: it is not the newest of the run",
        check="K-11",
        expected=problem.expected,
        got=problem.got,
        hint="an older file may have been put in its place; a run that has checkpoints goes on with --resume only",
    )
