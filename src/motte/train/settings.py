"""What a training run is: every setting, validated when it is made. Nothing here imports torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, get_args

from motte.errors import SettingError
from motte.limits import MAX_RELEASE
from motte.offload.settings import (
    DEFAULT_DECOMPOSITION,
    DEFAULT_ITERATIONS,
    Asymmetric,
    Decomposition,
    Gaussian,
    Integrity,
    LowRank,
    Rank,
    Residual,
    ResidualDtype,
    Schedule,
    Scheme,
)
from motte.offload.words import NOISE_FORM

if TYPE_CHECKING:
    from motte.seal.keys import RecipientPrivateKey, RecipientPublicKey, SignerPrivateKey, SignerPublicKey
    from motte.train.admission import BrokerRun
    from motte.train.attested_star import AttestedCollectives
    from motte.train.meeting import Meeting

SchemeName = Literal["asymmetric", "trusted", "accelerator", "lowrank", "residual"]
SchedulerName = Literal["cos", "step"]
Dtype = Literal["fp32", "bf16"]
Evaluation = Literal["inside", "split"]
SCHEMES: Final[tuple[str, ...]] = get_args(SchemeName)
SPLIT_SCHEMES: Final = ("asymmetric", "lowrank", "residual")
"""Schemes that decompose activations."""
NOISY_SCHEMES: Final = ("asymmetric", "residual")
"""Schemes that demand a word about noise."""
MAX_SEED: Final = (1 << 63) - 1
_MAX_THREADS: Final = 4096
_DEVICE: Final = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


class Unset(Enum):
    """The value of a setting that has no default because none would be right."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET
PUBLISHED_RANK: Final = Schedule()


# --- the settings ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """One training run. What stays None is filled in by :mod:`motte.train.recipe`, per model and data set.

    Args:
        model: a name that :func:`motte.train.models.build_model` knows, or ``module.py:factory``.
        data: a name that :func:`motte.train.data.open_data` knows.
        scheme: what runs where. ``trusted``: everything inside. ``accelerator``: everything outside, nothing protected.
        width: multiplies the channels of the model.
        seed: of the initial weights, the order, the augmentation, dropout.
        data_dir, image_size: as ``open_data`` takes them.
        subset: only so many records of each split, chosen by the seed; for short runs.
        data_key, data_signer: open sealed data: our private key, and whose signature is demanded.
        data_min_release: refuse older sealed data.
        workers: threads that prepare batches ahead.
        batch_size, epochs, lr, scheduler, lr_decay, decay_period, momentum, weight_decay: the recipe.
        max_steps: end after so many optimizer steps in all, wherever the epoch is.
        input_noise: standard deviation of noise on normalised training images. Earlier work did this; **no privacy
            accounting counts it**.
        rank, iterations, noise, decomposition, residual_dtype, integrity, trusted_layers, offload_layers: as
            :class:`motte.offload.settings.Asymmetric` takes them. ``noise`` has no default where something may leave.
        evaluate: ``inside``: nothing of the test split leaves. ``split``: it is evaluated as it is trained, and every
            test record is released anew in every epoch; refused for private data.
        delta: of the epsilon that is reported. None: that of :mod:`motte.offload.accounting`.
        accelerator: address of one that runs already; None: a process of our own on ``device``. In a distributed run
            ``{rank}`` in it stands for the process.
        accelerator_pin: ``sha256:...`` of its public key, for TLS.
        device: of the accelerator.
        dtype: ``bf16`` = autocast. None: bf16 for ``trusted`` where the CPU has AMX, else fp32.
        threads: of the trusted process. None: all cores.
        memory_bytes: refuse before the start what does not fit.
        checkpoint_dir, checkpoint_every: where, and after how many steps beside the end of each epoch.
        checkpoint_key: opens checkpoints; they are sealed to it. None: ``data_key``.
        checkpoint_recipients: who else can open them.
        checkpoint_signer: signs them. None: a key derived from ``checkpoint_key``.
        insecure_plaintext_checkpoint: neither encrypted nor signed; refused for private data and where noise is used.
        resume: continue from ``checkpoint_dir``.
        min_release: refuse to continue from an older checkpoint.
        log_dir: of scalars by step. None: none are written.
        insecure_plaintext_log: not sealed even for private data.
        profile: the timeline of every layer too.
        record: a file of records (docs/spec/records.md) to which the results are added.
        insecure_plaintext_collectives: gradients between trusted processes may cross the host's network unencrypted.
        attested_collectives: or how the trusted processes meet over attested channels.
        broker: the key broker that gives the keys of sealed data and of checkpoints, against evidence, and counts what
            is released; then no key is given here. Everything that decides what may leave must be what the owner of the
            data signed (:mod:`motte.train.signed_terms`).
        meeting: how the processes that the owner of the data signed meet, each proving itself to process 0.

    Raises:
        SettingError: a value out of range, or two that contradict each other.
    """

    model: str
    data: str
    scheme: SchemeName = "asymmetric"
    width: float = 1.0
    seed: int = 0
    data_dir: Path | None = None
    image_size: int | None = None
    subset: int | None = None
    data_key: RecipientPrivateKey | None = field(default=None, repr=False)
    data_signer: SignerPublicKey | None = None
    data_min_release: int = 0
    workers: int = 0
    batch_size: int | None = None
    epochs: int | None = None
    lr: float | None = None
    scheduler: SchedulerName | None = None
    lr_decay: float | None = None
    decay_period: int | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    max_steps: int | None = None
    input_noise: float = 0.0
    rank: Rank = PUBLISHED_RANK
    iterations: int = DEFAULT_ITERATIONS
    noise: Gaussian | Unset | None = UNSET
    decomposition: Decomposition = DEFAULT_DECOMPOSITION
    residual_dtype: ResidualDtype = "same"
    integrity: Integrity = "freivalds"
    trusted_layers: tuple[str, ...] | None = None
    offload_layers: tuple[str, ...] | None = None
    evaluate: Evaluation = "inside"
    delta: float | None = None
    accelerator: str | None = None
    accelerator_pin: str | None = None
    device: str = "cpu"
    dtype: Dtype | None = None
    threads: int | None = None
    memory_bytes: int | None = None
    checkpoint_dir: Path | None = None
    checkpoint_every: int | None = None
    checkpoint_key: RecipientPrivateKey | None = field(default=None, repr=False)
    checkpoint_recipients: tuple[RecipientPublicKey, ...] = ()
    checkpoint_signer: SignerPrivateKey | None = field(default=None, repr=False)
    insecure_plaintext_checkpoint: bool = False
    resume: bool = False
    min_release: int = 0
    log_dir: Path | None = None
    insecure_plaintext_log: bool = False
    profile: bool = False
    record: Path | None = None
    insecure_plaintext_collectives: bool = False
    attested_collectives: AttestedCollectives | None = field(default=None, repr=False)
    broker: BrokerRun | None = field(default=None, repr=False)
    meeting: Meeting | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        _one_of("scheme", self.scheme, SCHEMES)
        _one_of("evaluate", self.evaluate, get_args(Evaluation))
        _check_numbers(self)
        _check_broker(self)
        _check_protection(self)
        _check_placement(self)
        _check_checkpoints(self)
        if self.profile and self.log_dir is None:
            raise SettingError("profile is written beside the log", where="profile", hint="give a log directory too")
        if self.profile and self.scheme != "asymmetric":
            raise SettingError("only split layers have a timeline", where="profile", got=f"scheme {self.scheme}")
        if self.private != (self.data_signer is not None):
            raise SettingError(
                "sealed data needs both the key that opens it and its signer", where="data_key, data_signer"
            )
        if self.data_min_release and not self.private:
            raise SettingError("only sealed data has a release", where="data_min_release")
        self.offload_scheme()

    @property
    def private(self) -> bool:
        """Whether the data is: the host must not see it."""
        return self.data_key is not None or self.broker is not None

    def offload_scheme(self) -> Scheme | None:
        """The scheme for :func:`motte.offload.protect.protect`; None where the model stays as it is."""
        if self.scheme == "lowrank":
            return LowRank(
                rank=self.rank,
                iterations=self.iterations,
                decomposition=self.decomposition,
                trusted_layers=self.trusted_layers,
            )
        if isinstance(self.noise, Unset):
            return None
        if self.scheme == "residual":
            return Residual(
                noise=self.noise,
                rank=self.rank,
                iterations=self.iterations,
                decomposition=self.decomposition,
                trusted_layers=self.trusted_layers,
            )
        if self.scheme == "asymmetric":
            return Asymmetric(
                noise=self.noise,
                rank=self.rank,
                iterations=self.iterations,
                decomposition=self.decomposition,
                residual_dtype=self.residual_dtype,
                trusted_layers=self.trusted_layers,
                offloaded_layers=self.offload_layers,
                integrity=self.integrity,
            )
        return None


def _check_numbers(settings: TrainSettings) -> None:
    _whole("seed", settings.seed, 0, MAX_SEED)
    _whole("workers", settings.workers, 0, 256)
    _whole("min_release", settings.min_release, 0, MAX_RELEASE)
    _whole("data_min_release", settings.data_min_release, 0, MAX_RELEASE)
    for name in ("image_size", "subset", "batch_size", "epochs", "decay_period", "max_steps", "memory_bytes"):
        _optional_whole(settings, name, 1 << 53)
    _optional_whole(settings, "checkpoint_every", 1 << 53)
    _optional_whole(settings, "threads", _MAX_THREADS)
    _fraction("width", settings.width, above=0.0, most=64.0)
    _fraction("input_noise", settings.input_noise, most=1e6)
    for name, most in (("lr", 1e6), ("weight_decay", 1e6)):
        value = getattr(settings, name)
        if value is not None:
            _fraction(name, value, most=most)
    for name in ("momentum", "lr_decay", "delta"):
        value = getattr(settings, name)
        if value is not None:
            _fraction(name, value, most=1.0)
    if settings.scheduler is not None:
        _one_of("scheduler", settings.scheduler, get_args(SchedulerName))
    if settings.scheduler == "cos" and (settings.lr_decay is not None or settings.decay_period is not None):
        raise SettingError("lr_decay and decay_period belong to the step scheduler", where="scheduler", got="cos")


def _check_protection(settings: TrainSettings) -> None:
    scheme = settings.scheme
    if scheme in NOISY_SCHEMES and isinstance(settings.noise, Unset):
        raise SettingError(
            f"the scheme {scheme} needs a word about noise",
            where="noise",
            expected=NOISE_FORM,
            hint="none hides nothing of what leaves; motte privacy says what a noise is worth",
        )
    if scheme not in NOISY_SCHEMES and not isinstance(settings.noise, Unset):
        raise SettingError("this scheme adds no noise", where="noise", got=f"scheme {scheme}")
    if scheme not in SPLIT_SCHEMES:
        _keep_default(settings, ("rank", "iterations", "decomposition", "trusted_layers"), "this scheme splits nothing")
    if scheme != "asymmetric":
        names = ("residual_dtype", "integrity", "offload_layers", "evaluate", "delta")
        _keep_default(settings, names, "only the scheme asymmetric takes it")

    if settings.evaluate == "split" and settings.private:
        raise SettingError(
            "private test records would be released anew in every epoch, which no accounting counts",
            where="evaluate",
            got="split",
        )


def _check_placement(settings: TrainSettings) -> None:
    if _DEVICE.fullmatch(settings.device) is None:
        raise SettingError("unknown device", where="device", expected="cpu, cuda or cuda:0", got=repr(settings.device))
    if settings.dtype is not None:
        _one_of("dtype", settings.dtype, get_args(Dtype))
    if settings.accelerator is not None and settings.scheme != "asymmetric":
        raise SettingError(
            "this scheme talks to no accelerator by address",
            where="accelerator",
            got=f"scheme {settings.scheme}",
            hint="the scheme accelerator computes in this process, on --device",
        )
    if settings.accelerator is not None and settings.device != "cpu":
        raise SettingError(
            "an accelerator that runs already has chosen its device", where="device", got=settings.device
        )
    if settings.accelerator_pin is not None and settings.accelerator is None:
        raise SettingError("a pin belongs to an address", where="accelerator_pin", hint="give the accelerator too")
    if settings.device != "cpu" and settings.scheme not in ("asymmetric", "accelerator"):
        raise SettingError("this scheme computes on the CPU", where="device", got=settings.device)


def _check_checkpoints(settings: TrainSettings) -> None:
    wants = (
        settings.checkpoint_every is not None
        or settings.checkpoint_key is not None
        or bool(settings.checkpoint_recipients)
        or settings.checkpoint_signer is not None
        or settings.insecure_plaintext_checkpoint
        or settings.resume
        or settings.min_release > 0
    )
    if wants and settings.checkpoint_dir is None:
        raise SettingError("checkpoints need a directory", where="checkpoint_dir")
    keyed = (
        settings.checkpoint_key is not None
        or bool(settings.checkpoint_recipients)
        or settings.checkpoint_signer is not None
    )
    if settings.insecure_plaintext_checkpoint and keyed:
        raise SettingError("a plaintext checkpoint takes no keys", where="insecure_plaintext_checkpoint")
    if settings.insecure_plaintext_checkpoint and settings.data_key is not None:
        raise SettingError(
            "private data is never written to a plaintext checkpoint", where="insecure_plaintext_checkpoint"
        )
    if settings.insecure_plaintext_checkpoint and isinstance(settings.noise, Gaussian):
        raise SettingError(
            "a plaintext checkpoint would hold the key of the noise, which takes the noise off what was released",
            where="insecure_plaintext_checkpoint",
            hint="motte keys new NAME --kind recipient, and seal checkpoints to it",
        )
    keyless = settings.checkpoint_key is None and not settings.private
    if settings.checkpoint_dir is not None and not settings.insecure_plaintext_checkpoint and keyless:
        raise SettingError(
            "checkpoints need a key, to which they are sealed",
            where="checkpoint_key",
            hint="motte keys new NAME --kind recipient makes one; for public data and without noise there is "
            "--insecure-plaintext-checkpoint",
        )


_BROKER_INSTEAD: Final = {
    "data_key": "the broker gives the keys of the data",
    "checkpoint_key": "the broker gives the keys of checkpoints",
    "checkpoint_recipients": "what the run writes is sealed to who can open the data, and to nobody whom a host names",
    "checkpoint_signer": "what the run writes is signed by a key that follows from the keys of the data",
    "min_release": "the broker says which checkpoint is the newest",
    "insecure_plaintext_checkpoint": "no host decides that private data lies open",
    "insecure_plaintext_log": "no host decides that private data lies open",
    "insecure_plaintext_collectives": "no host decides that private data lies open",
}
"""Settings that a run under a key broker does not take, and why."""


def _check_broker(settings: TrainSettings) -> None:
    if settings.meeting is not None and (settings.insecure_plaintext_collectives or settings.attested_collectives):
        raise SettingError("processes meet in one way", where="meeting", got="another one too")
    if settings.meeting is not None and not settings.private:
        raise SettingError("only sealed data names the processes of its runs", where="meeting", got=settings.data)
    if settings.broker is None:
        return
    for name, why in _BROKER_INSTEAD.items():
        if getattr(settings, name):
            raise SettingError(f"under a key broker {why}", where=name, hint="leave it out")
    if settings.attested_collectives is not None:
        raise SettingError("the processes are those that the owner of the data signed", where="attested_collectives")
    if not settings.data.startswith("sealed:"):
        raise SettingError(
            "a broker holds keys of sealed data", where="data", expected="sealed:FILE", got=settings.data
        )


def _keep_default(settings: TrainSettings, names: tuple[str, ...], why: str) -> None:
    defaults = {"rank": PUBLISHED_RANK, "iterations": DEFAULT_ITERATIONS, "decomposition": DEFAULT_DECOMPOSITION}
    defaults |= {"residual_dtype": "same", "integrity": "freivalds", "evaluate": "inside"}
    for name in names:
        if getattr(settings, name) != defaults.get(name):
            raise SettingError(why, where=name, got=f"scheme {settings.scheme}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise SettingError(f"unknown {name}", where=name, expected=" or ".join(allowed), got=repr(value)[:80])


def _whole(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise SettingError(f"{name} out of range", where=name, expected=f"{low} to {high}", got=repr(value)[:80])


def _optional_whole(settings: TrainSettings, name: str, high: int) -> None:
    value = getattr(settings, name)
    if value is not None:
        _whole(name, value, 1, high)


def _fraction(name: str, value: object, *, most: float, above: float = -1.0) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if number and isinstance(value, int | float) and 0.0 <= value <= most and value > above:
        return
    low = "0" if above < 0 else f"above {above:g}"
    raise SettingError(f"{name} out of range", where=name, expected=f"{low}, at most {most:g}", got=repr(value)[:80])
