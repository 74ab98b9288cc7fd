"""``motte broker ...``: a service that holds bundles' keys, and gives them to enclaves that proved themselves."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.options import private_key, public_key
from motte.cli.output import Line, Output
from motte.cli.verb import verb
from motte.errors import InputError

if TYPE_CHECKING:
    from motte.attest.anchors import Anchors
    from motte.attest.policy import Policy
    from motte.provision.address import BrokerAddress
    from motte.provision.broker.state import Broker
    from motte.provision.broker.store import Store
    from motte.provision.broker.wrapping import Unlock
    from motte.provision.heads import Head
    from motte.seal.keys import SignerPublicKey

app = typer.Typer(help="Hold bundles' keys; give them to enclaves that proved themselves.")
policy_app = typer.Typer(help="Check and set the policies under which keys are given.")
audit_app = typer.Typer(help="Read and verify the log of what was given to whom.")
run_app = typer.Typer(help="Enroll training runs: what each may release.")
app.add_typer(policy_app, name="policy")
app.add_typer(run_app, name="run")
app.add_typer(audit_app, name="audit")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The broker's folder.")]
_UNLOCK = "Opening the broker's keys (one way; without one a passphrase is asked for)"
_NEW = "The new way (one; without one a new passphrase is asked for)"


@dataclass(frozen=True, slots=True)
class UnlockOptions:
    """How the key that wraps all others is had."""

    passphrase_file: Annotated[
        Path | None,
        typer.Option("--passphrase-file", metavar="FILE", help="Its one line (mode 0600).", rich_help_panel=_UNLOCK),
    ] = None
    key_file: Annotated[
        Path | None,
        typer.Option("--key-file", metavar="FILE", help="A key in a file (mode 0600).", rich_help_panel=_UNLOCK),
    ] = None
    pkcs11_module: Annotated[
        Path | None,
        typer.Option("--pkcs11-module", metavar="LIB", help="A token, by its library.", rich_help_panel=_UNLOCK),
    ] = None
    pkcs11_token: Annotated[
        str | None,
        typer.Option("--pkcs11-token", metavar="LABEL", help="The token's label.", rich_help_panel=_UNLOCK),
    ] = None
    pkcs11_pin_file: Annotated[
        Path | None,
        typer.Option("--pkcs11-pin-file", metavar="FILE", help="Its user PIN (mode 0600).", rich_help_panel=_UNLOCK),
    ] = None


@dataclass(frozen=True, slots=True)
class NewUnlockOptions:
    """As :class:`UnlockOptions`, for the key that comes in the place of another."""

    new_passphrase_file: Annotated[
        Path | None,
        typer.Option("--new-passphrase-file", metavar="FILE", help="Its one line (mode 0600).", rich_help_panel=_NEW),
    ] = None
    new_key_file: Annotated[
        Path | None,
        typer.Option("--new-key-file", metavar="FILE", help="A key file; made here.", rich_help_panel=_NEW),
    ] = None
    new_pkcs11_module: Annotated[
        Path | None,
        typer.Option("--new-pkcs11-module", metavar="LIB", help="A token, by its library.", rich_help_panel=_NEW),
    ] = None
    new_pkcs11_token: Annotated[
        str | None,
        typer.Option("--new-pkcs11-token", metavar="LABEL", help="The token's label.", rich_help_panel=_NEW),
    ] = None
    new_pkcs11_pin_file: Annotated[
        Path | None,
        typer.Option("--new-pkcs11-pin-file", metavar="FILE", help="Its user PIN (mode 0600).", rich_help_panel=_NEW),
    ] = None


@app.command()
@verb
def init(out: Output, folder: Folder, unlock: UnlockOptions) -> None:
    """Make a broker: new keys, an empty store, a log. Nothing is overwritten.

    A key file that is named is made. Keep it, or the passphrase, apart from DIR: who has both has every key.
    """
    _require()
    from motte.provision.broker.state import create

    with create(folder, _unlock(unlock, new=True)) as broker:
        document = {**_public(broker), "folder": str(folder), "wrapping": broker.wrapper.parameters["kind"]}
        out.result(
            document,
            Line(f"broker in {folder}, its keys wrapped by a {broker.wrapper.parameters['kind']}"),
            Line(f"  signs as   {broker.signer.public}"),
            Line(f"  TLS pin    {broker.tls.pin}"),
            Line(f"  recipient  {broker.recipient.public}   (seal bundles to it)"),
        )


@app.command()
@verb
def serve(
    out: Output,
    folder: Folder,
    unlock: UnlockOptions,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where to listen; port 0 takes a free one.")
    ] = "127.0.0.1:8443",
) -> None:
    """Serve until Ctrl-C, over TLS 1.3. Prints the address that owners and enclaves are given.

    The audit log is verified first. This machine is trusted with every key that it holds.
    """
    _require()
    from motte.provision.broker.serve import serve as serve_broker
    from motte.provision.broker.state import open_broker

    with open_broker(folder, _unlock(unlock)) as broker:

        def listening(address: BrokerAddress) -> None:
            out.result(
                {"address": str(address), **_public(broker)},
                Line(f"key broker listening at {address.host}:{address.port}"),
                Line(f"  address    {address}"),
                Line(f"  recipient  {broker.recipient.public}   (seal bundles to it)"),
            )

        serve_broker(broker, listen, on_listening=listening)


@app.command()
@verb
def add(
    out: Output,
    folder: Folder,
    bundle: Annotated[Path, typer.Argument(metavar="FILE", help="The bundle.")],
    unlock: UnlockOptions,
    model: Annotated[
        str, typer.Option("--model", metavar="NAME", help="Its model: releases of one share a lowest allowed one.")
    ],
    policy: Annotated[str, typer.Option("--policy", metavar="NAME", help="The policy under which keys are given.")],
    signer: Annotated[
        str, typer.Option("--signer", metavar="SIGNER", help="Who must have signed it: motte-signer-1-..., or .pub.")
    ],
    configuration: Annotated[
        list[str],
        typer.Option("--configuration", metavar="HEX", help="Digest of a run configuration that may; repeatable."),
    ],
    key: Annotated[
        Path | None,
        typer.Option("--key", metavar="FILE", help="A recipient's key that opens it. (default: the broker's own)"),
    ] = None,
    min_release: Annotated[
        int | None,
        typer.Option("--min-release", metavar="N", min=0, help="Lowest release with keys. (default: this one)"),
    ] = None,
    lease: Annotated[int, typer.Option("--lease", metavar="S", min=1, help="Seconds that keys may be used.")] = 3600,
    run_budget: Annotated[
        int | None,
        typer.Option("--run-budget", metavar="N", min=1, help="Training data: enroll a run of at most N releases."),
    ] = None,
) -> None:
    """Hold one more release of a model. Older releases get no keys from then on, unless --min-release says so."""
    _require()
    from motte.provision.broker import enroll
    from motte.provision.registration import Registration
    from motte.seal.keys import RecipientPrivateKey, SignerPublicKey
    from motte.seal.primitives import random_bytes
    from motte.seal.reader import open_bundle

    demanded = public_key(signer, SignerPublicKey, option="--signer")
    opener = None if key is None else private_key(key, RecipientPrivateKey, option="--key")
    digests = tuple(_hexadecimal(each, "--configuration") for each in configuration)
    with open_bundle(bundle, signer=demanded) as signed:
        header = signed.header
    registration = Registration(
        header=header, model=model, policy=policy, configurations=digests, min_release=min_release, lease_s=lease
    )
    run: bytes | None = None
    with _open(folder, unlock) as broker:
        done = enroll.register(broker, registration, opener or broker.recipient)
        if run_budget is not None:
            run = random_bytes(16)
            enroll.enroll_run(broker, model, run, run_budget)
    document = {
        "model": model,
        "release": header.release,
        "bundle_id": header.bundle_id.hex(),
        "min_release": done.min_release,
        "known_already": done.known_already,
        "run": None if run is None else run.hex(),
    }
    lines = [Line(f"{model} release {header.release}: keys held; none below release {done.min_release}")]
    if run is not None:
        lines.append(Line(f"training run {run.hex()}: at most {run_budget} releases"))
    out.result(document, *lines)


@run_app.command("enroll")
@verb
def run_enroll(
    out: Output,
    folder: Folder,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The data, by the name it was registered under.")],
    unlock: UnlockOptions,
    budget: Annotated[
        int, typer.Option("--budget", metavar="N", min=1, help="Releases that the run may be charged for in all.")
    ],
) -> None:
    """Let one training run on registered data begin. Keys of this data go to enrolled runs only from then on.

    A step of training releases three tensors for each layer that leaves: split layers times 3 times steps is what a run
    takes, times its processes.
    """
    _require()
    from motte.provision.broker import enroll
    from motte.seal.primitives import random_bytes

    run = random_bytes(16)
    with _open(folder, unlock) as broker:
        document = enroll.enroll_run(broker, model, run, budget)
    found = {"model": model, "run": run.hex(), "budget": budget, "entry": document["index"]}
    out.result(found, Line(f"training run {run.hex()} on {model}: at most {budget} releases"))


@app.command()
@verb
def revoke(
    out: Output,
    folder: Folder,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model.")],
    unlock: UnlockOptions,
    release: Annotated[
        int | None, typer.Option("--release", metavar="N", min=0, help="This release alone. (default: the whole model)")
    ] = None,
    min_release: Annotated[
        int | None, typer.Option("--min-release", metavar="N", min=0, help="All releases below N; never falls.")
    ] = None,
) -> None:
    """Give no more keys of a model, and end the leases on it.

    What an enclave holds already stays with it until it ends.
    """
    _require()
    from motte.provision.broker import enroll

    with _open(folder, unlock) as broker:
        head = enroll.revoke(broker, model, release=release, min_release=min_release)
    what = f"release {release}" if release is not None else f"below {min_release}" if min_release is not None else "all"
    out.result({"model": model, "revoked": what, "entry": head["index"]}, Line(f"{model}: revoked ({what})"))


@app.command()
@verb
def rotate(out: Output, folder: Folder, unlock: UnlockOptions, new: NewUnlockOptions) -> None:
    """Wrap all keys anew under another passphrase, key file or token. Start the server again afterwards.

    Backups from before still open with the old one: make a new backup, and destroy the old key with the old backups.
    """
    _require()
    from motte.provision.broker.state import rotate_wrapping

    options = UnlockOptions(
        new.new_passphrase_file, new.new_key_file, new.new_pkcs11_module, new.new_pkcs11_token, new.new_pkcs11_pin_file
    )
    with _open(folder, unlock) as broker:
        rotate_wrapping(broker, _unlock(options, new=True))
        kind = broker.wrapper.parameters["kind"]
    out.result({"folder": str(folder), "wrapping": kind}, Line(f"all keys are wrapped by the new {kind}"))


@app.command()
@verb
def backup(
    out: Output,
    folder: Folder,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The backup; never overwritten.")],
    unlock: UnlockOptions,
) -> None:
    """Write a consistent copy while the broker may be serving. It holds no key in clear."""
    _require()
    from motte.provision.broker.backup import backup as write_backup

    with _open(folder, unlock) as broker:
        head = write_backup(broker, file)
    out.result({"file": str(file), "head": head}, Line(f"{file}: everything up to entry {head['index']}"))


@app.command()
@verb
def restore(
    out: Output,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A backup.")],
    folder: Folder,
    unlock: UnlockOptions,
    head: Annotated[
        list[Path] | None, typer.Option("--head", metavar="FILE", help="A head that a client kept; repeatable.")
    ] = None,
) -> None:
    """Make a broker from a backup. All clients notice; open nonces, leases and training runs end.

    What happened after the backup is forgotten: revoke again what was revoked since, and raise --min-release again.
    """
    _require()
    from motte.provision.broker.backup import restore as read_backup
    from motte.provision.broker.state import open_broker

    opened = _unlock(unlock)
    document, held = read_backup(file, folder, opened, head or ())
    with open_broker(folder, opened) as broker:
        made = {"folder": str(folder), "head": document, "runs_held": held, **_public(broker)}
    out.result(made, Line(f"broker in {folder}, era {document['era']}, from {file}; {held} training runs are held"))
    out.warn("what was revoked after the backup is not revoked here")


@policy_app.command("check")
@verb
def policy_check(
    out: Output, file: Annotated[Path, typer.Argument(metavar="FILE", help="The policy: strict JSON.")]
) -> None:
    """Read a policy as the broker would, and print it; says what is dangerous about it."""
    _require()
    from motte.attest.policy_text import dumps
    from motte.provision.broker.policies import allows_simulated, read_policy

    policy = read_policy(file)
    simulated = allows_simulated(policy)
    out.result(
        {"file": str(file), "allows_simulated": simulated, "policy": dumps(policy)}, Line(dumps(policy).rstrip())
    )
    _warn_simulated(out, policy)


@policy_app.command("set")
@verb
def policy_set(
    out: Output,
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name; what has it now is replaced.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The policy: strict JSON.")],
    unlock: UnlockOptions,
    owner: Annotated[
        list[str] | None,
        typer.Option("--owner", metavar="SIGNER", help="May register bundles under it over the network; repeatable."),
    ] = None,
    simulated_signer: Annotated[
        list[str] | None,
        typer.Option("--simulated-signer", metavar="HEX", help="Development key of simulated evidence; repeatable."),
    ] = None,
    tpm_enrolled: Annotated[
        list[Path] | None,
        typer.Option("--tpm-enrolled", metavar="FILE", help="A TPM's attestation key (SPKI, DER); repeatable."),
    ] = None,
    tpm_root: Annotated[
        list[Path] | None,
        typer.Option("--tpm-root", metavar="FILE", help="A TPM maker's root certificate (DER); repeatable."),
    ] = None,
    intel_pccs: Annotated[
        str | None, typer.Option("--intel-pccs", metavar="URL", help="Fetch Intel's collateral from there.")
    ] = None,
) -> None:
    """Store a policy. It counts from the next handshake on; keys that were given stay given."""
    _require()
    from motte.provision.broker.policies import read_policy, set_policy
    from motte.seal.keys import SignerPublicKey

    policy = read_policy(file)
    owners: list[SignerPublicKey] = [public_key(each, SignerPublicKey, option="--owner") for each in owner or ()]
    anchors = _anchors(simulated_signer, tpm_enrolled, tpm_root, intel_pccs)
    with _open(folder, unlock) as broker:
        set_policy(broker, name, policy, anchors=anchors, owners=owners)
    out.result({"name": name, "owners": [str(each) for each in owners]}, Line(f"policy {name} is set"))
    _warn_simulated(out, policy)


@audit_app.command("verify")
@verb
def audit_verify(
    out: Output,
    folder: Folder,
    head: Annotated[
        list[Path] | None, typer.Option("--head", metavar="FILE", help="A head that a client kept; repeatable.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option("--broker-key", metavar="KEY", help="The broker's key. (default: the one that the store names)"),
    ] = None,
) -> None:
    """Compute the whole chain anew. Without --head from a client an end that was cut off cannot be seen."""
    _require()
    from motte.provision.broker import log, state
    from motte.seal.keys import SignerPublicKey

    with _stored(folder) as store:
        demanded = state.public_key(store) if key is None else public_key(key, SignerPublicKey, option="--broker-key")
        with store.read() as db:
            found = log.verify(db, demanded, _heads(head, demanded))
    document = {"entries": found.index, "era": found.era, "head": found.digest.hex(), "heads_compared": len(head or ())}
    out.result(document, Line(f"{found.index} entries, era {found.era}: every one is as it was written"))
    if not head:
        out.warn("no client's head was given: entries cut off at the end would not show")


@audit_app.command("show")
@verb
def audit_show(
    out: Output,
    folder: Folder,
    last: Annotated[int, typer.Option("--last", metavar="N", min=1, max=100_000, help="So many entries.")] = 20,
) -> None:
    """Print the newest entries of the log, unverified."""
    _require()
    from datetime import UTC, datetime

    from motte.provision.broker import log

    with _stored(folder) as store, store.read() as db:
        found = list(log.entries(db, last=last))
    lines = []
    for each in found:
        at = datetime.fromtimestamp(each.at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        facts = "  ".join(f"{name}={value}" for name, value in each.facts.items() if value is not None)
        lines.append(Line(f"{each.index:>6}  {at}  {each.kind:<12} {facts}"))
    out.result({"entries": [each.to_json() for each in found]}, *lines)


def _require() -> None:
    from motte.provision.broker.extra import require_broker_packages

    require_broker_packages()


def _unlock(given: UnlockOptions, *, new: bool = False) -> Unlock:
    from motte.provision.broker.wrapping import Unlock, read_secret_file

    passphrase = None if given.passphrase_file is None else read_secret_file(given.passphrase_file, "passphrase")
    pin = None if given.pkcs11_pin_file is None else read_secret_file(given.pkcs11_pin_file, "PIN")
    if passphrase is None and given.key_file is None and given.pkcs11_module is None:
        if not sys.stdin.isatty():
            raise InputError(
                "no way to open the broker's keys",
                expected="--passphrase-file, --key-file or --pkcs11-module",
                hint="on a terminal a passphrase would be asked for",
            )
        text = typer.prompt(
            "new passphrase" if new else "passphrase", hide_input=True, confirmation_prompt=new, err=True
        )
        passphrase = str(text).encode()
    token_pin = None if pin is None else pin.decode("utf-8", "strict")
    return Unlock(passphrase, given.key_file, given.pkcs11_module, given.pkcs11_token, token_pin)


def _open(folder: Path, unlock: UnlockOptions) -> Broker:
    from motte.provision.broker.state import open_broker

    return open_broker(folder, _unlock(unlock))


@contextlib.contextmanager
def _stored(folder: Path) -> Iterator[Store]:
    """The store of a broker, none of its secrets opened."""
    from motte.provision.broker.state import DATABASE
    from motte.provision.broker.store import Store

    store = Store(folder / DATABASE)
    try:
        yield store
    finally:
        store.close()


def _public(broker: Broker) -> dict[str, Any]:
    return {
        "key": str(broker.signer.public),
        "pin": broker.tls.pin,
        "recipient": str(broker.recipient.public),
    }


def _heads(paths: list[Path] | None, key: SignerPublicKey) -> list[Head]:
    from motte.provision.heads import load_head

    return [load_head(path, key) for path in paths or ()]


def _hexadecimal(text: str, option: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as problem:
        raise InputError("not hexadecimal", where=option, got=repr(text)[:100]) from problem


def _anchors(
    simulated: list[str] | None, enrolled: list[Path] | None, roots: list[Path] | None, pccs: str | None
) -> Anchors:
    from motte.attest.anchors import Anchors

    return Anchors(
        intel_pccs=pccs,
        tpm_roots=tuple(map(_file, roots or ())),
        tpm_enrolled=tuple(map(_file, enrolled or ())),
        simulated_signers=tuple(_hexadecimal(each, "--simulated-signer") for each in simulated or ()),
    )


def _file(path: Path) -> bytes:
    from motte.limits import MAX_CERTIFICATE_BYTES

    try:
        with path.open("rb") as file:
            data = file.read(MAX_CERTIFICATE_BYTES + 1)
    except OSError as problem:
        raise InputError("cannot read a file", where=str(path), got=problem.strerror) from problem
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise InputError("too large for a key or a certificate", where=str(path))
    return data


def _warn_simulated(out: Output, policy: Policy) -> None:
    from motte.provision.broker.policies import allows_simulated

    if allows_simulated(policy):
        out.warn("this policy gives keys for SIMULATED evidence: no hardware stands behind it")
