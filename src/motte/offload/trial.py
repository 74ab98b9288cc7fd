"""A measured trial of both sides, layer by layer, from which ``--offload auto`` makes a placement. The owner's only.

Every layer is timed on the activations that it meets in a real forward pass of the example, all ways interleaved in
each round (:mod:`motte.measure.compare`), with the rank that it would have. Under a schedule that rank depends on which
layers before it are split: so layers that are not chosen drop out, the ranks of those behind them fall, and what is
left is measured again, until nothing changes. A layer that dropped out does not come back, so that this ends.

A trial sends residuals of the example to the accelerator. Give it an example that nobody minds: the zoo's are noise.
A running enclave never comes here: its host steers the clock. A test holds who may import this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn import functional

from motte.accelerator.interface import Accelerator, Gradients
from motte.errors import SettingError
from motte.linear import compute
from motte.linear.operation import LinearOperation
from motte.measure.compare import compare
from motte.offload import integrity, lowrank
from motte.offload.decide import Budget, LayerTimes, Measured, Phase, place_auto
from motte.offload.decompose import Principal, decompose, energy_shares, residual
from motte.offload.layers import LinearLayer, Trace, operator_shape, padding_of, trace
from motte.offload.noise import Noise
from motte.offload.placement import Placed, Placement, most_rank, place_all, planned_rank
from motte.offload.settings import Asymmetric, Mechanism

_WIRE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial found. ``measured`` holds every layer at the last rank at which it was tried, ``ranks`` that rank
    (for rules that look at the activation: the most that they give)."""

    placement: Placement
    measured: Mapping[str, Measured]
    ranks: Mapping[str, int]
    budget: Budget
    training: bool
    rounds: int


def run_trial(
    model: nn.Module,
    arguments: Sequence[Tensor],
    scheme: Asymmetric,
    accelerator: Accelerator,
    budget: Budget,
    *,
    keywords: Mapping[str, Tensor] | None = None,
    training: bool = False,
    warmup: int = 1,
    repeats: int = 7,
    on_layer: Callable[[str], None] | None = None,
    seen: Trace | None = None,
) -> Trial:
    """Measure and decide.

    Args:
        arguments, keywords: one call of ``model``, with the batch that counts.
        accelerator: where the heavy part would run. It sees residuals of these arguments.
        training: measure the backward pass too.
        repeats: counted rounds per layer, at least 5.
        on_layer: called with a layer's name before it is measured.
        seen: a trace of this call, if there is one already.

    Raises:
        IntegrityError: the accelerator's answer is wrong. LinkError, FrameError: it does not answer properly.
        UnsupportedError: the model does not run on shapes alone.
    """
    seen = trace(model, tuple(arguments), keywords) if seen is None else seen
    bench = _Bench(scheme, accelerator, training=training, warmup=warmup, repeats=repeats)
    cache: dict[tuple[str, int], Measured] = {}

    def measure(wanted: Mapping[str, int]) -> Mapping[str, Measured]:
        ranks = _ranks(seen, scheme, wanted)
        new = {name: place for name, place in wanted.items() if (name, ranks[name]) not in cache}
        for name, found in _measured(model, arguments, keywords or {}, seen, new, bench, on_layer).items():
            cache[name, ranks[name]] = found
        return {name: cache[name, ranks[name]] for name in wanted}

    placement, measured, rounds = settle(place_all(seen.layers, scheme), measure, budget)
    places = {name: place for name, (_, place) in measured.items()}
    return Trial(
        placement,
        {name: found for name, (found, _) in measured.items()},
        _ranks(seen, scheme, places),
        budget,
        training,
        rounds,
    )


def settle(
    base: Placement, measure: Callable[[Mapping[str, int]], Mapping[str, Measured]], budget: Budget
) -> tuple[Placement, Mapping[str, tuple[Measured, int]], int]:
    """Decide, drop what was not chosen, measure the rest at its new position, until nothing drops.

    Args:
        measure: from names with their positions to what was measured there.

    Returns:
        the placement, what was last measured of each layer with its position then, and the number of rounds.
    """
    found: dict[str, tuple[Measured, int]] = {}
    rounds = 0
    while True:
        rounds += 1
        positions = {name: index for index, name in enumerate(base.split)}
        latest = measure(positions)
        found.update({name: (latest[name], positions[name]) for name in positions})
        placement = place_auto(base, latest, budget)
        if placement.split == base.split:
            return placement, found, rounds
        base = Placement(tuple(Placed(each.name, each.side, each.reason) for each in placement.layers))


def _ranks(seen: Trace, scheme: Asymmetric, positions: Mapping[str, int]) -> dict[str, int]:
    return {name: max(_layer_ranks(seen[name], scheme, position)) for name, position in positions.items()}


def _layer_ranks(layer: LinearLayer, scheme: Asymmetric, position: int) -> list[int]:
    if layer.operation is None:
        return [0]
    return [planned_rank(scheme.rank, position, most_rank(layer.operation, shape)) for shape in layer.shapes]


# --- activations ----------------------------------------------------------------------------------------------------
def _measured(
    model: nn.Module,
    arguments: Sequence[Tensor],
    keywords: Mapping[str, Tensor],
    seen: Trace,
    positions: Mapping[str, int],
    bench: _Bench,
    on_layer: Callable[[str], None] | None,
) -> dict[str, Measured]:
    """Measure the layers of ``positions``, each while the model's forward pass stands before it."""
    calls: dict[str, list[Measured]] = {}

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if on_layer is not None and name not in calls:
                on_layer(name)
            found = bench.measure(seen[name], positions[name], module, given[0].detach())
            calls.setdefault(name, []).append(found)

        return hook

    if not positions:
        return {}
    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(hook_for(name)) for name in positions]
    modes = {module: module.training for module in model.modules()}
    try:
        # In eval mode, so that a trial changes no running statistic.
        model.eval()
        with torch.no_grad():
            model(*arguments, **keywords)
    finally:
        for module, mode in modes.items():
            module.training = mode
        for each in hooks:
            each.remove()
    missing = sorted(set(positions) - set(calls))
    if missing:
        raise SettingError("a layer did not run on the example", got=", ".join(missing)[:400])
    return {name: _sum(found) for name, found in calls.items()}


def _sum(calls: Sequence[Measured]) -> Measured:
    forward = _sum_phases([call.times.forward for call in calls])
    backward = [call.times.backward for call in calls if call.times.backward is not None]
    return Measured(
        LayerTimes(forward, _sum_phases(backward) if backward else None),
        bytes_out=sum(call.bytes_out for call in calls),
        energy=sum(call.energy for call in calls) / len(calls),
    )


def _sum_phases(phases: Sequence[Phase]) -> Phase:
    return Phase(**{each.name: sum(getattr(phase, each.name) for phase in phases) for each in fields(Phase)})


# --- one layer ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _Given:
    """What one measurement works on; ``sent`` is what leaves of ``x``."""

    layer: LinearLayer
    operation: LinearOperation
    x: Tensor
    weight: Tensor
    principal: Principal
    rest: Tensor
    sent: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape)


class _Bench:
    """Times one layer in all its ways."""

    def __init__(
        self, scheme: Asymmetric, accelerator: Accelerator, *, training: bool, warmup: int, repeats: int
    ) -> None:
        self._scheme = scheme
        self._accelerator = accelerator
        self._training = training
        self._warmup = warmup
        self._repeats = repeats
        self._noise = Noise.fresh()
        self._steps = count(1)

    def measure(self, layer: LinearLayer, position: int, module: nn.Module, x: Tensor) -> Measured:
        """Both passes of ``layer`` on the activation ``x``."""
        operation, weight = layer.operation, module.weight
        if operation is None or not isinstance(weight, Tensor):
            raise SettingError("this layer cannot run split", where=layer.name)
        if operator_shape(module, tuple(x.shape)) != tuple(x.shape):
            x = functional.pad(x, *padding_of(module))
        x = x.contiguous()
        given = self._given(layer, operation, position, x, weight.detach())
        forward, answer = self._forward(given, position)
        backward, gradient_bytes = None, 0
        if self._training:
            backward, gradient_bytes = self._backward(given, answer)
        shares = energy_shares(self._matrix(operation, x), given.principal, given.rest)
        energy = float(shares.residual.mean()) if x.shape[0] else 0.0
        return Measured(LayerTimes(forward, backward), given.sent.nbytes + gradient_bytes, min(1.0, energy))

    def _given(
        self, layer: LinearLayer, operation: LinearOperation, position: int, x: Tensor, weight: Tensor
    ) -> _Given:
        matrix = self._matrix(operation, x)
        principal = self._decompose(matrix, position)
        rest = residual(matrix, principal)
        noise = self._scheme.noise
        sent = self._wire(self._privatised(rest, noise.residual if noise else None, layer.name).reshape(x.shape))
        self._accelerator.register(layer.name, operation)
        self._accelerator.put_weight(layer.name, weight)
        return _Given(layer, operation, x, weight, principal, rest, sent)

    def _forward(self, given: _Given, position: int) -> tuple[Phase, Tensor]:
        scheme, operation, weight, sent = self._scheme, given.operation, given.weight, given.sent
        matrix = self._matrix(operation, given.x)
        main = lowrank.forward(operation, given.principal, given.shape, weight)
        answer = self._accelerator.forward(given.layer.name, sent, step=next(self._steps), hold=False).result()
        merged = torch.empty_like(main)
        half = answer.to(main.dtype)
        ways: dict[str, Callable[[], object]] = {
            "whole": lambda: compute.forward(operation, given.x, weight),
            "low_rank": lambda: lowrank.forward(operation, given.principal, given.shape, weight),
            "outside": lambda: self._accelerator.forward(
                given.layer.name, sent, step=next(self._steps), hold=False
            ).result(),
            "decomposition": lambda: residual(matrix, self._decompose(matrix, position)),
            "merge": lambda: torch.add(main, half, out=merged),
        }
        if scheme.noise is not None or scheme.residual_dtype != "same":
            mechanism = None if scheme.noise is None else scheme.noise.residual
            ways["noise"] = lambda: self._wire(self._privatised(given.rest, mechanism, given.layer.name))
        if scheme.integrity == "freivalds":
            ways["check"] = lambda: integrity.check_forward(
                operation, sent, weight, answer, vectors=scheme.integrity_vectors, where=given.layer.name
            )
        return self._phase(given, ways), answer

    def _backward(self, given: _Given, answer: Tensor) -> tuple[Phase | None, int]:
        layer, operation, weight = given.layer, given.operation, given.weight
        need = {"need_input": layer.input_gradient, "need_weight": layer.weight_gradient}
        if not any(need.values()):
            return None, 0
        noise = self._scheme.noise
        clean = torch.randn(answer.shape, generator=torch.Generator().manual_seed(0)).to(given.x.dtype)
        sent = self._privatised(clean, noise.gradient if noise else None, layer.name)
        self._accelerator.forward(given.layer.name, given.sent, step=next(self._steps), hold=True).result()
        held = self._accelerator.last_held()

        def outside() -> Gradients:
            pending = self._accelerator.backward(given.layer.name, held, sent, step=next(self._steps), **need)
            return pending.result()

        def whole() -> None:
            if layer.input_gradient:
                compute.input_gradient(operation, given.shape, weight, clean)
            if layer.weight_gradient:
                compute.weight_gradient(operation, given.x, clean)

        gradients = outside()
        clip = noise.update.clip if noise and noise.update else None

        def low_rank() -> Tensor:
            return lowrank.weight_gradient(operation, given.principal, given.shape, clean, clip=clip)

        ways: dict[str, Callable[[], object]] = {"whole": whole, "outside": outside}
        if gradients.weight is not None:
            main, half = low_rank(), gradients.weight
            ways["low_rank"] = low_rank
            ways["merge"] = lambda: (main.to(half.dtype) + half).to(weight.dtype)
        if noise is not None and (noise.gradient or noise.update):
            ways["noise"] = self._noise_backward(given, clean, low_rank() if noise.update else None)
        if self._scheme.integrity == "freivalds":
            ways["check"] = lambda: self._check_backward(given, sent, gradients)
        try:
            return self._phase(given, ways), sent.nbytes
        finally:
            self._accelerator.release([held])

    def _noise_backward(self, given: _Given, clean: Tensor, update: Tensor | None) -> Callable[[], None]:
        noise = self._scheme.noise

        def both() -> None:
            if noise is not None and noise.gradient is not None:
                self._privatised(clean, noise.gradient, given.layer.name)
            if noise is not None and update is not None:
                self._privatised(update, noise.update, given.layer.name, per_sample=False)

        return both

    def _check_backward(self, given: _Given, sent: Tensor, gradients: Gradients) -> None:
        vectors, where = self._scheme.integrity_vectors, given.layer.name
        if gradients.input is not None:
            integrity.check_input_gradient(
                given.operation, given.shape, given.weight, sent, gradients.input, vectors=vectors, where=where
            )
        if gradients.weight is not None:
            integrity.check_weight_gradient(
                given.operation, given.sent, sent, gradients.weight, vectors=vectors, where=where
            )

    def _phase(self, given: _Given, ways: Mapping[str, Callable[[], object]]) -> Phase:
        before = self._claimed(given.layer.name)
        found = compare(ways, baseline="whole", warmup=self._warmup, repeats=self._repeats, resamples=1000)
        median = {name: found[name].median for name in ways}
        claimed = (self._claimed(given.layer.name) - before) / (self._warmup + self._repeats)
        # What the accelerator says of itself only divides the figure; their sum is what was measured here.
        accelerator = min(max(claimed, 0.0), median["outside"])
        return Phase(
            whole=median["whole"],
            low_rank=median.get("low_rank", 0.0),
            transfer=median["outside"] - accelerator,
            accelerator=accelerator,
            **{name: median.get(name, 0.0) for name in ("decomposition", "noise", "check", "merge")},
        )

    def _claimed(self, layer: str) -> float:
        return self._accelerator.stats()[layer].compute_s

    # --- small things ---------------------------------------------------------------------------------------------
    def _decompose(self, matrix: Tensor, position: int) -> Principal:
        scheme = self._scheme
        return decompose(
            matrix, scheme.rank, position=position, iterations=scheme.iterations, method=scheme.decomposition
        )

    def _privatised(self, clean: Tensor, mechanism: Mechanism | None, layer: str, *, per_sample: bool = True) -> Tensor:
        if mechanism is None:
            return clean
        return self._noise.privatise(
            clean, mechanism, layer=layer, kind="residual", step=next(self._steps), per_sample=per_sample
        ).tensor

    def _wire(self, sent: Tensor) -> Tensor:
        return sent if self._scheme.residual_dtype == "same" else sent.to(_WIRE[self._scheme.residual_dtype])

    @staticmethod
    def _matrix(operation: LinearOperation, x: Tensor) -> Tensor:
        return x.flatten(1, -2) if operation.family == "linear" else x.flatten(2)
