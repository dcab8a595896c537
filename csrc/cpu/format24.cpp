// The choice of a path of the format ops.
#include "format24.h"
#include "format24_bits.h"
#include "linear24.h"
#include "memory.h"
#include "sizes.h"

#include <cstring>

namespace sparsekit::cpu {
namespace {

// AVX-512 without VBMI2 cannot gather 16-bit lanes by a mask: AVX2 then does better.
const Format24Path &format24() {
#if defined(__x86_64__)
    static const bool vbmi2 = __builtin_cpu_supports("avx512vbmi2");
    const char *isa = cpu_isa();
    if (std::strcmp(isa, "avx512") == 0 && vbmi2)
        return kFormat24Vbmi2;
    if (std::strcmp(isa, "portable") != 0)
        return kFormat24Avx2;
#endif
    return kFormat24Portable;
}

// What decides, by whatever kind; a mask is bytes.
Matrix ranks(const void *rank, int kind, int dtype, int64_t row_stride, int64_t col_stride) {
    return {rank, row_stride, col_stride, kind == kByMask ? kInt8 : DType(dtype)};
}

void prune(const Prune24 &p, int threads) {
    p.status[0] = p.status[1] = INT64_MAX;
    if (p.rows <= 0 || p.cols <= 0)
        return;
    const int64_t blocks = ceil_div(p.cols, 8), size = width_of(p.w.dtype);
    prefer_huge_pages(p.values, p.rows * blocks * 4 * size);
    prefer_huge_pages(p.meta, p.rows * blocks);
    prefer_huge_pages(p.dense, p.rows * p.cols * size);
    format24().prune(p, threads);
}

} // namespace
} // namespace sparsekit::cpu

namespace sparsekit {

using cpu::Matrix;

void compress24_cpu(const void *w, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype,
                    void *values, uint8_t *meta, int64_t *status, int threads) {
    cpu::prune({rows, cols, {w, row_stride, col_stride, DType(dtype)}, kByNonzero, {}, values, meta, nullptr, status},
               threads);
}

void prune_compress24_cpu(const void *w, int64_t rows, int64_t cols, int64_t w_row_stride, int64_t w_col_stride,
                          int dtype, const void *rank, int rank_kind, int rank_dtype, int64_t rank_row_stride,
                          int64_t rank_col_stride, void *values, uint8_t *meta, int64_t *status, int threads) {
    const Matrix matrix{w, w_row_stride, w_col_stride, DType(dtype)};
    const Matrix by = cpu::ranks(rank, rank_kind, rank_dtype, rank_row_stride, rank_col_stride);
    cpu::prune({rows, cols, matrix, RankKind(rank_kind), by, values, meta, nullptr, status}, threads);
}

void prune24_cpu(const void *w, int64_t rows, int64_t cols, int64_t w_row_stride, int64_t w_col_stride, int dtype,
                 const void *rank, int rank_kind, int rank_dtype, int64_t rank_row_stride, int64_t rank_col_stride,
                 void *out, int64_t *status, int threads) {
    const Matrix matrix{w, w_row_stride, w_col_stride, DType(dtype)};
    const Matrix by = cpu::ranks(rank, rank_kind, rank_dtype, rank_row_stride, rank_col_stride);
    cpu::prune({rows, cols, matrix, RankKind(rank_kind), by, nullptr, nullptr, out, status}, threads);
}

void expand24_cpu(const void *values, const uint8_t *meta, int itemsize, int64_t rows, int64_t cols, void *out,
                  int threads) {
    if (rows <= 0 || cols <= 0)
        return;
    cpu::prefer_huge_pages(out, rows * cols * itemsize);
    cpu::format24().expand({values, meta, itemsize, rows, cols, out}, threads);
}

void mask_nm_cpu(const void *scores, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype,
                 int n, int m, bool pairs, uint8_t *mask, int64_t *status, int threads) {
    status[0] = INT64_MAX;
    if (rows <= 0 || cols <= 0)
        return;
    cpu::prefer_huge_pages(mask, rows * cols);
    cpu::format24().mask_nm({rows, cols, {scores, row_stride, col_stride, DType(dtype)}, n, m, pairs, mask, status},
                            threads);
}

void mask_rows_cpu(const void *scores, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype,
                   int64_t kept, uint8_t *mask, int64_t *status, int threads) {
    status[0] = INT64_MAX;
    if (rows <= 0 || cols <= 0)
        return;
    cpu::prefer_huge_pages(mask, rows * cols);
    cpu::format24().mask_rows({rows, cols, {scores, row_stride, col_stride, DType(dtype)}, kept, mask, status},
                              threads);
}

void validate24_cpu(const void *values, const uint8_t *meta, int dtype, int64_t rows, int64_t cols, int64_t *status,
                    int threads) {
    status[0] = status[1] = INT64_MAX;
    if (rows > 0 && cols > 0)
        cpu::format24().check({values, meta, rows, cols, DType(dtype), status}, threads);
}

} // namespace sparsekit
