"""The AVX-512 paths of the CPU kernels, emulated: the tests of those kernels run again on the one path, of each what depends on the
instruction set. The truth of the format is here reference.py, which is quicker than a definition group by group.

That a compiler makes of the sources what they say is not tested here, nor the choice of a path by what a CPU has."""

from pathlib import Path

import format24_cpu
import pytest
import test_format24_cpu_kernel as formats
import test_format24_transposed as transposed
import test_linear24_cpu_kernel as linear
import test_mask_rows_cpu_kernel as long_rows
import test_obs as obs
import torch
from avx512_emulated import COMPILER, Emulated, compiled

import sparsekit
from sparsekit import reference

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no g++ to build the emulator with"),
    pytest.mark.skipif("avx2" not in format24_cpu.PATHS, reason="the emulated AVX-512 is compiled for AVX2"),
]

AGAIN = [
    linear.test_product,
    linear.test_every_number_of_rows,
    linear.test_tail_columns,
    linear.test_each_pair_of_columns_in_each_group,
    linear.test_nothing_to_write,
    linear.test_no_columns_give_the_bias,
    linear.test_activation_of_the_product,
    linear.test_only_y_is_written_and_rows_may_lie_apart,
    obs.test_patterns,
    obs.test_a_given_mask,
    obs.test_views_of_wider_weights,
    obs.test_a_row_is_the_same_wherever_it_stands,
    obs.test_a_tie_goes_to_the_lower_column,
    formats.test_the_two_largest_of_every_number_of_columns,
    formats.test_every_layout_gives_the_same,
    formats.test_scores_decide,
    formats.test_the_lowest_score_is_above_what_is_past_the_end,
    formats.test_a_mask_is_kept_as_given,
    formats.test_compress24_keeps_non_zeros_then_the_lowest_free_columns,
    formats.test_minus_zero_is_stored_as_zero,
    formats.test_expand24_places_every_pair_of_nibbles,
    formats.test_more_than_two_of_four,
    formats.test_validate24,
    formats.test_mask_nm,
    formats.test_pairs,
    formats.test_mask_rows,
    formats.test_scores_of_fp64_are_not_narrowed,
    transposed.test_packing_of_transposed_tiles,
]
globals().update({test.__name__: test for test in AGAIN})

TRUTH = {
    "pack_largest": lambda w: reference.prune_compress24(w, None, None),
    "pack_scored": lambda w, scores: reference.prune_compress24(w, scores, None),
    "pack_masked": lambda w, mask: reference.prune_compress24(w, None, mask),
    "pack_nonzero": reference.compress24,
    "unpack": reference.expand24,
    "keep_nm": lambda scores, n, m, pairs=False: reference.mask_nm(scores, n, m, pairs).byte(),
    "keep_rows": lambda scores, kept: reference.mask_rows(scores, kept).byte(),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("avx512"))


@pytest.fixture(autouse=True)
def isa(library, monkeypatch):
    """The emulated path in the extension's place, wherever the tests above look for it."""
    path = Emulated(library)
    for module in (format24_cpu, linear, obs, sparsekit.ops.obs):
        monkeypatch.setattr(module, "_C", path)
    for module in (format24_cpu, obs):
        monkeypatch.setattr(module, "CHOSEN", "avx512")
    monkeypatch.setattr(format24_cpu, "PATHS", ["avx512"])
    for module in (formats, transposed):
        for name in vars(module).keys() & TRUTH:
            monkeypatch.setattr(module, name, TRUTH[name])
    return "avx512"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_lines_past_the_caches_are_whole_and_fenced(dtype, monkeypatch):
    transposed.test_large_transposed_matrices(dtype, 17 * 64, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_masks_of_transposed_tiles(dtype):
    transposed.test_masks_of_transposed_tiles(dtype)


@pytest.mark.parametrize("how", ["row-major", "transposed"])
def test_the_first_bad_group_is_named(how):
    formats.test_the_first_bad_group_is_named(how, (67, 132))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_long_rows(dtype):
    long_rows.test_any_bits(dtype)


INSTEAD = """
import sys
sys.path.insert(0, {folder!r})
import sparsekit, avx512_emulated
sparsekit._C = avx512_emulated.Emulated({library!r})
"""


@pytest.mark.parametrize("walls", [linear.GUARDED, formats.WALLS], ids=["linear24", "the format"])
def test_nothing_is_read_or_written_past_an_array(library, walls):
    """Every array ends at a page that may not be touched; one step too far ends the process."""
    folder = str(Path(__file__).parent)
    result = linear.run(INSTEAD.format(folder=folder, library=str(library)) + walls.format(folder=folder, isa="avx512"))
    assert result.returncode == 0 and result.stdout.strip() == "done", result.stderr[-2000:]
