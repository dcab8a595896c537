// 2:4 on words of 64 columns, a bit a column: what is kept, and the metadata that say so. Plain arithmetic, on one word
// or on eight at once.
#pragma once
#include "../launch.h"
#include "sizes.h"

#include <array>
#include <atomic>
#include <cstring>
#include <type_traits>
#include <utility>

namespace sparsekit::cpu {
namespace {

constexpr int kWord = 64; // columns of a word

// The signed integer as wide as W.
template <class W>
using Integer = std::conditional_t<
    sizeof(W) == 1, int8_t,
    std::conditional_t<sizeof(W) == 2, int16_t, std::conditional_t<sizeof(W) == 4, int32_t, int64_t>>>;

constexpr uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// By m: the first column of every group of m that a word holds whole.
struct Starts {
    uint64_t bits[kMostM + 1] = {};
    constexpr Starts() {
        for (int m = 1; m <= kMostM; ++m)
            for (int start = 0; start + m <= kWord; start += m)
                bits[m] |= uint64_t{1} << start;
    }
};
constexpr Starts kStarts;

// The low `count` bits of every group of m columns, of as many groups as a word holds whole.
constexpr uint64_t in_groups(int m, int count) { return low_bits(count) * kStarts.bits[m]; }

// The n best of every group of m columns; the rest of the word, where m does not divide it, is empty. higher(r) has the
// bit of each column whose r-th neighbour to the right beats it, a tie being no beating; what it says of neighbours in
// the next group is not used. PLANES bits must hold m - 1, the most rivals that can beat a column.
template <int PLANES, class Word = uint64_t, class Higher> inline Word best(int m, int n, const Higher &higher) {
    if (n >= m)
        return Word{} + in_groups(m, m);
    Word beaten_by[PLANES] = {}; // of each column, how many rivals: one bit of the number a word
    const auto count = [&](Word columns) {
        for (int plane = 0; plane < PLANES; ++plane) {
            const Word carry = beaten_by[plane] & columns;
            beaten_by[plane] ^= columns;
            columns = carry;
        }
    };
    for (int right = 1; 2 * right <= m; ++right) {
        // A rival is `right` columns away in a ring: either to the right, or m - right to the left, where beating is
        // the other one's not being beaten.
        const int left = m - right;
        const Word near = higher(right), far = left == right ? near : higher(left);
        const uint64_t with_right = in_groups(m, left), with_left = in_groups(m, right);
        count((near & with_right) | (~far & with_left) << left);
        if (left != right)
            count((far & with_left) | (~near & with_right) << right);
    }
    Word fewer{}; // beaten by fewer than n
    for (int plane = 0; plane < PLANES; ++plane)
        fewer = n >> plane & 1 ? ~beaten_by[plane] | fewer : ~beaten_by[plane] & fewer;
    return fewer & in_groups(m, m);
}

// What Lanes (see format24_body.h) whose masks are bits do with them; Bytes are the lanes of bytes.
template <class L, class Bytes> struct MasksOfBits {
    static constexpr int kLeastRanked = 4, kMostRanked = 4;
    static constexpr bool kStoresPairs = false;

    static uint64_t bits(uint64_t mask) { return mask; }
    template <class... Body> static std::array<int64_t, sizeof...(Body)> count(int64_t words, const Body &...body) {
        std::array<int64_t, sizeof...(Body)> found{};
        for (int64_t i = 0; i < words * kWord; i += L::kLanes) {
            int at = 0;
            ((found[at++] += __builtin_popcountll(body(i) & low_bits(L::kLanes))), ...);
        }
        return found;
    }
    static auto lanes(uint64_t mask) { return L::from_bits(mask); }
    template <class Body> static uint64_t word(const Body &body) {
        uint64_t found = 0;
#pragma GCC unroll 16
        for (int i = 0; i < kWord; i += L::kLanes)
            found |= (body(i) & low_bits(L::kLanes)) << i;
        return found;
    }
    template <class Body> static void store_ones(const Body &body, uint8_t *out) {
        const uint64_t ones = word(body);
        for (int i = 0; i < kWord; i += Bytes::kLanes)
            Bytes::store(reinterpret_cast<int8_t *>(out) + i, Bytes::land(Bytes::from_bits(ones >> i), Bytes::set(1)));
    }
    template <int m, class V> static uint64_t best(V v, int n) {
        static_assert(m == 4);
        const uint64_t a = beats<1>(v), b = beats<2>(v), c = beats<3>(v);
        return n == 2 ? (a & b) | (c & (a | b)) : n == 1 ? a & b & c : n == 3 ? a | b | c : -uint64_t(n == 4);
    }

  private:
    // The columns that beat their r-th neighbour in the ring of four, by a tie one on the right.
    template <int r, class V> static uint64_t beats(V v) {
        constexpr uint64_t kRivalOnTheRight = in_groups(4, 4 - r);
        const V rival = L::template rotate<r>(v);
        return L::gt(v, rival) | (kRivalOnTheRight & ~L::gt(rival, v));
    }
};

// Of m columns in a ring: all ones where a lane's r-th neighbour is on its right.
template <class Int, int m, int r> struct RightOf {
    static constexpr int kLanes = 32 / sizeof(Int);
    alignas(32) Int lanes[kLanes] = {};

    constexpr RightOf() {
        for (int i = 0; i < kLanes; ++i)
            lanes[i] = i % m + r < m ? -1 : 0;
    }
};
template <class Int, int m, int r> constexpr RightOf<Int, m, r> kRightOf;

// What Lanes of 32 bytes or fewer whose masks are vectors do with them, by L's sum; rotate<m, r>, in which a lane has
// its r-th neighbour in the ring of m; and wins(a, b, right), where a > b, or equal in the lanes of `right`.
template <class L, class Int, int kMost> struct MasksOfLanes {
    static constexpr int kLeastRanked = 2, kMostRanked = kMost;
    static constexpr bool kStoresPairs = false;

    template <class V> static V lanes(V mask) { return mask; }
    // A mask is a minus one; as many of them as a lane can hold are summed at once.
    template <class... Body> static std::array<int64_t, sizeof...(Body)> count(int64_t words, const Body &...body) {
        constexpr int64_t kStep = (sizeof(Int) == 1 ? 127 : 32767) / (kWord / L::kLanes) * kWord;
        constexpr size_t kBodies = sizeof...(Body);
        std::array<int64_t, kBodies> found{};
        for (int64_t at = 0; at < words * kWord; at += kStep) {
            decltype(L::set(0)) sums[kBodies];
            for (auto &sum : sums)
                sum = L::set(0);
            for (int64_t i = at; i < min(at + kStep, words * kWord); i += L::kLanes) {
                int of = 0;
                ((sums[of] = L::sum(sums[of], body(i)), ++of), ...);
            }
            for (size_t of = 0; of < kBodies; ++of) {
                Int lanes[L::kLanes];
                L::store(lanes, sums[of]);
                for (const Int lane : lanes)
                    found[of] -= lane;
            }
        }
        return found;
    }
    // Those that beat m - n of the m - 1 others or more: a win is a minus one.
    template <int m, class V> static V best(V v, int n) {
        return L::gt(L::set(static_cast<Int>(n - m + 1)), wins<m>(v, std::make_integer_sequence<int, m - 1>()));
    }

  private:
    template <int m, class V, int... r> static V wins(V v, std::integer_sequence<int, r...>) {
        V found = L::set(0);
        ((found = L::sum(found, L::wins(v, L::template rotate<m, r + 1>(v), L::load(kRightOf<Int, m, r + 1>.lanes)))),
         ...);
        return found;
    }
};

// Two of every four columns: those that `bits` has, then the lowest.
template <class Word> inline Word two_of(Word bits) {
    return best<2, Word>(4, 2, [&](int r) { return bits >> r & ~bits; });
}

// The lowest bit of every group of four that has more than two.
template <class Word> inline Word more_than_two(Word bits) {
    const Word halves = (bits & 0x5555555555555555) + (bits >> 1 & 0x5555555555555555);
    const Word count = (halves & 0x3333333333333333) + (halves >> 2 & 0x3333333333333333);
    return (count >> 2 | (count >> 1 & count)) & 0x1111111111111111;
}

// 64 bits of metadata, four a group, from 64 columns of which every group keeps two, and back. With b3 b2 b1 b0 for the
// kept columns the nibble is b3|b2, b3|~b2, ~b1&~b0, b1&~b0.
template <class Word> inline Word meta_of(Word kept) {
    return ((kept | kept << 1) & 0x8888888888888888) | ((kept >> 1 | ~kept) & 0x4444444444444444) |
           (~(kept | kept << 1) & 0x2222222222222222) | (kept >> 1 & ~kept & 0x1111111111111111);
}

// Never more than two of a group, whatever the bits.
inline uint64_t kept_of(uint64_t meta) {
    return (~(meta | meta >> 1) & 0x1111111111111111) |
           (((~meta & meta << 1) | (~(meta >> 2) & meta >> 1)) & 0x2222222222222222) |
           (((meta << 1 & ~(meta << 2)) | (meta >> 1 & ~meta)) & 0x4444444444444444) |
           (meta & meta << 1 & 0x8888888888888888);
}

// The lowest bit of every nibble that is not one of 4, 8, 9, C, D, E: whose first column is not below its second.
inline uint64_t bad_nibbles(uint64_t meta) {
    const uint64_t n0 = meta, n1 = meta >> 1, n2 = meta >> 2, n3 = meta >> 3;
    return ~((n3 & ~n1) | (~(n3 ^ n1) & n2 & ~n0)) & 0x1111111111111111;
}

// The bytes of a word as they lie in memory, the lowest first.
inline uint64_t lowest_first(uint64_t word) {
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

// count <= 8 bytes of metadata, the first lowest.
inline uint64_t load_meta64(const uint8_t *p, int64_t count = 8) {
    uint64_t meta = 0;
    std::memcpy(&meta, p, count);
    return lowest_first(meta);
}

inline void store_meta64(uint64_t meta, uint8_t *p, int64_t count = 8) {
    meta = lowest_first(meta);
    std::memcpy(p, &meta, count);
}

// The first bad place of a matrix, whoever finds it.
class First {
  public:
    void report(int64_t place) {
        int64_t seen = place_.load(std::memory_order_relaxed);
        while (place < seen && !place_.compare_exchange_weak(seen, place, std::memory_order_relaxed)) {
        }
    }
    int64_t place() const { return place_.load(std::memory_order_relaxed); }

  private:
    std::atomic<int64_t> place_{INT64_MAX}; // where there is none
};

// How the bits of a number of some dtype are read, as signed integers of its own width.
struct Numbers {
    int64_t magnitude; // the bits of it; all of an integer's
    int64_t largest;   // magnitude that is not NaN
    int64_t lowest;    // the bits of the lowest number
    int fraction;      // bits after the exponent's
    bool integer;
};

inline int width_of(DType dtype) {
    return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : dtype == kFloat16 || dtype == kBFloat16 ? 2 : 1;
}

inline Numbers numbers(DType dtype) {
    const int64_t sign = int64_t(uint64_t{1} << (8 * width_of(dtype) - 1)), magnitude = int64_t(uint64_t(sign) - 1);
    if (dtype == kInt8)
        return {-1, 0, -128, 0, true};
    const int64_t largest = dtype == kFloat64      ? 0x7ff0000000000000
                            : dtype == kFloat32    ? 0x7f800000
                            : dtype == kFloat16    ? 0x7c00
                            : dtype == kBFloat16   ? 0x7f80
                            : dtype == kFloat8E4M3 ? 0x7e // has no infinity: 448
                                                   : 0x7c;
    const int fraction = dtype == kFloat64      ? 52
                         : dtype == kFloat32    ? 23
                         : dtype == kFloat16    ? 10
                         : dtype == kBFloat16   ? 7
                         : dtype == kFloat8E4M3 ? 3
                                                : 2;
    return {magnitude, largest, sign | largest, fraction, false};
}

} // namespace
} // namespace sparsekit::cpu
