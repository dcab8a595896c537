// The OBS step of a block of columns, for vectors of L floats.
//
// A lane is a row: rows are independent, so no column waits for a sum across lanes. A task turns 2 L rows of the block
// over into a tile of columns, [cols, 2 L] floats (16 KB for 128 columns and AVX-512), which stays in the first-level
// cache while its columns are eliminated from left to right, and writes weights, errors and mask back by rows.
//
// Updates go out in three sizes: within a step of up to 8 columns, in registers; from a step to the rest of its span
// (whole groups, 8 columns or more); and from a span to the rest of the block, where a column of the tile is loaded and
// stored once for 8 columns eliminated. So multiply-adds bound it: rows * cols^2 / 2 of them.
//
// A row's result depends neither on the other rows nor on the number of threads. Unnamed namespace: see epilogue.h.
#pragma once
#include "linear24.h"
#include "obs.h"
#include "sizes.h"
#include "threads.h"

#include <atomic>
#include <cstring>
#include <tuple>
#include <utility>

namespace sparsekit::cpu {
namespace {

template <int L> struct Vector {
    typedef float F __attribute__((vector_size(4 * L)));
    typedef int32_t I __attribute__((vector_size(4 * L)));
};

// Half s of a transposition: blocks of s lanes change places between x and y.
template <int S, class F, int... lane> inline std::pair<F, F> exchange(F x, F y, std::integer_sequence<int, lane...>) {
    constexpr int L = sizeof...(lane);
#ifdef __clang__
    return {__builtin_shufflevector(x, y, (lane & S ? L + lane - S : lane)...),
            __builtin_shufflevector(x, y, (lane & S ? L + lane : lane + S)...)};
#else
    using I = typename Vector<L>::I;
    return {__builtin_shuffle(x, y, I{(lane & S ? L + lane - S : lane)...}),
            __builtin_shuffle(x, y, I{(lane & S ? L + lane : lane + S)...})};
#endif
}

// a[i][j] becomes a[j][i].
template <int L, int S = L / 2> inline void transpose(typename Vector<L>::F (&a)[L]) {
    if constexpr (S > 0) {
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i)
            if (!(i & S))
                std::tie(a[i], a[i + S]) = exchange<S>(a[i], a[i + S], std::make_integer_sequence<int, L>{});
        transpose<L, S / 2>(a);
    }
}

// A byte 0 or 1 for each of the 8 bits, lowest first, and back.
inline uint64_t bytes_of(uint32_t bits) {
    const uint64_t apart = (bits & 0xff) * 0x0101010101010101u & 0x8040201008040201u;
    return (apart + 0x7f7f7f7f7f7f7f7fu) >> 7 & 0x0101010101010101u;
}
inline uint32_t bits_of(uint64_t bytes) { return bytes * 0x0102040810204080u >> 56; }

template <int L> class ObsTile {
    using F = typename Vector<L>::F;
    using I = typename Vector<L>::I;
    static constexpr int kRank = L == 16 ? 8 : 4; // columns a pass over the tile eliminates: what the registers hold

  public:
    static constexpr int kVectors = 2, kRows = kVectors * L;

    static int64_t floats(const ObsBlock &p) {
        return 2 * columns(p) * kRows + ceil_div(p.cols, 32) * kRows + columns(p) + units(p) * (L + kRows);
    }

    ObsTile(const ObsBlock &problem, float *memory)
        : p(problem), w(memory), errors(w + columns(p) * kRows),
          kept(reinterpret_cast<int32_t *>(errors + columns(p) * kRows)),
          inverse(reinterpret_cast<float *>(kept + ceil_div(p.cols, 32) * kRows)), scores(inverse + columns(p)),
          ranks(reinterpret_cast<int32_t *>(scores + units(p) * L)) {}

    // Rows [first, first + kRows) of one weight. Returns the first of them with NaN, or -1.
    int64_t run(int64_t weight, int64_t first) {
        upper = p.upper + weight * p.cols * p.cols;
        const int64_t count = min(kRows, p.rows - first), place = (weight * p.rows + first) * p.cols;
        read(p.w + weight * p.batch_stride + first * p.row_stride, count);
        if (p.given)
            read_mask(p.mask + place, count);
        else
            std::memset(kept, 0, ceil_div(p.cols, 32) * kRows * sizeof *kept);
        for (int64_t j = 0; j < p.cols; ++j)
            inverse[j] = 1.0f / upper[j * p.cols + j];
        for (int v = 0; v < kVectors; ++v)
            loss[v] = F{}, bad[v] = I{};

        const int64_t group = p.given ? kRank : int64_t{p.m} << p.pairs;
        const int64_t span = group * ceil_div(8, group);
        for (int64_t begin = 0; begin < p.cols; begin += span) {
            const int64_t end = min(begin + span, p.cols);
            for (int64_t j = begin; j < end;) {
                if (!p.given && j % group == 0)
                    choose(j, min(group, p.cols - j));
                // No step goes past its group: the next one's choice waits for it.
                j += eliminate(j, min(min((j / group + 1) * group, p.cols), end), end);
            }
            update(begin, end, end, p.cols);
        }

        write(w, p.w + weight * p.batch_stride + first * p.row_stride, p.row_stride, count);
        write(errors, p.errors + place, p.cols, count);
        if (!p.given)
            write_mask(p.mask + place, count);
        float sums[kRows];
        std::memcpy(sums, loss, sizeof sums);
        std::memcpy(p.loss + weight * p.rows + first, sums, count * sizeof(float));
        int32_t nan[kRows];
        for (int v = 0; v < kVectors; ++v)
            bad[v] |= loss[v] != loss[v];
        std::memcpy(nan, bad, sizeof nan);
        for (int64_t row = 0; row < count; ++row)
            if (nan[row])
                return row;
        return -1;
    }

  private:
    const ObsBlock &p;
    float *w, *errors; // [columns, kRows]
    int32_t *kept;     // [cols / 32, kRows], bit j % 32 of word j / 32
    float *inverse;    // [columns] 1 / U_jj
    float *scores;     // [units, L]
    int32_t *ranks;    // [units, kRows]
    const float *upper = nullptr;
    F loss[kVectors];
    I bad[kVectors]; // of each row, whether it met NaN

    static int64_t columns(const ObsBlock &p) { return ceil_div(p.cols, L) * L; }
    static int64_t units(const ObsBlock &p) { return p.given ? 0 : min(p.m, p.cols); }

    static F load(const float *from) {
        F v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static void store(float *to, F v) { std::memcpy(to, &v, sizeof v); }
    static I load(const int32_t *from) {
        I v;
        std::memcpy(&v, from, sizeof v);
        return v;
    }
    static void store(int32_t *to, I v) { std::memcpy(to, &v, sizeof v); }
    float *column(float *tile, int64_t j, int v) const { return tile + j * kRows + v * L; }
    I keeps(int64_t j, int v) const {
        return (load(kept + j / 32 * kRows + v * L) & static_cast<int32_t>(uint32_t{1} << j % 32)) != 0;
    }

    void read(const float *from, int64_t count) {
        for (int v = 0; v < kVectors; ++v)
            for (int64_t j = 0; j < p.cols; j += L) {
                F a[L];
                const int64_t there = min(L, p.cols - j);
#pragma GCC unroll 16
                for (int i = 0; i < L; ++i) {
                    a[i] = F{};
                    if (v * L + i < count)
                        std::memcpy(&a[i], from + (v * L + i) * p.row_stride + j, there * sizeof(float));
                }
                transpose<L>(a);
#pragma GCC unroll 16
                for (int i = 0; i < L; ++i)
                    store(column(w, j + i, v), a[i]);
            }
    }

    void write(float *tile, float *to, int64_t stride, int64_t count) const {
        for (int v = 0; v < kVectors; ++v)
            for (int64_t j = 0; j < p.cols; j += L) {
                F a[L];
                const int64_t there = min(L, p.cols - j);
#pragma GCC unroll 16
                for (int i = 0; i < L; ++i)
                    a[i] = load(column(tile, j + i, v));
                transpose<L>(a);
                for (int i = 0; i < min(L, count - v * L); ++i)
                    std::memcpy(to + (v * L + i) * stride + j, &a[i], there * sizeof(float));
            }
    }

    void read_mask(const uint8_t *from, int64_t count) {
        for (int64_t row = 0; row < kRows; ++row)
            for (int64_t word = 0; word < ceil_div(p.cols, 32); ++word) {
                uint32_t bits = 0;
                for (int64_t part = 0; part < 4 && row < count && word * 32 + part * 8 < p.cols; ++part) {
                    uint64_t bytes = 0;
                    const int64_t j = word * 32 + part * 8;
                    std::memcpy(&bytes, from + row * p.cols + j, min(8, p.cols - j));
                    bits |= bits_of(bytes) << 8 * part;
                }
                kept[word * kRows + row] = static_cast<int32_t>(bits);
            }
    }

    void write_mask(uint8_t *to, int64_t count) const {
        for (int64_t row = 0; row < count; ++row)
            for (int64_t j = 0; j < p.cols; j += 8) {
                const uint64_t bytes = bytes_of(static_cast<uint32_t>(kept[j / 32 * kRows + row]) >> j % 32);
                std::memcpy(to + row * p.cols + j, &bytes, min(8, p.cols - j));
            }
    }

    // The n best of the units of columns [begin, begin + count), a unit being a column or a pair.
    void choose(int64_t begin, int64_t count) {
        const int64_t wide = 1 + p.pairs, there = ceil_div(count, wide);
        for (int v = 0; v < kVectors; ++v) {
            for (int64_t u = 0; u < there; ++u) {
                F score{};
                for (int64_t j = begin + u * wide; j < min(begin + (u + 1) * wide, begin + count); ++j) {
                    const F root = load(column(w, j, v)) * inverse[j];
                    score += root * root;
                }
                store(scores + u * L, score);
                store(ranks + u * kRows + v * L, I{});
            }
            if (there == 4)
                rank<4>(4, v);
            else
                rank<0>(there, v);
        }
        for (int64_t j = begin; j < begin + count; ++j)
            for (int v = 0; v < kVectors; ++v) {
                int32_t *word = kept + j / 32 * kRows + v * L;
                const I stays = load(ranks + (j - begin) / wide * kRows + v * L) < p.n;
                store(word, load(word) | (stays & static_cast<int32_t>(uint32_t{1} << j % 32)));
            }
    }

    // How many of the other units beat each; of equals the lower one does.
    template <int UNITS> void rank(int64_t there, int v) {
        const int64_t units = UNITS ? UNITS : there;
        for (int64_t low = 0; low < units; ++low) {
            const F a = load(scores + low * L);
            I beaten = load(ranks + low * kRows + v * L);
            for (int64_t high = low + 1; high < units; ++high) {
                const I wins = a >= load(scores + high * L); // -1 where it does
                int32_t *other = ranks + high * kRows + v * L;
                store(other, load(other) - wins);
                beaten += wins + 1;
            }
            store(ranks + low * kRows + v * L, beaten);
        }
    }

    // Columns [j, most) or fewer, and what follows of them to the columns before `end`. Returns how many.
    int64_t eliminate(int64_t j, int64_t most, int64_t end) {
        if (kRank >= 8 && most - j >= 8)
            return step<8>(j, end);
        if (most - j >= 4)
            return step<4>(j, end);
        return step<1>(j, end);
    }

    template <int P> int64_t step(int64_t j, int64_t end) {
        F now[P][kVectors], left[P][kVectors];
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i)
            for (int v = 0; v < kVectors; ++v)
                now[i][v] = load(column(w, j + i, v));
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) {
            const float *u = upper + (j + i) * p.cols + j;
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) {
                const I stays = keeps(j + i, v);
                bad[v] |= now[i][v] != now[i][v];
                left[i][v] = stays ? F{} : now[i][v] * inverse[j + i];
                now[i][v] = stays ? now[i][v] : F{};
                loss[v] += left[i][v] * left[i][v];
#pragma GCC unroll 8
                for (int c = i + 1; c < P; ++c)
                    now[c][v] -= left[i][v] * u[c];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i)
            for (int v = 0; v < kVectors; ++v) {
                store(column(w, j + i, v), now[i][v]);
                store(column(errors, j + i, v), left[i][v]);
            }
        update(j, j + P, j + P, end);
        return P;
    }

    // Takes what columns [begin, end) leave behind from columns [from, to).
    void update(int64_t begin, int64_t end, int64_t from, int64_t to) {
        if (from >= to)
            return;
        int64_t j = begin;
        for (; j + kRank <= end; j += kRank)
            subtract<kRank>(j, from, to);
        for (; j + 4 <= end; j += 4)
            subtract<4>(j, from, to);
        for (; j < end; ++j)
            subtract<1>(j, from, to);
    }

    template <int K> void subtract(int64_t j, int64_t from, int64_t to) {
        F left[K][kVectors];
#pragma GCC unroll 8
        for (int i = 0; i < K; ++i)
            for (int v = 0; v < kVectors; ++v)
                left[i][v] = load(column(errors, j + i, v));
        for (int64_t c = from; c < to; ++c) {
            F now[kVectors];
            for (int v = 0; v < kVectors; ++v)
                now[v] = load(column(w, c, v));
#pragma GCC unroll 8
            for (int i = 0; i < K; ++i)
                for (int v = 0; v < kVectors; ++v)
                    now[v] -= left[i][v] * upper[(j + i) * p.cols + c];
            for (int v = 0; v < kVectors; ++v)
                store(column(w, c, v), now[v]);
        }
    }
};

template <int L> void obs_block(const ObsBlock &p, int threads) {
    using Tile = ObsTile<L>;
    const int64_t of_weight = ceil_div(p.rows, Tile::kRows), tasks = p.batch * of_weight;
    const int used = static_cast<int>(min(min(threads, kMaxThreads), tasks));
    const int64_t floats = ceil_div(Tile::floats(p), 16) * 16;
    const Scratch memory(used * floats);
    std::atomic<int64_t> first_bad{INT64_MAX};
    parallel_for(tasks, used, [&](int64_t task, int worker) {
        const int64_t weight = task / of_weight, first = task % of_weight * Tile::kRows;
        const int64_t row = Tile(p, memory.data() + worker * floats).run(weight, first);
        if (row < 0)
            return;
        int64_t now = first_bad.load();
        const int64_t place = weight * p.rows + first + row;
        while (place < now && !first_bad.compare_exchange_weak(now, place))
            ;
    });
    p.status[0] = first_bad.load();
}

} // namespace
} // namespace sparsekit::cpu
