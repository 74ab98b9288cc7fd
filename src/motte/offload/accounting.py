"""What a configuration promises to one record: every release counted, composed to one epsilon, and said in plain words.

Three rules decide the number. Every one errs on the safe side, and none is a choice of the caller's:

* **No subsampling.** Every sample of every batch leaves, so that which batch a record is in is no secret, and nothing
  is amplified. A record takes part once an epoch, however batches are drawn.
* **Whatever learnt from a record and is not privatised carries it on.** The split layers' weights follow from
  privatised updates and are free. Everything else that is trained inside, the first and the last layer, norms and every
  bias, learns from exact gradients: from the first step that a record takes part in, every later release of every
  other sample depends on it. Then all rows of all releases of the run count. Frozen, they carry nothing.
* **Samples that meet change together.** BatchNorm in training mode, or a rank found over the whole batch, lets one
  record change every row of its batch.

If one kind of release is not privatised there is no finite epsilon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

from motte.errors import SettingError
from motte.offload.accountant import GaussianReleases
from motte.offload.analytic import check_delta
from motte.offload.calibration import MAX_COUNT, Kind, multiplier_for, sensitivity
from motte.offload.settings import Adjacency, Gaussian, Mechanism
from motte.offload.statement import Accountant, KindStatement, PrivacyStatement, inference_words, stated, training_words

TrustedParameters = Literal["trained", "frozen"]
TRAINED: Final[tuple[Kind, ...]] = ("residual", "gradient", "update")
DELTA: Final = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A training configuration, as far as privacy goes.

    Args:
        records: of the private training set. How many there are is not protected.
        batch_size: samples of one forward pass (of one process). Each record is in at most one batch an epoch.
        epochs: how often every record is used.
        offloaded_layers: layers that run split; one that is called k times in a forward pass counts k times.
        noise: None: nothing is privatised.
        coupled_samples: samples of a batch that one record's activation can change: the batch size with BatchNorm in
            training mode or a rank that is found per batch (``Energy``, ``Entropy``), else 1.
        trusted_parameters: ``trained``: anything but the weights of split layers learns from private data inside;
            ``frozen``: nothing else learns, no bias either.
        delta: below one over the number of records.

    Raises:
        SettingError: a value out of range.
    """

    records: int
    batch_size: int
    epochs: int
    offloaded_layers: int
    noise: Gaussian | None
    coupled_samples: int = 1
    trusted_parameters: TrustedParameters = "trained"
    delta: float = DELTA

    def __post_init__(self) -> None:
        for name in ("records", "batch_size", "epochs", "offloaded_layers", "coupled_samples"):
            _count(name, getattr(self, name))
        if self.coupled_samples > self.batch_size:
            bound = f"at most the batch size, {self.batch_size}"
            raise SettingError("more samples are coupled than there are", expected=bound, got=str(self.coupled_samples))
        if self.trusted_parameters not in ("trained", "frozen"):
            raise SettingError("unknown value", where="trusted_parameters", expected="trained or frozen")
        check_delta(self.delta)

    @property
    def steps(self) -> int:
        """Forward passes of the whole run; the last, shorter batch of an epoch counts."""
        return self.epochs * self._epoch_steps

    def statement(self, *, accountant: Accountant = "dp-accounting") -> PrivacyStatement:
        """For the whole run.

        Raises:
            ResourceError: dp-accounting is not installed.
        """
        return self.so_far(self.steps, accountant=accountant)

    def so_far(
        self, steps: int, *, repeated: Mapping[Kind, int] | None = None, accountant: Accountant = "closed-form"
    ) -> PrivacyStatement:
        """For the first ``steps`` forward passes.

        Args:
            steps: that released anything; a step that failed counts.
            repeated: releases by kind beyond one a layer and step: steps that were run again and sent other bytes.
            accountant: ``closed-form`` needs no package, ``dp-accounting`` bounds it from above.

        Raises:
            SettingError: negative counts.
            ResourceError: dp-accounting is asked for and not installed.
        """
        extra: dict[Kind, int] = {kind: (repeated or {}).get(kind, 0) for kind in TRAINED}
        for name, value in (("steps", steps), *extra.items()):
            _count(name, value, low=0)
        noise = self.noise
        mechanisms: dict[Kind, Mechanism | None] = {
            "residual": None if noise is None else noise.residual,
            "gradient": None if noise is None else noise.gradient,
            "update": None if noise is None else noise.update,
        }
        uses = steps if self.trusted_parameters == "trained" else -(-steps // self._epoch_steps)
        samples = self.batch_size if self.trusted_parameters == "trained" else self.coupled_samples
        kinds = tuple(
            KindStatement(
                kind,
                mechanism,
                self.offloaded_layers * steps + extra[kind],
                self.offloaded_layers * uses + extra[kind],
                samples,
                sensitivity(kind, self._adjacency, samples=samples),
            )
            for kind, mechanism in mechanisms.items()
        )
        alone = replace(
            kinds[0],
            per_record=self.offloaded_layers * -(-steps // self._epoch_steps) + extra["residual"],
            sensitivity=sensitivity("residual", self._adjacency, samples=self.coupled_samples),
        )
        words = training_words(
            self._adjacency,
            records=self.records,
            uses=-(-steps // self._epoch_steps),
            steps=steps,
            trained=self.trusted_parameters == "trained",
            coupled=self.coupled_samples > 1,
            delta=self.delta,
        )
        return stated("training", self._adjacency, self.delta, kinds, alone, accountant, words)

    def calibrated(self, epsilon: float) -> TrainingRun:
        """The same run with the one noise multiplier that keeps the whole to ``epsilon``.

        Raises:
            SettingError: a kind of release has no clip, so that no noise is enough.
            ResourceError: dp-accounting is not installed.
        """
        noise = self.noise
        if noise is None or not noise.covers_training:
            hint = "give clips for residuals, output gradients and updates"
            raise SettingError("no noise gives a finite epsilon while a kind of release is not clipped", hint=hint)
        kinds = self.so_far(self.steps).kinds
        return replace(self, noise=_with_multiplier(noise, _calibrated(epsilon, self.delta, kinds)))

    @property
    def _epoch_steps(self) -> int:
        return -(-self.records // self.batch_size)

    @property
    def _adjacency(self) -> Adjacency:
        return "replace" if self.noise is None else self.noise.adjacency


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceRun:
    """Inference with public weights: only residuals leave.

    Args:
        queries: how often the same record is asked about. Every query is a release of each split layer.
        offloaded_layers: layers that run split; one that is called k times in a forward pass counts k times.
        noise: None: nothing is privatised. Gradients and updates do not occur.
        coupled_samples: samples of a batch that one record can change: more than 1 only where the rank is found per
            batch (BatchNorm does not couple in eval mode).
        delta: of epsilon.

    Raises:
        SettingError: a value out of range.
    """

    queries: int
    offloaded_layers: int
    noise: Gaussian | None
    coupled_samples: int = 1
    delta: float = DELTA

    def __post_init__(self) -> None:
        for name in ("queries", "offloaded_layers", "coupled_samples"):
            _count(name, getattr(self, name))
        check_delta(self.delta)

    def statement(self, *, accountant: Accountant = "dp-accounting") -> PrivacyStatement:
        """For all queries about one record.

        Raises:
            ResourceError: dp-accounting is not installed.
        """
        adjacency: Adjacency = "replace" if self.noise is None else self.noise.adjacency
        count = self.queries * self.offloaded_layers
        moved = sensitivity("residual", adjacency, samples=self.coupled_samples)
        mechanism = None if self.noise is None else self.noise.residual
        kind = KindStatement("residual", mechanism, count, count, self.coupled_samples, moved)
        words = inference_words(adjacency, queries=self.queries, delta=self.delta)
        return stated("inference", adjacency, self.delta, (kind,), kind, accountant, words)

    def calibrated(self, epsilon: float) -> InferenceRun:
        """The same with the noise multiplier that keeps all queries to ``epsilon``.

        Raises:
            SettingError: no clip is given.
            ResourceError: dp-accounting is not installed.
        """
        if self.noise is None:
            raise SettingError("no noise gives a finite epsilon while residuals are not clipped")
        kinds = self.statement(accountant="closed-form").kinds
        return replace(self, noise=_with_multiplier(self.noise, _calibrated(epsilon, self.delta, kinds)))


def _calibrated(epsilon: float, delta: float, kinds: Sequence[KindStatement]) -> float:
    def planned(multiplier: float) -> list[GaussianReleases]:
        return [GaussianReleases(multiplier, each.sensitivity, each.per_record) for each in kinds]

    return multiplier_for(epsilon, delta, planned)


def _with_multiplier(noise: Gaussian, multiplier: float) -> Gaussian:
    def again(mechanism: Mechanism | None) -> Mechanism | None:
        return None if mechanism is None else Mechanism(mechanism.clip, multiplier)

    residual = Mechanism(noise.residual.clip, multiplier)
    return replace(noise, residual=residual, gradient=again(noise.gradient), update=again(noise.update))


def _count(name: str, value: object, *, low: int = 1) -> None:
    if type(value) is not int or not low <= value <= MAX_COUNT:
        raise SettingError("out of range", where=name, expected=f"a whole number of at least {low}", got=repr(value))
