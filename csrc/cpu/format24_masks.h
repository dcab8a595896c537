// The mask that keeps the n best of every m columns, of one instruction set `Isa` (see format24_body.h).
//
// The columns of a small group are ranked against one another, m - 1 comparisons a column; of larger ones, 64 at once,
// the n-th highest is found first (format24_choose.h), while memory is asked for the next span. Bound by memory for m
// up to 4: scores read once, a byte a column written; beyond about as much by the comparisons.
#pragma once
#include "epilogue.h"
#include "format24_check.h"
#include "format24_choose.h"
#include "format24_pairs.h"
#include "format24_rows.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

namespace sparsekit::cpu {
namespace {

struct E4M3 {
    uint8_t bits;
};
struct E5M2 {
    uint8_t bits;
};

inline double to_float(double v) { return v; }
inline int16_t to_float(int8_t v) { return v; }
inline float to_float(E5M2 v) {
    return to_float(Half{static_cast<uint16_t>(v.bits << 8)});
} // the upper byte of an fp16
// The exponent field, moved into fp32's, is 120 too small; the product is exact for subnormals too.
inline float to_float(E4M3 v) {
    const uint32_t sign = uint32_t{v.bits & 0x80u} << 24, rest = v.bits & 0x7fu;
    const uint32_t nan = -uint32_t{rest == 0x7f} & 0x7fc00000;
    return bit_cast<float>(sign | nan | bit_cast<uint32_t>(bit_cast<float>(rest << 20) * 0x1p120f));
}

inline int32_t sum_key(float a, float b) { return order_of(bit_cast<int32_t>(a + b)); }
inline int16_t sum_key(int16_t a, int16_t b) { return static_cast<int16_t>(a + b); }
inline int64_t sum_key(double a, double b) { return order_of(bit_cast<int64_t>(a + b)); }

// The keys of T's sums, and what they are keys of.
template <class T> using SumKey = decltype(sum_key(to_float(T{}), to_float(T{})));
template <class Key> constexpr DType kSumDType = sizeof(Key) == 8 ? kFloat64 : sizeof(Key) == 4 ? kFloat32 : kFloat16;

// Reads the keys of a row's members, columns or pairs of them, and counts them.
template <class Key> using ReadKeys = int64_t (*)(const void *row, int64_t cols, DType dtype, Key *keys);

template <class Isa, class Int>
[[gnu::flatten]] int64_t read_keys(const void *row, int64_t cols, DType dtype, Int *keys) {
    using L = Lanes<Isa, Int>;
    const Reader<Isa, Int> reader(dtype);
    for_words(Tile<Int>{static_cast<const Int *>(row), 0}, Span{0, 1, 0, cols}, Int{0},
              [&](int64_t, int64_t col, const Int *at, int64_t, int64_t) {
                  for (int i = 0; i < kWord; i += L::kLanes)
                      L::store(keys + col + i, reader.order(L::load(at + i)));
              });
    return cols;
}

// Keys of the sums of pairs; a column past the end adds nothing. Up to 15 more may be written behind them.
template <class T, class Key> int64_t read_pair_keys(const void *numbers, int64_t cols, DType, Key *keys) {
    const T *row = static_cast<const T *>(numbers);
    if constexpr (std::is_same_v<T, E4M3>)
        if (sum_pairs_e4m3(static_cast<const uint8_t *>(numbers), cols, keys))
            return ceil_div(cols, 2);
    if constexpr (sizeof(T) <= 2) { // as one integer, whose halves a compiler takes apart in vectors
        using Bits = std::make_unsigned_t<Integer<T>>;
        using Both = std::conditional_t<sizeof(T) == 1, uint16_t, uint32_t>;
        const auto number = [](Both bits) {
            if constexpr (std::is_class_v<T>)
                return to_float(T{static_cast<Bits>(bits)});
            else
                return to_float(static_cast<T>(bits));
        };
        for (int64_t i = 0; i < cols / 2; ++i) {
            Both both;
            std::memcpy(&both, row + 2 * i, sizeof both);
            keys[i] = sum_key(number(both), number(both >> 8 * sizeof(T)));
        }
    } else {
        for (int64_t i = 0; i < cols / 2; ++i)
            keys[i] = sum_key(to_float(row[2 * i]), to_float(row[2 * i + 1]));
    }
    if (cols % 2)
        keys[cols / 2] = sum_key(to_float(row[cols - 1]), decltype(to_float(row[0]))(0));
    return ceil_div(cols, 2);
}

// Bit i of `half` to bits 2i and 2i + 1.
inline uint64_t doubled(uint64_t half) {
    half = (half | half << 16) & 0x0000ffff0000ffff;
    half = (half | half << 8) & 0x00ff00ff00ff00ff;
    half = (half | half << 4) & 0x0f0f0f0f0f0f0f0f;
    half = (half | half << 2) & 0x3333333333333333;
    half = (half | half << 1) & 0x5555555555555555;
    return half | half << 1;
}

// The rows of a span, of whichever dtype: those of the scores, or turned over.
struct Rows {
    const char *data;
    int64_t stride; // in bytes
    DType dtype;
    int64_t next; // bytes from here to the next span, which is in place too

    template <class T>
    Rows(const Tile<T> &tile, const Matrix &m, const Span &s, const Span &next)
        : data(reinterpret_cast<const char *>(tile.data)), stride(tile.stride * int64_t(sizeof(T))), dtype(m.dtype),
          next(m.col_stride == 1 ? ((next.row - s.row) * m.row_stride + next.col - s.col) * int64_t(sizeof(T)) : 0) {}
};

// A span of groups of 8 or more by keys: 64 groups at once, of as many rows as have them.
template <class Isa, class Key>
void mask_large_groups(const MaskNM &p, const Span &s, const Rows &from, DType key_dtype, First &nan,
                       ReadKeys<Key> read) {
    const int64_t width = p.pairs ? 2 : 1, groups = ceil_div(s.cols, p.m * width); // columns of a member, of a row
    const int64_t batch = max(1, kWord / groups);                                  // rows
    const Ends<Key> ends{numbers(key_dtype)};
    const auto some = p.m == 8 ? choose<Isa, 8, Key> : p.m <= 16 ? choose<Isa, 16, Key> : choose<Isa, 32, Key>;
    constexpr int kRoomKeys = (kTileSteps + kMostM) * kWord + kWord; // 64 groups are chosen at once, a word is read
    Key keys[kRoomKeys];
    uint8_t mask[kRoomKeys];
    const bool past = p.rows * p.cols >= kPastBytes,
               whole = !p.pairs && s.cols % p.m == 0 && (p.m == 8 || p.m == 16 || p.m == 32);
    for (int64_t row = 0; row < s.rows; row += batch) {
        const int64_t rows = min(batch, s.rows - row), all = rows * groups;
        for (int64_t r = 0; r < rows; ++r) {
            Key *of_row = keys + r * groups * p.m;
            const int64_t members = read(from.data + (row + r) * from.stride, s.cols, from.dtype, of_row);
            std::fill(of_row + members, of_row + groups * p.m, ends.lowest); // past the end: they lose every tie
        }
        std::fill(keys + all * p.m, keys + ceil_div(all, kWord) * kWord * p.m + kWord, ends.lowest);
        uint8_t *const place = p.mask + (s.row + row) * p.cols + s.col;
        const bool there = whole && all % kWord == 0 && (rows == 1 || s.cols == p.cols);
        Target to{there ? place : mask, past && there && whole_lines(place, kWord),
                  from.data + row * from.stride + from.next, kWord * p.m * width * width_of(from.dtype)};
        for (int64_t first = 0; first < all; first += kWord, to.mask += kWord * p.m, to.next += to.bytes)
            if (const int bad = some(keys + first * p.m, p.n, p.m, ends, to); bad < kWord) {
                const int64_t group = first + bad;
                nan.report((s.row + row + group / groups) * ceil_div(p.cols, p.m * width) + s.col / (p.m * width) +
                           group % groups);
            }
        for (int64_t r = 0; r < rows && !there; ++r) {
            const uint8_t *found = mask + r * groups * p.m;
            uint8_t *out = place + r * p.cols;
            if (!p.pairs) {
                std::memcpy(out, found, s.cols);
                continue;
            }
            for (int64_t i = 0; i < s.cols / 2; ++i)
                out[2 * i] = out[2 * i + 1] = found[i];
            if (s.cols % 2)
                out[s.cols - 1] = found[s.cols / 2];
        }
    }
}

// The n best of every group of m of 64 keys, ranked in registers.
template <class Isa, int m, class Key> uint64_t best_in_vectors(const Key *keys, int n) {
    return each<Isa>(keys, [&](auto v) { return Lanes<Isa, Key>::template best<m>(v, n); });
}

// A span by the keys of its members.
template <class Isa, class Key>
[[gnu::noinline, gnu::flatten]] void mask_by_keys(const MaskNM &p, const Span &s, const Rows &from, DType key_dtype,
                                                  First &nan, ReadKeys<Key> read) {
    if (p.m > kSide || (p.m == kSide && sizeof(Key) == 2)) // of eight others ranking is as fast or faster in vectors
        return mask_large_groups<Isa, Key>(p, s, from, key_dtype, nan, read);
    using L = Lanes<Isa, Key>;
    const int per = kWord / p.m * p.m, width = p.pairs ? 2 : 1; // members of a step, columns of a member
    const bool integer = numbers(key_dtype).integer;
    const Ends<Key> ends{numbers(key_dtype)};
    const auto top = L::set(ends.highest), bottom = L::set(ends.lowest);
    const bool past = p.rows * p.cols >= kPastBytes;
    const int64_t bytes = per * width * width_of(from.dtype), ahead = past && from.next ? bytes : 0; // of a step
    Key keys[kTileSteps * kWord + kWord + kSide]; // a step reads a word and the m - 1 neighbours to its right
    for (int64_t row = 0; row < s.rows; ++row) {
        const int64_t members = read(from.data + row * from.stride, s.cols, from.dtype, keys);
        // What is past the end loses every tie, as the last.
        std::fill(keys + members, keys + ceil_div(members, per) * per + kWord + kSide, ends.lowest);
        uint8_t *out = p.mask + (s.row + row) * p.cols + s.col;
        auto highest = bottom, lowest = top;
        const char *next = from.data + row * from.stride + from.next;
        for (int64_t first = 0; first < members; first += per, next += bytes) {
            const Key *at = keys + first;
            for (int64_t i = 0; i < ahead; i += 64)
                __builtin_prefetch(next + i);
            const auto higher = [&](int right) {
                return L::word([&](int i) { return L::gt(L::load(at + i + right), L::load(at + i)); });
            };
#pragma GCC unroll 16
            for (int i = 0; i < kWord; i += L::kLanes) {
                highest = L::max(highest, L::load(at + i));
                lowest = L::min(lowest, L::load(at + i));
            }
            const int64_t col = first * width, count = min(per * width, s.cols - col);
            if constexpr (L::kStoresPairs)
                if (p.pairs && p.m == 4 && count == 2 * kWord) {
                    L::store_pairs([&](int i) { return L::template best<4>(L::load(at + i), p.n); }, out + col,
                                   past && whole_lines(out + col, 2 * kWord));
                    continue;
                }
            const uint64_t kept = p.m == 4 ? best_in_vectors<Isa, 4>(at, p.n) : best<3>(p.m, p.n, higher);
            if (p.pairs) {
                store_mask<Isa>(doubled(kept & low_bits(32)), out + col, min(count, kWord));
                if (count > kWord)
                    store_mask<Isa>(doubled(kept >> 32), out + col + kWord, count - kWord);
            } else {
                store_mask<Isa>(kept, out + col, count);
            }
        }
        if (integer || !L::bits(L::gt(highest, top) | L::gt(bottom, lowest)))
            continue;
        for (int64_t first = 0; first < members; first += per) // a NaN: where?
            if (const uint64_t bad = each<Isa>(keys + first, [&](auto v) { return L::gt(v, top) | L::gt(bottom, v); }) &
                                     low_bits(min(per, members - first)))
                nan.report((s.row + row) * ceil_div(p.cols, p.m * width) +
                           (s.col / width + first + __builtin_ctzll(bad)) / p.m);
    }
}

// A span of groups of m columns, ranked in registers.
template <class Isa, int m, class Int>
[[gnu::flatten]] void mask_small_groups(const MaskNM &p, const Span &s, const Tile<Int> &tile, First &nan) {
    using L = Lanes<Isa, Int>;
    const Reader<Isa, Int> reader(p.scores.dtype);
    const Int lowest = static_cast<Int>(numbers(p.scores.dtype).lowest); // what is past the end loses: it is the last
    auto largest = L::set(0);
    for_words(tile, s, lowest, [&](int64_t row, int64_t col, const Int *at, int64_t count, int64_t) {
        uint8_t copy[kWord], *out = p.mask + (s.row + row) * p.cols + s.col + col, *to = count == kWord ? out : copy;
        const auto kept = [&](int i) {
            const auto v = L::load(at + i);
            largest = L::max(largest, L::land(v, reader.magnitude));
            return L::template best<m>(reader.order(v), p.n);
        };
        L::store_ones(kept, to);
        if (to == copy)
            std::memcpy(out, copy, count);
    });
    if (reader.past(largest)) // a NaN: where?
        for_words(tile, s, lowest, [&](int64_t row, int64_t col, const Int *at, int64_t, int64_t) {
            if (const uint64_t bad = reader.nan(at))
                nan.report((s.row + row) * ceil_div(p.cols, m) + (s.col + col + __builtin_ctzll(bad)) / m);
        });
}

template <class Isa, class Int> void mask_columns(const MaskNM &p, const Span &s, const Span &next, First &nan) {
    Int room[kRoom<Int>];
    const Tile<Int> tile = fetch<Isa>(p.scores, s, room);
    if (p.scores.col_stride != 1)
        Ahead<Int>(p.scores, next).all();
    if (p.m == 4)
        return mask_small_groups<Isa, 4>(p, s, tile, nan);
    if constexpr (Lanes<Isa, Int>::kLeastRanked == 2)
        if (p.m == 2)
            return mask_small_groups<Isa, 2>(p, s, tile, nan);
    if constexpr (Lanes<Isa, Int>::kMostRanked == 8)
        if (p.m == 8)
            return mask_small_groups<Isa, 8>(p, s, tile, nan);
    mask_by_keys<Isa, Int>(p, s, Rows(tile, p.scores, s, next), p.scores.dtype, nan, read_keys<Isa, Int>);
}

template <class Isa, class T> void mask_pairs(const MaskNM &p, const Span &s, const Span &next, First &nan) {
    using Key = SumKey<T>;
    T room[kRoom<T>];
    const Rows rows(fetch<Isa>(p.scores, s, room), p.scores, s, next);
    if (p.scores.col_stride != 1)
        Ahead<T>(p.scores, next).all();
    mask_by_keys<Isa, Key>(p, s, rows, kSumDType<Key>, nan, read_pair_keys<T, Key>);
}

} // namespace
} // namespace sparsekit::cpu
