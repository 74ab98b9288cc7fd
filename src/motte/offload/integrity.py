"""Checks of every product that an accelerator gives back, after Freivalds: compare random projections of both sides.

An operator is linear in its weights, so r . y at one position is the same operator with weights r . W: one output
channel in place of M. The coefficients r are drawn from the operating system after the answer was copied in, and every
position of every sample is compared, so nothing can be hidden in a part that was not looked at.

**Soundness.** r is uniform on (-1, 1) per channel. By Ball's theorem (Cube slicing in R^n, 1986) r . e has a density of
at most sqrt(2) / (2 |e|) for an error e over the channels of one position, so |r . e| <= t happens with probability at
most sqrt(2) t / |e|, whatever e; the grid of r adds sqrt(2) 2^-23 sqrt(channels). With k independent vectors it is
the k-th power of that. :func:`detectable` turns it round: the L2 norm of e above which a lie passes with probability
at most :func:`escape_probability`. It is the bound for the worst direction of e at one position alone: a lie that
touches many positions in different directions has to escape at each. Where a group has no more channels than there are
vectors, the product is computed again and compared value by value: nothing above :func:`detectable` passes at all.

**Tolerance.** u is the unit roundoff of what is summed in, K the number of products in a sum, P_m = |x w_m| (2-norm of
the products) for output channel m, P = |P_m|_2 over the channels of a group, Y = |y|_2 likewise:

    limit = 2 s u L (P + Y) + [bfloat16: 5 s 2^-8 Y] + floor,     L = min(K, 80 sqrt(K)) + 2 sqrt(channels)

with s = 3^-1/2, the standard deviation of a coefficient. Why: rounding errors d_m of an honest answer do not depend on
r, so |r . d| <= z s |d|_2 but with probability 2 exp(-z^2 / 2) (a uniform coefficient is as sub-Gaussian as its
variance says). If roundings in a sum act as independent (Higham & Mary 2019), |d_m| is at most some sqrt(K) u times the
largest partial sum, which is at most sum|x w| <= sqrt(K) P_m: |d|_2 <= K u P for data of any kind, partial sums that
cancel in the end included. Roundings that do not act so (thousands of equal products in one chain) stay below K u Y / 2
(by the worst case of each addition).
Measured as |d|_2 / (u (P + Y)): at most 10 for random data with K = 4608, 186 for the worst planted data on torch's
kernels (one half of the channels against the other), 0.31 K for them in one float32 chain. The limit allows 2 L / z,
which is 0.31 K at z = 6.4 and 10 at z = 900. Beyond K = 6400 (weight gradients, summed over batch and positions) no
kernel keeps one chain of coherent products, hence the square root. P is the largest of the sample for convolutions,
since Winograd and FFT kernels spread errors over a tile, and of the token for linear layers. The bfloat16 term is the
rounding of the answer: at most 2^-8 Y, 0.42 of that on average over mantissas, so 5 s is 12 standard deviations.
``floor``: products below the smallest normal number may be flushed.

A check costs vectors / M of the product in multiply-adds, two passes over the data and two over the answer; nothing big
is copied whole. The passes are what takes time. Measured on one busy core of a Xeon at 2.5 GHz, float32, 3x3, two
vectors, ms of processor time (product: check of output, gradient to the input, to the weight): batch 4, 64 channels at
112 px 55: 19, 19, 23; 256 at 28 px 32: 7, 7, 8; 512 at 14 px 31: 8, 8, 9; batch 128, 16 channels at 28 px 7: 14, 14,
15. The last shows the limit: with few channels a check does not cost less than what it checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from motte.errors import InputError, IntegrityError
from motte.linear.operation import LinearOperation
from motte.offload.arithmetic import as_written, computing_dtype, known_dtype
from motte.offload.projection import (
    GRID,
    SPREAD,
    ChannelWeights,
    Geometry,
    Room,
    draw,
    energies,
    few_channels,
    fourth_powers,
    mix,
    spread_maps,
)

ESCAPE: Final = 1 / 16
"""Probability, per vector, that an error of the stated magnitude passes."""
_ACCUMULATION: Final = 2.0
_CHAIN: Final = 80.0
_ROUNDING: Final = 5.0
_PIECE: Final = 1 << 20
"""Values of data and answer that are looked at together: few enough for the cache to help."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """For projections of one answer, at every (sample, group, position) or (group, channel, kernel offset), float64."""

    limit: Tensor
    """Largest deviation that is let pass."""
    own: Tensor
    """Of that, what the rounding of the check itself and of the accelerator's sums may each take."""
    spread: float
    """Standard deviation of the coefficients; 1 where values are compared one by one."""


def escape_probability(vectors: int) -> float:
    """Probability that a lie of the magnitude of :func:`detectable` passes: 1/16 per vector."""
    return ESCAPE**vectors


def detectable(tolerance: Tolerance, channels: int) -> Tensor:
    """L2 norm, over the ``channels`` of one group at one position, from which an error of the answer passes with
    probability at most :func:`escape_probability`.

    ``tolerance`` is that of the answer as it came, so it holds for whatever answer was chosen.
    """
    seen = tolerance.limit + tolerance.own
    if tolerance.spread == 1:
        return seen
    return math.sqrt(2) * seen / (ESCAPE - math.sqrt(2 * channels) * GRID)


@as_written
def check_forward(
    operation: LinearOperation,
    x: Tensor,
    weight: Tensor | WeightSide,
    y: Tensor,
    *,
    vectors: int,
    where: str,
) -> None:
    """Check that y is the operator's output for x.

    Args:
        x: what was sent, (N, C, *spatial) or (N, *, C); bfloat16 means that the accelerator multiplies in bfloat16.
        weight: as sent; it is rounded to x's dtype, as the accelerator does. Or its :func:`weight_side` for x's dtype.
        y: **unverified**, copied in, not changed by anyone any more; float32 or float64.
        vectors: random vectors, 1 or more. where: layer and step, for the message.

    Raises:
        IntegrityError: it is not, or it is not finite, or magnitudes are too large for any bound.
    """
    side = weight if isinstance(weight, WeightSide) else _forward_side(operation, weight, x.dtype)
    _run(_forward(operation, x, side, y), vectors, where)


@as_written
def weight_side(operation: LinearOperation, weight: Tensor, sent: torch.dtype) -> WeightSide:
    """What :func:`check_forward` needs of the weight alone, for inputs that are sent as ``sent``. For a weight that
    stays the same: it may hold the weight itself, which is **not to be changed** while this is used."""
    return _forward_side(operation, weight, sent)


@as_written
def check_input_gradient(
    operation: LinearOperation,
    shape: Sequence[int],
    weight: Tensor,
    gradient: Tensor,
    answer: Tensor,
    *,
    vectors: int,
    where: str,
) -> None:
    """Check that ``answer`` is the gradient to an input of ``shape`` for the output's gradient that was sent.

    Raises:
        IntegrityError: as for :func:`check_forward`.
    """
    _run(_input_gradient(operation, shape, weight, gradient, answer), vectors, where)


@as_written
def check_weight_gradient(
    operation: LinearOperation, x: Tensor, gradient: Tensor, answer: Tensor, *, vectors: int, where: str
) -> None:
    """Check that ``answer`` is the weight's gradient, summed over the batch, for the x and gradient that were sent.

    Projected over the channels of the side that makes it cheaper; x is rounded to the gradient's dtype, as there.

    Raises:
        IntegrityError: as for :func:`check_forward`.
    """
    product = _weight_gradient(operation, x, gradient, answer, vectors)
    groups, mixed, others, offsets = product.answer.shape
    r = _coefficients(vectors, mixed, product.answer)
    theirs = mix(r, product.answer.reshape(1, groups, mixed, others * offsets)).view(groups, -1, others, offsets)
    ours, tolerance = product.sums(r, vectors)
    _judge(ours.sub_(theirs).abs_().amax(1), tolerance, "gradient to the weight", where, _in_weight)


@as_written
def forward_tolerance(operation: LinearOperation, x: Tensor, weight: Tensor, y: Tensor, *, vectors: int) -> Tolerance:
    """What :func:`check_forward` tolerates: (N, groups, positions); (1, 1, tokens) for a linear layer."""
    return _forward(operation, x, _forward_side(operation, weight, x.dtype), y).tolerance(vectors)


@as_written
def input_gradient_tolerance(
    operation: LinearOperation,
    shape: Sequence[int],
    weight: Tensor,
    gradient: Tensor,
    answer: Tensor,
    *,
    vectors: int,
) -> Tolerance:
    """What :func:`check_input_gradient` tolerates: (N, groups, positions); (1, 1, tokens) for a linear layer."""
    return _input_gradient(operation, shape, weight, gradient, answer).tolerance(vectors)


@as_written
def weight_gradient_tolerance(
    operation: LinearOperation, x: Tensor, gradient: Tensor, answer: Tensor, *, vectors: int
) -> tuple[Tolerance, str]:
    """What :func:`check_weight_gradient` tolerates, (groups, channels of the other side, kernel offsets), and the side
    whose channels an error is projected over: ``input`` or ``output``."""
    product = _weight_gradient(operation, x, gradient, answer, vectors)
    return product.sums(None, vectors)[1], product.side


# --- costs ------------------------------------------------------------------------------------------------------------
def check_forward_multiply_adds(operation: LinearOperation, shape: Sequence[int], vectors: int) -> int:
    """Multiply-adds of :func:`check_forward`; 3 for every value whose square is summed."""
    return _product_cost(operation, shape, vectors, forward=True)


def check_input_gradient_multiply_adds(operation: LinearOperation, shape: Sequence[int], vectors: int) -> int:
    """Multiply-adds of :func:`check_input_gradient` for an input of ``shape``."""
    return _product_cost(operation, shape, vectors, forward=False)


def check_weight_gradient_multiply_adds(operation: LinearOperation, shape: Sequence[int], vectors: int) -> int:
    """Multiply-adds of :func:`check_weight_gradient` for an input of ``shape``."""
    output = operation.output_shape(shape)
    inputs, outputs = _per_sample(operation, shape)
    channels = operation.in_channels // operation.groups, operation.out_channels // operation.groups
    side, cost = _cheaper_side(operation, inputs, outputs, vectors)
    few = min(vectors, channels[0] if side == "input" else channels[1])
    weights = math.prod(operation.weight_shape)
    return shape[0] * cost + 3 * (math.prod(shape) + math.prod(output)) + (few + 3) * weights


def _product_cost(operation: LinearOperation, shape: Sequence[int], vectors: int, *, forward: bool) -> int:
    output = operation.output_shape(shape)
    groups = operation.groups
    data, answer = (shape, output) if forward else (output, shape)
    channels = operation.out_channels if forward else operation.in_channels
    few, weights = min(vectors, channels // groups), math.prod(operation.weight_shape)
    inputs, outputs = _per_sample(operation, shape)
    # Per weight and position of the data: every kernel offset is multiplied there, used or not.
    each = few * groups * weights // channels * (inputs if forward else outputs)
    projection = few * math.prod(answer) if few < channels // groups else 0
    return shape[0] * each + projection + 3 * (math.prod(data) + math.prod(answer)) + (few + 3) * weights


def _per_sample(operation: LinearOperation, shape: Sequence[int]) -> tuple[int, int]:
    """Positions (or tokens) of one sample's input and output."""
    if operation.family == "linear":
        return math.prod(shape[1:-1]), math.prod(shape[1:-1])
    return math.prod(shape[2:]), math.prod(operation.output_shape(shape)[2:])


def _cheaper_side(operation: LinearOperation, inputs: int, outputs: int, vectors: int) -> tuple[str, int]:
    """Which side to project over in a weight gradient, and multiply-adds of one sample."""
    offsets = math.prod(operation.kernel)
    sides = (operation.in_channels, inputs), (operation.out_channels, outputs)
    costs = []
    for (mixed, mixed_at), (other, other_at) in (sides, sides[::-1]):
        few = min(vectors, mixed // operation.groups)
        costs.append(few * mixed * mixed_at + few * offsets * other * other_at)
    # Where they cost the same, the output's: its channels come first in the weight, whose passes are then contiguous.
    return ("input", costs[0]) if costs[0] < costs[1] else ("output", costs[1])


# --- forward and gradient to the input --------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class WeightSide:
    """What a check of a product with positions needs of its weight alone.

    Attributes:
        values: (G, P, D, offsets), in the computing dtype.
        sent: the dtype that it was rounded to first.
        magnitudes: (G, D): sum of squares over P, at the kernel offset where it is largest.
    """

    geometry: Geometry
    values: Tensor
    sent: torch.dtype
    magnitudes: ChannelWeights


@dataclass(frozen=True, slots=True)
class _Product:
    """A product whose answer has positions: the output, or the gradient to the input."""

    name: str
    side: WeightSide
    data: Tensor  # (N, G * D, *spatial), as sent; (1, D, tokens) for a linear layer
    answer: Tensor  # (N, G * P, *extents), unverified
    gathers: bool
    shape: tuple[int, ...]  # of the answer as it came, for messages
    linear: bool
    room: Room

    @property
    def weight(self) -> Tensor:
        """(G, P, D, offsets), in the computing dtype."""
        return self.side.values

    def pieces(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        for start, stop, axis in _ranges(self.data, self.answer, self.linear):
            data, answer = (each.narrow(axis, start, stop - start) for each in (self.data, self.answer))
            yield start, data.to(self.weight.dtype), answer.to(self.weight.dtype)

    def largest_products(self, data: Tensor) -> Tensor:
        """P of a piece."""
        groups, _, inner, offsets = self.weight.shape
        there = energies(data.reshape(len(data), groups, inner, -1), self.side.magnitudes, self.room).mul_(offsets)
        if not self.linear:
            there = there.amax(2, keepdim=True) if there.shape[2] else there.new_zeros(*there.shape[:2], 1)
        return there.sqrt()

    def tolerance_of(self, products: Tensor, answer: Tensor, spread: float) -> Tolerance:
        """``products``: :meth:`largest_products`."""
        groups, channels, inner, offsets = self.weight.shape
        given = energies(answer.reshape(len(answer), groups, channels, -1), room=self.room).sqrt_()
        rounds = self.data.dtype is torch.bfloat16
        return _tolerance(products, given, inner * offsets, channels, self.weight.dtype, spread, rounds)

    def tolerance(self, vectors: int) -> Tolerance:
        spread = _spread(vectors, self.weight.shape[1])
        each = [self.tolerance_of(self.largest_products(data), answer, spread) for _, data, answer in self.pieces()]
        if not each:
            nothing = torch.zeros(0, dtype=torch.float64)
            return Tolerance(nothing, nothing, spread)
        axis = 2 if self.linear else 0
        limits, owns = ([getattr(one, name) for one in each] for name in ("limit", "own"))
        return Tolerance(torch.cat(limits, axis), torch.cat(owns, axis), spread)


def _run(product: _Product, vectors: int, where: str) -> None:
    """Project both sides of ``product`` and compare."""
    groups, channels, _, _ = product.weight.shape
    # Drawn here, with the answer in hand.
    r, spread = _coefficients(vectors, channels, product.weight), _spread(vectors, channels)
    weight = _mixed_weight(r, product.weight)
    for start, data, answer in product.pieces():
        ours = few_channels(
            product.side.geometry, data, weight, answer.shape[2:], gathers=product.gathers, room=product.room
        )
        # All that reads the data, then all that reads the answer, so that the second pass over each finds it cached.
        products = product.largest_products(data)
        theirs = mix(r, answer.reshape(len(answer), groups, channels, -1))
        tolerance = product.tolerance_of(products, answer, spread)
        deviation = theirs.sub_(ours).abs_().amax(2).double()

        def place(n: int, _group: int, position: int, start: int = start) -> str:
            return _place(product.shape, product.linear, n, position, start)

        _judge(deviation, tolerance, product.name, where, place)


def _place(shape: Sequence[int], linear: bool, n: int, position: int, start: int) -> str:
    if linear:
        at = [int(each) for each in torch.unravel_index(torch.tensor(start + position), tuple(shape[:-1]))]
        return f"sample {at[0]}, token {tuple(at[1:])}"
    at = [int(each) for each in torch.unravel_index(torch.tensor(position), tuple(shape[2:]))]
    return f"sample {start + n}, position {tuple(at)}"


def _turned(weight: Tensor) -> bool:
    """Whether (G, P, D, offsets) is a view of (G, D, P, offsets); a copy would cost more than what is done with it."""
    return weight.stride(1) < weight.stride(2)


def _mixed_weight(r: Tensor, weight: Tensor) -> Tensor:
    """(few, P) and (G, P, D, offsets) -> (G, few, D, offsets)."""
    groups, channels, inner, offsets = weight.shape
    if _turned(weight):
        return mix(r, weight.transpose(1, 2)).transpose(1, 2)
    return mix(r, weight.reshape(1, groups, channels, inner * offsets)).view(groups, -1, inner, offsets)


def _forward_side(operation: LinearOperation, weight: Tensor, sent: torch.dtype) -> WeightSide:
    split = _split_weight(operation, weight, sent)
    # Channels of the answer before those of the data; a transposed convolution's weight has its input's first.
    return _side(operation, split.transpose(1, 2) if operation.family == "conv_transpose" else split, sent)


def _forward(operation: LinearOperation, x: Tensor, side: WeightSide, y: Tensor) -> _Product:
    _expect("output", y, operation.output_shape(x.shape))
    return _product("output", operation, x, side, y, gathers=operation.family != "conv_transpose")


def _input_gradient(
    operation: LinearOperation, shape: Sequence[int], weight: Tensor, gradient: Tensor, answer: Tensor
) -> _Product:
    _expect("gradient to the input", answer, shape)
    transposed = operation.family == "conv_transpose"
    split = _split_weight(operation, weight, gradient.dtype)
    side = _side(operation, split if transposed else split.transpose(1, 2), gradient.dtype)
    return _product("gradient to the input", operation, gradient, side, answer, gathers=transposed)


def _product(
    name: str, operation: LinearOperation, data: Tensor, side: WeightSide, answer: Tensor, *, gathers: bool
) -> _Product:
    known_dtype(data, "what was sent")
    if side.sent is not data.dtype:
        raise InputError("the weight was prepared for another dtype", expected=str(side.sent), got=str(data.dtype))
    linear = operation.family == "linear"
    shape = tuple(answer.shape)
    return _Product(name, side, _maps(data, linear), _maps(answer, linear), gathers, shape, linear, Room())


def _side(operation: LinearOperation, weight: Tensor, sent: torch.dtype) -> WeightSide:
    groups, channels, inner, offsets = weight.shape
    if offsets == 1:
        columns = energies(weight.squeeze(3).unsqueeze(0))
    elif _turned(weight):
        columns = energies(weight.transpose(1, 2).reshape(groups * inner, 1, channels, offsets))
    else:
        columns = energies(weight.reshape(1, groups, channels, inner * offsets))
    magnitudes = ChannelWeights.of(columns.view(groups, inner, offsets).amax(2))
    return WeightSide(Geometry.of(operation), weight, sent, magnitudes)


# --- gradient to the weight -------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class _WeightProduct:
    geometry: Geometry
    mixed: Tensor  # (N, G * A, *spatial): the side whose channels are projected
    other: Tensor  # (N, G * B, *extents)
    answer: Tensor  # (G, A, B, offsets), unverified
    gathers: bool
    linear: bool
    side: str
    dtype: torch.dtype  # of the gradient that was sent
    terms: int  # products in one sum

    def pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        groups, a, b, _ = self.answer.shape
        for start, stop, axis in _ranges(self.mixed, self.other, self.linear):
            sides = (each.narrow(axis, start, stop - start) for each in (self.mixed, self.other))
            # Through the dtype of the gradient: what the accelerator multiplied.
            mixed, other = (each.to(self.dtype).to(self.answer.dtype) for each in sides)
            yield mixed.unflatten(1, (groups, a)), other.unflatten(1, (groups, b))

    def sums(self, r: Tensor | None, vectors: int) -> tuple[Tensor, Tolerance]:
        """The gradient with its ``mixed`` channels projected on ``r``, (G, few, B, offsets) in float64, and what may be
        tolerated: P^2 = sum |a|^2 b^2 <= sqrt(sum |a|^4) sqrt(sum b^4), over all samples and positions."""
        groups, a, b, offsets = self.answer.shape
        few = 0 if r is None else len(r)
        ours = torch.zeros(groups, few * offsets, b, dtype=torch.float64)
        squares, fourths = torch.zeros(groups, dtype=torch.float64), torch.zeros(groups, b, dtype=torch.float64)
        room = Room()
        for mixed, other in self.pieces():
            flat, partner = mixed.flatten(3), other.flatten(3)
            squares += energies(flat, room=room).square_().sum((0, 2))
            fourths += fourth_powers(partner, room)
            if r is not None:
                moved = spread_maps(self.geometry, mix(r, flat), mixed.shape[3:], other.shape[3:], gathers=self.gathers)
                each = torch.bmm(moved.flatten(0, 1), partner.flatten(0, 1).mT)
                ours += each.view(-1, groups, few * offsets, b).sum(0, dtype=torch.float64)
        products = (squares.sqrt().unsqueeze(1) * fourths.sqrt()).sqrt().unsqueeze(2)
        given = energies(self.answer.reshape(1, groups, a, b * offsets), room=room).sqrt_().view(groups, b, offsets)
        spread = _spread(vectors, a)
        rounds = self.dtype is torch.bfloat16
        tolerance = _tolerance(products, given, self.terms, a, self.answer.dtype, spread, rounds)
        return ours.view(groups, few, offsets, b).transpose(2, 3), tolerance


def _weight_gradient(
    operation: LinearOperation, x: Tensor, gradient: Tensor, answer: Tensor, vectors: int
) -> _WeightProduct:
    _expect("gradient to the weight", answer, operation.weight_shape)
    known_dtype(x, "input")
    split = _split_weight(operation, answer, None)
    linear, transposed = operation.family == "linear", operation.family == "conv_transpose"
    inputs, outputs = _per_sample(operation, x.shape)
    side, _ = _cheaper_side(operation, inputs, outputs, vectors)
    data, there = _maps(x, linear), _maps(gradient, linear)
    mixed, other = (data, there) if side == "input" else (there, data)
    # ``split`` has the output's channels first, a transposed convolution's the input's.
    arranged = split if (side == "output") != transposed else split.transpose(1, 2)
    terms = x.shape[0] * (inputs if transposed else outputs)
    # The large map is the input, of a transposed convolution the output.
    gathers = (side == "input") != transposed
    dtype = computing_dtype(gradient.dtype)
    return _WeightProduct(
        Geometry.of(operation), mixed, other, arranged.to(dtype), gathers, linear, side, gradient.dtype, terms
    )


def _in_weight(group: int, channel: int, offset: int) -> str:
    return f"group {group}, channel {channel}, kernel offset {offset}"


# --- both -------------------------------------------------------------------------------------------------------------
def _coefficients(vectors: int, channels: int, like: Tensor) -> Tensor:
    """Random vectors, or every channel for itself where that is no more work."""
    if channels <= vectors:
        return torch.eye(channels, dtype=like.dtype)
    return draw(vectors, channels, like.dtype)


def _spread(vectors: int, channels: int) -> float:
    return 1.0 if channels <= vectors else SPREAD


def _tolerance(
    products: Tensor, given: Tensor, terms: int, channels: int, dtype: torch.dtype, spread: float, rounds: bool
) -> Tolerance:
    unit = torch.finfo(dtype).eps / 2
    length = min(float(terms), _CHAIN * math.sqrt(terms)) + 2 * math.sqrt(channels)
    floor = 4 * torch.finfo(dtype).tiny * (terms + 1) * channels
    own = (products + given).mul_(_ACCUMULATION * spread * unit * length).add_(floor)
    limit = own + _ROUNDING * spread * 2**-8 * given if rounds else own
    return Tolerance(limit, own, spread)


def _judge(
    deviation: Tensor, tolerance: Tolerance, name: str, where: str, place: Callable[[int, int, int], str]
) -> None:
    # What is not a number compares as false; an infinite limit would let everything pass.
    if not deviation.numel() or (
        bool((deviation <= tolerance.limit).all()) and float(tolerance.limit.amax()) < math.inf
    ):
        return
    limit = tolerance.limit.expand_as(deviation)
    finite = deviation.isfinite() & limit.isfinite()
    excess = torch.where(finite, deviation / limit, math.inf)
    worst = tuple(int(each) for each in torch.unravel_index(excess.argmax(), excess.shape))
    if not bool(finite[worst]):
        raise IntegrityError(
            f"the accelerator's {name} is not finite, or too large to be checked",
            where=f"{where}, {place(*worst)}",
            hint="do not go on with this accelerator, or scale the model down if its activations overflow",
        )
    raise IntegrityError(
        f"the accelerator's {name} is not the product that was asked for",
        where=f"{where}, {place(*worst)}",
        expected=f"a deviation of at most {float(limit[worst]):.3g}",
        got=f"{float(deviation[worst]):.3g}",
        hint="it lies, it is broken, or it computes in a lower precision than it was asked to",
    )


def _maps(tensor: Tensor, linear: bool) -> Tensor:
    """As maps with channels first: itself, or (1, C, tokens) for the tokens of a linear layer."""
    return tensor.reshape(-1, tensor.shape[-1]).t().unsqueeze(0) if linear else tensor


def _ranges(first: Tensor, second: Tensor, linear: bool) -> Iterator[tuple[int, int, int]]:
    """(start, stop, axis) over samples, or over tokens of a linear layer; none where there are none."""
    axis = 2 if linear else 0
    count = first.shape[axis]
    step = max(1, _PIECE * count // max(first.numel() + second.numel(), 1))
    for start in range(0, count, step):
        yield start, min(start + step, count), axis


def _split_weight(operation: LinearOperation, weight: Tensor, sent: torch.dtype | None) -> Tensor:
    """(G, channels of the first axis, of the second, offsets) of a weight, or of its gradient; after rounding to the
    dtype that was ``sent``, in the dtype that the check computes in."""
    known_dtype(weight, "weight")
    if tuple(weight.shape) != operation.weight_shape:
        raise InputError("weight of another shape", expected=str(operation.weight_shape), got=str(tuple(weight.shape)))
    if sent is not None:
        weight = weight.to(sent).to(computing_dtype(sent))
    second = operation.weight_shape[1]
    return weight.reshape(operation.groups, -1, second, math.prod(operation.kernel))


def _expect(name: str, answer: Tensor, shape: Sequence[int]) -> None:
    known_dtype(answer, name)
    if tuple(answer.shape) != tuple(shape):
        raise IntegrityError(
            f"the accelerator's {name} has another shape", expected=str(tuple(shape)), got=str(tuple(answer.shape))
        )
