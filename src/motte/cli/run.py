"""``motte run``: photos, texts or arrays through a sealed bundle, and where the time and the memory went."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from motte.cli.anchoring import AnchorOptions
from motte.cli.attest_tpm import TpmOptions
from motte.cli.options import parse_size, public_key
from motte.cli.output import Line, Output, bytes_text
from motte.cli.releasing import EnclaveOptions, ReleaseOptions
from motte.cli.report import Measured, engine_line, report_json, show_report
from motte.cli.verb import verb
from motte.errors import InputError, SettingError
from motte.limits import MAX_RELEASE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from motte.enclave.host_service import Issue
    from motte.provision.address import BrokerAddress
    from motte.run.inputs import InputItem
    from motte.run.model import Model
    from motte.run.pool import PooledModel
    from motte.run.settings import LoadSettings
    from motte.run.told import Answered, Offload, OnGpu, Outside
    from motte.seal.keys import RecipientPrivateKey, SignerPublicKey

    Array = NDArray[Any]
    Ask = Callable[[list[Any]], Answered]

_INPUTS, _TRUST, _WORKER = "Inputs and answers", "Trust", "Worker"
_SHOWN_LAYERS = 4
_FIRST = {"since": "inputs joined to a batch", "until": "answer received"}


@verb
def run(
    out: Output,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A file of `motte seal`.")],
    signer: Annotated[
        str,
        typer.Option(
            "--signer",
            metavar="KEY",
            rich_help_panel=_TRUST,
            help="Demanded signer: motte-signer-1-..., or a .pub file.",
        ),
    ],
    release: ReleaseOptions,
    tpm: TpmOptions,
    given_roots: AnchorOptions,
    where: EnclaveOptions,
    inputs: Annotated[
        list[Path] | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE",
            rich_help_panel=_INPUTS,
            help="PNG, JPEG, .npy, a .txt for encoders, or a folder of them. Repeat it for several.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", metavar="TEXT", rich_help_panel=_INPUTS, help="A text for an encoder. Repeat it for several."
        ),
    ] = None,
    topk: Annotated[
        int, typer.Option("--topk", metavar="N", min=1, rich_help_panel=_INPUTS, help="Labels shown per input.")
    ] = 5,
    save: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE.npy",
            rich_help_panel=_INPUTS,
            help="Save the embeddings, or else the first output of the model, of all inputs.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", rich_help_panel=_INPUTS, help="Replace the file of --out.")
    ] = False,
    min_release: Annotated[
        int,
        typer.Option(
            "--min-release", metavar="N", min=0, max=MAX_RELEASE, rich_help_panel=_TRUST, help="Refuse an older bundle."
        ),
    ] = 0,
    verify_digests: Annotated[
        bool,
        typer.Option(
            "--verify-digests", rich_help_panel=_TRUST, help="Check all ciphertext against the signed digests first."
        ),
    ] = False,
    mode: Annotated[
        Literal["resident", "streamed"],
        typer.Option(
            "--mode", rich_help_panel=_WORKER, help="All parts opened once, or one after the other on every run."
        ),
    ] = "resident",
    weight_memory: Annotated[
        int | None,
        typer.Option(
            "--weight-memory",
            metavar="SIZE",
            parser=parse_size,
            rich_help_panel=_WORKER,
            help="Bound of the weight memory, such as 128MiB; needed by --mode streamed.",
        ),
    ] = None,
    engine: Annotated[
        Literal["auto", "torch", "onnxruntime", "openvino"],
        typer.Option(
            "--engine",
            rich_help_panel=_WORKER,
            help="What computes. auto: onnxruntime where every part is lowered, else torch, the exact reference.",
        ),
    ] = "auto",
    precision: Annotated[
        Literal["f32", "bf16"],
        typer.Option(
            "--precision",
            rich_help_panel=_WORKER,
            help="bf16: with openvino, for a bundle that was sealed with it.",
        ),
    ] = "f32",
    pool: Annotated[
        int | None,
        typer.Option(
            "--pool",
            metavar="N",
            min=1,
            max=256,
            rich_help_panel=_WORKER,
            help="Start N empty workers first: the bundle waits for no start, and if a worker dies or stalls the next"
            " one goes on.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            metavar="N",
            min=1,
            rich_help_panel=_WORKER,
            help="Inputs that run together. (default: the plan's batch)",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads",
            metavar="N",
            min=1,
            max=256,
            rich_help_panel=_WORKER,
            help="Compute threads of the worker. (default: all cores)",
        ),
    ] = None,
    accelerator: Annotated[
        str | None,
        typer.Option(
            "--accelerator",
            metavar="ADDRESS",
            rich_help_panel=_WORKER,
            help="Where the layers run that the bundle lets out: unix:PATH, tcp:HOST:PORT, or local to start one here."
            " (default: everything inside)",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", rich_help_panel=_WORKER, help="Time limit of every step of the worker."
        ),
    ] = 120.0,
    repeat: Annotated[
        int,
        typer.Option(
            "--repeat",
            metavar="N",
            min=0,
            max=10_000,
            rich_help_panel=_WORKER,
            help="Runs of the first batch after the first one, for the steady time; 0: none.",
        ),
    ] = 5,
) -> None:
    """Answer inputs with a sealed model, in a trusted worker that ends with this command."""
    import motte
    from motte.run.settings import LoadSettings
    from motte.seal.keys import SignerPublicKey

    given = _given(inputs, text)
    if save is not None and not overwrite and os.path.lexists(save):
        raise InputError(
            "the file of --out exists already", where=str(save), hint="choose another name, or say --overwrite"
        )
    settings = LoadSettings(
        mode=mode,
        weight_memory_bytes=weight_memory or 0,
        threads=threads or 0,
        # A streamed worker bounds its activations by the batch stated at the start.
        dims={"batch": batch} if batch is not None and mode == "streamed" else None,
        min_release=min_release,
        verify_digests=verify_digests,
        timeout_s=timeout,
        accelerator=accelerator,
        engine=engine,
        precision=precision,
        enclave=where.enclave,
        image=where.image,
        vm=where.vm,
    )
    if pool is not None and accelerator is not None:
        raise SettingError("a worker of a pool is started without an accelerator", got="--pool with --accelerator")
    if pool is not None and where.enclave != "process":
        raise SettingError("a pool starts processes", got=f"--pool with --enclave {where.enclave}")
    keys, issue, verifier = release.keys(), release.issuer(tpm), release.verifier(given_roots)
    if pool is not None and verifier is not None:
        raise SettingError("a pool verifies no evidence", got="--pool with --verify")
    demanded = public_key(signer, SignerPublicKey, option="--signer")
    with ExitStack() as stack:
        opened: Model | PooledModel
        if pool is None:
            with out.progress(f"starting the worker and opening {bundle.name}"):
                opened = stack.enter_context(
                    motte.load(bundle, keys=keys, signer=demanded, settings=settings, issue=issue, verifier=verifier)
                )
        else:
            opened = stack.enter_context(_pooled(out, bundle, pool, settings, keys, demanded, issue))
        model = opened if isinstance(opened, motte.Model) else opened.model
        out.note(engine_line(model.engine))
        if model.offload is not None and model.offload.layers and model.offload.accelerator is None:
            out.note("no --accelerator is given: everything runs inside, and nothing leaves")
        found = _answer_all(out, model, opened.run, given, batch, topk, repeat)
        # Of a pool another worker may have gone on; times are of the one that answered first.
        memory = dict((opened if isinstance(opened, motte.Model) else opened.model).stats())
    if save is not None:
        _save(save, found, overwrite=overwrite)
    document = report_json(bundle, model, settings, found, memory)
    shown = show_report(bundle, model, settings, found, memory)
    if model.offload is not None:
        document["offload"] = _offload_json(model.offload, found.outside)
        shown = [*shown, Line(offload_line(model.offload, found.outside)), *gpu_lines(model.offload.gpu)]
    out.result(document, *shown)
    if save is not None:
        out.note(f"saved to {save}")


@contextmanager
def _pooled(
    out: Output,
    bundle: Path,
    size: int,
    settings: LoadSettings,
    keys: RecipientPrivateKey | BrokerAddress,
    signer: SignerPublicKey,
    issue: Issue | None,
) -> Iterator[PooledModel]:
    """The bundle in the first of ``size`` workers, the others waiting for it to fail."""
    from motte.run.pool import Pool, PooledModel
    from motte.run.settings import AUTO

    # A pool is started before the bundle is read: auto can only mean the engine that needs no torch.
    engine = "onnxruntime" if settings.engine == AUTO else settings.engine
    with Pool(size, engine=engine, precision=settings.precision, threads=settings.threads, refill=False) as workers:
        with out.progress(f"starting {size} workers"):
            workers.wait(wait_s=settings.timeout_s)
        with out.progress(f"opening {bundle.name}"):
            model = PooledModel(
                workers, bundle, keys=keys, signer=signer, settings=settings, retries=size - 1, issue=issue
            )
        with model:
            yield model


def offload_line(offload: Offload, outside: Sequence[Outside]) -> str:
    """One line: which layers left, how they were checked, whether they were noised, and what crossed."""
    if not offload.layers:
        return "inside: all; nothing may leave"
    if offload.accelerator is None:
        return f"inside: all; the {len(offload.layers)} layers that may leave did not, for want of an accelerator"
    crossed = ""
    if outside:
        later = max((each.sent_bytes for each in outside[1:]), default=None)
        crossed = f"; out: {bytes_text(outside[0].sent_bytes)} with the weights in the first run"
        crossed += "" if later is None else f", {bytes_text(later)} in a later one"
    return (
        f"outside: {len(offload.layers)} layers ({_names(offload.layers)}) on {offload.accelerator}; integrity"
        f" {'OFF' if offload.integrity == 'off' else 'on'}; {'noise' if offload.noise else 'NO NOISE'}{crossed}"
    )


def gpu_lines(gpu: OnGpu | None) -> list[Line]:
    """A line: which layers ran on a GPU of the trusted side, and by what verdict it counts as one."""
    if gpu is None:
        return []
    where = f"{len(gpu.layers)} layers ({_names(gpu.layers)}) on {gpu.device}"
    what = f"{gpu.gpu}, driver {gpu.gpu_driver}, firmware {gpu.gpu_vbios}"
    simulated = "SIMULATED: " if gpu.simulated else ""
    said = f"inside, on a confidential GPU: {where}; {what}, proved {gpu.proved_at} with its {gpu.guest} guest"
    return [Line(simulated + said)]


def _names(layers: Sequence[str]) -> str:
    more = f" and {len(layers) - _SHOWN_LAYERS} more" if len(layers) > _SHOWN_LAYERS else ""
    return ", ".join(layers[:_SHOWN_LAYERS]) + more


def _offload_json(offload: Offload, outside: Sequence[Outside]) -> dict[str, Any]:
    return {
        "accelerator": offload.accelerator,
        "layers": list(offload.layers),
        "integrity": offload.integrity,
        "noise": offload.noise,
        "gpu": None if offload.gpu is None else asdict(offload.gpu),
        "runs": [
            {
                "layers": each.layers,
                "sent_bytes": each.sent_bytes,
                "received_bytes": each.received_bytes,
                "seconds": dict(each.seconds),
            }
            for each in outside
        ],
    }


def _given(inputs: Sequence[Path] | None, texts: Sequence[str] | None) -> list[Path | str]:
    """Everything to answer, in order; what is missing is refused before a worker is started."""
    given: list[Path | str] = [*(inputs or ()), *(texts or ())]
    if not given:
        raise SettingError("no input is given", expected="--input FILE or --text TEXT")
    for path in inputs or ():
        if not path.exists():
            raise InputError("no such input", where=str(path))
    return given


def _answer_all(
    out: Output, model: Model, ask: Ask, given: list[Path | str], batch: int | None, topk: int, repeat: int
) -> Measured:
    from motte.run.inputs import batches, read_inputs
    from motte.run.tensors import from_wire, to_wire

    if model.signature.weights_origin == "random":
        out.warn("the weights are random: the answer means nothing")
    if any(isinstance(each, str) for each in given) and not _takes_text(model):
        raise SettingError(
            "this model takes no text", where=model.signature.model, got="--text", hint="give --input FILE"
        )
    items = read_inputs(given, model.signature, model.inputs)
    for item in items:
        if item.note:
            out.warn(f"{item.name}: {item.note}")
    found = Measured()
    # Only inputs of a model with a dimension of that name can be joined.
    dynamic = "batch" in {dim.name for dim in model.dims}
    size = (batch or model.plan_dims.get("batch", 1)) if dynamic else 1
    mask_index = next((i for i, value in enumerate(model.inputs) if value.name == "attention_mask"), None)
    with out.progress("running", total=len(items)) as bar:
        for index, (group, arrays) in enumerate(batches(items, size)):
            wire = [to_wire(array, where=value.name) for array, value in zip(arrays, model.inputs, strict=True)]
            if index == 0:
                with model.clock.segment("first inference", **_FIRST):
                    answered = _run(ask, wire, found)
                for _ in range(repeat):
                    found.steady_s.append(_timed(ask, wire, found))
                found.first_batch = sum(item.batch for item in group)
            else:
                answered = _run(ask, wire, found)
            found.activation_peak_bytes = max(found.activation_peak_bytes, answered.activation_peak_bytes)
            outputs = [from_wire(tensor, like=arrays[0]) for tensor in answered.outputs]
            mask = arrays[mask_index] if mask_index is not None else None
            _read(found, model, group, outputs, topk, mask)
            bar.advance(len(group))
    return found


def _takes_text(model: Model) -> bool:
    from motte.capture.signature import TextPreprocessing

    return isinstance(model.signature.preprocessing, TextPreprocessing)


def _run(ask: Ask, wire: list[Any], found: Measured) -> Answered:
    answered = ask(wire)
    if answered.outside is not None:
        found.outside.append(answered.outside)
    return answered


def _timed(ask: Ask, wire: list[Any], found: Measured) -> float:
    from motte.measure.clock import Clock

    clock = Clock()
    with clock.segment("inference", **_FIRST):
        _run(ask, wire, found)
    return clock.segments()["inference"].seconds


def _read(
    found: Measured, model: Model, group: Sequence[InputItem], outputs: list[Array], topk: int, mask: Array | None
) -> None:
    import numpy as np

    from motte.run.answers import read_answers

    names = [item.name if item.batch == 1 else f"{item.name}[{i}]" for item in group for i in range(item.batch)]
    answers = read_answers(outputs, model.signature, names, topk=topk, mask=mask)
    found.answers += answers
    embeddings = [answer.embedding for answer in answers if answer.embedding is not None]
    same = len({each.shape for each in embeddings}) == 1
    found.raw.append(np.stack(embeddings) if embeddings and same else outputs[0])


def _save(path: Path, found: Measured, *, overwrite: bool) -> None:
    """Write what all inputs gave as one array, inputs along the first axis.

    Raises:
        InputError: answers of different shapes, or the file exists.
    """
    import numpy as np

    from motte.seal.atomic import atomic_file

    shapes = {array.shape[1:] for array in found.raw}
    if len(shapes) != 1:
        raise InputError(
            "the answers have different shapes and make no array", where="--out", got=", ".join(map(str, shapes))
        )
    with atomic_file(path, overwrite=overwrite) as fd, os.fdopen(os.dup(fd), "wb") as file:
        np.save(file, np.concatenate(found.raw), allow_pickle=False)
