"""A handshake with a key broker on loopback: from a new TLS connection to the first opened part, and its pieces.

    python benchmarks/bench_handshake.py [--repeats 30] [--part-kib 1024]

The broker is a process of its own (``motte broker serve``) with a key file; the evidence is SIMULATED, so making it and
verifying it costs one signature each: a hardware quote and its collateral come on top. The pieces of one handshake, in
order: connect (TCP, TLS 1.3, the pin), nonce (asked, checked), evidence (a key pair, report data, a signature),
release (evidence verified, the log on disk, keys sealed, checked and opened), open (the first part of the bundle,
under the released keys). Every handshake makes two synchronous commits: the disk's own time for one is in ``nonce``
and in ``release``.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import CONSOLE, arguments, report

from motte.attest.anchors import Anchors
from motte.attest.configuration import RunConfiguration
from motte.attest.platforms import simulated
from motte.attest.policy_text import loads
from motte.measure.compare import compare_samples
from motte.provision.address import BrokerAddress
from motte.provision.broker import enroll, policies, state
from motte.provision.broker.wrapping import Unlock
from motte.provision.client import BrokerClient
from motte.provision.handshake import Enclave, Handshake
from motte.provision.registration import Registration
from motte.seal import BytesPart, SignedBundle, SignerPrivateKey, open_bundle, write_bundle
from motte.seal.keys import SignerPublicKey
from motte.seal.primitives import new_ed25519

POLICY = """{"format": "motte-policy-1", "policy": {"all_of": [{"insecure_allow_simulated": {}},
    {"platform": ["simulated"]}, {"not_debug": {}}, {"fresh": {"max_age_s": 60}}]}}"""
PIECES = ("connect", "nonce", "evidence", "release", "open")


def main() -> None:
    """A broker, a bundle, and one handshake after the other."""
    parser = arguments(__doc__, repeats=30)
    parser.add_argument("--part-kib", type=int, default=1024, help="size of the first part")
    given = parser.parse_args()
    CONSOLE.print("[bold]SIMULATED: no hardware protection.[/]")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle, enclave, signer = prepare(folder, given.part_kib)
        command = [sys.executable, "-m", "motte", "broker", "serve", str(folder / "broker"), "--listen", "127.0.0.1:0"]
        server = subprocess.Popen(
            [*command, "--key-file", str(folder / "wrapping.key"), "--json"], stdout=subprocess.PIPE, text=True
        )
        try:
            address = announced(server)
            with open_bundle(bundle, signer=signer) as signed:
                once(address, signed, enclave)
                rounds = [once(address, signed, enclave) for _ in range(given.repeats)]
        finally:
            server.terminate()
            server.wait(timeout=30)
    samples = {"sealed: whole handshake": [sum(each) for each in rounds]}
    for index, piece in enumerate(PIECES):
        samples[f"sealed: {piece}"] = [each[index] for each in rounds]
    report(
        compare_samples(samples),
        series="broker handshake",
        what="from connecting to the first opened part",
        threads=given.threads,
        records=given.records,
        part_kib=given.part_kib,
    )


def prepare(folder: Path, part_kib: int) -> tuple[Path, Enclave, SignerPublicKey]:
    """A broker in ``folder`` that holds one bundle's keys; the enclave that may have them."""
    owner = SignerPrivateKey.new()
    private, public = new_ed25519()
    with state.create(folder / "broker", Unlock(key_file=folder / "wrapping.key")) as broker:
        policies.set_policy(broker, "bench", loads(POLICY), anchors=Anchors(simulated_signers=(public,)))
        path = folder / "bench.motte"
        write_bundle(
            path,
            release=1,
            manifest=b"manifest",
            parts=[BytesPart(os.urandom(part_kib * 1024)) for _ in range(12)],
            recipients=[broker.recipient.public],
            signer=owner,
        )
        with open_bundle(path, signer=owner.public) as signed:
            header = signed.header
        configuration = RunConfiguration(
            bundle_id=header.bundle_id,
            release=1,
            signer=owner.public.raw,
            broker=str(broker.signer.public),
            scheme="trusted",
            placement="all inside",
            noise=None,
            integrity="on",
        ).digest()
        order = Registration(header=header, model="bench", policy="bench", configurations=(configuration,))
        enroll.register(broker, order, broker.recipient)
    enclave = Enclave(lambda data: simulated.issue(data, private=private), b"", configuration)
    return path, enclave, owner.public


def announced(server: subprocess.Popen[str]) -> BrokerAddress:
    """The address that the server prints when it listens."""
    text = ""
    assert server.stdout is not None
    for line in server.stdout:
        text += line
        if line.startswith("}"):
            break
    return BrokerAddress.parse(json.loads(text)["address"])


def once(address: BrokerAddress, signed: SignedBundle, enclave: Enclave) -> list[float]:
    """One handshake over a new connection: the seconds of its pieces."""
    marks = [time.perf_counter()]
    handshake = Handshake(address.key, signed.header, enclave)
    into = bytearray(signed.header.sections[1].plaintext_bytes)
    with BrokerClient(address) as client:
        client.connect()
        marks.append(time.perf_counter())
        challenge = client.ask(handshake.ask())
        marks.append(time.perf_counter())
        proof = handshake.prove(challenge)
        marks.append(time.perf_counter())
        release, _ = handshake.finish(client.prove(proof))
        marks.append(time.perf_counter())
        with signed.unlock_with(release.data_keys) as unlocked:
            unlocked.open_part(0, memoryview(into))
        marks.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(marks)]


if __name__ == "__main__":
    main()
