"""``motte train``, ``motte train-log`` and ``motte train-weights``: a training run, and what it left for its owner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from motte.cli.anchoring import AnchorOptions
from motte.cli.attest_tpm import TpmOptions
from motte.cli.options import private_key, public_key
from motte.cli.output import Column, Line, Output, bytes_text, seconds_text, table
from motte.cli.train_options import (
    EvaluationOptions,
    KeptOptions,
    PlaceOptions,
    ProtectionOptions,
    RecipeOptions,
    SubjectOptions,
    settings_of,
)
from motte.cli.train_releasing import AdmissionOptions
from motte.cli.verb import INTERRUPTED, TERMINATED, verb

if TYPE_CHECKING:
    from motte.cli.output import Bar
    from motte.seal.keys import RecipientPrivateKey, SignerPublicKey
    from motte.train.result import Progress, TrainResult
    from motte.train.settings import TrainSettings

_Key = Annotated[
    Path, typer.Option("--key", metavar="FILE", help="The private key that the run's files are sealed to.")
]
_Signer = Annotated[
    str | None,
    typer.Option(
        "--signer",
        metavar="KEY",
        help="Who signed them, if --checkpoint-signer was given (default: derived from --key); with --data, who signed"
        " the data.",
    ),
]
_Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Of a run under a key broker: the sealed data that it was trained on, which --key opens.",
    ),
]
_BrokerRun = Annotated[
    str | None, typer.Option("--broker-run", metavar="RUN", help="Of a run under a key broker: its name there.")
]


@verb
def train(
    out: Output,
    subject: SubjectOptions,
    recipe: RecipeOptions,
    protection: ProtectionOptions,
    place: PlaceOptions,
    kept: KeptOptions,
    evaluation: EvaluationOptions,
    admission: AdmissionOptions,
    tpm: TpmOptions,
    given_roots: AnchorOptions,
) -> None:
    """Train a model, split between this process and an accelerator, or as a baseline all inside or all outside."""
    keys = admission.read(tpm, given_roots)
    settings = settings_of(subject, recipe, protection, evaluation, place, kept, **keys)
    from motte.train.figures import append_records, document, may_tell
    from motte.train.loop import train as run

    told = may_tell(settings)
    with out.progress(f"training {settings.model}") as bar:
        result = run(settings, progress=_teller(out, bar, told=told))
    if not result.main:
        return
    if settings.record is not None:
        count = append_records(settings.record, settings, result)
        out.note(f"{count} records added to {settings.record}")
    out.result(document(settings, result), *_shown(settings, result, told=told))
    if result.stopped is not None:
        out.warn(_how_to_continue(settings, result))
        raise typer.Exit(TERMINATED if result.stopped == "SIGTERM" else INTERRUPTED)


def _teller(out: Output, bar: Bar, *, told: bool) -> Callable[[Progress], None]:
    """Shows where a run is. What tells about private data is left out."""

    def tell(now: Progress) -> None:
        if now.finished is not None:
            end = now.finished
            figures = (
                f"train loss {end.train_loss:.4f}, accuracy {end.train_accuracy:.2%}; "
                f"test loss {end.test_loss:.4f}, accuracy {end.test_accuracy:.2%}"
            )
            out.note(f"epoch {end.epoch + 1}/{now.epochs}: {figures if told else 'done'}")
            return
        figures = f", loss {now.loss:.4f}, accuracy {now.accuracy:.1%}" if told else ""
        bar.describe(f"{now.phase} {now.epoch}/{now.epochs}{figures}")
        if now.phase == "train":
            bar.set((now.epoch - 1) * now.batches + now.batch, now.epochs * now.batches)

    return tell


def _how_to_continue(settings: TrainSettings, result: TrainResult) -> str:
    stopped = f"stopped by {result.stopped} after {result.steps} steps"
    if settings.checkpoint_dir is None:
        return f"{stopped}; nothing was kept: there is no --checkpoint-dir"
    return f"{stopped}; to continue, repeat the command with --resume (checkpoint in {settings.checkpoint_dir})"


def _shown(settings: TrainSettings, result: TrainResult, *, told: bool) -> list[Any]:
    rows = [("scheme", settings.scheme), ("data", result.provenance)]
    if not told:
        rows.append(("accuracy, loss", "not shown: the data is private; motte train-log opens the sealed log"))
    elif result.test_accuracy is not None and result.test_loss is not None:
        rows += [("test accuracy", f"{result.test_accuracy:.2%}"), ("test loss", f"{result.test_loss:.4f}")]
    if told and result.train_loss is not None:
        rows.append(("train loss, latest steps", f"{result.train_loss:.4f}"))
    rows.append(("steps", f"{result.steps} ({len(result.history)} whole epochs)"))
    if result.median_step_s is not None:
        where = f"{result.dtype}, {result.threads} threads, {result.processes} processes"
        rows.append(("median of a step", f"{seconds_text(result.median_step_s)} ({where})"))
    if result.layers:
        split = sum(each.side == "split" for each in result.layers)
        rows.append(("split layers", f"{split} of {len(result.layers)}"))
    rows += [("bytes out", bytes_text(result.bytes_out)), ("epsilon", str(result.spent))]
    if result.charged is not None:
        rows.append(("releases charged at the broker", f"{result.charged:,}"))
    if result.release is not None:
        rows.append(("checkpoint", f"release {result.release} in {settings.checkpoint_dir}"))
    shown: list[Any] = [table((Column("", keep=True), Column("")), rows, title=f"{settings.model}, {settings.scheme}")]
    if settings.scheme == "accelerator":
        shown.append(Line("NOT PROTECTED: inputs, labels, weights and gradients lay open on the device"))
    return shown


@verb
def train_log(
    out: Output,
    log: Annotated[Path, typer.Argument(metavar="FILE", help="A sealed log, train-0001.motte-log.")],
    key: _Key,
    signer: _Signer = None,
    data: _Data = None,
    broker_run: _BrokerRun = None,
) -> None:
    """Show a sealed training log to its owner, as JSON lines. Whoever sees the terminal sees it too."""
    from motte.train.logs import entries_text
    from motte.train.sealed_log import read_log

    opener, demanded = _opened(key, signer, data, broker_run)
    found = read_log(log, opener, signer=demanded)
    if not found.closed:
        out.warn("the log has no end mark: its run still writes, was killed, or the end was cut off")
    document = {"closed": found.closed, "entries": [dict(entry) for entry in found.entries]}
    out.result(document, Line(entries_text(found.entries).removesuffix("\n")))


@verb
def train_weights(
    out: Output,
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint, best.checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="New safetensors file.")],
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="The private key that it is sealed to.")
    ] = None,
    signer: _Signer = None,
    data: _Data = None,
    broker_run: _BrokerRun = None,
    insecure_plaintext: Annotated[
        bool, typer.Option("--insecure-plaintext", help="Say that weights may lie on this disk in the clear.")
    ] = False,
) -> None:
    """Write the weights of a checkpoint to disk in the clear: for its owner, on a machine of their own.

    `motte seal --weights FILE` takes them from there.
    """
    from motte.errors import SettingError
    from motte.train.checkpoint import write_weights

    if not insecure_plaintext:
        raise SettingError(
            "this writes weights to disk in the clear", hint="say --insecure-plaintext if that is what you want"
        )
    if key is None and (signer is not None or data is not None or broker_run is not None):
        raise SettingError("a plaintext checkpoint has no signer, and is not of a broker's run", where="--key")
    keys = None if key is None else _opened(key, signer, data, broker_run)
    written = write_weights(checkpoint, output, keys)
    out.warn(f"the weights lie in the clear in {output}")
    document = {"path": str(output), "tensors": written.tensors, "steps": written.steps, "release": written.release}
    out.result(document, Line(f"{output}: {written.tensors} tensors after {written.steps} steps"))


def _opened(
    key: Path, signer: str | None, data: Path | None, broker_run: str | None
) -> tuple[RecipientPrivateKey, SignerPublicKey]:
    """What opens a run's files, and whose signature on them is demanded."""
    from motte.errors import SettingError
    from motte.seal.keys import RecipientPrivateKey, SignerPublicKey
    from motte.train.owner import derived_signer

    opener = private_key(key, RecipientPrivateKey, option="--key")
    demanded = None if signer is None else public_key(signer, SignerPublicKey, option="--signer")
    if (data is None) != (broker_run is None):
        raise SettingError("what a run under a key broker wrote", expected="--data FILE and --broker-run RUN")
    if data is None or broker_run is None:
        return opener, derived_signer(opener).public if demanded is None else demanded
    if demanded is None:
        raise SettingError("sealed data has a signer", where="--signer", expected="who signed the data")
    from motte.seal.reader import open_bundle
    from motte.train.admission import parse_run
    from motte.train.owner import run_keys

    with open_bundle(data, signer=demanded) as signed:
        keys = run_keys(signed.data_keys(signed.unwrap(opener))[0], parse_run(broker_run))
    return keys.opener, keys.signer.public
