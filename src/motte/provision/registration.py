"""An owner's order to a broker, by the key that signed the bundle: hold this release's keys, under this policy.

It names the broker, so that no other one can be given it, and the digests of the run configurations that may have the
keys: whoever shows evidence for another noise, accelerator or broker gets none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from motte.errors import FormatError, InputError
from motte.limits import MAX_BROKER_CONFIGURATIONS, MAX_BROKER_REQUEST_BYTES, MAX_NAME_BYTES, MAX_RELEASE
from motte.provision.messages import DIGEST_BYTES
from motte.provision.statements import check_signed, sign
from motte.seal.header import BundleHeader, parse_header
from motte.seal.keys import SignerPrivateKey, SignerPublicKey
from motte.seal.primitives import KEY_BYTES
from motte.strict_json import Fields, canonical, parse

REGISTRATION_FORMAT: Final = "motte-registration-1"
MAX_LEASE_S: Final = 30 * 86_400
DEFAULT_LEASE_S: Final = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What an owner orders for one release of one model.

    Attributes:
        header: of the bundle; the broker's own key is among its recipients.
        model: the owner's name for the model: releases of one model share a lowest allowed one.
        policy: name of a policy that the broker has.
        configurations: digests of the run configurations that may have the keys; at least one.
        min_release: lowest release of the model that gets keys from now on; None: this one. It never falls.
        lease_s: seconds for which released keys may be used.
    """

    header: BundleHeader
    model: str
    policy: str
    configurations: tuple[bytes, ...]
    min_release: int | None = None
    lease_s: int = DEFAULT_LEASE_S

    def __post_init__(self) -> None:
        check_name(self.model, "model")
        check_name(self.policy, "policy")
        if not 1 <= len(self.configurations) <= MAX_BROKER_CONFIGURATIONS or any(
            len(each) != DIGEST_BYTES for each in self.configurations
        ):
            raise InputError(
                "not digests of run configurations",
                expected=f"1 to {MAX_BROKER_CONFIGURATIONS} of {DIGEST_BYTES} bytes",
                got=f"{len(self.configurations)}",
                hint="keys go only to a configuration that the owner signed; there is no 'any'",
            )
        if self.min_release is not None and not 0 <= self.min_release <= self.header.release:
            raise InputError("not a lowest release", expected=f"0 to {self.header.release}", got=str(self.min_release))
        if not 1 <= self.lease_s <= MAX_LEASE_S:
            raise InputError("not a length for leases", expected=f"1 to {MAX_LEASE_S} s", got=f"{self.lease_s} s")

    def encode(self, signer: SignerPrivateKey, broker: SignerPublicKey) -> bytes:
        """Signed by the owner for one broker, as it travels.

        Raises:
            InputError: ``signer`` is not the one whom the header names.
        """
        if signer.public != self.header.signer:
            raise InputError(
                "only the signer of a bundle can register it",
                expected=str(self.header.signer),
                got=str(signer.public),
            )
        body: dict[str, Any] = {
            "broker": broker.raw.hex(),
            "configurations": [each.hex() for each in self.configurations],
            "format": REGISTRATION_FORMAT,
            "header": self.header.encode().decode("ascii"),
            "lease_s": self.lease_s,
            "min_release": self.min_release,
            "model": self.model,
            "policy": self.policy,
        }
        return canonical(sign(body, signer))

    @staticmethod
    def decode(data: bytes, broker: SignerPublicKey) -> Registration:
        """Read an **unverified** registration: signed by the signer whom its header names, for this broker.

        That somebody signed says nothing yet: whether this signer may register anything here is the broker's to ask.

        Raises:
            FormatError, BundleError: malformed. SignatureError: not signed so. InputError: a bound of this class.
        """
        value = parse(data, max_bytes=MAX_BROKER_REQUEST_BYTES, what="registration")
        where = "registration"
        text = Fields(value, where=where).text("header", max_bytes=MAX_BROKER_REQUEST_BYTES)
        try:
            header = parse_header(text.encode("ascii"))
        except UnicodeEncodeError as problem:
            raise FormatError("not a header", where="registration.header") from problem
        fields = check_signed(value, form=REGISTRATION_FORMAT, key=header.signer, where=where)
        fields.any("header")
        if fields.hexadecimal("broker", length_bytes=KEY_BYTES) != broker.raw:
            raise FormatError("a registration for another broker", where="registration.broker", expected=str(broker))
        made = Registration(
            header=header,
            model=fields.text("model", max_bytes=MAX_NAME_BYTES),
            policy=fields.text("policy", max_bytes=MAX_NAME_BYTES),
            configurations=tuple(
                fields.items("configurations", max_items=MAX_BROKER_CONFIGURATIONS, read=_read_digest)
            ),
            min_release=None if _absent(value) else fields.integer("min_release", low=0, high=MAX_RELEASE),
            lease_s=fields.integer("lease_s", low=1, high=MAX_LEASE_S),
        )
        if _absent(value):
            fields.any("min_release")
        fields.done()
        return made


def check_name(name: str, what: str) -> None:
    """Return only if ``name`` can name a model or a policy.

    Raises:
        InputError: it cannot.
    """
    good = name.replace("-", "").replace("_", "").replace(".", "")
    if not good.isascii() or not good.isalnum() or len(name) > 100 or name.startswith("."):
        raise InputError(
            f"not a name for a {what}", expected="up to 100 letters, digits, '-', '_', '.'", got=repr(name)[:120]
        )


def _absent(value: dict[str, Any]) -> bool:
    return "min_release" in value and value["min_release"] is None


def _read_digest(value: Any, where: str) -> bytes:
    return Fields({"digest": value}, where=where).hexadecimal("digest", length_bytes=DIGEST_BYTES)
