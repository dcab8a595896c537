// The 2:4 format ops of one instruction set `Isa`: prune, compress, expand.
//
// Everything goes by words, 64 columns of one row: what is chosen becomes 64 bits, a bit a column, and ranking,
// metadata and the search for what is wrong are arithmetic on those. Vectors compare numbers and move values, nothing
// else. A task owns tiles of the matrix. Rows that lie along memory are read where they are; of any other matrix a tile
// is turned over into a buffer in the first-level cache. Bound by memory: the weight (and scores) read once, what is
// written written once.
//
// Isa provides Lanes<Int>, a vector of kLanes signed integers: load, store, set, land (and), lxor, the bit masks gt (of
// a > b) and test (of a & b != 0), from_bits (all ones in the lanes of a bit mask), rotate<r>, in which the lane of
// column j of a group of four has its column (j + r) % 4, order (integers ordered as the numbers are, -0.0 as +0.0) and
// flipped_abs (|int8| with the sign bit flipped). Isa::pack gathers the 32 kept of 64 values, those not in `live` as
// zeros; Isa::unpack puts 32 values at the kept of 64 places and zeros elsewhere. Unnamed namespace: see epilogue.h.
#pragma once
#include "format24.h"
#include "format24_bits.h"
#include "threads.h"

#include <type_traits>

namespace sparsekit::cpu {
namespace {

constexpr int kRoomBytes = 32768;              // of a tile that is turned over
constexpr int kTileWords = kRoomBytes / kWord; // most of a tile

constexpr int kTileSteps = 32; // most of a tile in place

template <class Int> constexpr int kRoom = kRoomBytes / sizeof(Int);

template <class Body> auto with_integer(int width, const Body &body) {
    switch (width) {
    case 1:
        return body(int8_t{});
    case 2:
        return body(int16_t{});
    case 4:
        return body(int32_t{});
    default:
        return body(int64_t{});
    }
}

// ---- tiles ----

struct Span {
    int64_t row, rows, col, cols;
};

// `step` columns are what is never divided: a word, or as many of its columns as are whole groups.
struct Tiling {
    int64_t rows, cols, tile_rows, tile_cols, down, across;

    Tiling(int64_t rows, int64_t cols, int64_t step, int turned) : rows(rows), cols(cols) {
        if (turned) { // as tall as there is room for: a column of the matrix is a page of memory or more away from the
                      // next
            tile_cols = step;
            tile_rows = kRoomBytes / turned / (ceil_div(step, kWord) * kWord);
        } else {
            tile_cols = step * min(ceil_div(cols, step), kTileSteps);
            tile_rows = max(1, kTileSteps / ceil_div(tile_cols, step));
        }
        down = ceil_div(rows, tile_rows);
        across = ceil_div(cols, tile_cols);
    }
};

// body(span) for every tile, on as many threads as `bytes` read and written are worth.
template <class Body> void for_tiles(const Tiling &t, int64_t bytes, int threads, const Body &body) {
    const int64_t tiles = t.down * t.across, batch = max(1, 65536 / max(1, bytes / tiles));
    const int used = static_cast<int>(min(min(threads, kMaxThreads), 1 + (bytes >> 17)));
    parallel_for(ceil_div(tiles, batch), used, [&](int64_t task, int) {
        for (int64_t tile = task * batch; tile < min(tiles, (task + 1) * batch); ++tile) {
            const int64_t row = tile / t.across * t.tile_rows, col = tile % t.across * t.tile_cols;
            body(Span{row, min(t.tile_rows, t.rows - row), col, min(t.tile_cols, t.cols - col)});
        }
    });
}

template <class Int> struct Tile {
    const Int *data;
    int64_t stride; // of a row; those of a column are neighbours
};

constexpr int kSide = 8; // of a block that is turned over in registers

// to[r * stride + c] = from[c * col_stride + r]. Three times interleaving the first half of eight with the second turns
// them over.
template <class Int> inline void turn_block(const Int *from, int64_t col_stride, Int *to, int64_t stride) {
    using Lane = std::conditional_t<
        sizeof(Int) == 1, int8_t,
        std::conditional_t<sizeof(Int) == 2, int16_t, std::conditional_t<sizeof(Int) == 4, int32_t, int64_t>>>;
    typedef Lane V [[gnu::vector_size(kSide * sizeof(Lane))]];
    V a[kSide], b[kSide];
    for (int i = 0; i < kSide; ++i)
        std::memcpy(&a[i], from + i * col_stride, sizeof(V));
    const auto interleave = [](const V(&x)[kSide], V(&y)[kSide]) {
        for (int i = 0; i < kSide / 2; ++i) {
            y[2 * i] = __builtin_shufflevector(x[i], x[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
            y[2 * i + 1] = __builtin_shufflevector(x[i], x[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
        }
    };
    interleave(a, b);
    interleave(b, a);
    interleave(a, b);
    for (int i = 0; i < kSide; ++i)
        std::memcpy(to + i * stride, &b[i], sizeof(V));
}

// Copies a span of a matrix to `room`, rows `stride` apart.
template <class Int> void turn(const Matrix &m, const Span &s, Int *room, int64_t stride) {
    const Int *from = static_cast<const Int *>(m.data) + s.row * m.row_stride + s.col * m.col_stride;
    const auto copy = [&](int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
        for (int64_t r = row; r < row_end; ++r)
            for (int64_t c = col; c < col_end; ++c)
                room[r * stride + c] = from[r * m.row_stride + c * m.col_stride];
    };
    if (m.row_stride != 1)
        return copy(0, s.rows, 0, s.cols);
    const int64_t rows = s.rows / kSide * kSide, cols = s.cols / kSide * kSide;
    for (int64_t c = 0; c < cols; c += kSide)
        for (int64_t r = 0; r < rows; r += kSide) {
            const Int *at = from + c * m.col_stride + r;
            if (r * sizeof(Int) % 64 == 0) // the next columns: too far apart for the hardware to guess
                for (int64_t i = kSide; i < 2 * kSide; ++i)
                    __builtin_prefetch(at + i * m.col_stride);
            turn_block(at, m.col_stride, room + r * stride + c, stride);
        }
    copy(0, rows, cols, s.cols);
    copy(rows, s.rows, 0, s.cols);
}

// A span of a matrix, in place where its columns are neighbours, else in `room`, which holds a tile.
template <class Int> Tile<Int> fetch(const Matrix &m, const Span &s, Int *room) {
    if (m.col_stride == 1)
        return {static_cast<const Int *>(m.data) + s.row * m.row_stride + s.col, m.row_stride};
    const int64_t stride = ceil_div(s.cols, kWord) * kWord;
    turn(m, s, room, stride);
    return {room, stride};
}

// body(row, col, p, count, word) for every word of a tile: p points at 64 numbers, of which `count` are the matrix's,
// the rest `fill`.
template <class Int, class Body>
inline void for_words(const Tile<Int> &tile, const Span &s, Int fill, const Body &body) {
    int64_t word = 0;
    for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t col = 0; col < s.cols; col += kWord, ++word) {
            const Int *p = tile.data + row * tile.stride + col;
            if (const int64_t count = s.cols - col; count >= kWord) {
                body(row, col, p, int64_t{kWord}, word);
            } else {
                Int copy[kWord];
                for (int64_t i = 0; i < kWord; ++i)
                    copy[i] = i < count ? p[i] : fill;
                body(row, col, copy, count, word);
            }
        }
}

// ---- numbers to bits ----

template <class Isa, class Int> using Lanes = typename Isa::template Lanes<Int>;

// The bits that `test` finds in each vector of 64 numbers.
template <class Isa, class Int, class Test> inline uint64_t each(const Int *p, const Test &test) {
    constexpr int kLanes = Lanes<Isa, Int>::kLanes;
    uint64_t bits = 0;
#pragma GCC unroll 16
    for (int i = 0; i < kWord; i += kLanes)
        bits |= test(Lanes<Isa, Int>::load(p + i)) << i;
    return bits;
}

// The constants of a dtype in every lane.
template <class Isa, class Int> struct Reader {
    using L = Lanes<Isa, Int>;
    using V = typename L::V;
    V magnitude, largest;
    bool integer;

    explicit Reader(DType dtype)
        : magnitude(L::set(static_cast<Int>(numbers(dtype).magnitude))),
          largest(L::set(static_cast<Int>(numbers(dtype).largest))), integer(numbers(dtype).integer) {}

    uint64_t nonzero(const Int *p) const {
        return each<Isa>(p, [&](V v) { return L::test(v, magnitude); });
    }
    uint64_t nan(const Int *p) const {
        return integer ? 0 : each<Isa>(p, [&](V v) { return L::gt(L::land(v, magnitude), largest); });
    }
    // Integers in the order of |x|, or of x.
    V size(V v) const { return integer ? L::flipped_abs(v) : L::land(v, magnitude); }
    V order(V v) const { return integer ? v : L::order(v, magnitude); }
};

// The n best of every four of 64 numbers by the integers that key(v) gives, all in registers.
template <class Isa, class Int, class Key> inline uint64_t best_of_four(const Int *p, int n, const Key &key) {
    using L = Lanes<Isa, Int>;
    uint64_t higher[3] = {};
#pragma GCC unroll 16
    for (int i = 0; i < kWord; i += L::kLanes) {
        const auto v = key(L::load(p + i));
        higher[0] |= L::gt(L::template rotate<1>(v), v) << i;
        higher[1] |= L::gt(L::template rotate<2>(v), v) << i;
        higher[2] |= L::gt(L::template rotate<3>(v), v) << i;
    }
    return best<2>(4, n, [&](int r) { return higher[r - 1]; });
}

// ---- prune and compress ----

// What is kept of each word of a tile, two of every four; of those, the live keep their values, the rest become zeros.
struct Choice {
    uint64_t kept[kTileWords], live[kTileWords];
};

// The flat index of a group of four, kp / 4 a row.
inline int64_t group_at(int64_t row, int64_t col, int64_t cols) { return row * (2 * ceil_div(cols, 8)) + col / 4; }

// Reports the group of the first of the columns `bad` of the word at (row, col).
inline void report_word(First &first, uint64_t bad, int64_t row, int64_t col, int64_t cols) {
    if (bad)
        first.report(group_at(row, col + __builtin_ctzll(bad), cols));
}

struct Found {
    First nan, over;
};

// By the numbers themselves: the largest, or those that are not zero, which may be two of a group at most.
template <class Isa, class W>
[[gnu::flatten]] void choose_by_weight(const Prune24 &p, const Span &s, const Tile<W> &w, Choice &choice,
                                       Found &found) {
    const Reader<Isa, W> reader(p.w.dtype);
    for_words(w, s, W{0}, [&](int64_t row, int64_t col, const W *at, int64_t, int64_t word) {
        if (p.kind == kByNonzero) {
            const uint64_t nonzero = reader.nonzero(at);
            choice.kept[word] = two_of(nonzero);
            report_word(found.over, more_than_two(nonzero), s.row + row, s.col + col, p.cols);
        } else {
            choice.kept[word] = best_of_four<Isa>(at, 2, [&](auto v) { return reader.size(v); });
        }
        choice.live[word] = ~uint64_t{0};
    });
}

template <class Isa, class S>
[[gnu::flatten]] void choose_by_rank(const Prune24 &p, const Span &s, Choice &choice, Found &found) {
    S room[kRoom<S>];
    const Tile<S> rank = fetch(p.rank, s, room);
    if (p.kind == kByMask) {
        const auto any = Lanes<Isa, S>::set(-1);
        for_words(rank, s, S{0}, [&](int64_t row, int64_t col, const S *at, int64_t, int64_t word) {
            const uint64_t on = each<Isa>(at, [&](auto v) { return Lanes<Isa, S>::test(v, any); });
            choice.kept[word] = two_of(on);
            choice.live[word] = on;
            report_word(found.over, more_than_two(on), s.row + row, s.col + col, p.cols);
        });
        return;
    }
    const Reader<Isa, S> reader(p.rank.dtype);
    const S lowest = static_cast<S>(numbers(p.rank.dtype).lowest); // what is past the end loses: it is the last, too
    for_words(rank, s, lowest, [&](int64_t row, int64_t col, const S *at, int64_t, int64_t word) {
        choice.kept[word] = best_of_four<Isa>(at, 2, [&](auto v) { return reader.order(v); });
        choice.live[word] = ~uint64_t{0};
        report_word(found.nan, reader.nan(at), s.row + row, s.col + col, p.cols);
    });
}

template <class Isa, class W>
[[gnu::flatten]] void write_tile(const Prune24 &p, const Span &s, const Tile<W> &w, const Choice &choice,
                                 Found &found) {
    using L = Lanes<Isa, W>;
    const Reader<Isa, W> reader(p.w.dtype);
    const int64_t bytes = ceil_div(p.cols, 8);
    for_words(w, s, W{0}, [&](int64_t row, int64_t col, const W *at, int64_t count, int64_t word) {
        row += s.row;
        col += s.col;
        // -0.0 becomes +0.0: compressing what was expanded then gives the same bits.
        const uint64_t kept = choice.kept[word], live = choice.live[word] & reader.nonzero(at);
        report_word(found.nan, reader.nan(at), row, col, p.cols);
        W copy[kWord];
        if (p.dense) {
            W *out = static_cast<W *>(p.dense) + row * p.cols + col, *to = count == kWord ? out : copy;
#pragma GCC unroll 16
            for (int i = 0; i < kWord; i += L::kLanes)
                L::store(to + i, L::land(L::load(at + i), L::from_bits((kept & live) >> i)));
            if (to == copy)
                std::memcpy(out, copy, count * sizeof(W));
            return;
        }
        W *values = static_cast<W *>(p.values) + row * (4 * bytes) + col / 2;
        uint8_t *meta = p.meta + row * bytes + col / 8;
        if (count == kWord) {
            Isa::pack(at, kept, live, values);
            store_meta64(meta_of(kept), meta);
        } else {
            const int64_t used = ceil_div(count, 8);
            Isa::pack(at, kept, live, copy);
            std::memcpy(values, copy, 4 * used * sizeof(W));
            store_meta64(meta_of(kept), meta, used);
        }
    });
}

// Without gaps, so that all rows are one where they end with a byte of metadata.
inline bool dense_rows(const Matrix &m, int64_t rows, int64_t cols) {
    return m.col_stride == 1 && (m.row_stride == cols || rows == 1);
}

template <class Isa, class W> void prune(Prune24 p, int threads) {
    const bool ranked = p.kind == kByScores || p.kind == kByMask;
    if (p.cols % 8 == 0 && dense_rows(p.w, p.rows, p.cols) && (!ranked || dense_rows(p.rank, p.rows, p.cols))) {
        p.cols *= p.rows;
        p.rows = 1;
    }
    const int rank_width = ranked ? width_of(p.rank.dtype) : 8;
    const auto choose = with_integer(rank_width, [](auto s) { return choose_by_rank<Isa, decltype(s)>; });
    const int64_t turned = max(p.w.col_stride != 1 ? sizeof(W) : 0, ranked && p.rank.col_stride != 1 ? rank_width : 0);
    const int64_t bytes = p.rows * p.cols * int64_t(2 * sizeof(W) + (ranked ? rank_width : 0));
    Found found;
    for_tiles(Tiling(p.rows, p.cols, kWord, turned), bytes, threads, [&](const Span &s) {
        W room[kRoom<W>];
        const Tile<W> w = fetch(p.w, s, room);
        Choice choice;
        if (ranked)
            choose(p, s, choice, found);
        else
            choose_by_weight<Isa, W>(p, s, w, choice, found);
        write_tile<Isa, W>(p, s, w, choice, found);
    });
    p.status[0] = found.nan.place();
    p.status[1] = found.over.place();
}

template <class Isa> void prune(const Prune24 &p, int threads) {
    switch (width_of(p.w.dtype)) {
    case 1:
        return prune<Isa, int8_t>(p, threads);
    case 2:
        return prune<Isa, int16_t>(p, threads);
    default:
        return prune<Isa, int32_t>(p, threads);
    }
}

// ---- expand ----

template <class Isa, class W> [[gnu::flatten]] void expand_tile(const Expand24 &p, const Span &s) {
    const int64_t bytes = ceil_div(p.cols, 8);
    for (int64_t row = s.row; row < s.row + s.rows; ++row)
        for (int64_t col = s.col; col < s.col + s.cols; col += kWord) {
            const W *values = static_cast<const W *>(p.values) + row * (4 * bytes) + col / 2;
            const uint8_t *meta = p.meta + row * bytes + col / 8;
            W *out = static_cast<W *>(p.dense) + row * p.cols + col;
            if (const int64_t count = p.cols - col; count >= kWord) {
                Isa::unpack(values, kept_of(load_meta64(meta)), out);
            } else {
                const int64_t used = ceil_div(count, 8);
                W some[kWord / 2] = {}, copy[kWord];
                std::memcpy(some, values, 4 * used * sizeof(W));
                Isa::unpack(some, kept_of(load_meta64(meta, used)), copy);
                std::memcpy(out, copy, count * sizeof(W));
            }
        }
}

template <class Isa> void expand(const Expand24 &problem, int threads) {
    Expand24 p = problem;
    if (p.cols % 8 == 0) {
        p.cols *= p.rows;
        p.rows = 1;
    }
    const auto tile = p.itemsize == 1   ? expand_tile<Isa, int8_t>
                      : p.itemsize == 2 ? expand_tile<Isa, int16_t>
                                        : expand_tile<Isa, int32_t>;
    for_tiles(Tiling(p.rows, p.cols, kWord, 0), 2 * p.rows * p.cols * p.itemsize, threads,
              [&](const Span &s) { tile(p, s); });
}

} // namespace
} // namespace sparsekit::cpu
