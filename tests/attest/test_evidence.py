"""Evidence as it travels."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motte.attest.evidence import PLATFORMS, Evidence
from motte.errors import EvidenceError
from motte.limits import MAX_EVIDENCE_BYTES

NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)


@given(st.sampled_from(PLATFORMS), st.dictionaries(NAMES, st.binary(max_size=100), max_size=5))
def test_what_was_encoded_is_decoded(platform: str, documents: dict[str, bytes]) -> None:
    evidence = Evidence(platform, documents)
    found = Evidence.decode(evidence.encode())
    assert (found.platform, dict(found.documents)) == (platform, documents)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b'{"documents":{},"format":"motte-evidence-2","platform":"sgx"}',
        b'{"documents":{},"format":"motte-evidence-1","platform":"sgy"}',
        b'{"documents":{},"format":"motte-evidence-1","platform":"sgx","more":1}',
        b'{"documents":{},"format":"motte-evidence-1","platform":"sgx","platform":"sgx"}',
        b'{"documents":[],"format":"motte-evidence-1","platform":"sgx"}',
        b'{"documents":{"":"AA=="},"format":"motte-evidence-1","platform":"sgx"}',
        b'{"documents":{"quote":1},"format":"motte-evidence-1","platform":"sgx"}',
        b'{"documents":{"quote":"A"},"format":"motte-evidence-1","platform":"sgx"}',
        b'{"documents":{"quote":"AA==\\n"},"format":"motte-evidence-1","platform":"sgx"}',
        b'{"documents":{"\\ud800":"AA=="},"format":"motte-evidence-1","platform":"sgx"}',
        json.dumps({"documents": {str(i): "" for i in range(33)}, "format": "motte-evidence-1", "platform": "sgx"}),
        b" " * (MAX_EVIDENCE_BYTES + 1),
    ],
)
def test_what_is_not_evidence(data: bytes | str) -> None:
    with pytest.raises(EvidenceError) as caught:
        Evidence.decode(data.encode() if isinstance(data, str) else data)
    assert caught.value.check == "E-1"


@given(st.binary(max_size=60))
def test_no_bytes_crash_the_reader(data: bytes) -> None:
    with pytest.raises(EvidenceError):
        Evidence.decode(b'{"documents":{"quote":"' + data)


def test_documents_are_taken_by_the_platform_they_are_for() -> None:
    evidence = Evidence("sgx", {"quote": b"q", "collateral": b"c"})
    assert evidence.take("sgx", required=("quote",), optional=("collateral",)) == {"quote": b"q", "collateral": b"c"}
    for platform, required, documents in (
        ("tdx", ("quote",), {"quote": b"q"}),
        ("sgx", ("quote",), {"quote": b""}),
        ("sgx", ("quote",), {}),
        ("sgx", ("quote",), {"quote": b"q", "more": b"x"}),
    ):
        with pytest.raises(EvidenceError) as caught:
            Evidence("sgx", documents).take(platform, required=required)
        assert caught.value.check == "E-2"
