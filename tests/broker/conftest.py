"""A broker with one model under a policy that takes simulated evidence, and enclaves that ask it for keys."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the extra motte[broker] is not installed")
pytest.importorskip("fastapi", reason="the extra motte[broker] is not installed")
pytest.importorskip("uvicorn", reason="the extra motte[broker] is not installed")

from motte.attest.anchors import Anchors
from motte.attest.configuration import RunConfiguration
from motte.attest.evidence import Evidence
from motte.attest.platforms import simulated
from motte.attest.policy_text import loads
from motte.provision.address import BrokerAddress
from motte.provision.broker import answers, enroll, log, policies, state
from motte.provision.broker.wrapping import Unlock
from motte.provision.handshake import Enclave, Handshake
from motte.provision.heads import Head
from motte.provision.messages import Resume
from motte.provision.registration import Registration
from motte.provision.release import Release
from motte.seal import BytesPart, SignerPrivateKey, open_bundle, write_bundle
from motte.seal.header import BundleHeader
from motte.seal.primitives import new_ed25519

MEASUREMENT = b"\x07" * 32
POLICY = """{"format": "motte-policy-1", "policy": {"all_of": [
    {"insecure_allow_simulated": {}}, {"platform": ["simulated"]}, {"not_debug": {}},
    {"measurement": {"allowed": ["MEASUREMENT"]}}, {"fresh": {"max_age_s": 120}}]}}""".replace(
    "MEASUREMENT", MEASUREMENT.hex()
)


@dataclass
class Place:
    """A broker's folder, its key file, and what the owner and the enclaves of one model hold."""

    folder: Path
    key_file: Path
    broker: state.Broker
    owner: SignerPrivateKey
    development_key: bytes

    @property
    def unlock(self) -> Unlock:
        return Unlock(key_file=self.key_file)

    def seal(self, release: int, name: str = "model.motte", manifest: bytes = b"manifest") -> Path:
        path = self.folder.parent / f"{release}-{name}"
        write_bundle(
            path,
            release=release,
            manifest=manifest,
            parts=[BytesPart(b"part one"), BytesPart(b"part two" * 1000)],
            recipients=[self.broker.recipient.public],
            signer=self.owner,
        )
        return path

    def header(self, path: Path) -> BundleHeader:
        with open_bundle(path, signer=self.owner.public) as bundle:
            return bundle.header

    def configuration(self, header: BundleHeader, **other: object) -> bytes:
        base = RunConfiguration(
            bundle_id=header.bundle_id,
            release=header.release,
            signer=header.signer.raw,
            broker=str(self.broker.signer.public),
            scheme="trusted",
            placement="all inside",
            noise="gaussian 1.0",
            integrity="on",
        )
        return replace(base, **other).digest()

    def register(self, path: Path, **other: object) -> Registration:
        header = self.header(path)
        given = {"model": "model", "policy": "development", "configurations": (self.configuration(header),), **other}
        made = Registration(header=header, **given)
        self.register_made(made)
        return made

    def register_made(self, made: Registration) -> None:
        enroll.register(self.broker, made, self.broker.recipient)

    def issue(self, **other: object) -> Callable[[bytes], Evidence]:
        given = {"private": self.development_key, "measurement": MEASUREMENT, **other}
        return lambda data: simulated.issue(data, **given)

    def enclave(self, header: BundleHeader, **evidence: object) -> Enclave:
        return Enclave(self.issue(**evidence), b"\x05" * 32, self.configuration(header))

    def handshake(self, header: BundleHeader, *, resume: Resume | None = None, head: Head | None = None) -> Handshake:
        key = self.broker.signer.public
        return Handshake(key, header, self.enclave(header), resume=resume, known_head=head)

    def obtain(self, header: BundleHeader, resume: Resume | None = None) -> tuple[Release, bytes]:
        """A whole handshake without a network."""
        handshake = self.handshake(header, resume=resume)
        challenge = answers.ask(self.broker, handshake.ask())
        return handshake.finish(answers.prove(self.broker, handshake.prove(challenge)))

    def entries(self) -> list[log.Entry]:
        with self.broker.store.read() as db:
            return list(log.entries(db))

    def verify(self, *known: Head) -> Head:
        with self.broker.store.read() as db:
            return log.verify(db, self.broker.signer.public, known)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """New for every test."""
    key_file = tmp_path / "wrapping.key"
    broker = state.create(tmp_path / "broker", Unlock(key_file=key_file))
    private, public = new_ed25519()
    made = Place(tmp_path / "broker", key_file, broker, SignerPrivateKey.new(), private)
    anchors = Anchors(simulated_signers=(public,))
    policies.set_policy(broker, "development", loads(POLICY), anchors=anchors, owners=[made.owner.public])
    yield made
    made.broker.close()


@pytest.fixture
def header(place: Place) -> BundleHeader:
    """Of a registered bundle, release 3."""
    path = place.seal(3)
    place.register(path)
    return place.header(path)


class Served:
    """``motte broker serve`` as a process of its own, to be killed."""

    def __init__(self, place: Place) -> None:
        self.place = place
        words = ["broker", "serve", str(place.folder), "--key-file", str(place.key_file), "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "motte", *words, "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        import json

        text = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text += line
            if line.startswith("}"):
                break
        if not text:
            raise RuntimeError(self.process.communicate()[1])
        self.address = BrokerAddress.parse(json.loads(text)["address"])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> str:
        self.process.terminate()
        return self.process.communicate(timeout=30)[1]


@pytest.fixture
def serve(place: Place) -> Iterator[Callable[[], Served]]:
    """Starts servers of the place's broker; all are gone at the end."""
    started: list[Served] = []

    def start() -> Served:
        started.append(Served(place))
        return started[-1]

    yield start
    for each in started:
        if each.process.poll() is None:
            each.kill()
