"""Options of ``motte run`` and ``motte seal``: where the worker runs, and who gives it keys, on what evidence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from motte.cli.anchoring import AnchorOptions, read_small
from motte.cli.attest_tpm import TpmOptions
from motte.cli.options import private_key
from motte.errors import SettingError
from motte.limits import MAX_POLICY_TEXT_BYTES

if TYPE_CHECKING:
    from motte.attest.evidence import Evidence
    from motte.provision.address import BrokerAddress
    from motte.provision.client import BrokerIdentity
    from motte.provision.registration import Registration
    from motte.run.verified import Verifier
    from motte.seal.keys import RecipientPrivateKey, SignerPrivateKey

_ENCLAVE = "Where the worker runs"
_KEYS = "Who gives the worker its keys (--key, or --broker)"
_BROKER = "A key broker"


@dataclass(frozen=True, slots=True)
class EnclaveOptions:
    """Which kind of enclave, and where it is."""

    enclave: Annotated[
        Literal["process", "gramine-direct", "gramine-sgx", "vm"],
        typer.Option(
            "--enclave",
            rich_help_panel=_ENCLAVE,
            help="process and gramine-direct are SIMULATED: nothing protects them from this machine's administrator.",
        ),
    ] = "process"
    image: Annotated[
        Path | None,
        typer.Option(
            "--image", metavar="DIR", rich_help_panel=_ENCLAVE, help="gramine-*: the image of `motte enclave build`."
        ),
    ] = None
    vm: Annotated[
        str | None,
        typer.Option(
            "--vm", metavar="ADDRESS", rich_help_panel=_ENCLAVE, help="vm: where its worker listens, vsock:CID:PORT."
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class ReleaseOptions:
    """From whom the worker gets the bundle's keys."""

    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="FILE", rich_help_panel=_KEYS, help="File of a recipient's private key."),
    ] = None
    broker: Annotated[
        str | None,
        typer.Option(
            "--broker",
            metavar="ADDRESS",
            rich_help_panel=_KEYS,
            help="The key broker that the bundle's owner named: it gives the keys to the worker, against evidence.",
        ),
    ] = None
    evidence: Annotated[
        Literal["simulated", "tpm", "tdx", "snp", "sgx"] | None,
        typer.Option(
            "--evidence",
            rich_help_panel=_KEYS,
            help="process: what of this machine speaks for the worker; tdx, snp: the guest in which all of this runs;"
            " sgx: the enclave. Workers in enclaves have evidence of their own.",
        ),
    ] = None
    verify: Annotated[
        Path | None,
        typer.Option(
            "--verify",
            metavar="POLICY",
            rich_help_panel=_KEYS,
            help="Send the worker nothing but the bundle before its evidence satisfies this policy; inputs and answers"
            " then go through TLS that ends in it.",
        ),
    ] = None
    simulated_key: Annotated[
        Path | None,
        typer.Option(
            "--simulated-key", metavar="FILE", rich_help_panel=_KEYS, help="Of --evidence simulated: who signs it."
        ),
    ] = None

    def keys(self) -> RecipientPrivateKey | BrokerAddress:
        """The recipient's key, or the broker's address.

        Raises:
            SettingError: neither, or both. InputError: no such file, not such an address.
        """
        if (self.key is None) == (self.broker is None):
            raise SettingError(
                "the worker gets its keys in one way",
                expected="--key FILE of a recipient, or --broker ADDRESS",
                got="neither" if self.key is None else "both",
            )
        from motte.seal.keys import RecipientPrivateKey

        if self.key is not None:
            return private_key(self.key, RecipientPrivateKey, option="--key")
        from motte.provision.address import BrokerAddress

        return BrokerAddress.parse(self.broker or "")

    def verifier(self, given: AnchorOptions) -> Verifier | None:
        """What is demanded of the worker; None: nothing.

        Raises:
            InputError: no such file, or not a policy. SettingError: roots for a policy that is not given.
        """
        if self.verify is None:
            if given != AnchorOptions():
                raise SettingError("roots and reference data are for a policy", expected="--verify POLICY")
            return None
        from motte.attest.policy_text import loads
        from motte.run.verified import Verifier

        return Verifier(loads(read_small(self.verify, MAX_POLICY_TEXT_BYTES)), given.anchors())

    def issuer(self, tpm: TpmOptions) -> Callable[[bytes], Evidence] | None:
        """What makes evidence of this machine; None: nobody asked for any.

        Raises:
            SettingError: an option that nothing reads, or one that is missing.
        """
        if (self.evidence == "simulated") != (self.simulated_key is not None):
            raise SettingError(
                "simulated evidence is signed by a development key, and only that",
                expected="--evidence simulated --simulated-key FILE",
                hint="make one: motte attest simulated new-key FILE",
            )
        if self.evidence is not None and self.broker is None and self.verify is None:
            raise SettingError(
                "nobody asks for evidence", expected="--broker or --verify", got=f"--evidence {self.evidence}"
            )
        if self.evidence != "tpm" and tpm != TpmOptions():
            raise SettingError("a TPM is used only for its evidence", expected="--evidence tpm", got=str(self.evidence))
        if self.simulated_key is not None:
            from motte.attest.platforms import simulated
            from motte.attest.platforms.simulated_key import read_key
            from motte.enclave.process_measurement import measure_process

            secret, measurement = read_key(self.simulated_key).secret, measure_process()
            return lambda report_data: simulated.issue(report_data, private=secret, measurement=measurement)
        if self.evidence == "tpm":
            from motte.attest.platforms import tpm as platform

            device, handle = tpm.open(), tpm.at()
            return lambda report_data: platform.issue(report_data, tpm=device, handle=handle)
        if self.evidence is None:
            return None
        from motte.attest.platforms import sgx, snp, tdx

        issuers: dict[str, Callable[[bytes], Evidence]] = {"tdx": tdx.issue, "snp": snp.issue, "sgx": sgx.issue}
        return issuers[self.evidence]


@dataclass(frozen=True, slots=True)
class BrokerOptions:
    """A broker that is to hold the new bundle's keys."""

    broker: Annotated[
        str | None,
        typer.Option(
            "--broker",
            metavar="ADDRESS",
            rich_help_panel=_BROKER,
            help="Let this broker (the word of `motte broker serve`) release the keys, and no one else: it becomes a"
            " recipient, its name is signed into the bundle, and the bundle is registered there.",
        ),
    ] = None
    model_name: Annotated[
        str | None,
        typer.Option(
            "--broker-model",
            metavar="NAME",
            rich_help_panel=_BROKER,
            help="What it calls the model: releases of one share a lowest allowed one. (default: the model's name)",
        ),
    ] = None
    policy: Annotated[
        str | None,
        typer.Option(
            "--broker-policy", metavar="NAME", rich_help_panel=_BROKER, help="Its policy for releasing the keys."
        ),
    ] = None
    lease: Annotated[
        int,
        typer.Option(
            "--broker-lease",
            metavar="S",
            min=1,
            rich_help_panel=_BROKER,
            help="Seconds that released keys may be used.",
        ),
    ] = 3600

    def address(self) -> BrokerAddress | None:
        """The broker's address; None: there is none.

        Raises:
            SettingError: options of a broker without one, or no policy. InputError: not such an address.
        """
        if self.broker is None:
            if self.model_name is not None or self.policy is not None:
                raise SettingError("no broker is given", expected="--broker ADDRESS", got="options of a broker")
            return None
        if self.policy is None:
            raise SettingError("a broker releases keys under a policy", expected="--broker-policy NAME")
        from motte.provision.address import BrokerAddress

        return BrokerAddress.parse(self.broker)

    def identity(self, address: BrokerAddress) -> BrokerIdentity:
        """What the broker says of itself, **verified** by its key: asked before anything is sealed.

        Raises:
            LinkError, SignatureError, HandshakeError: no such broker there.
        """
        from motte.provision.client import BrokerClient

        with BrokerClient(address) as client:
            return client.identity()

    def register(
        self, path: Path, signer: SignerPrivateKey, address: BrokerAddress, name: str, final: Path
    ) -> Registration:
        """Give the broker the release in ``path`` and move that to ``final``; where it does not take it, remove it.

        Raises:
            BrokerRefused: the broker said no; its words. LinkError: no way to it.
        """
        from motte.attest.configuration import RunConfiguration
        from motte.provision.client import BrokerClient
        from motte.provision.registration import Registration
        from motte.seal.reader import open_bundle

        try:
            with open_bundle(path, signer=signer.public) as bundle:
                header = bundle.header
            made = Registration(
                header=header,
                model=self.model_name or name,
                policy=self.policy or "",
                configurations=(RunConfiguration.of(header).digest(),),
                lease_s=self.lease,
            )
            with BrokerClient(address) as client:
                client.register(made, signer)
            path.replace(final)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return made
