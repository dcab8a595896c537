"""OWL: blocks whose scores have more outliers keep more. Source: Yin et al. 2023, arXiv:2310.05175."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

from ..criteria import CRITERIA
from ..errors import SparsekitError
from ..patterns import NM
from ..pipeline.source import Progress
from ..plan import Plan
from ..pruners import Wanda
from .allocation import read_target, share_plan
from .dense import dense_blocks, source_of

OUTLIERS, SPREAD = 5.0, 0.08  # the paper's M and lambda


@dataclass(frozen=True)
class Outliers:
    """A block, the shapes (out_features, in_features) of its matrices by name, and the share of its scores that are outliers."""

    block: str
    shapes: Mapping[str, tuple[int, int]]
    share: float


@torch.no_grad()
def outlier_shares(
    model: nn.Module | str | Path,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    above: float = OUTLIERS,
    skip: Iterable[str] = (),
    blocks: nn.ModuleList | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str = "auto",
) -> list[Outliers]:
    """Of each block the share of its weights whose score |w| |x|_2 is more than ``above`` times the mean score of the block.

    |x|_2 is the root of the mean over the tokens that the matrix received, so that experts compare; one that received none is left
    out of mean and share. The other arguments are those of ``error_curves``; nothing but sums of squares is kept of the inputs."""
    if not 0 < above < math.inf:
        raise SparsekitError(f"an outlier must be so many times the mean, a number above 0 such as {OUTLIERS:g}, got {above}")
    found, wanda = [], CRITERIA["wanda"]
    for seen in dense_blocks(source_of(model, blocks, device, dtype), batches, Wanda, NM(2, 4), skip, progress):
        reached = [(target, pruner.statistics) for target, pruner in seen.pruners.items() if pruner.statistics.tokens]

        def scores(reached=reached):  # made twice, held one at a time
            for target, statistics in reached:
                yield wanda.scores(target.weight, statistics) / math.sqrt(statistics.tokens)

        count = sum(target.weight.numel() for target, _ in reached)
        mean = sum(one.sum(dtype=torch.float64).item() for one in scores()) / max(count, 1)
        outliers = sum(int((one > above * mean).sum()) for one in scores())
        shapes = {target.name: tuple(target.weight.shape) for target in seen.pruners}
        found.append(Outliers(seen.name, shapes, outliers / max(count, 1)))
    return found


def allocate_owl(
    outliers: Sequence[Outliers],
    target: str | float,
    *,
    spread: float = SPREAD,
    low: str | float = 0.0,
    high: str | float = 1.0,
    method: str | None = "sparsegpt",
) -> Plan:
    """A share for each block, the lower the more outliers it has: target - a (outliers - mean), so that of all weights together
    floor(target * count) go. The mean is weighted by the number of weights.

    a is as large as leaves every share within target +- spread and low to high. So nothing is cut off at a bound, and the target is
    met whatever the sizes; with blocks alike, or one block, all are at the target. (The published code stretches the shares to a
    width of 2 spread and then shifts them to a mean that counts blocks, which need not stay within target +- spread.)
    Raises SparsekitError where the target does not lie within the bounds."""
    share, bounds = read_target(target, low, high)
    if not (isinstance(spread, int | float) and 0 <= spread <= 1):
        raise SparsekitError(f"the spread must be 0 to 1, got {spread!r}")
    shapes = {name: shape for block in outliers for name, shape in block.shapes.items()}
    sizes = [sum(map(math.prod, block.shapes.values())) for block in outliers]
    # In fractions: a mean that is rounded would tell blocks apart that are alike.
    mean = sum(Fraction(block.share) * size for block, size in zip(outliers, sizes)) / max(sum(sizes), 1)
    further = [Fraction(block.share) - mean for block in outliers]
    down, up = (min(Fraction(spread), share - bounds[0]), min(Fraction(spread), bounds[1] - share))
    scale = min([down / far for far in further if far > 0] + [up / -far for far in further if far < 0], default=Fraction(0))
    wanted = {name: float(share - scale * far) for block, far in zip(outliers, further) for name in block.shapes}
    made = {"by": "owl", "target": float(share), "spread": float(spread), "outliers": {one.block: one.share for one in outliers}}
    return share_plan(shapes, wanted, share, bounds, method, made)
