"""Split activations into a principal part of low rank, which stays inside, and the residual.

For every sample X (rows x cols; channels x positions of a convolution, tokens x features of a linear layer):
X_main = left @ right and X_res = X - X_main, so that X_main + X_res = X to rounding, whatever the factors are.

``als`` is the light SVD of AsymML (arXiv 2110.01229): alternating least squares, one rank-1 term at a
time, u = X v / |v|^2, v = X^T u / |u|^2, X <- X - u v^T. After each term X^T u = 0, so the columns of ``left`` are
orthogonal, X_main is the projection of X on their span, and the energies of the two parts add up to that of X.
``range-finder`` takes an orthonormal basis of X times a random matrix (Halko, Martinsson & Tropp 2011, algorithm 4.4).

The rank counts for the whole batch: under a rule that looks at the data, the sample that needs most decides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from motte.errors import InputError, SettingError
from motte.offload.arithmetic import as_written, computing_dtype, known_dtype
from motte.offload.settings import Decomposition, Entropy, Fixed, Rank, Schedule

_SEED: Final = 0x6D6F747465
"""Of the range finder's random matrix. It protects nothing; fixed, so that the same batch gives the same residual."""
_PIECE: Final = 1 << 20
"""Values whose terms are found together, 4 MiB in float32: the remainder, read and written for every term, stays in the
cache. Measured on one busy core, batch 4, rank 8: 64 channels at 112 px 40 ms, as a whole 76; smaller pieces cost more
in calls than they save."""
_BLOCK: Final = 8
"""Terms that the range finder adds at a time under an energy rule."""


@dataclass(frozen=True, slots=True)
class Principal:
    """The principal part of a batch: ``left`` (N, rows, R) @ ``right`` (N, R, cols), both of the activation's dtype."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        """R, the same for every sample."""
        return self.left.shape[2]

    @as_written
    def restore(self) -> Tensor:
        """X_main (N, rows, cols), formed in full. The slow way; layers use :mod:`motte.offload.lowrank`."""
        return torch.bmm(self.left, self.right)


@dataclass(frozen=True, slots=True)
class EnergyShares:
    """Share of every sample's energy |X|^2 in the two parts, (N,) each, float64; both 0 for a sample of zeros."""

    main: Tensor
    residual: Tensor


@as_written
def decompose(
    x: Tensor, rank: Rank, *, position: int = 0, iterations: int = 1, method: Decomposition = "als"
) -> Principal:
    """Find the principal part of every sample.

    Args:
        x: (N, rows, cols), float32, float64 or bfloat16 (computed in float32, factors rounded term by term, so that
            later terms correct the rounding of earlier ones). Not changed.
        rank: the rule. ``Energy`` adds terms until the residual of every sample holds at most 1 - share of its energy,
            to rounding; every rule stops at min(rows, cols).
        position: of the layer among the split layers, for ``Schedule``.
        iterations: of alternating least squares per term, or 1 + the power iterations of the range finder; 1 to 16.

    Raises:
        InputError: not three-dimensional, or another dtype. SettingError: iterations or method.
    """
    known_dtype(x, "activation")
    if x.ndim != 3:
        raise InputError("an activation to decompose is a batch of matrices", got=str(tuple(x.shape)))
    if not 1 <= iterations <= 16 or method not in ("als", "range-finder"):
        raise SettingError("iterations 1 to 16, als or range-finder", got=f"{iterations}, {method!r}")
    most = min(x.shape[1:]) if x.shape[0] else 0
    share = None
    if isinstance(rank, Fixed):
        terms = min(rank.rank, most)
    elif isinstance(rank, Schedule):
        terms = min(rank.rank(position), most)
    elif isinstance(rank, Entropy):
        terms = min(entropy_rank(x), rank.cap, most)
    else:
        terms, share = min(rank.cap, most), rank.share
    if terms == 0:
        return Principal(x.new_zeros(x.shape[0], x.shape[1], 0), x.new_zeros(x.shape[0], 0, x.shape[2]))
    if share is None and terms == most:
        return _whole(x)
    # Samples depend on one another through an energy rule only: where one fits, each is read from the cache.
    step = max(1, _PIECE // max(math.prod(x.shape[1:]), 1)) if share is None and method == "als" else len(x)
    found = [_factors(piece, terms, share, iterations, method) for piece in x.split(step)]
    if len(found) == 1:
        return found[0]
    return Principal(torch.cat([each.left for each in found]), torch.cat([each.right for each in found]))


def _whole(x: Tensor) -> Principal:
    """Every direction is kept: X times the identity, so that the residual is zero exactly. A decomposition would leave
    its rounding outside, and that still depends on X (docs/findings.md)."""
    count, rows, cols = x.shape
    one = torch.eye(min(rows, cols), dtype=x.dtype).expand(count, -1, -1)
    return Principal(one, x.clone()) if rows <= cols else Principal(x.clone(), one)


def _factors(x: Tensor, terms: int, share: float | None, iterations: int, method: Decomposition) -> Principal:
    scaled, scale = _in_range(x.to(computing_dtype(x.dtype)))
    find = _als if method == "als" else _range_finder
    left, right = find(scaled, terms, share, iterations, x.dtype)
    return Principal(left.to(x.dtype), (right if scale is None else right * scale).to(x.dtype))


@as_written
def residual(x: Tensor, principal: Principal, *, out: Tensor | None = None) -> Tensor:
    """X - left @ right, (N, rows, cols), of x's dtype; a bfloat16 result is rounded once, from float32.

    ``out`` may be ``x`` itself.
    """
    if out is None:
        return torch.baddbmm(x, principal.left, principal.right, alpha=-1)
    return torch.baddbmm(x, principal.left, principal.right, alpha=-1, out=out)


@as_written
def energy_shares(x: Tensor, principal: Principal, left_over: Tensor) -> EnergyShares:
    """How the energy of x (N, rows, cols) is shared; ``left_over`` is its :func:`residual`, before any noise."""
    total = _norms(x)
    left, right = principal.left.double(), principal.right.double()
    main = (torch.bmm(left.mT, left) * torch.bmm(right, right.mT)).sum((1, 2)).clamp_min(0).sqrt()
    there = torch.where(total > 0, total, 1)
    return EnergyShares(main.div(there).square(), _norms(left_over).div(there).square())


@as_written
def entropy_rank(x: Tensor) -> int:
    """ceil(2^mu) of the sample of x (N, rows, cols) that needs most, mu = -log2(sum(sbar^2)), sbar = s / sum(s) over
    its singular values s (AsymML, SVD-channel entropy). 0 where every sample is zero."""
    small = x.mT if x.shape[1] > x.shape[2] else x
    most = 0
    for sample in small:
        # From the smaller Gram matrix, in float64: its noise on a singular value is 1e-8 of the largest one.
        wide = sample.double()
        largest = wide.abs().amax().item() if wide.numel() else 0.0
        if largest == 0:
            continue
        wide = wide / largest
        squares = torch.linalg.eigvalsh(wide @ wide.T).clamp_min(0)
        effective = (squares.sqrt().sum().square() / squares.sum()).item()
        most = max(most, math.ceil(effective * (1 - 1e-6)))
    return min(most, x.shape[1], x.shape[2])


def decompose_multiply_adds(rows: int, cols: int, rank: int, iterations: int, method: Decomposition) -> int:
    """Multiply-adds of one sample's decomposition at a known rank, the residual included.

    ALS reads the remainder once for the row to start from, twice per iteration, and subtracts the term. Entropy() costs
    :func:`entropy_multiply_adds` beside it.
    """
    rank = min(rank, rows, cols)
    once = rows * cols * rank
    if rank == min(rows, cols):
        # Nothing is decomposed; the residual, which is zero, is still formed.
        return once
    if method == "als":
        # The last subtraction is the residual, of all terms at once.
        return once * (2 * iterations + 2) + max(rank - 1, 0) * rows * cols
    factorisations = 2 * (iterations * rows + (iterations - 1) * cols) * rank * rank
    return once * (2 * iterations + 1) + factorisations


def entropy_multiply_adds(rows: int, cols: int) -> int:
    """Multiply-adds of one sample's Gram matrix and its eigenvalues, for :class:`motte.offload.settings.Entropy`."""
    small, large = sorted((rows, cols))
    return small * small * large + 4 * small**3 // 3


def _als(x: Tensor, terms: int, share: float | None, iterations: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    count, rows, cols = x.shape
    left, right = x.new_zeros(count, rows, terms), x.new_zeros(count, terms, cols)
    remainder, kept = x, terms
    energies = _row_energies(x)
    goal = None if share is None else _goal(energies.sum(1), share, x.dtype)
    for term in range(terms):
        if goal is not None and bool((energies.sum(1) <= goal).all()):
            kept = term
            break
        start = energies.argmax(1)
        v = remainder.gather(1, start.view(count, 1, 1).expand(count, 1, cols))
        u = x.new_zeros(count, rows, 1)
        for _ in range(iterations):
            u = _unit(torch.bmm(remainder, _unit(v).mT))
            v = torch.bmm(u.mT, remainder)
        # What is subtracted is what is kept, rounding to the activation's dtype included.
        u, v = u.to(dtype).to(x.dtype), v.to(dtype).to(x.dtype)
        left[:, :, term : term + 1], right[:, term : term + 1] = u, v
        if term + 1 < terms:
            # addcmul: 1.5 times faster than baddbmm with an inner dimension of 1 (float32, 64 x 50176).
            remainder = torch.addcmul(remainder, u, v, value=-1, out=None if remainder is x else remainder)
            energies = _row_energies(remainder)
    return left[:, :, :kept], right[:, :kept]


def _range_finder(
    x: Tensor, terms: int, share: float | None, iterations: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    cols = x.shape[2]
    generator = torch.Generator(x.device).manual_seed(_SEED)
    goal = None if share is None else _goal(_row_energies(x).sum(1), share, x.dtype)
    lefts, rights, remainder, kept = [], [], x, 0
    while kept < terms:
        width = terms if goal is None else min(_BLOCK, terms - kept)
        probe = torch.randn(cols, width, generator=generator, dtype=x.dtype, device=x.device)
        basis = torch.linalg.qr(remainder @ probe)[0]
        for _ in range(iterations - 1):
            basis = torch.linalg.qr(torch.bmm(remainder, torch.linalg.qr(torch.bmm(remainder.mT, basis))[0]))[0]
        # Of the basis as it will be kept: rounding it costs optimality, never the sum of the two parts.
        basis = basis.to(dtype).to(x.dtype)
        part = torch.bmm(basis.mT, remainder)
        if goal is not None:
            width, remainder = _prefix(remainder, basis, part, goal)
        lefts.append(basis[:, :, :width])
        rights.append(part[:, :width])
        kept += width
        if goal is None or width < basis.shape[2] or bool((_row_energies(remainder).sum(1) <= goal).all()):
            break
    return torch.cat(lefts, 2), torch.cat(rights, 1)


def _prefix(remainder: Tensor, basis: Tensor, part: Tensor, goal: Tensor) -> tuple[int, Tensor]:
    """How many leading terms reach the goal, and what remains without them; all of them where none do."""
    after = torch.baddbmm(remainder, basis, part, alpha=-1)
    if bool((_row_energies(after).sum(1) > goal).any()):
        return part.shape[1], after
    # The basis is orthonormal: taking terms off the end puts their energies back.
    back = _row_energies(part).flip(1).cumsum(1).flip(1)
    left_over = _row_energies(after).sum(1, keepdim=True) + back
    enough = (left_over <= goal.unsqueeze(1)).all(0)
    width = int(enough.to(torch.int8).argmax()) if bool(enough.any()) else part.shape[1]
    return width, after


def _goal(energy: Tensor, share: float, dtype: torch.dtype) -> Tensor:
    """What the residual may hold at most, (N,). The second summand is the energy of its rounding."""
    return energy * (1.0 - share) + energy * (8 * torch.finfo(dtype).eps) ** 2


def _row_energies(x: Tensor) -> Tensor:
    """|row|^2 of (N, rows, cols): (N, rows)."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=2)
    return norms.square()


def _norms(x: Tensor) -> Tensor:
    rows: Tensor = torch.linalg.vector_norm(x, dim=2, dtype=torch.float64)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms


def _unit(v: Tensor) -> Tensor:
    """``v`` (N, a, b) with norm 1, zeros where it is zero. With u and v of norm 1, dividing by |u|^2 falls away."""
    norm = torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True)
    return v * torch.where(norm > 0, 1 / norm, 0)


def _in_range(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """``x`` with every sample divided by a power of two such that its squares neither overflow nor vanish, and those
    powers (N, 1, 1); ``x`` itself and None where that holds already."""
    limits = torch.finfo(x.dtype)
    # Norms take a third of the time of a largest value, and where they lie well inside, so do the values.
    norms = torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=2), dim=1)
    least = limits.tiny**0.25 * math.sqrt(math.prod(x.shape[1:]))
    if bool(((norms >= least) & (norms <= limits.max**0.25)).all()):
        return x, None
    largest = x.abs().amax((1, 2))
    odd = (largest > limits.max**0.25) | ((largest < limits.tiny**0.25) & (largest > 0))
    if not bool(odd.any()):
        return x, None
    bound = math.frexp(limits.max)[1] - 24
    exponent = torch.where(odd, torch.frexp(largest).exponent.clamp(-bound, bound), 0).to(x.dtype).view(-1, 1, 1)
    return x * torch.exp2(-exponent), torch.exp2(exponent)
