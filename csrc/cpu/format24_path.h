// Masks of a matrix whose rows are neighbours in memory, as in w.t(), of one instruction set `Isa` (see
// format24_body.h), and the path.
//
// As in format24_turned.h a lane is a row, so that the members of a group are vectors as they lie. What is kept is a
// bit a row, 64 rows a word of each column; the bits are turned over, a 64th of the work of turning numbers over. Bound
// by memory, or by what it takes to rank: see format24_masks.h.
#pragma once
#include "format24_masks.h"
#include "format24_turned.h"

namespace sparsekit::cpu {
namespace {

// The keys of a member of words of groups: of numbers, or of sums of two columns. Those of a word are `apart`.
template <class Isa, int width, class T, class Key>
inline void read_member(const T *from, int64_t stride, DType dtype, int64_t words, Key *keys, int64_t apart) {
    for (int64_t word = 0; word < words; ++word, from += kWord, keys += apart)
        if constexpr (width == 1) {
            using L = Lanes<Isa, Key>;
            const Reader<Isa, Key> reader(dtype);
            for (int i = 0; i < kWord; i += L::kLanes)
                L::store(keys + i, reader.order(L::load(from + i)));
        } else {
            for (int i = 0; i < kWord; ++i)
                keys[i] = sum_key(to_float(from[i]), to_float(from[i + stride]));
        }
}

// Words of rows of a span, if its columns fill a tile; returns how many rows, or none where something is wrong.
template <class Isa, int width, class T, class Key>
[[gnu::flatten]] int64_t mask_turned(const MaskNM &p, const Span &s, const Span &next, int64_t cols) {
    constexpr int kWords = kDown / sizeof(T) / kWord, kAhead = 4; // columns
    const int64_t words = s.rows / kWord, stride = p.scores.col_stride;
    if (s.cols != cols || words == 0)
        return 0;
    const Ends<Key> ends{numbers(width == 1 ? p.scores.dtype : kSumDType<Key>)};
    const auto some = lanes_chooser<Isa, Key>(p.m);
    const int64_t apart = (p.m <= 8 ? 8 : p.m <= 16 ? 16 : 32) * kWord;
    Key keys[kWords * kMostM * kWord];
    uint64_t bits[kWords][2 * kWord] = {}, kept[kMostM], bad = 0;
    const T *const matrix = static_cast<const T *>(p.scores.data), *const from = matrix + s.col * stride + s.row;
    for (int64_t col = 0, member = 0; col < cols; col += width) {
        for (int64_t i = col + kAhead; i < col + kAhead + width; ++i) {
            const T *ahead = i < cols ? from + i * stride : matrix + (next.col + i - cols) * stride + next.row;
            for (int64_t row = 0; row < words * kWord; row += 64 / int(sizeof(T)))
                __builtin_prefetch(ahead + row);
        }
        read_member<Isa, width>(from + col * stride, stride, p.scores.dtype, words, keys + member * kWord, apart);
        if (++member < p.m)
            continue;
        for (int64_t word = 0; word < words; ++word) {
            bad |= some(keys + word * apart, p.n, p.m, ends, kept);
            for (int64_t i = 0; i < p.m * width; ++i)
                bits[word][col + width - p.m * width + i] = kept[i / width];
        }
        member = 0;
    }
    if (bad)
        return 0;
    const bool past = p.rows * p.cols >= kPastBytes && p.cols % 64 == 0;
    for (int64_t word = 0; word < words; ++word)
        for (int64_t col = 0; col < cols; col += kWord) {
            turn_bits(bits[word] + col);
            const int64_t count = min(kWord, cols - col);
            uint8_t *out = p.mask + (s.row + word * kWord) * p.cols + s.col + col;
            const bool line = past && count == kWord && whole_lines(out, kWord);
            for (int row = 0; row < kWord; ++row)
                line ? store_line<Isa>(bits[word][col + row], out + row * p.cols, true)
                     : store_mask<Isa>(bits[word][col + row], out + row * p.cols, count);
        }
    return words * kWord;
}

// How the masks of a dtype are found.
struct MaskWays {
    void (*tile)(const MaskNM &, const Span &, const Span &, First &);
    int64_t (*turned)(const MaskNM &, const Span &, const Span &, int64_t);
};

template <class Isa, class T> constexpr MaskWays ways_of_pairs() {
    return {mask_pairs<Isa, T>, mask_turned<Isa, 2, T, SumKey<T>>};
}

template <class Isa> void mask_nm(const MaskNM &problem, int threads) {
    MaskNM p = problem;
    const int width = p.pairs ? 2 : 1, itemsize = width_of(p.scores.dtype);
    if (p.cols % (p.m * width) == 0 && dense_rows(p.scores, p.rows, p.cols)) {
        p.cols *= p.rows;
        p.rows = 1;
    }
    const MaskWays of_dtype[] = {ways_of_pairs<Isa, float>(),    ways_of_pairs<Isa, Half>(),
                                 ways_of_pairs<Isa, BFloat16>(), ways_of_pairs<Isa, E4M3>(),
                                 ways_of_pairs<Isa, int8_t>(),   ways_of_pairs<Isa, double>(),
                                 ways_of_pairs<Isa, E5M2>()}; // as in DType
    const MaskWays ways = p.pairs ? of_dtype[p.scores.dtype] : with_integer(itemsize, [](auto s) -> MaskWays {
        using Int = decltype(s);
        return {mask_columns<Isa, Int>, mask_turned<Isa, 1, Int, Int>};
    });
    const int64_t cols = kWord / p.m * p.m * width;
    Tiling tiling(p.rows, p.cols, cols, p.scores.col_stride != 1 ? itemsize : 0);
    const int64_t rows = tiling.tile_rows;
    const bool lanes = p.scores.row_stride == 1 && p.scores.col_stride != 1;
    if (lanes)
        tiling.set_rows(kDown / itemsize);
    First nan;
    const auto tile = [&](const Span &s, const Span &next) {
        if (!lanes)
            return ways.tile(p, s, next, nan);
        for (int64_t row = ways.turned(p, s, next, cols); row < s.rows; row += rows)
            ways.tile(p, {s.row + row, min(rows, s.rows - row), s.col, s.cols}, {}, nan);
    };
    for_tiles(tiling, p.rows * p.cols * (itemsize + 1), threads, tile, Isa::fence);
    p.status[0] = nan.place();
}

template <class Isa> constexpr Format24Path path() {
    return {prune<Isa>, expand<Isa>, mask_nm<Isa>, mask_rows<Isa>, check};
}

} // namespace
} // namespace sparsekit::cpu
