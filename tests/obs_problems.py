"""Blocks for the OBS step, and what must hold of a kernel's result: shared by the tests in the interpreter and on a GPU."""

import torch
from torch import Tensor

from sparsekit import reference


def problem64(rows: int, b: int, seed: int = 0, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """w (*batch, rows, b) fp32, H (*batch, b, b) fp64 of correlated inputs, and U fp64 with H^-1 = U'U."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, 2 * b + 8, b, generator=g, dtype=torch.float64)
    x = x @ (torch.eye(b) + 0.3 * torch.randn(b, b, generator=g) / b**0.5).double()
    h = 2 / x.shape[-2] * x.mT @ x + 0.05 * torch.eye(b).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(h)).mT.contiguous()
    return torch.randn(*batch, rows, b, generator=g), h, upper


def problem(rows: int, b: int, device="cpu", batch: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """w ([batch,] rows, b) and U ([batch,] b, b) of problem64, both fp32."""
    w, _, upper = problem64(rows, b, seed, () if batch is None else (batch,))
    return w.to(device), upper.float().to(device)


def check(
    obs, w: Tensor, upper: Tensor, mask: Tensor | None = None, n: int = 0, m: int = 0, pairs: bool = False, ties: int = 0
) -> None:
    """Prunes w by the kernel ``obs``: the mask that fp64 gives, and under it weights, errors and loss within 1e-5 of fp64's.

    ties: rows of each block, where there are very many groups, whose mask may be another because two scores are as good as one."""
    blocks = list(zip(*(t[None] if w.dim() == 2 else t for t in (w.cpu().clone(), upper.cpu()))))
    masks = [None] * len(blocks) if mask is None else list(mask.cpu()[None] if w.dim() == 2 else mask.cpu())
    kept, errors, loss, status = obs(w, upper, mask, n, m, pairs)
    assert status.item() == torch.iinfo(torch.int64).max
    results = zip(*(t.cpu()[None] if w.dim() == 2 else t.cpu() for t in (w, kept, errors, loss)))
    for (block, u), given, (new, chosen, owed, lost) in zip(blocks, masks, results):
        want = reference.obs_block(block.double(), u.double(), given, n, m, pairs)[1]
        assert (chosen != want).any(1).sum() <= ties, "the masks differ"
        exact = reference.obs_block(block.double(), u.double(), chosen, n, m, pairs)
        for ours, truth in zip((new, owed, lost), (exact[0], *exact[2:])):
            assert ours.dtype == torch.float32 and (ours - truth).abs().max() <= 1e-5 * truth.abs().max()
        assert not new.view(torch.int32)[~chosen].any() and not owed[chosen].any(), "not +0.0, or owing"
