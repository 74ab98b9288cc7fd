"""The broker's keys wrapped by a key that never leaves a PKCS#11 token, tried with SoftHSM."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from motte.errors import DecryptError, KeyAccessError, ResourceError
from motte.provision.broker import state
from motte.provision.broker.wrapping import Unlock

LIBRARIES = [Path(each) for each in ("/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so")]
PIN = "1234"


@pytest.fixture(scope="module")
def token(tmp_path_factory: pytest.TempPathFactory):
    """How to unlock a new token. One for the module: SoftHSM reads its configuration once in a process."""
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed")
    library = next((each for each in LIBRARIES if each.exists()), None)
    if library is None or shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM is not installed (apt install softhsm2)")
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    (folder / "softhsm2.conf").write_text(f"directories.tokendir = {folder / 'tokens'}\nlog.level = ERROR\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(folder / "softhsm2.conf"))
        made = ["softhsm2-util", "--init-token", "--free", "--label", "motte test", "--pin", PIN, "--so-pin", "5678"]
        subprocess.run(made, check=True, capture_output=True)
        yield Unlock(module=library, token="motte test", pin=PIN)


def test_a_broker_whose_keys_a_token_wraps(place, token, header, tmp_path) -> None:
    state.rotate_wrapping(place.broker, token)
    release, _ = place.obtain(header)
    assert len(release.data_keys) == 3
    place.broker.close()
    place.broker = state.open_broker(place.folder, token)
    place.obtain(header)
    wrapper = place.broker.wrapper
    assert wrapper.unwrap(wrapper.wrap(b"secret", b"one"), b"one") == b"secret"
    for wrong, context in ((wrapper.wrap(b"secret", b"one"), b"two"), (b"", b"one"), (b"x" * 60, b"one")):
        with pytest.raises(DecryptError):
            wrapper.unwrap(wrong, context)
    import pkcs11

    with pytest.raises(pkcs11.exceptions.AttributeSensitive):
        wrapper._key[pkcs11.Attribute.VALUE]
    with pytest.raises(ResourceError):
        state.open_broker(place.folder, Unlock(module=token.module, token="no such token", pin=PIN))
    with pytest.raises(ResourceError):
        state.open_broker(place.folder, Unlock(module=tmp_path / "none.so", token="motte test", pin=PIN))
    other = state.create(tmp_path / "other", token)
    other.close()
    # The same token, another broker's key in it: this one's store does not open with it.
    with other.store.read() as db:
        wrapping = state.setting(db, "wrapping")
    with place.broker.store.write() as db:
        state.put_setting(db, "wrapping", wrapping)
    with pytest.raises(KeyAccessError):
        state.open_broker(place.folder, token)
