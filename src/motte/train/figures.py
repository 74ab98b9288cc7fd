"""The figures of a finished run, for people, for programs and for files of records (docs/spec/records.md).

Accuracy and loss tell about the data. For private data, and inside an enclave, they are told in the sealed log only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from motte.errors import SettingError
from motte.measure.record import PROCESS, UNPROTECTED, Parameter, Record, Setting, state
from motte.measure.record_file import append
from motte.offload.words import noise_text, rank_text
from motte.train.logs import inside_enclave
from motte.train.result import TrainResult
from motte.train.settings import TrainSettings

_DTYPES: Final = {"fp32": "float32", "bf16": "bfloat16"}


def may_tell(settings: TrainSettings) -> bool:
    """Whether figures about the data may be shown to whoever watches this process."""
    return settings.insecure_plaintext_log or not (settings.private or inside_enclave())


def check_record(settings: TrainSettings) -> None:
    """Refuse, before the start, a record that the end could not write.

    Raises:
        SettingError: a file of records is plaintext, and the data is private.
    """
    if settings.record is not None and not may_tell(settings):
        raise SettingError(
            "a record tells accuracy and loss on private data in the clear",
            where="record",
            hint="leave it out, or say --insecure-plaintext-log",
        )


def document(settings: TrainSettings, result: TrainResult) -> dict[str, Any]:
    """The result as plain JSON values; without what tells about the data where that may not be told."""
    shown: dict[str, Any] = {
        "scheme": settings.scheme,
        "model": settings.model,
        "data": settings.data.partition(":")[0],
        "seed": settings.seed,
        "recipe": dict(result.recipe.facts()),
        "dtype": result.dtype,
        "threads": result.threads,
        "processes": result.processes,
        "steps": result.steps,
        "epochs": len(result.history),
        "median_step_s": result.median_step_s,
        "bytes_out": result.bytes_out,
        "bytes_in": result.bytes_in,
        "privacy": result.spent.to_json(),
        "layers": [asdict(each) for each in result.layers],
        "checkpoint_release": result.release,
        "broker": None
        if settings.broker is None
        else {"run": settings.broker.run.hex(), "charged": result.charged, "checkpoint": result.release},
        "stopped": result.stopped,
        "simulated": settings.scheme != "accelerator",
        "told": may_tell(settings),
    }
    if may_tell(settings):
        shown |= {
            "test_accuracy": result.test_accuracy,
            "test_loss": result.test_loss,
            "train_loss": result.train_loss,
            "history": [asdict(each) for each in result.history],
            "curve": [asdict(each) for each in result.curve],
        }
    return shown


def records(settings: TrainSettings, result: TrainResult) -> tuple[Record, ...]:
    """Accuracy, loss, seconds a step and bytes that left, each a record of its own with all that decides it.

    A run that was stopped states only what it measured.
    """
    setting = Setting(
        threads=result.threads,
        dtype=_DTYPES[result.dtype],
        device=settings.device if settings.scheme in ("asymmetric", "accelerator") else "cpu",
        engine="torch",
        enclave=UNPROTECTED if settings.scheme == "accelerator" else PROCESS,
    )
    parameters = _parameters(settings, result)
    after = f"after {result.steps} steps"
    found = []

    def add(what: str, value: float, unit: str, **samples: Any) -> None:
        found.append(
            state(
                series=f"train {settings.model} {settings.scheme}",
                what=what,
                value=value,
                unit=unit,
                setting=setting,
                parameters=parameters,
                **samples,
            )
        )

    if result.test_accuracy is not None and result.test_loss is not None:
        add(f"share of the test split whose largest logit is the label, {after}", result.test_accuracy, "1")
        add(f"mean cross-entropy on the test split in nats, {after}", result.test_loss, "1")
    median = result.median_step_s
    if median is not None:
        what = "one training step, from asking for its batch to the updated weights"
        add(what, median, "s", statistic="median", samples=result.step_s)
        add("tensor bytes sent to accelerators by this process since its start", float(result.bytes_out), "B")
    return tuple(found)


def append_records(path: Path, settings: TrainSettings, result: TrainResult) -> int:
    """Add the records of a run to a file; returns how many.

    Raises:
        ResourceError: it cannot be written. RecordError: it ends in half a line.
    """
    found = records(settings, result)
    for record in found:
        append(path, record)
    return len(found)


def _parameters(settings: TrainSettings, result: TrainResult) -> Mapping[str, Parameter]:
    parameters: dict[str, Parameter] = {
        "model": settings.model,
        "width": settings.width,
        "data": settings.data.partition(":")[0],
        "scheme": settings.scheme,
        "seed": settings.seed,
        "steps": result.steps,
        "processes": result.processes,
        "epsilon": str(result.spent),
        **result.recipe.facts(),
    }
    if settings.subset is not None:
        parameters["subset"] = settings.subset
    if settings.input_noise:
        parameters["input_noise"] = settings.input_noise
    scheme = settings.offload_scheme()
    if scheme is not None:
        parameters |= {"rank": rank_text(scheme.rank), "noise": noise_text(getattr(scheme, "noise", None))}
    if settings.scheme == "asymmetric":
        parameters |= {
            "integrity": settings.integrity,
            "evaluate": settings.evaluate,
            "split_layers": sum(each.side == "split" for each in result.layers),
        }
    return parameters
