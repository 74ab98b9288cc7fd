"""The broker as a process: TLS with a pin, many at once, killed at any moment, and never a 500."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import random
import socket
import sqlite3
import ssl
import threading
import time
from dataclasses import replace

import pytest

from motte.errors import (
    BrokerRefused,
    HandshakeError,
    InputError,
    LinkError,
    PeerStalled,
    RollbackError,
    SignatureError,
    TrustError,
)
from motte.limits import MAX_BROKER_REQUEST_BYTES
from motte.provision.broker import enroll
from motte.provision.broker.app import make_app
from motte.provision.broker.serve import parse_listen
from motte.provision.broker.serve import serve as serve_here
from motte.provision.client import BrokerClient, _Pinned
from motte.provision.messages import Resume
from motte.provision.registration import Registration
from motte.provision.runs import RunSession
from motte.seal import SignerPrivateKey, open_bundle


def get(address, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, bytes, str]:
    connection = _Pinned(address, 30)
    try:
        connection.request(method, path, body=body)
        response = connection.getresponse()
        return response.status, response.read(), response.getheader("Content-Type") or ""
    finally:
        connection.close()


def test_over_the_network(place, header, serve) -> None:
    """From sealing to opened parts, with nothing but the address; then the pages, the refusals and the end."""
    server = serve()
    with BrokerClient(server.address) as client:
        identity = client.identity()
        assert identity.recipient == place.broker.recipient.public
        path = place.seal(4)
        sealed = place.header(path)
        order = Registration(
            header=sealed, model="far", policy="development", configurations=(place.configuration(sealed),)
        )
        registered = client.register(order, place.owner)
        client.check_history(identity.head, registered)
        release, _ = client.obtain(place.handshake(sealed, head=registered))
        with open_bundle(path, signer=place.owner.public) as bundle, bundle.unlock_with(release.data_keys) as unlocked:
            assert unlocked.open_part_chunk(0, 0) == b"part one"
        newest, document = client.head()
        assert document["index"] == newest.index
        client.check_history(registered, newest)
        with pytest.raises(RollbackError):
            client.check_history(newest, registered)
        enroll.enroll_run(place.broker, "model", b"r" * 16, 5)
        held, private = client.obtain(place.handshake(header, resume=Resume(b"r" * 16, 0)))
        run = RunSession(held, private, place.broker.signer.public, client.run)
        assert run.charge(5).charged == 5
        with pytest.raises(BrokerRefused) as refused:
            run.charge(1)
        assert (refused.value.check, refused.value.kind) == ("K-13", "KeyAccessError")
        with pytest.raises(BrokerRefused) as refused:
            client.obtain(place.handshake(header))
        assert refused.value.check == "K-11"
        stranger = SignerPrivateKey.new()
        place.owner, mine = stranger, place.owner
        foreign = Registration(
            header=place.header(place.seal(9)), model="x", policy="development", configurations=(b"c" * 32,)
        )
        place.owner = mine
        with pytest.raises(BrokerRefused) as refused:
            client.register(foreign, stranger)
        assert refused.value.check == "K-14"
    status, page, kind = get(server.address, "/docs")
    assert (status, kind.split(";")[0]) == (200, "text/html")
    assert b"/v1/release" in page
    assert b"<script" not in page
    schema = json.loads(get(server.address, "/openapi.json")[1])
    assert set(schema["paths"]) >= {"/v1/nonce", "/v1/release", "/v1/run", "/v1/bundles", "/v1/broker"}
    status, body, _ = get(server.address, "/v1/nonce", "POST", b"{" * 10)
    assert (status, json.loads(body)["error"]["kind"]) == (400, "FormatError")
    assert get(server.address, "/v1/nothing")[0] == 404
    large = b" " * (MAX_BROKER_REQUEST_BYTES + 1)
    assert get(server.address, "/v1/nonce", "POST", large)[0] == 413
    assert "terminated" in server.stop()
    with pytest.raises(LinkError):
        BrokerClient(server.address).identity()


def test_another_server_than_the_pinned_one_gets_nothing(place, header, serve) -> None:
    server = serve()
    wrong = replace(server.address, pin=b"\x00" * 32)
    with pytest.raises(SignatureError), BrokerClient(wrong) as client:
        client.obtain(place.handshake(header))
    other_key = replace(server.address, key=SignerPrivateKey.new().public)
    with pytest.raises(HandshakeError) as found, BrokerClient(other_key) as client:
        client.identity()
    assert found.value.check == "H-3"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        deaf = replace(server.address, port=silent.getsockname()[1])
        with pytest.raises(PeerStalled), BrokerClient(deaf, timeout_s=0.2) as client:
            client.identity()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((server.address.host, server.address.port)) as raw, pytest.raises(ssl.SSLError):
        context.wrap_socket(raw)


def test_two_hundred_at_once(place, header, serve) -> None:
    server = serve()
    gate = threading.Barrier(200)

    def one() -> object:
        handshake = place.handshake(header)
        with BrokerClient(server.address, timeout_s=120) as client:
            gate.wait()
            proof = handshake.prove(client.ask(handshake.ask()))
            release, _ = handshake.finish(client.prove(proof))
            with pytest.raises(BrokerRefused) as again:
                client.prove(proof)
            return release, again.value.check

    with concurrent.futures.ThreadPoolExecutor(200) as pool:
        done = [each.result() for each in [pool.submit(one) for _ in range(200)]]
    assert {check for _, check in done} == {"K-6"}
    released = [each.facts["nonce"] for each in place.entries() if each.kind == "released"]
    assert len(released) == len(set(released)) == 200
    assert {release.nonce.hex() for release, _ in done} == set(released)
    assert len({release.lease.id for release, _ in done}) == 200
    assert len({release.data_keys for release, _ in done}) == 1
    place.verify(*(release.head for release, _ in done))


def test_killed_at_any_moment(place, header, serve) -> None:
    """What a client saw answered is in the log; one nonce gives keys once, before the kill or after it."""
    chance = random.Random(20)
    heads, nonces, open_proofs = [], [], []
    lock = threading.Lock()

    def work(address, stop: threading.Event) -> None:
        while not stop.is_set():
            handshake = place.handshake(header)
            try:
                with BrokerClient(address, timeout_s=20) as client:
                    proof = handshake.prove(client.ask(handshake.ask()))
                    with lock:
                        open_proofs.append((handshake, proof))
                    release, _ = handshake.finish(client.prove(proof))
                    with lock:
                        heads.append(release.head)
                        nonces.append(release.nonce)
            except (LinkError, http.client.HTTPException):
                return

    for _ in range(3):
        server, stop = serve(), threading.Event()
        before = len(heads)
        workers = [threading.Thread(target=work, args=(server.address, stop)) for _ in range(3)]
        for each in workers:
            each.start()
        while len(heads) < before + 2:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.3)
        server.kill()
        stop.set()
        for each in workers:
            each.join()
    server = serve()  # it verifies its log before it serves
    with BrokerClient(server.address) as client:
        for handshake, proof in open_proofs:
            if handshake.state == "proved":
                try:
                    release, _ = handshake.finish(client.prove(proof))
                    nonces.append(release.nonce)
                except BrokerRefused as refused:
                    assert refused.check == "K-6"  # noqa: PT017
    place.verify(*heads)
    released = [each.facts["nonce"] for each in place.entries() if each.kind == "released"]
    assert len(released) == len(set(released))
    assert len(nonces) == len(set(nonces))
    assert {each.hex() for each in nonces} <= set(released)


def test_a_broken_log_is_not_served(place, header) -> None:
    with sqlite3.connect(place.folder / "broker.db") as db:
        db.execute("DROP TRIGGER audit_no_delete")
        db.execute("DELETE FROM audit WHERE idx = 2")
    db.close()
    with pytest.raises(TrustError):
        serve_here(place.broker, "127.0.0.1:0", on_listening=print)


@pytest.mark.parametrize("text", ["", "8443", ":8443", "h:", "h:x", "h:70000", "h:-1"])
def test_not_an_address_to_listen_at(text) -> None:
    with pytest.raises(InputError):
        parse_listen(text)
    assert parse_listen("[::1]:0") == ("::1", 0)


def test_no_input_makes_a_500(place, header) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable

    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(place.broker))
    seen: set[tuple[str, int]] = set()
    few = settings(
        max_examples=5,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    for operation in (each.ok() for each in schema.get_all_operations()):
        for mode in schemathesis.GenerationMode:

            @few
            @given(case=operation.as_strategy(generation_mode=mode))
            def fuzz(case) -> None:
                response = case.call()
                seen.add((case.operation.label, response.status_code))
                assert response.status_code < 500, response.content

            try:
                fuzz()
            except Unsatisfiable:  # nothing can be wrong about a GET without parameters
                assert case_free(operation)
    assert {label.split()[1] for label, _ in seen} == set(schema.raw_schema["paths"])
    assert ("POST /v1/release", 400) in seen


def case_free(operation) -> bool:
    return operation.method == "get"
