"""Make src/motte/audit/vectors/evidence.json: evidence of made-up machines, honest and not, for the conformance list.

    python scripts/make_evidence_vectors.py src/motte/audit/vectors/evidence.json

The real formats, signed by keys that exist only while this runs, under test roots that the file names: a verifier that
is given them calls all of it SIMULATED. A second run makes other bytes of the same kinds; the committed file is what
counts. It holds public values only: certificates, quotes, lists, no key.
"""

from __future__ import annotations

import base64
import importlib
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from motte.attest.anchors import Anchors
from motte.attest.evidence import Evidence
from motte.attest.report_data import Binding
from motte.strict_json import canonical

_TESTS = Path(__file__).resolve().parents[1] / "tests" / "attest"
BINDING = Binding(nonce=b"n" * 32, public_key=b"k" * 32, tls_spki_digest=b"t" * 32, configuration_digest=b"c" * 32)
OTHERS = Binding(nonce=b"n" * 32, public_key=b"k" * 32, tls_spki_digest=b"t" * 32, configuration_digest=b"u" * 32)
"""The same but for a configuration that no owner signed."""


def makers() -> tuple[Any, Any, Any, Any, Any]:
    """The makers of the tests: DCAP, SEV-SNP, NVIDIA, TPM, and the time at which certificates hold."""
    package = ModuleType("attest_makers")
    package.__path__ = [str(_TESTS)]
    sys.modules["attest_makers"] = package
    names = ("dcap_maker", "snp_maker", "nvidia_maker", "software_tpm", "certificate_maker")
    dcap, snp, nvidia, tpm, certificates = (importlib.import_module(f"attest_makers.{name}") for name in names)
    return dcap, snp, nvidia, tpm, certificates


def platform(
    name: str, at: datetime, anchors: Anchors, others: Anchors, evidence: Mapping[str, Evidence], code: str
) -> dict[str, object]:
    """One platform's table."""
    return {
        "platform": name,
        "at": at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "code": code,
        "anchors": _anchors(anchors),
        "other_anchors": _anchors(others),
        "evidence": {kind: each.encode().decode("ascii") for kind, each in evidence.items()},
    }


def _anchors(anchors: Anchors) -> dict[str, list[str]]:
    given: dict[str, tuple[bytes, ...]] = {
        "amd_arks": anchors.amd_arks or (),
        "intel_root": () if anchors.intel_root is None else (anchors.intel_root,),
        "nvidia_rim": anchors.nvidia_rim,
        "nvidia_root": () if anchors.nvidia_root is None else (anchors.nvidia_root,),
        "tpm_enrolled": anchors.tpm_enrolled,
        "tpm_roots": anchors.tpm_roots,
    }
    return {name: [base64.b64encode(each).decode() for each in values] for name, values in given.items() if values}


def of_dcap(dcap: Any, name: str) -> dict[str, object]:
    """SGX or TDX."""
    ours = dcap.Maker(platform=name, report_data=BINDING.report_data())
    theirs = ours.but(world="theirs")
    looked_into: dict[str, Any] = {"attributes": bytes([7]) + bytes(15)}
    if name == "tdx":
        looked_into = {"td_attributes": bytes.fromhex("0100001000000000")}
    evidence = {
        "honest": ours.evidence(),
        "rebound": ours.but(report_data=OTHERS.report_data()).evidence(),
        "debug": ours.but(**looked_into).evidence(),
        "older": ours.but(needed_svn=4, older_status="OutOfDate").evidence(),
        "below": ours.but(needed_svn=5, cpu_svn=bytes(16)).evidence(),
        "revoked": ours.but(revoked=(4711,)).evidence(),
        "theirs": theirs.evidence(),
    }
    code = b"E".hex() * (32 if name == "sgx" else 48)
    return platform(name, dcap.AT, ours.anchors(), theirs.anchors(), evidence, code)


def of_snp(snp: Any, at: datetime) -> dict[str, object]:
    """SEV-SNP."""
    ours, theirs = snp.Machine(), snp.Machine(vendor="theirs")
    data = BINDING.report_data()
    honest, anchors = ours.evidence(data)
    foreign, others = theirs.evidence(data)
    neighbour = snp.other_chip(ours)
    leaf = neighbour.leaf(ours.chain()[1])
    evidence = {
        "honest": honest,
        "rebound": ours.evidence(OTHERS.report_data())[0],
        "debug": ours.evidence(data, at_0x08=0xB0000)[0],
        "older": ours.evidence(data, at_0x38=ours.tcb(microcode=1))[0],
        "below": ours.evidence(data, at_0x180=ours.tcb(snp=21))[0],
        "migratable": ours.evidence(data, at_0x08=0x30000 | 1 << 18)[0],
        "privileged": ours.evidence(data, at_0x30=1)[0],
        "neighbour": Evidence("snp", {**honest.documents, "vcek": leaf.der}),
        "theirs": foreign,
    }
    return platform("snp", at, anchors, others, evidence, bytes(range(48)).hex())


def of_nvidia(nvidia: Any, snp: Any, at: datetime) -> dict[str, object]:
    """A GPU in an SEV-SNP guest."""
    ours = nvidia.Gpu()
    theirs = nvidia.Gpu(vendor="theirs", machine=snp.Machine(vendor="theirs"))
    data = BINDING.report_data()
    honest, anchors = ours.evidence(data)
    foreign, others = theirs.evidence(data)
    modified = replace(ours, measurements={**ours.measurements, 1: b"\xee" * 48})
    modified.__dict__["_made"] = ours.chain()
    evidence = {
        "honest": honest,
        "rebound": ours.evidence(OTHERS.report_data())[0],
        "modified": modified.evidence(data)[0],
        "theirs": foreign,
    }
    return platform("nvidia", at, anchors, others, evidence, bytes(range(48)).hex())


def of_tpm(tpm: Any) -> dict[str, object]:
    """A TPM whose key an owner enrolled."""
    makers_root, ours, theirs = tpm.Maker(), tpm.FakeTpm(), tpm.FakeTpm()
    record = ours.record((makers_root.certify(ours.ek_key.public_key()),), simulated=True)
    other = theirs.record((makers_root.certify(theirs.ek_key.public_key()),), simulated=True)
    data = BINDING.report_data()
    unrestricted = tpm.FakeTpm(key=ours.key, ek_key=ours.ek_key, attributes=0x00040072)
    evidence = {
        "honest": ours.evidence(data),
        "rebound": ours.evidence(OTHERS.report_data()),
        "unrestricted": unrestricted.evidence(data),
        "theirs": theirs.evidence(data),
    }
    from motte.attest.platforms.tpm import composite

    def given(each: bytes) -> Anchors:
        return Anchors(tpm_roots=(makers_root.root,), tpm_enrolled=(each,))

    code = composite("sha256", ours.registers)
    return platform("tpm", tpm.NOW, given(record.encode()), given(other.encode()), evidence, code)


def main() -> None:
    """Write the file that the command line names."""
    dcap, snp, nvidia, tpm, certificates = makers()
    tables = [of_dcap(dcap, "sgx"), of_dcap(dcap, "tdx"), of_snp(snp, certificates.NOW)]
    tables += [of_nvidia(nvidia, snp, certificates.NOW), of_tpm(tpm)]
    binding = {name: getattr(BINDING, name).hex() for name in BINDING.__slots__}
    data = canonical({"format": "motte-evidence-vectors-1", "binding": binding, "platforms": tables})
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    main()
