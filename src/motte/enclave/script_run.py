"""What an owner signs for one process of a script: which script, which arguments, which rank among which peers.

The host starts the process and hands it this text; the process believes the signature and nothing else of the host: no
``RANK`` and no ``WORLD_SIZE`` of its environment, no argument. What evidence binds is :meth:`ScriptRun.configuration`,
whose ``placement`` names script, arguments and rank, so that a policy's ``Configuration`` refuses any other.

Everything that reading one needs is imported here, and not where it is used: an image holds what a trial loaded, and
the trial of a script for one process reads no peers.

A script asks for its own by :func:`current`:

    from motte.enclave.script_run import current

    run = current()
    model = motte.protect(net, run.asymmetric(), accelerator=run.accelerator)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from motte.attest.configuration import MAX_RANKS, RunConfiguration
from motte.digests import sha256
from motte.errors import InputError, ResourceError, SettingError
from motte.limits import KIB, MAX_NAME_BYTES, MAX_RELEASE, MAX_SCRIPT_ARGUMENTS, MAX_SCRIPT_RUN_BYTES
from motte.link.address import TcpAddress, parse_address
from motte.offload.settings import Asymmetric
from motte.offload.words import parse_noise
from motte.provision.statements import check_signed, sign
from motte.seal.keys import SignerPrivateKey, SignerPublicKey
from motte.strict_json import Fields, canonical, parse

FORMAT: Final = "motte-script-run-1"
NO_SCHEME: Final = "trusted"
SCHEME: Final = "asymmetric"
INTEGRITIES: Final = ("freivalds", "off")
DIGEST_BYTES: Final = 32
_ID_BYTES: Final = 16
_MAX_ARGUMENT_BYTES: Final = 4 * KIB
_current: ScriptRun | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScriptRun:
    """One process of one run, as its owner signed it.

    Attributes:
        script: SHA-256 of the script's source (32 bytes).
        arguments: all that the script finds in ``sys.argv`` behind its own name.
        rank: of this process, 0 to ``ranks - 1``; ``peers``: where each rank is met (``tcp:HOST:PORT``), by rank; none
            for one process alone.
        accelerator: address of this rank's accelerator; empty: nothing leaves.
        noise: of every release, as ``motte plan --noise`` takes it; None: **none is added**. Read with an accelerator.
        integrity: how its answers are checked.
        broker: where the script gets keys from; empty: none.
        bundle_id, release: 16 bytes, and from 1, of the sealed data or model that the script opens; the default names
            the script itself.
        signer: who signed this text.

    Raises:
        InputError, SettingError: a field is out of bounds, or contradicts another.
    """

    script: bytes
    arguments: tuple[str, ...] = ()
    rank: int = 0
    ranks: int = 1
    peers: tuple[str, ...] = ()
    accelerator: str = ""
    noise: str | None = None
    integrity: str = "freivalds"
    broker: str = ""
    bundle_id: bytes = b""
    release: int = 1
    signer: SignerPublicKey

    def __post_init__(self) -> None:
        for name in ("arguments", "peers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.bundle_id:
            object.__setattr__(self, "bundle_id", self.script[:_ID_BYTES])
        if len(self.script) != DIGEST_BYTES:
            raise InputError("not the digest of a script", expected=f"{DIGEST_BYTES} bytes", got=str(len(self.script)))
        if len(self.arguments) > MAX_SCRIPT_ARGUMENTS or any(map(_bad_argument, self.arguments)):
            expected = f"at most {MAX_SCRIPT_ARGUMENTS} texts of {_MAX_ARGUMENT_BYTES} bytes, without a zero byte"
            raise InputError("arguments out of bounds", expected=expected, got=repr(self.arguments)[:200])
        if type(self.rank) is not int or not 0 <= self.rank < self.ranks:
            raise SettingError("not a rank of this run", expected=f"0 to {self.ranks - 1}", got=repr(self.rank)[:40])
        if len(self.peers) != (self.ranks if self.ranks > 1 else 0):
            expected = f"one address for each of {self.ranks} ranks" if self.ranks > 1 else "none for one process"
            raise SettingError("not the peers of this run", expected=expected, got=f"{len(self.peers)} addresses")
        if len(set(self.peers)) != len(self.peers):
            raise SettingError("two ranks at one address", got=", ".join(self.peers)[:200])
        for address in self.peers:
            _host_and_port(address)
        if self.integrity not in INTEGRITIES:
            raise SettingError("unknown integrity", expected=" or ".join(INTEGRITIES), got=repr(self.integrity)[:80])
        if self.noise is not None and not self.accelerator:
            raise SettingError("noise is for what leaves, and nothing does", expected="an accelerator, or no noise")
        if self.accelerator:
            self.asymmetric()
        self.configuration()

    def configuration(self) -> RunConfiguration:
        """What evidence of this process speaks for."""
        arguments = sha256(canonical(list(self.arguments)))
        accelerator = (f"accelerator {self.accelerator}",) if self.accelerator else ()
        return RunConfiguration(
            bundle_id=self.bundle_id,
            release=self.release,
            signer=self.signer.raw,
            broker=self.broker,
            scheme=SCHEME if self.accelerator else NO_SCHEME,
            placement=f"script {self.script.hex()} arguments {arguments.hex()} rank {self.rank}",
            noise=self.noise,
            integrity=self.integrity,
            ranks=self.ranks,
            peers=(*self.peers, *accelerator),
        )

    def asymmetric(self) -> Asymmetric:
        """The scheme with the noise and the checks that the owner signed, for :func:`motte.protect`.

        Raises:
            SettingError: the owner signed a run in which nothing leaves.
        """
        if not self.accelerator:
            raise SettingError("the owner signed a run without an accelerator", expected="everything stays inside")
        noise = None if self.noise is None else parse_noise(self.noise)
        return Asymmetric(noise=noise, integrity="off" if self.integrity == "off" else "freivalds")

    def environment(self) -> dict[str, str]:
        """What ``torch.distributed`` reads, from what the owner signed; empty for one process alone."""
        if self.ranks == 1:
            return {}
        host, port = _host_and_port(self.peers[0])
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": "0",
            "MASTER_ADDR": host,
            "MASTER_PORT": str(port),
        }

    def require_command(self, script: bytes | None, arguments: tuple[str, ...]) -> None:
        """Return only if this is the script (SHA-256 of its source; None: not known here) and these the arguments.

        Raises:
            SettingError: the host would run another script, or with other arguments, than the owner signed.
        """
        if script is not None and script != self.script:
            raise SettingError(
                "another script than the owner signed", expected=f"SHA-256 {self.script.hex()}", got=script.hex()
            )
        if arguments != self.arguments:
            raise SettingError(
                "other arguments than the owner signed", expected=repr(self.arguments)[:300], got=repr(arguments)[:300]
            )

    def encode(self, signer: SignerPrivateKey) -> bytes:
        """The signed text.

        Raises:
            InputError: ``signer`` is not the one whom it names.
        """
        if signer.public != self.signer:
            raise InputError("another signer than it names", expected=str(self.signer), got=str(signer.public))
        body: dict[str, Any] = {
            "format": FORMAT,
            "script": self.script.hex(),
            "arguments": list(self.arguments),
            "rank": self.rank,
            "ranks": self.ranks,
            "peers": list(self.peers),
            "accelerator": self.accelerator,
            "noise": "none" if self.noise is None else self.noise,
            "integrity": self.integrity,
            "broker": self.broker,
            "bundle_id": self.bundle_id.hex(),
            "release": self.release,
        }
        return canonical(sign(body, signer))

    @staticmethod
    def decode(data: bytes, signer: SignerPublicKey) -> ScriptRun:
        """Read **unverified** bytes, which ``signer`` must have signed.

        Raises:
            FormatError: malformed. SignatureError: not signed by ``signer``. InputError: a bound of this class.
        """
        value = parse(data, max_bytes=MAX_SCRIPT_RUN_BYTES, what="configuration")
        fields = check_signed(value, form=FORMAT, key=signer, where="configuration")
        noise = fields.text("noise", max_bytes=MAX_NAME_BYTES)
        made = ScriptRun(
            script=fields.hexadecimal("script", length_bytes=DIGEST_BYTES),
            arguments=tuple(fields.items("arguments", max_items=MAX_SCRIPT_ARGUMENTS, read=_text)),
            rank=fields.integer("rank", low=0, high=MAX_RANKS - 1),
            ranks=fields.integer("ranks", low=1, high=MAX_RANKS),
            peers=tuple(fields.items("peers", max_items=MAX_RANKS, read=_text)),
            accelerator=fields.text("accelerator", max_bytes=MAX_NAME_BYTES),
            noise=None if noise == "none" else noise,
            integrity=fields.choice("integrity", INTEGRITIES),
            broker=fields.text("broker", max_bytes=MAX_NAME_BYTES),
            bundle_id=fields.hexadecimal("bundle_id", length_bytes=_ID_BYTES),
            release=fields.integer("release", low=1, high=MAX_RELEASE),
            signer=signer,
        )
        fields.done()
        return made


def current() -> ScriptRun:
    """The signed run of this process; its signature was verified before the script began.

    Raises:
        ResourceError: ``motte enclave run`` did not start this process.
    """
    if _current is None:
        raise ResourceError("this process was not started with a signed configuration", hint="motte enclave run")
    return _current


def make_current(run: ScriptRun) -> None:
    """Fix the **verified** run of this process. Once.

    Raises:
        ResourceError: it was fixed before.
    """
    global _current  # noqa: PLW0603 - one process, one run, like its arguments
    if _current is not None:
        raise ResourceError("this process has its configuration already")
    _current = replace(run)


def source_digest(source: bytes) -> bytes:
    """What :attr:`ScriptRun.script` is of a source."""
    return sha256(source)


def _bad_argument(text: object) -> bool:
    return not isinstance(text, str) or "\0" in text or len(text.encode("utf-8", "replace")) > _MAX_ARGUMENT_BYTES


def _text(item: Any, where: str) -> str:
    return Fields({"text": item}, where=where).text("text", max_bytes=_MAX_ARGUMENT_BYTES)


def _host_and_port(address: str) -> tuple[str, int]:
    found = parse_address(address)
    if not isinstance(found, TcpAddress):
        raise SettingError("not where a rank can be met", expected="tcp:HOST:PORT", got=repr(address)[:200])
    return found.host, found.port
