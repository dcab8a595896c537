"""The OBS block step against the reference, and the reference against the definition: solving for what is left, in fp64."""

import pytest
import torch
from torch import Tensor

from sparsekit import reference

PATTERNS = {"2:4": (2, 4, False), "1:4": (1, 4, False), "4:8": (4, 8, False), "pairs": (2, 4, True), "3:5": (3, 5, False)}


def problem(rows: int, b: int, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """w fp32, H fp64 and U fp64 with H^-1 = U'U, of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, 3 * b + 8, b, generator=generator, dtype=torch.float64)
    h = x.mT @ (x @ (torch.eye(b) + 0.3 * torch.randn(b, b, generator=generator)).double())
    h = (h + h.mT) / 2
    h = h @ h.mT / h.diagonal(dim1=-2, dim2=-1).mean() ** 2 + 0.05 * torch.eye(b).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).mT.contiguous()
    return torch.randn(*batch, rows, b, generator=generator), h, upper


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reference_solves_for_what_is_left(pattern):
    # Given its mask, the result minimises (w - q) H (w - q)' subject to the zeros column by column: the OBS step of each column is
    # the exact minimiser over the columns to its right, with those before it fixed.
    w, h, upper = problem(6, 20)
    w = w.double()
    q, kept, errors, loss = reference.obs_block(w, upper, None, *PATTERNS[pattern])
    for row in range(len(w)):
        now = w[row].clone()
        for j in range(w.shape[1]):
            if kept[row, j]:
                continue
            free = slice(j + 1, None)
            step = torch.zeros_like(now)
            step[j] = -now[j]
            if j + 1 < len(now):
                step[free] = torch.linalg.solve(h[free, free], h[free, j] * now[j])
            now += step
            now[j] = 0
        assert torch.allclose(now, q[row], rtol=1e-9, atol=1e-9)
    assert torch.allclose(loss, errors.square().sum(-1))
    d = w - q
    assert torch.allclose((d @ h * d).sum(-1), loss, rtol=1e-8)  # what is lost is the sum of the steps' losses
