"""Pruning whose caller has chosen less for the model than fp32: TF32 or bf16 products, autocast, inference_mode."""

import pytest
import torch
from models import build, token_batches

from sparsekit import prune
from sparsekit.criteria import Gram
from sparsekit.patterns import NM
from sparsekit.precision import full_precision
from sparsekit.pruners import SparseGPT


def precision() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture(params=["highest", "high", "medium", "by backend"])
def chosen(request):
    """What the caller has chosen: TF32, or bf16 where a CPU has that, by the older or the newer of torch's two ways."""
    if request.param == "by backend":
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = "tf32", "bf16"
    else:
        torch.set_float32_matmul_precision(request.param)
    yield precision()
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "ieee"
    torch.set_float32_matmul_precision("highest")


class Watched(torch.overrides.TorchFunctionMode):
    """Notes the precision of every call of torch that multiplies matrices."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in ("addmm_", "matmul", "__matmul__", "linalg_cholesky_ex", "linalg_solve_triangular", "gram_.default"):
            autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
            self.seen.setdefault(func.__name__, set()).add((*precision(), torch.backends.cuda.matmul.allow_tf32, autocast))
        return func(*args, **(kwargs or {}))


def test_every_product_of_the_pruner_is_of_fp32(chosen):
    pruner, w = SparseGPT(700, NM(2, 4)), torch.randn(8, 700)
    with torch.autocast("cpu", torch.bfloat16), Watched() as watched:
        pruner.observe(torch.randn(900, 700))
        pruner.prune(w)
        assert torch.is_autocast_enabled("cpu")
    assert len(watched.seen) >= 4 and all(how == {("ieee", "ieee", False, False)} for how in watched.seen.values()), watched.seen
    assert precision() == chosen


def test_what_was_chosen_is_back_after_an_error(chosen):
    with pytest.raises(ValueError, match="NaN or Inf"):
        gram = Gram(4)
        gram.update(torch.full((3, 4), torch.nan))
        _ = gram.factor
    assert precision() == chosen
    with full_precision(), full_precision():
        assert not torch.backends.cuda.matmul.allow_tf32
    assert precision() == chosen


@pytest.mark.parametrize("method", ["sparsegpt", "gradient"])
def test_a_model_pruned_under_inference_mode(method):
    ours, theirs = build("llama"), build("llama")
    prune(theirs, token_batches((2, 16), (1, 11)), method)
    with torch.inference_mode():
        prune(ours, token_batches((2, 16), (1, 11)), method)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


def test_a_model_pruned_under_autocast_holds_its_pattern():
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        report = prune(model, token_batches((2, 16), (1, 11)))
    assert all(0 < row.output_error < 1 for row in report.linears)
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
