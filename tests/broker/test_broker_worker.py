"""A worker that gets its data keys from a served broker, carried by a client that holds no key at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import motte
from motte.attest.configuration import RunConfiguration
from motte.attest.evidence import Evidence
from motte.errors import BrokerRefused, BundleError, HandshakeError, InputError, MotteError, ResourceError
from motte.provision.address import BrokerAddress
from motte.provision.registration import Registration
from motte.seal.keys import SignerPrivateKey
from motte.seal.manifest import Manifest
from motte.seal.reader import open_bundle
from motte.seal.run_terms import RunTerms, terms_of

X = torch.linspace(-1, 1, 24).reshape(4, 6)


class Sealed:
    """A small lowered model, sealed to the broker's recipient key and registered there."""

    def __init__(self, place: Any, path: Path, model: nn.Module) -> None:
        self.place, self.path, self.model = place, path, model

    def load(self, broker: BrokerAddress, **options: Any) -> Any:
        given = {"issue": self.place.issue(), "threads": 1, "timeout_s": 60.0, "engine": "torch", **options}
        return motte.load(self.path, keys=broker, signer=self.place.owner.public, **given)


@pytest.fixture
def seal(place, tmp_path: Path) -> Callable[..., Sealed]:
    """Seals and registers; keywords change the terms that are signed, or the digests that are registered."""
    from motte.capture.export import capture
    from motte.capture.signature import Signature
    from motte.plan.planner import plan_parts
    from motte.seal.package import seal_model

    def make(
        address: BrokerAddress,
        *,
        terms: dict[str, object] | None = None,
        configuration: dict[str, object] | None = None,
    ) -> Sealed:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
        captured = capture(model, (torch.zeros(2, 6),), dims={"input": {0: "batch"}}, name="net")
        plan = plan_parts(captured.graph, parts=2, objective="weights", dims={"batch": 4})
        manifest = Manifest(captured.graph, plan, Signature("net", "random"))
        path = tmp_path / "net.motte"
        run = replace(terms_of(plan.offload, broker=str(address)), **(terms or {}))
        recipient = place.broker.recipient.public
        seal_model(path, manifest, captured.weights, release=1, recipients=[recipient], signer=place.owner, run=run)
        with open_bundle(path, signer=place.owner.public) as bundle:
            header = bundle.header
        digest = replace(RunConfiguration.of(header), **(configuration or {})).digest()
        place.register_made(Registration(header=header, model="net", policy="development", configurations=(digest,)))
        return Sealed(place, path, model)

    return make


def test_keys_go_to_the_worker_and_the_client_holds_none(serve, seal) -> None:
    served = serve()
    sealed = seal(served.address)
    frames: list[bytes] = []
    with sealed.load(served.address, recorder=lambda direction, data: frames.append(data)) as model:
        with torch.inference_mode():
            assert torch.equal(model(X), sealed.model(X))
        assert model.worker_seconds["attest"] > 0
    # Evidence and the broker's messages crossed under the session key.
    assert not any(b"motte-proof-1" in each or b"motte-evidence-1" in each for each in frames)
    before = len(sealed.place.entries())
    with sealed.load(served.address, mode="streamed", weight_memory_bytes=1 << 20) as model:
        assert model(X).shape == (4, 3)
    # Every start is a handshake of its own.
    assert len(sealed.place.entries()) > before


def test_another_measurement_a_debug_enclave_and_no_evidence_get_no_keys(serve, seal) -> None:
    served = serve()
    sealed = seal(served.address)
    place = sealed.place
    tampered, debug = place.issue(measurement=b"\x08" * 32), place.issue(debug=True)
    for issue, words in ((tampered, "measurement"), (debug, "debug")):
        with pytest.raises(BrokerRefused, match=words):
            sealed.load(served.address, issue=issue)
    with pytest.raises(ResourceError, match="the host makes no evidence"):
        sealed.load(served.address, issue=None)


def test_evidence_that_was_made_before_is_refused(serve, seal) -> None:
    served = serve()
    sealed = seal(served.address)
    made: list[Evidence] = []

    def keep(report_data: bytes) -> Evidence:
        made.append(sealed.place.issue()(report_data))
        return made[0]

    with sealed.load(served.address, issue=keep):
        pass
    with pytest.raises(BrokerRefused, match="another nonce, key"):
        sealed.load(served.address, issue=keep)
    assert len(made) == 2


@pytest.mark.parametrize(
    "other",
    [{"noise": "none at all"}, {"integrity": "freivalds"}, {"peers": ("unix:/tmp/other",)}, {"scheme": "asymmetric"}],
)
def test_a_configuration_that_is_not_registered_gets_no_keys(serve, seal, other: dict[str, object]) -> None:
    served = serve()
    sealed = seal(served.address, configuration=other)
    with pytest.raises(BrokerRefused, match="configuration"):
        sealed.load(served.address)


def test_terms_that_differ_from_the_plan_are_refused_by_the_worker(serve, seal) -> None:
    # Only the owner could sign them so; the worker still does what the plan says, and not what the terms do.
    served = serve()
    sealed = seal(served.address, terms={"integrity": "freivalds"})
    with pytest.raises(BundleError, match="terms of the run") as caught:
        sealed.load(served.address)
    assert caught.value.check == "M-6"


def test_another_broker_is_refused_before_a_worker_starts_and_in_it(serve, seal, monkeypatch) -> None:
    served = serve()
    sealed = seal(served.address)
    other = replace(served.address, key=SignerPrivateKey.new().public)
    with pytest.raises(InputError, match="another broker"):
        sealed.load(other)
    # A host that leaves that check out gains nothing: the worker knows the signed key.
    monkeypatch.setattr("motte.run.model.check_broker", lambda header, broker: None)
    with pytest.raises((HandshakeError, MotteError)):
        sealed.load(replace(served.address, pin=b"\x01" * 32))


def test_a_bundle_without_terms_has_no_broker(serve, place, tmp_path: Path) -> None:
    served = serve()
    path = place.seal(5)
    with pytest.raises(InputError, match="without the terms of its runs"):
        motte.load(path, keys=served.address, signer=place.owner.public)


def test_terms_round_trip_in_the_header_and_bad_ones_are_refused() -> None:
    terms = RunTerms("https://h:1#sha256:00+k", "asymmetric", "sha256:00", None, "off", ("unix:/a",))
    assert RunTerms.from_json(terms.to_json(), where="header.run") == terms
    for bad in ({"scheme": ""}, {"noise": ""}, {"peers": [""]}, {"broker": 7}, {"more": 1}, {"broker": "x" * 600}):
        with pytest.raises(BundleError):
            RunTerms.from_json({**terms.to_json(), **bad}, where="header.run")
