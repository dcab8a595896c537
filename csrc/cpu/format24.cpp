// The portable path of the format ops, and the choice of a path.
#include "format24.h"
#include "format24_masks.h"
#include "memory.h"

#include <cstring>

namespace sparsekit::cpu {
namespace {

// Eight integers: what a compiler turns into registers of SSE or NEON.
template <class Int> struct Eight : MasksOfBits<Eight<Int>, Eight<int8_t>> {
    struct V {
        Int v[8];
    };
    static constexpr int kLanes = 8;

    template <class Each> static V make(const Each &each) {
        V a;
        for (int i = 0; i < 8; ++i)
            a.v[i] = static_cast<Int>(each(i));
        return a;
    }
    template <class Each> static uint64_t each_lane(const Each &each) {
        uint64_t found = 0;
        for (int i = 0; i < 8; ++i)
            found |= uint64_t{each(i)} << i;
        return found;
    }
    static V load(const Int *p) {
        V a;
        std::memcpy(a.v, p, sizeof a.v);
        return a;
    }
    static void store(Int *p, V a) { std::memcpy(p, a.v, sizeof a.v); }
    static void stream(Int *p, V a) { store(p, a); }
    static V set(Int a) {
        return make([&](int) { return a; });
    }
    static V land(V a, V b) {
        return make([&](int i) { return a.v[i] & b.v[i]; });
    }
    static V lxor(V a, V b) {
        return make([&](int i) { return a.v[i] ^ b.v[i]; });
    }
    static V min(V a, V b) {
        return make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
    }
    static V max(V a, V b) {
        return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
    }
    static uint64_t gt(V a, V b) {
        return each_lane([&](int i) { return a.v[i] > b.v[i]; });
    }
    static uint64_t test(V a, V b) {
        return each_lane([&](int i) { return (a.v[i] & b.v[i]) != 0; });
    }
    static V from_bits(uint64_t bits) {
        return make([&](int i) { return -static_cast<Int>(bits >> i & 1); });
    }
    static V nonzero(V a, V b) {
        return make([&](int i) { return a.v[i] & b.v[i] ? a.v[i] : 0; });
    }
    template <int r> static V rotate(V a) {
        return make([&](int i) { return a.v[(i & 4) | ((i + r) & 3)]; });
    }
    static V order(V a, V) {
        return make([&](int i) { return order_of(a.v[i]); });
    }
    static V flipped_abs(V a) {
        return make([&](int i) { return (a.v[i] < 0 ? -a.v[i] : a.v[i]) ^ -128; });
    }
};

struct Portable {
    template <class Int> using Lanes = Eight<Int>;

    static void fence() {}

    template <class W, class Clean> static void pack(const W *p, uint64_t kept, const Clean &clean, W *out) {
        W copy[kWord];
        for (int i = 0; i < kWord; i += Lanes<W>::kLanes)
            Lanes<W>::store(copy + i, clean(Lanes<W>::load(p + i), i));
        for (; kept; kept &= kept - 1)
            *out++ = copy[__builtin_ctzll(kept)];
    }
    template <class W> static void gather(const W *p, uint64_t kept, W *out) { gather_each(p, kept, out); }
    template <class W> static void unpack(const W *values, uint64_t kept, W *out) {
        for (int column = 0; column < kWord; ++column)
            out[column] = kept >> column & 1 ? *values++ : W{0};
    }
};

} // namespace

const Format24Path kFormat24Portable = path<Portable>();

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
