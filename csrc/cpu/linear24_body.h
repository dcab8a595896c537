// y[m, n] = act(x w^T + bias) with w stored 2:4, for one instruction set `Isa`; two ways, by m.
//
// Everything goes by words: 32 columns of one row of w, that is 16 kept values and 32 bits of metadata.
//
// dot (few rows of x): lanes are the kept values of one row of w; the metadata select the activations they meet. A task
// owns a run of rows of w and all of x. Bound at one row of x by reading values and metadata, 9/16 of the dense 16-bit
// weight; from about four on by the two ports of a multiply-add and the permute before it.
//
// panel (many rows of x): lanes are rows of x. x is turned over once, to fp32 [k, rows], so that a kept value costs MB
// multiply-adds on the column that its two bits of metadata name: half the arithmetic of the dense product. A task owns
// a block of rows of w times some blocks of rows of x, and goes over w where it lies, a slice of its columns at a time.
// Bound by loads from the first-level cache: one a multiply-add.
//
// An element of y is summed in one task and in one order, whatever the number of threads.
//
// Isa provides F, kLanes floats wide, with zero, load (float, Half, BFloat16), store, add, fma and sum; load_four (of
// the same) and spread<lane>, to fill a vector with one of four numbers; Choice, decode and pick to select activations,
// and arrange, the order in which pick wants a word of x; kDotBlock, the rows of w of a dot tile; kPanelRows, the rows
// of x from which panel is faster than dot, as measured. Unnamed namespace: see epilogue.h.
#pragma once
#include "epilogue.h"
#include "sizes.h"
#include "threads.h"

#include <new>
#include <type_traits>
#include <utility>

namespace sparsekit::cpu {
namespace {

constexpr int kColumns = 32, kKept = 16; // of a word

// body(0), ..., body(N - 1) with the index known at compile time, so that arrays indexed by it stay in registers.
template <class Body, int... I> inline void unroll(std::integer_sequence<int, I...>, const Body &body) {
    (body(std::integral_constant<int, I>{}), ...);
}
template <int N, class Body> inline void unroll(const Body &body) {
    unroll(std::make_integer_sequence<int, N>{}, body);
}

// Bits 2j, 2j + 1 are the column, within its group of four, of the j-th kept value.
inline uint32_t load_meta(const uint8_t *p) {
    return p[0] | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
}

inline int64_t eight_bytes(const void *p) {
    int64_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
}

// w by rows and words; the last word of a row is short where k is not a multiple of 32.
template <class W> struct Weight {
    const W *values;
    const uint8_t *meta;
    int64_t row_values, row_meta; // of a row: kp / 2 values, kp / 8 bytes
    int64_t full, words;          // words of a row that are whole, and all of them

    explicit Weight(const Linear24 &p)
        : values(static_cast<const W *>(p.values)), meta(p.meta), row_values(4 * ceil_div(p.k, 8)),
          row_meta(ceil_div(p.k, 8)), full(row_meta / 4), words(ceil_div(row_meta, 4)) {}
};

// The short last word of a row, filled up with zeros: nothing is read past the row.
template <class W> struct LastWord {
    W values[kKept] = {};
    uint8_t meta[4] = {};

    LastWord(const Weight<W> &w, int64_t row) {
        const int64_t bytes = w.row_meta - 4 * w.full;
        std::memcpy(meta, w.meta + row * w.row_meta + 4 * w.full, bytes);
        std::memcpy(values, w.values + row * w.row_values + kKept * w.full, 4 * bytes * sizeof(W));
    }
};

// dst[0, 32) = x[0, count), then zeros.
template <class Isa, class T> void load_word(const T *x, int64_t count, float *dst) {
    T copy[kColumns];
    if (count < kColumns) {
        std::memset(copy, 0, sizeof copy);
        std::memcpy(copy, x, count * sizeof(T));
        x = copy;
    }
    for (int i = 0; i < kColumns; i += Isa::kLanes)
        Isa::store(dst + i, Isa::load(x + i));
}

// ---- dot ----

// Floats between rows of the copy of x: not a multiple of a page, or all rows would want the same lines of the cache.
template <class W> int64_t dot_stride(const Weight<W> &w) { return w.words * kColumns + 16; }

// One word of NB rows of w with MB rows of x, x_stride floats apart.
template <class Isa, class W, int MB, int NB>
inline void dot_word(const float *x, int64_t x_stride, const W *const (&values)[NB], const uint8_t *const (&meta)[NB],
                     typename Isa::F (&sums)[NB][MB]) {
    for (int part = 0; part < kKept / Isa::kLanes; ++part)
        for (int r = 0; r < NB; ++r) {
            const auto choice = Isa::decode(load_meta(meta[r]), part);
            const auto weight = Isa::load(values[r] + part * Isa::kLanes);
            for (int i = 0; i < MB; ++i)
                sums[r][i] = Isa::fma(weight, Isa::pick(x + i * x_stride, part, choice), sums[r][i]);
        }
}

// out[i * out_stride + r] = the product of row r of NB rows of w from `row` on and row i of MB rows of x.
template <class Isa, class W, int MB, int NB>
[[gnu::flatten]] void dot_tile(const Weight<W> &w, int64_t row, const float *x, float *out, int64_t out_stride) {
    const int64_t x_stride = dot_stride(w);
    typename Isa::F sums[NB][MB];
    const W *values[NB];
    const uint8_t *meta[NB];
    for (int r = 0; r < NB; ++r) {
        values[r] = w.values + (row + r) * w.row_values;
        meta[r] = w.meta + (row + r) * w.row_meta;
        for (int i = 0; i < MB; ++i)
            sums[r][i] = Isa::zero();
    }
    for (int64_t word = 0; word < w.full; ++word, x += kColumns) {
        dot_word<Isa, W, MB, NB>(x, x_stride, values, meta, sums);
        for (int r = 0; r < NB; ++r) {
            // The same columns of the next rows: too far for the hardware, which stops at a page.
            __builtin_prefetch(reinterpret_cast<const char *>(values[r]) + NB * w.row_values * sizeof(W));
            values[r] += kKept;
            meta[r] += 4;
        }
    }
    if (w.full < w.words)
        for (int r = 0; r < NB; ++r) {
            const LastWord<W> last(w, row + r);
            const W *const last_values[1] = {last.values};
            const uint8_t *const last_meta[1] = {last.meta};
            typename Isa::F(&row_sums)[1][MB] = reinterpret_cast<typename Isa::F(&)[1][MB]>(sums[r]);
            dot_word<Isa, W, MB, 1>(x, x_stride, last_values, last_meta, row_sums);
        }
    for (int r = 0; r < NB; ++r)
        for (int i = 0; i < MB; ++i)
            out[i * out_stride + r] = Isa::sum(sums[r][i]);
}

// NB rows of w with all m rows of x.
template <class Isa, class W, int NB>
void dot_rows(const Weight<W> &w, int64_t row, const float *x, int64_t m, float *out, int64_t out_stride) {
    for (int64_t done = 0; done < m;) {
        const float *rows = x + done * dot_stride(w);
        float *to = out + done * out_stride;
        switch (min(m - done, 4)) {
        case 1:
            dot_tile<Isa, W, 1, NB>(w, row, rows, to, out_stride);
            break;
        case 2:
            dot_tile<Isa, W, 2, NB>(w, row, rows, to, out_stride);
            break;
        case 3:
            dot_tile<Isa, W, 3, NB>(w, row, rows, to, out_stride);
            break;
        default:
            dot_tile<Isa, W, 4, NB>(w, row, rows, to, out_stride);
        }
        done += min(m - done, 4);
    }
}

template <class Isa, class T, class W> void dot(const Linear24 &p, int threads) {
    constexpr int NB = Isa::kDotBlock;
    const Weight<W> w(p);
    const int64_t row_bytes = w.row_values * sizeof(W) + w.row_meta;
    const int64_t rows = kFinish * max(1, 65536 / (kFinish * max(1, row_bytes))); // of a task: 64 KB of w, or 16 rows
    const Scratch x(p.m * dot_stride(w));
    for (int64_t i = 0; i < p.m; ++i)
        for (int64_t word = 0; word < w.words; ++word) {
            float *dst = x.data() + i * dot_stride(w) + word * kColumns;
            load_word<Isa>(static_cast<const T *>(p.x) + i * p.ldx + word * kColumns,
                           min(kColumns, p.k - word * kColumns), dst);
            Isa::arrange(dst);
        }
    parallel_for(ceil_div(p.n, rows), threads, [&](int64_t task, int) {
        const int64_t end = min(p.n, (task + 1) * rows);
        float sums[Isa::kPanelRows * kFinish] = {};
        for (int64_t row = task * rows; row < end; row += kFinish) {
            const int count = static_cast<int>(min(kFinish, end - row));
            int r = 0;
            for (; r + NB <= count; r += NB)
                dot_rows<Isa, W, NB>(w, row + r, x.data(), p.m, sums + r, kFinish);
            for (; r < count; ++r)
                dot_rows<Isa, W, 1>(w, row + r, x.data(), p.m, sums + r, kFinish);
            for (int64_t i = 0; i < p.m; ++i)
                finish(sums + i * kFinish, p.bias ? static_cast<const T *>(p.bias) + row : nullptr,
                       static_cast<T *>(p.y) + i * p.n + row, count, p.activation);
        }
    });
}

// ---- panel ----

constexpr int kMaxBlock = 8;     // vectors of rows of x in a block
constexpr int kGroup = 4;        // blocks of rows of x that share a slice of w, at most
constexpr int kRowBlock = 256;   // rows of w in a task, at most
constexpr int kTaskSums = 65536; // floats: 256 KB
constexpr int kPadding = 16;     // floats between rows of sums: a column of them must not fall on one line of the cache
constexpr int kSlice = 32768;    // bytes of a panel that w passes by: those of a first-level cache
constexpr int kAhead = 4;        // rows of w between a prefetch and its use

constexpr int power_of_two(int v) { return v <= 1 ? 1 : 2 * power_of_two((v + 1) / 2); }

// Rows of a panel of x are a power of two of bytes apart, so that metadata bits become an offset by a shift and a mask.
template <class Isa> constexpr int panel_stride(int block) { return power_of_two(block) * Isa::kLanes; }

// Words of w that meet a slice of a panel of `block` vectors.
template <class Isa> constexpr int64_t slice_words(int block) {
    return max(1, kSlice / (kColumns * 4 * panel_stride<Isa>(block)));
}

// Words of rows of w.
template <class W> struct Rows {
    const W *values;
    const uint8_t *meta;
    int64_t row_values, row_meta, words;
};

// sums[rows, MB vectors], rows `pitch` apart, += words of rows of w times [words * 32, stride] of a panel of x.
template <class Isa, class W, int MB>
[[gnu::flatten]] void panel_slice(const float *panel, Rows<W> w, int64_t rows, float *sums, int64_t pitch) {
    constexpr int L = Isa::kLanes, stride = panel_stride<Isa>(MB);
    // Few sums are kept several times over: a multiply-add takes four cycles and two can start in each.
    constexpr int copies = MB >= 7 ? 1 : MB >= 4 ? 2 : MB == 3 ? 3 : MB == 2 ? 4 : 8;
    for (int64_t row = 0; row < rows; ++row, w.values += w.row_values, w.meta += w.row_meta, sums += pitch) {
        typename Isa::F acc[copies][MB];
        unroll<MB>([&](auto i) { acc[0][i] = Isa::load(sums + i * L); });
        unroll<(copies - 1) * MB>([&](auto i) { acc[1 + i / MB][i % MB] = Isa::zero(); });
        const float *columns = panel;
        const W *values = w.values;
        const uint8_t *meta = w.meta;
        // The hardware does not follow from row to row.
        __builtin_prefetch(meta + kAhead * w.row_meta);
        for (int64_t word = 0; word < w.words; ++word, columns += kColumns * stride, values += kKept, meta += 4) {
            __builtin_prefetch(values + kAhead * w.row_values);
            const uint32_t bits = load_meta(meta);
            unroll<kKept / 4>([&](auto quarter) {
                // A load for four weights: loads are what is short here, and shuffles are not.
                const auto four = Isa::load_four(values + 4 * quarter);
                unroll<4>([&](auto lane) {
                    constexpr int j = 4 * quarter + lane;
                    const float *column = columns + (j / 2 * 4 + (bits >> 2 * j & 3)) * stride;
                    const auto weight = Isa::template spread<lane>(four);
                    unroll<MB>([&](auto i) {
                        acc[j % copies][i] = Isa::fma(weight, Isa::load(column + i * L), acc[j % copies][i]);
                    });
                });
            });
        }
        unroll<(copies - 1) * MB>([&](auto i) {
            constexpr int from = copies - 1 - i / MB; // a binary tree: copy c is added to copy c - (highest bit of c)
            constexpr int to = from - power_of_two(from / 2 + 1);
            acc[to][i % MB] = Isa::add(acc[to][i % MB], acc[from][i % MB]);
        });
        unroll<MB>([&](auto i) { Isa::store(sums + i * L, acc[0][i]); });
    }
}

template <class Isa, class W>
void panel_slice(int block, const float *panel, Rows<W> w, int64_t rows, float *sums, int64_t pitch) {
    static constexpr decltype(&panel_slice<Isa, W, 1>) table[kMaxBlock] = {
        panel_slice<Isa, W, 1>, panel_slice<Isa, W, 2>, panel_slice<Isa, W, 3>, panel_slice<Isa, W, 4>,
        panel_slice<Isa, W, 5>, panel_slice<Isa, W, 6>, panel_slice<Isa, W, 7>, panel_slice<Isa, W, 8>};
    table[block - 1](panel, w, rows, sums, pitch);
}

// panel[c, i] = x[first + i, c] for 32 columns c of one word and i < block * kLanes; zeros outside of x.
template <class Isa, class T> void turn_word(const Linear24 &p, int64_t first, int64_t word, int block, float *panel) {
    const int stride = panel_stride<Isa>(block);
    for (int i = 0; i < block * Isa::kLanes; ++i) {
        float row[kColumns] = {};
        if (first + i < p.m)
            load_word<Isa>(static_cast<const T *>(p.x) + (first + i) * p.ldx + word * kColumns,
                           min(kColumns, p.k - word * kColumns), row);
        for (int c = 0; c < kColumns; ++c)
            panel[c * stride + i] = row[c];
    }
}

// The rows of x in blocks of `full` vectors; the last may be smaller.
template <class Isa> struct Blocks {
    int64_t vectors, count;
    int full;

    explicit Blocks(int64_t m)
        : vectors(ceil_div(m, Isa::kLanes)), count(ceil_div(vectors, kMaxBlock)),
          full(static_cast<int>(ceil_div(vectors, count))) {}
    int size(int64_t b) const { return static_cast<int>(min(full, vectors - b * full)); }
    int64_t first(int64_t b) const { return b * full * Isa::kLanes; }
};

// y of `rows` rows of w from `row` on and m rows of x from `first` on, from sums[rows, pitch].
template <class T>
void finish_block(const Linear24 &p, int64_t row, int64_t rows, int64_t first, int64_t m, const float *sums,
                  int64_t pitch) {
    for (int64_t i = 0; i < m; ++i)
        for (int64_t r = 0; r < rows; r += kFinish) {
            const int run = static_cast<int>(min(kFinish, rows - r));
            float line[kFinish] = {};
            for (int j = 0; j < run; ++j)
                line[j] = sums[(r + j) * pitch + i];
            finish(line, p.bias ? static_cast<const T *>(p.bias) + row + r : nullptr,
                   static_cast<T *>(p.y) + (first + i) * p.n + row + r, run, p.activation);
        }
}

template <class Isa, class T, class W> void panel(const Linear24 &p, int threads) {
    const Weight<W> w(p);
    const Blocks<Isa> blocks(p.m);
    const int64_t panel_floats = w.words * kColumns * panel_stride<Isa>(blocks.full);
    const Scratch x(blocks.count * panel_floats);
    const auto panel_of = [&](int64_t b, int64_t word) {
        return x.data() + b * panel_floats + word * kColumns * panel_stride<Isa>(blocks.size(b));
    };
    parallel_for(blocks.count * w.words, threads, [&](int64_t task, int) {
        const int64_t b = task / w.words, word = task % w.words;
        turn_word<Isa, T>(p, blocks.first(b), word, blocks.size(b), panel_of(b, word));
    });

    // Several tasks a thread, so that a slow one does not hold up the rest. How y is cut changes no result.
    const int64_t slice = slice_words<Isa>(blocks.full);
    const int64_t group = min(kGroup, blocks.count), groups = ceil_div(blocks.count, group);
    const int64_t pitch = blocks.full * Isa::kLanes + kPadding;
    const int64_t most = min(min(kRowBlock, kTaskSums / (group * pitch)), p.n * groups / (int64_t{4} * threads));
    const int64_t rows = kFinish * max(1, most / kFinish), runs = ceil_div(p.n, rows), tasks = groups * runs;
    const int64_t sum_floats = group * rows * pitch;
    const int64_t worker_floats = sum_floats + rows * (kKept + 1); // sums, and the short last words
    const Scratch scratch(worker_floats * min(threads, tasks));
    parallel_for(tasks, threads, [&](int64_t task, int worker) {
        float *sums = scratch.data() + worker * worker_floats;
        // The tasks of a group are neighbours, which a thread has: its blocks stay in the second-level cache.
        const int64_t row = task % runs * rows, count = min(rows, p.n - row);
        const int64_t begin = task / runs * group, end = min(begin + group, blocks.count);
        std::memset(sums, 0, sum_floats * sizeof(float));
        const auto add = [&](const Rows<W> &part, int64_t word) {
            for (int64_t b = begin; b < end; ++b)
                panel_slice<Isa, W>(blocks.size(b), panel_of(b, word), part, count, sums + (b - begin) * rows * pitch,
                                    pitch);
        };
        for (int64_t word = 0; word < w.full; word += slice)
            add({w.values + row * w.row_values + word * kKept, w.meta + row * w.row_meta + word * 4, w.row_values,
                 w.row_meta, min(slice, w.full - word)},
                word);
        if (w.full < w.words) {
            auto *last = reinterpret_cast<LastWord<W> *>(sums + sum_floats);
            for (int64_t r = 0; r < count; ++r)
                new (last + r) LastWord<W>(w, row + r);
            add({last->values, last->meta, sizeof *last / sizeof(W), sizeof *last, 1}, w.full);
        }
        for (int64_t b = begin; b < end; ++b)
            finish_block<T>(p, row, count, blocks.first(b), min(blocks.size(b) * Isa::kLanes, p.m - blocks.first(b)),
                            sums + (b - begin) * rows * pitch, pitch);
    });
}

// ---- choice ----

constexpr int64_t kMostRows = 2048; // of x at a time: the fp32 copy of x stays small

template <class Isa, class T, class W> void by_rows(Linear24 p, int threads) {
    for (int64_t left = p.m; left > 0; left -= p.m) {
        p.m = min(left, kMostRows);
        p.m < Isa::kPanelRows ? dot<Isa, T, W>(p, threads) : panel<Isa, T, W>(p, threads);
        p.x = static_cast<const T *>(p.x) + p.m * p.ldx;
        p.y = static_cast<T *>(p.y) + p.m * p.n;
    }
}

template <class Isa, class T> void by_weight(const Linear24 &p, int threads) {
    switch (p.w_dtype) {
    case kFloat32:
        return by_rows<Isa, T, float>(p, threads);
    case kFloat16:
        return by_rows<Isa, T, Half>(p, threads);
    case kBFloat16:
        return by_rows<Isa, T, BFloat16>(p, threads);
    default: // the other dtypes are storage alone
        return;
    }
}

template <class Isa> void linear24(const Linear24 &p, int threads) {
    switch (p.x_dtype) {
    case kFloat32:
        return by_weight<Isa, float>(p, threads);
    case kFloat16:
        return by_weight<Isa, Half>(p, threads);
    case kBFloat16:
        return by_weight<Isa, BFloat16>(p, threads);
    default:
        return;
    }
}

} // namespace
} // namespace sparsekit::cpu
