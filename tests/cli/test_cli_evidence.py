"""Which issuer ``--evidence`` means, for a worker's host and for a training process."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

from motte.cli.attest_tpm import TpmOptions
from motte.cli.releasing import ReleaseOptions
from motte.errors import ResourceError, SettingError, UnsupportedError


@pytest.mark.parametrize("platform", ["tdx", "snp", "sgx"])
def test_the_word_is_the_platform_and_without_it_the_error_is_one(platform: str) -> None:
    issue = ReleaseOptions(broker="somewhere", evidence=platform).issuer(TpmOptions())  # type: ignore[arg-type]
    assert issue is import_module(f"motte.attest.platforms.{platform}").issue
    if Path("/sys/kernel/config/tsm/report").exists() or Path("/dev/attestation").exists():
        pytest.skip("this machine may have that platform")
    with pytest.raises((ResourceError, UnsupportedError)):
        issue(bytes(64))


def test_evidence_that_nobody_asks_for_is_refused() -> None:
    with pytest.raises(SettingError, match="nobody asks"):
        ReleaseOptions(evidence="snp").issuer(TpmOptions())
    with pytest.raises(SettingError, match="development key"):
        ReleaseOptions(broker="somewhere", evidence="simulated").issuer(TpmOptions())
