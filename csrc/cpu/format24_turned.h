// Prune and compress of one instruction set `Isa` (see format24_body.h), also of a matrix whose rows are neighbours in
// memory, as in w.t().
//
// There a lane is a row: a group of four columns is four vectors, which are compared with one another as they are read,
// and only what is kept of them is turned over. A tile is half a kilobyte down each of its columns, which memory gives
// as fast as what lies in order; four columns are read at a time, since those that are a power of two apart share few
// places of a cache. Rows and columns that fill no vector or word, and tiles with something wrong, go the other way.
#pragma once
#include "format24_body.h"

namespace sparsekit::cpu {
namespace {

// Of four columns the two best, by beats(right, left): is the one on the right better, and by no tie?
template <class Beats> struct TwoBest {
    decltype(std::declval<Beats>()(1, 0)) kept[4];

    explicit TwoBest(const Beats &beats) {
        const auto two = [](auto a, auto b, auto c) { return (a & b) | (c & (a | b)); };
        const auto b10 = beats(1, 0), b20 = beats(2, 0), b30 = beats(3, 0), b21 = beats(2, 1), b31 = beats(3, 1),
                   b32 = beats(3, 2);
        kept[0] = ~two(b10, b20, b30);
        kept[1] = two(b10, ~b21, ~b31);
        kept[2] = two(b20, b21, ~b32);
        kept[3] = two(b30, b31, b32);
    }
};

// What is kept of a tile, a lane a row: of a vector of rows each value, and as many bits of metadata as a lane has.
template <class W> struct Turned {
    static constexpr int kWords = max(1, 2 / sizeof(W)), kCols = kWords * kWord; // whose values are a line of the cache
    static constexpr int kRows = kDown / sizeof(W), kValues = kCols / 2, kCodes = kCols / 8 / sizeof(W);
    alignas(64) W values[kValues][kRows];
    alignas(64) W meta[kCodes][kRows];
};

// A group of four columns of so many rows; the same rows of the next are asked for. Returns whether something is wrong.
template <RankKind kind, class Isa, class W>
[[gnu::noinline, gnu::flatten]] bool choose_turned(const W *from, int64_t stride, const W *next, int64_t rows,
                                                   DType dtype, int group, Turned<W> &to) {
    using L = Lanes<Isa, W>;
    using V = typename L::V;
    const Reader<Isa, W> reader(dtype);
    constexpr int kGroups = 2 * sizeof(W); // whose metadata a lane holds
    const auto code = [&](int64_t nibble) { return L::set(static_cast<W>(nibble << group % kGroups * 4)); };
    const V none = L::set(0), c1 = code(1), c2 = code(2), c4 = code(4), c8 = code(8), c12 = code(12);
    W *first = to.values[2 * group], *second = to.values[2 * group + 1], *meta = to.meta[group / kGroups];
    V largest = none, over = none;
    for (int64_t row = 0; row < rows; row += L::kLanes) {
        if (row * sizeof(W) % 64 == 0)
            for (int i = 0; i < 4; ++i)
                __builtin_prefetch(next + i * stride + row);
        V v[4];
        for (int i = 0; i < 4; ++i)
            v[i] = L::load(from + i * stride + row);
        using Mask = decltype(L::gt(none, none));
        Mask live[4];
        V key[4];
        for (int i = 0; i < 4; ++i)
            if constexpr (kind == kByNonzero)
                live[i] = L::test(v[i], reader.magnitude);
            else
                key[i] = reader.size(v[i]);
        const TwoBest best([&](int right, int left) -> Mask {
            if constexpr (kind == kByNonzero)
                return live[right] & ~live[left];
            else
                return L::gt(key[right], key[left]);
        });
        if constexpr (kind == kByNonzero)
            over = L::lor(
                over, L::lanes((live[0] & live[1] & (live[2] | live[3])) | (live[2] & live[3] & (live[0] | live[1]))));
        const auto &kept = best.kept;
        const auto clean = [&](V a, W *out) {
            largest = L::max(largest, L::land(a, reader.magnitude));
            L::store(out + row, L::nonzero(a, reader.magnitude));
        };
        clean(L::select(kept[0], v[0], L::select(kept[1], v[1], v[2])), first);
        clean(L::select(kept[3], v[3], L::select(kept[2], v[2], v[1])), second);
        const V nibble = L::lor(L::select(kept[0], none, L::select(kept[1], c1, c2)),
                                L::select(kept[3], c12, L::select(kept[2], c8, c4)));
        L::store(meta + row, group % kGroups ? L::lor(L::load(meta + row), nibble) : nibble);
    }
    return reader.past(largest) || L::bits(L::test(over, L::set(-1))) != 0;
}

template <class Isa, class W>
[[gnu::noinline, gnu::flatten]] void write_turned(const Prune24 &p, const Span &s, const Turned<W> &from) {
    using L = Lanes<Isa, W>;
    using T = Turned<W>;
    constexpr int kCols = min(16 / int(sizeof(W)), L::kLanes);
    constexpr int kBatch = max(L::kLanes, 64); // rows: what has just been written is not read again at once
    const int64_t bytes = ceil_div(p.cols, 8);
    const bool past = p.rows * p.cols * int64_t(sizeof(W)) >= kPastBytes;
    alignas(64) W values[kBatch][T::kValues], codes[kBatch][T::kCodes];
    for (int64_t first = 0; first < s.rows; first += kBatch) {
        const int64_t rows = min(kBatch, s.rows - first);
        for (int64_t row = 0; row < rows; row += L::kLanes) {
            for (int i = 0; i < T::kValues; i += kCols)
                turn_block<kCols, L::kLanes>(from.values[i] + first + row, T::kRows, values[row] + i, T::kValues);
            turn_block<T::kCodes, L::kLanes>(from.meta[0] + first + row, T::kRows, codes[row], T::kCodes);
        }
        W *out = static_cast<W *>(p.values) + (s.row + first) * 4 * bytes + s.col / 2;
        uint8_t *meta = p.meta + (s.row + first) * bytes + s.col / 8;
        const bool lines = past && whole_lines(out, sizeof values[0]) && 4 * bytes * sizeof(W) % 64 == 0;
        for (int64_t row = 0; row < rows; ++row, out += 4 * bytes, meta += bytes) {
            if (lines)
                for (int i = 0; i < T::kValues; i += L::kLanes)
                    L::stream(out + i, L::load(values[row] + i));
            else
                std::memcpy(out, values[row], sizeof values[row]);
            for (int word = 0; word < T::kWords; ++word) {
                uint64_t code = 0;
                for (int i = 0; i < T::kCodes / T::kWords; ++i)
                    code |= uint64_t{std::make_unsigned_t<W>(codes[row][word * 8 / sizeof(W) + i])}
                            << 8 * sizeof(W) * i;
                store_meta64(code, meta + 8 * word);
            }
        }
    }
}

// Rows of a span that fill vectors, if its columns fill a tile; returns how many, or none where something is wrong.
template <RankKind kind, class Isa, class W> int64_t prune_turned(const Prune24 &p, const Span &s, const Span &next) {
    using T = Turned<W>;
    const int64_t rows = s.rows / Lanes<Isa, W>::kLanes * Lanes<Isa, W>::kLanes, stride = p.w.col_stride;
    if (s.cols != T::kCols || rows == 0)
        return 0;
    const W *const matrix = static_cast<const W *>(p.w.data), *from = matrix + s.col * stride + s.row;
    T tile;
    bool wrong = false;
    for (int group = 0; group < T::kCols / 4; ++group, from += 4 * stride) {
        const bool last = group == T::kCols / 4 - 1;
        wrong |=
            choose_turned<kind, Isa>(from, stride, last ? matrix + next.col * stride + next.row : from + 4 * stride,
                                     rows, p.w.dtype, group, tile);
    }
    if (wrong)
        return 0;
    write_turned<Isa>(p, {s.row, rows, s.col, s.cols}, tile);
    return rows;
}

template <class Isa, class W> void prune(Prune24 p, int threads) {
    const bool ranked = p.kind == kByScores || p.kind == kByMask;
    if (p.cols % 8 == 0 && dense_rows(p.w, p.rows, p.cols) && (!ranked || dense_rows(p.rank, p.rows, p.cols))) {
        p.cols *= p.rows;
        p.rows = 1;
    }
    const int rank_width = ranked ? width_of(p.rank.dtype) : 8;
    const auto choose = with_integer(rank_width, [](auto s) { return choose_by_rank<Isa, decltype(s)>; });
    const auto turned = p.kind == kByWeight ? prune_turned<kByWeight, Isa, W> : prune_turned<kByNonzero, Isa, W>;
    const int64_t itemsize =
        max(p.w.col_stride != 1 ? sizeof(W) : 0, ranked && p.rank.col_stride != 1 ? rank_width : 0);
    const int64_t bytes = p.rows * p.cols * int64_t(2 * sizeof(W) + (ranked ? rank_width : 0));
    const bool lanes = p.w.row_stride == 1 && p.w.col_stride != 1 && !ranked && !p.dense;
    Found found;
    Tiling tiling(p.rows, p.cols, lanes ? Turned<W>::kCols : kWord, itemsize);
    if (lanes)
        tiling.set_rows(Turned<W>::kRows);
    const auto tile = [&](const Span &s, const Span &next) {
        if (!lanes)
            return prune_tile<Isa, W>(p, s, next, choose, found);
        constexpr int64_t kRows = kTileWords / Turned<W>::kWords;
        for (int64_t row = turned(p, s, next); row < s.rows; row += kRows)
            prune_tile<Isa, W>(p, {s.row + row, min(kRows, s.rows - row), s.col, s.cols}, {}, choose, found);
    };
    for_tiles(tiling, bytes, threads, tile, Isa::fence);
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

} // namespace
} // namespace sparsekit::cpu
