"""How a run gets the keys of sealed data: from a key that we hold, or from a key broker against evidence.

    signed data -> settings compared with the signed terms -> evidence, handshake -> data keys, books, checkpoint

Of several processes only process 0 asks the broker, since a second handshake would end the first one's lease. It sends
what it got to the others over their attested channels: each of them has shown process 0 evidence that the owner's
signed policy takes, under the signed configuration.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from motte.attest.configuration import RunConfiguration
from motte.errors import BrokerRefused, BundleError, FormatError, SettingError
from motte.provision.address import BrokerAddress
from motte.provision.client import DEFAULT_TIMEOUT_S, BrokerClient
from motte.provision.handshake import Enclave, Handshake, Issue
from motte.provision.messages import RUN_ID_BYTES, Resume
from motte.seal.primitives import KEY_BYTES
from motte.seal.reader import SignedBundle, open_bundle
from motte.strict_json import Fields
from motte.train.books import Begin, Books, refused_rollback
from motte.trusted.harden import harden

if TYPE_CHECKING:
    from motte.provision.release import Release
    from motte.train.distributed import World
    from motte.train.settings import TrainSettings

_SEALED: Final = "sealed:"
_NUMBER_BYTES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerRun:
    """From which broker a run gets its keys, and as which of the runs that are enrolled there.

    Attributes:
        run: 16 bytes, as ``motte broker run enroll`` printed them. They are no secret.
        issue: makes this process's evidence.

    Raises:
        SettingError: not the name of a run.
    """

    address: BrokerAddress
    run: bytes
    issue: Issue = field(repr=False)
    timeout_s: float = DEFAULT_TIMEOUT_S

    def __post_init__(self) -> None:
        if len(self.run) != RUN_ID_BYTES:
            got = f"{len(self.run)} bytes"
            raise SettingError("not the name of a run", where="run", expected=f"{RUN_ID_BYTES} bytes", got=got)


def parse_run(text: str) -> bytes:
    """The name of a run from its 32 hexadecimal digits.

    Raises:
        SettingError: something else.
    """
    try:
        return Fields({"run": text}, where="broker").hexadecimal("run", length_bytes=RUN_ID_BYTES)
    except FormatError as problem:
        expected = f"{2 * RUN_ID_BYTES} hexadecimal digits, as motte broker run enroll printed them"
        raise SettingError("not the name of a run", where="run", expected=expected, got=repr(text)[:80]) from problem


@dataclass(frozen=True, slots=True)
class Granted:
    """What a broker gave this process, directly or through process 0. Secret.

    Attributes:
        data_keys: one of 32 bytes for each section of the data.
        checkpoint: number of the run's newest committed checkpoint; 0: none.
        checkpoint_key: 32 bytes, the key of that one; None: there is none.
        books: process 0's; None in every other.
    """

    data_keys: tuple[bytes, ...] = field(repr=False)
    checkpoint: int
    checkpoint_key: bytes | None = field(repr=False)
    books: Books | None


@contextlib.contextmanager
def signed_data(settings: TrainSettings) -> Iterator[SignedBundle | None]:
    """The sealed data of a run, its signature and release checked, nothing of it opened; None: the data is not sealed.

    This process is hardened first: not dumpable, no core files, no new privileges.

    Raises:
        InputError: no such file. BundleError, SignatureError, RollbackError: as :func:`motte.seal.reader.open_bundle`.
        ResourceError: the kernel refuses to harden this process.
    """
    if settings.data_signer is None or not settings.data.startswith(_SEALED):
        yield None
        return
    harden()
    path = Path(settings.data.removeprefix(_SEALED))
    try:
        signed = open_bundle(path, signer=settings.data_signer, min_release=settings.data_min_release)
    except BundleError as problem:
        problem.where = problem.where or str(path)
        raise
    with signed:
        yield signed


@contextlib.contextmanager
def granted(
    plan: BrokerRun,
    signed: SignedBundle,
    configuration: RunConfiguration,
    checkpoints: Sequence[int],
    world: World,
) -> Iterator[Granted]:
    """The keys of ``signed`` for this process of the run; the way to the broker stays open until the block ends.

    Args:
        signed: its owner's terms are those of the run (:func:`motte.train.signed_terms.check_settings`).
        checkpoints: numbers of checkpoints that lie on disk, **unverified**; none: the run begins.

    Raises:
        RollbackError: the broker's newest checkpoint of this run is none of ``checkpoints`` (K-11).
        BrokerRefused: it refuses for another reason. HandshakeError: its answers are not to be believed.
        SettingError: several processes without attested channels. LinkError: no way to it, or to process 0.
    """
    if world.size > 1 and not world.attested:
        raise SettingError("keys cross between processes over attested channels only", where="meeting")
    sections = len(signed.header.sections)
    if not world.main:
        blank = bytes((sections + 1) * KEY_BYTES + _NUMBER_BYTES)
        yield _unpacked(world.from_main(blank), sections)
        return
    header, key, digest = signed.header, plan.address.key, configuration.digest()

    def begin(resume: Resume) -> Handshake:
        return Handshake(key, header, Enclave(plan.issue, b"", digest), resume=resume)

    with BrokerClient(plan.address, timeout_s=plan.timeout_s) as client:
        release, private = _obtained(client, begin, plan.run, checkpoints)
        books = Books(client, key, begin, release, private)
        own = Granted(release.data_keys, books.checkpoint, release.checkpoint_key, books)
        world.from_main(_packed(own))
        yield own


def _obtained(client: BrokerClient, begin: Begin, run: bytes, checkpoints: Sequence[int]) -> tuple[Release, bytes]:
    # A broker says before any evidence is made which checkpoint is the newest, so asking for each costs a message.
    refused: Exception | None = None
    for checkpoint in sorted(set(checkpoints), reverse=True) or [0]:
        try:
            return client.obtain(begin(Resume(run, checkpoint)))
        except BrokerRefused as problem:
            refused = refused_rollback(problem)
            if refused is None:
                raise
    raise refused or SettingError("no checkpoint to go on from", where="checkpoint_dir")


def _packed(own: Granted) -> bytes:
    key = own.checkpoint_key or bytes(KEY_BYTES)
    return b"".join([*own.data_keys, key, own.checkpoint.to_bytes(_NUMBER_BYTES, "big")])


def _unpacked(data: bytes, sections: int) -> Granted:
    keys = [data[at : at + KEY_BYTES] for at in range(0, (sections + 1) * KEY_BYTES, KEY_BYTES)]
    checkpoint = int.from_bytes(data[-_NUMBER_BYTES:], "big")
    return Granted(tuple(keys[:-1]), checkpoint, keys[-1] if checkpoint else None, None)
