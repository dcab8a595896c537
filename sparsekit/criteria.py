"""What is known of a linear's inputs, gathered a batch at a time, and the scores made from it (higher is kept)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from . import ops
from .precision import full_precision


def _tokens(x: Tensor) -> Tensor:
    """The rows of x (..., k), of which k may be 0."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


class SquaredNorm:
    """Sum of squares of each input feature over all tokens: what Wanda needs. Memory k * 4 bytes."""

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.sum, self.tokens = torch.zeros(columns, dtype=torch.float32, device=device), 0

    def update(self, x: Tensor) -> None:
        """Adds the tokens of x (..., k), any float dtype; summed in fp32."""
        rows = _tokens(x).float()
        self.sum += self._of(rows).sum(0)
        self.tokens += rows.shape[0]

    def _of(self, rows: Tensor) -> Tensor:
        return rows * rows


class MeanAbs(SquaredNorm):
    """Sum of |x_j| of each input feature over all tokens, and their number. Memory k * 4 bytes."""

    def _of(self, rows: Tensor) -> Tensor:
        return rows.abs()


class SquaredGradients:
    """Sum over samples of the square of the loss's gradient by each weight: what Fisher needs. Memory n * k * 4 bytes.

    It comes from backward passes of the whole model, and not from a linear's inputs."""

    def __init__(self, shape: tuple[int, int], device: torch.device | str = "cpu"):
        self.sum, self.tokens = torch.zeros(shape, dtype=torch.float32, device=device), 0

    def update(self, gradient: Tensor) -> None:
        """Adds the gradient (n, k) of one sample, any float dtype, squared and summed in fp32; ``tokens`` counts samples here."""
        gradient = gradient.float()
        self.sum.addcmul_(gradient, gradient)
        self.tokens += 1


@dataclass(frozen=True)
class Factor:
    """H^-1 = U' U with U upper triangular; the inputs that never fired; the damping that made H positive definite.

    unit (k, k) fp32 is U of H / scale, so that neither it nor what is reckoned with it over- or underflows with the inputs."""

    unit: Tensor
    scale: float
    dead: Tensor
    damping: float

    @property
    def upper(self) -> Tensor:
        """U of H itself."""
        return self.unit / math.sqrt(self.scale)


class Gram:
    """Sum of x x' over all tokens, fp32: what SparseGPT needs. Memory k * k * 4 bytes."""

    # Shares of the mean diagonal added to it, tried in order; the last one is factorised in fp64.
    DAMPING_LADDER = (0.01, 0.1, 1.0)
    _STRIP = 256  # columns of one product of output_error: fewer cost the library more than the triangle saves

    def __init__(self, columns: int, device: torch.device | str = "cpu"):
        self.sum, self.tokens = torch.zeros(columns, columns, dtype=torch.float32, device=device), 0

    @full_precision()
    def update(self, x: Tensor) -> None:
        """Adds the tokens of x (..., k), any float dtype; summed in fp32."""
        rows = _tokens(x)
        ops.gram_(self.sum, rows)
        self.tokens += rows.shape[0]
        self.__dict__.pop("factor", None)

    @cached_property
    def factor(self) -> Factor:
        """The factor of (2 H / tokens + damping)^-1, from one Cholesky and one triangular inverse.

        H = R R' with R upper is the Cholesky factorisation of H read from its last row and column backwards; then
        H^-1 = (R^-1)' R^-1, and R^-1 is the upper factor asked for, without ever forming H^-1.
        Raises ValueError for NaN or Inf, or when the last rung of the ladder is not positive definite either."""
        factorise([self])
        if "factor" in self.__dict__:
            return self.__dict__["factor"]
        if not torch.isfinite(self.sum).all():
            raise ValueError("its inputs hold NaN or Inf")
        raise ValueError(
            f"its Gram matrix is not positive definite with damping up to {self.DAMPING_LADDER[-1]:g} of the mean diagonal"
        )

    def output_error(self, weight: Tensor, pruned: Tensor) -> float:
        """|X (W - W_pruned)'|^2 / |X W'|^2 over the tokens seen; weights (n, k)."""
        return self.output_errors(weight, [pruned])[0]

    @full_precision()
    def output_errors(self, weight: Tensor, pruned: Iterable[Tensor]) -> list[float]:
        """The output error of each of several pruned weights; one at a time is asked for and held."""
        weight = weight.float()
        largest = torch.linalg.vector_norm(weight, math.inf) if weight.numel() else weight.new_ones(())
        exponent = (torch.frexp(largest).exponent - 1).clamp_min(-126)
        unit = torch.ldexp(torch.ones_like(largest), exponent)  # squares of what is very large or small would over- or underflow
        outputs = [self._output(weight, unit), *(self._output(weight - one.float(), unit) for one in pruned)]
        whole, *lost = torch.stack(outputs).tolist()
        return [max(one, 0.0) / whole if whole > 0 else 0.0 for one in lost]  # rounding can take a small one below zero

    def _output(self, weight: Tensor, unit: Tensor) -> Tensor:
        """|X W'|^2 in units of the mean diagonal and of a weight's: the sum of (W G) * W, of which a symmetric G asks for half."""
        weight, total = (weight / unit).div_(self._mean().sqrt()), weight.new_zeros(())
        for begin in range(0, weight.shape[1], self._STRIP):
            own, left, columns = weight[:, begin : begin + self._STRIP], weight[:, :begin], slice(begin, begin + self._STRIP)
            total += ((own @ self.sum[columns, columns]).addmm_(left, self.sum[:begin, columns], alpha=2) * own).sum()
        return total

    def _mean(self) -> Tensor:
        """Of the diagonal, over inputs that fired: what the others are set to says nothing about the scale. 1 where none did."""
        diagonal = self.sum.diagonal().double()
        fired = (diagonal != 0).sum()
        return torch.where(fired > 0, diagonal.sum() / fired, 1.0).float()


@full_precision()
def factorise(grams: Sequence[Gram]) -> None:
    """Makes the ``factor`` of several Gram matrices of one size in as many calls of the library as that of one, with the same bits.

    One that has none is left without: whoever asks for its factor is told why."""
    grams = [gram for gram in dict.fromkeys(grams) if "factor" not in gram.__dict__]
    if not grams:
        return
    means, dead = torch.stack([gram._mean() for gram in grams]), torch.stack([gram.sum.diagonal() == 0 for gram in grams])
    scaled = grams[0].sum.new_empty(len(grams), *grams[0].sum.shape)
    for one, gram, mean in zip(scaled, grams, means):
        torch.div(gram.sum, mean, out=one)
    scaled.diagonal(dim1=1, dim2=2).masked_fill_(dead, 1)
    finite = torch.stack([torch.isfinite(gram.sum).all() for gram in grams])
    finite, none_fired, means = torch.stack((finite.float(), dead.all(1).float(), means)).tolist()  # a GPU is waited for once
    left = [i for i in range(len(grams)) if finite[i]]
    for damping in Gram.DAMPING_LADDER:
        if not left:
            return
        damped = scaled if len(left) == len(grams) else scaled[left]
        damped = (damped.double() if damping == Gram.DAMPING_LADDER[-1] else damped).flip(1, 2)
        damped.diagonal(dim1=1, dim2=2).add_(damping)
        damped, failed = torch.linalg.cholesky_ex(damped)
        units = damped.flip(1, 2).contiguous()
        _invert_upper_(units)
        good = ((failed == 0) & torch.isfinite(units).all(2).all(1)).tolist()
        for i, unit, is_one in zip(left, units, good):
            if is_one:
                scale = 1.0 if none_fired[i] else 2 * means[i] / max(grams[i].tokens, 1)
                grams[i].__dict__["factor"] = Factor(unit.float(), scale, dead[i], damping)
        left = [i for i, is_one in zip(left, good) if not is_one]


def _invert_upper_(r: Tensor) -> None:
    """The inverse of upper triangular matrices (..., k, k) in their place: [[a, b], [0, d]] becomes
    [[a^-1, -a^-1 b d^-1], [0, d^-1]].

    A third of the operations of solving for all of the identity."""
    if (k := r.shape[-1]) <= 256:
        r.copy_(torch.linalg.solve_triangular(r, torch.eye(k, dtype=r.dtype, device=r.device), upper=True))
        return
    half = k // 512 * 256 or 256
    a, b, d = r[..., :half, :half], r[..., :half, half:], r[..., half:, half:]
    left = torch.linalg.solve_triangular(a, b, upper=True)
    b.copy_(torch.linalg.solve_triangular(d, left, upper=True, left=False).neg_())
    _invert_upper_(a)
    _invert_upper_(d)


def total(parts: Sequence[Gram] | Sequence[SquaredNorm]) -> Gram | SquaredNorm:
    """The statistic of all the tokens that the parts, of one kind and size, have seen."""
    whole = type(parts[0])(parts[0].sum.shape[0], parts[0].sum.device)
    for part in parts:
        whole.sum += part.sum
        whole.tokens += part.tokens
    return whole


def _times(powers: Callable[[Tensor], Tensor], weight: Tensor, by: Tensor) -> Tensor:
    """powers(w) * by, neither below 0, of a weight (n, k): fp32 where that holds all of them, with room for sums of a few, else
    fp64, so that none that differ tie at Inf or at 0. by fp32 or fp64."""
    scores = powers(weight.float()) * by.float()
    if not scores.numel():
        return scores
    low, high = torch.aminmax(scores)
    least = torch.finfo(torch.float32).tiny
    if high < 2.0**120 and (low >= least or not ((scores < least) & (weight != 0) & (by != 0)).any()):
        return scores
    return powers(weight.double()) * by.double()


class Criterion(Protocol):
    """How much each weight of a linear matters. A user's own is a class with these four, handed to ``sparsekit.prune``.

    statistics: the class of what has to be known of the linear's inputs (SquaredNorm, MeanAbs, Gram, or one with their ``update``,
    ``sum`` and ``tokens``) or of its gradients (SquaredGradients), None for nothing. rowwise: whether weights are compared within
    their row unless asked otherwise."""

    name: str
    statistics: type | None
    rowwise: bool

    def scores(self, weight: Tensor, statistics) -> Tensor:
        """Of a weight (n, k), fp32, or fp64 where that holds too little; higher is kept. statistics are those of the tokens that
        the linear received."""


class Magnitude:
    """|w|."""

    name, statistics, rowwise = "magnitude", None, False

    def scores(self, weight: Tensor, statistics: None = None) -> Tensor:
        return weight.float().abs()


class Activation:
    """|w_ij| * mean |x_j|."""

    name, statistics, rowwise = "activation", MeanAbs, False

    def scores(self, weight: Tensor, statistics: MeanAbs) -> Tensor:
        return _times(torch.abs, weight, statistics.sum / statistics.tokens)


class Wanda:
    """|w_ij| * |x_j|_2. Source: Sun et al. 2023, arXiv:2306.11695."""

    name, statistics, rowwise = "wanda", SquaredNorm, True

    def scores(self, weight: Tensor, statistics: SquaredNorm) -> Tensor:
        return _times(torch.abs, weight, statistics.sum.sqrt())


class Gradient:
    """The sum over samples of (g w)^2, the empirical Fisher information along w. Source: Molchanov et al. 2019, arXiv:1906.10771.

    Samples cannot cancel, as they do in the square of a summed gradient."""

    name, statistics, rowwise = "gradient", SquaredGradients, False

    def scores(self, weight: Tensor, statistics: SquaredGradients) -> Tensor:
        return _times(torch.square, weight, statistics.sum)


class OBD:
    """H_jj w^2 / 2, what removing a weight costs where all others stay. Source: LeCun et al. 1989, Optimal Brain Damage."""

    name, statistics, rowwise = "obd", SquaredNorm, False

    def scores(self, weight: Tensor, statistics: SquaredNorm) -> Tensor:
        return _times(torch.square, weight, statistics.sum / statistics.tokens)  # H_jj = 2 sum / tokens


class OBS:
    """w^2 / (2 [H^-1]_jj), what it costs where the others of its row make up for it. Source: Hassibi and Stork 1993."""

    name, statistics, rowwise = "obs", Gram, False

    def scores(self, weight: Tensor, statistics: Gram) -> Tensor:
        factor = statistics.factor
        inverse = factor.unit.square().sum(0)  # H^-1 = U' U, of H / scale
        return _times(torch.square, weight, (factor.scale / 2 / inverse.double()).masked_fill(factor.dead, 0))


CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion for criterion in (Activation(), Gradient(), Magnitude(), OBD(), OBS(), Wanda())
}
