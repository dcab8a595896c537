// The AVX2 path of the format ops: a shuffle moves the values of eight columns, by a table.
#include "format24_path.h"

#include <immintrin.h>
#include <type_traits>

namespace sparsekit::cpu {
namespace {

// In the ring of m columns, of the r-th neighbour of each lane: the lane that it is, and its bytes in their half of a
// vector.
template <class Int, int m, int r> struct Ring {
    static constexpr int kLanes = 32 / sizeof(Int);
    alignas(32) Int lane[kLanes] = {};
    alignas(32) int8_t bytes[32] = {};

    constexpr Ring() {
        for (int i = 0; i < kLanes; ++i) {
            const int from = i / m * m + (i + r) % m;
            lane[i] = static_cast<Int>(from);
            for (size_t byte = 0; byte < sizeof(Int); ++byte)
                bytes[i * sizeof(Int) + byte] = static_cast<int8_t>((from * sizeof(Int) + byte) % 16);
        }
    }
};
template <class Int, int m, int r> constexpr Ring<Int, m, r> kRing;

// By the mask of eight columns: those that it has, and for each column its place among them; as lanes, and as the bytes
// of lanes of two.
struct Columns {
    static constexpr uint8_t kNone = 0x80; // a shuffle writes a zero for an index with the top bit
    alignas(64) uint8_t kept[256][8] = {}, place[256][8] = {}, kept_bytes[256][16] = {}, place_bytes[256][16] = {};

    constexpr Columns() {
        for (int mask = 0; mask < 256; ++mask)
            for (int column = 0, found = 0; column < 8; ++column) {
                const bool has = mask >> column & 1;
                place[mask][column] = has ? static_cast<uint8_t>(found) : kNone;
                for (int byte = 0; byte < 2; ++byte) {
                    place_bytes[mask][2 * column + byte] = has ? static_cast<uint8_t>(2 * found + byte) : kNone;
                    if (has)
                        kept_bytes[mask][2 * found + byte] = static_cast<uint8_t>(2 * column + byte);
                }
                if (has)
                    kept[mask][found] = static_cast<uint8_t>(column);
                found += has;
            }
    }
};
constexpr Columns kColumnsOf;

template <class Int> struct Vector {
    using V = __m256i;
    static constexpr int kLanes = 32 / sizeof(Int);

    static V load(const Int *p) { return _mm256_loadu_si256(reinterpret_cast<const V *>(p)); }
    static V load_bytes(const int8_t *p) { return _mm256_load_si256(reinterpret_cast<const V *>(p)); }
    static void store(Int *p, V a) { _mm256_storeu_si256(reinterpret_cast<V *>(p), a); }
    static void stream(Int *p, V a) { _mm256_stream_si256(reinterpret_cast<V *>(p), a); }
    static V land(V a, V b) { return _mm256_and_si256(a, b); }
    static V lor(V a, V b) { return _mm256_or_si256(a, b); }
    static V lxor(V a, V b) { return _mm256_xor_si256(a, b); }
    static V select(V mask, V a, V b) { return _mm256_blendv_epi8(b, a, mask); }
    static V flipped_abs(V a) { return _mm256_xor_si256(_mm256_abs_epi8(a), _mm256_set1_epi8(-128)); }
};

// What is made of L's bytes: the masks of 32 columns as a byte each.
template <class L, class Int> struct Masks : MasksOfLanes<L, Int, sizeof(Int) == 8 ? 4 : 8> {
    using V = __m256i;
    static constexpr bool kStoresPairs = sizeof(Int) == 2 || sizeof(Int) == 4;

    // Two bytes a column; past the caches if they are whole lines.
    template <class Body> static void store_pairs(const Body &body, uint8_t *out, bool past) {
        constexpr int kAtOnce = 16;
#pragma GCC unroll 4
        for (int i = 0; i < kWord; i += kAtOnce) {
            const V ones = L::words(body, i) & _mm256_set1_epi8(1);
            V *to = reinterpret_cast<V *>(out + 2 * i);
            past ? _mm256_stream_si256(to, ones) : _mm256_storeu_si256(to, ones);
        }
    }
    template <class Body> static uint64_t word(const Body &body) {
        const auto half = [&](int i) {
            return uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(L::bytes(body, i)))};
        };
        return half(0) | half(32) << 32;
    }
    template <class Body> static void store_ones(const Body &body, uint8_t *out) {
        for (int i = 0; i < kWord; i += 32)
            _mm256_storeu_si256(reinterpret_cast<V *>(out + i), L::bytes(body, i) & _mm256_set1_epi8(1));
    }
};

struct Bytes : Vector<int8_t>, Masks<Bytes, int8_t> {
    using V = __m256i;
    static V set(int8_t a) { return _mm256_set1_epi8(a); }
    static V min(V a, V b) { return _mm256_min_epi8(a, b); }
    static V max(V a, V b) { return _mm256_max_epi8(a, b); }
    static uint64_t bits(V a) { return static_cast<uint32_t>(_mm256_movemask_epi8(a)); }
    static V gt(V a, V b) { return _mm256_cmpgt_epi8(a, b); }
    static V test(V a, V b) { return ~_mm256_cmpeq_epi8(land(a, b), _mm256_setzero_si256()); }
    template <class Body> static V bytes(const Body &body, int i) { return body(i); }
    static V sum(V a, V b) { return _mm256_add_epi8(a, b); }
    template <int m, int r> static V rotate(V a) {
        return _mm256_shuffle_epi8(a, load_bytes(kRing<int8_t, m, r>.bytes));
    }
    // Not by one less, which -128 has not.
    static V wins(V a, V b, V right) { return gt(a, b) | (_mm256_cmpeq_epi8(a, b) & right); }
    static V from_bits(uint64_t bits) {
        const V byte_of_lane = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const V bit_of_lane = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        const V spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of_lane);
        return _mm256_cmpeq_epi8(land(spread, bit_of_lane), bit_of_lane);
    }
    static V nonzero(V a, V b) { return _mm256_andnot_si256(_mm256_cmpeq_epi8(land(a, b), _mm256_setzero_si256()), a); }
    static V order(V a, V magnitude) { return _mm256_sign_epi8(land(a, magnitude), a); }
};

struct Words : Vector<int16_t>, Masks<Words, int16_t> {
    using V = __m256i;
    static V set(int16_t a) { return _mm256_set1_epi16(a); }
    static V min(V a, V b) { return _mm256_min_epi16(a, b); }
    static V max(V a, V b) { return _mm256_max_epi16(a, b); }
    static uint64_t bits(V a) {
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
    }
    static V gt(V a, V b) { return _mm256_cmpgt_epi16(a, b); }
    static V test(V a, V b) { return ~_mm256_cmpeq_epi16(land(a, b), _mm256_setzero_si256()); }
    // The masks of 16 columns as words, and of 32 as bytes.
    template <class Body> static V words(const Body &body, int i) { return body(i); }
    template <class Body> static V bytes(const Body &body, int i) {
        return _mm256_permute4x64_epi64(_mm256_packs_epi16(body(i), body(i + 16)), 0xd8); // quarters came as 0 2 1 3
    }
    static V sum(V a, V b) { return _mm256_add_epi16(a, b); }
    template <int m, int r> static V rotate(V a) {
        return _mm256_shuffle_epi8(a, load_bytes(kRing<int16_t, m, r>.bytes));
    }
    static V wins(V a, V b, V right) { return gt(a, sum(b, right)); } // no key is the lowest integer
    static V from_bits(uint64_t bits) {
        const V bit_of_lane =
            _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
        return _mm256_cmpeq_epi16(land(_mm256_set1_epi16(static_cast<int16_t>(bits)), bit_of_lane), bit_of_lane);
    }
    static V nonzero(V a, V b) {
        return _mm256_andnot_si256(_mm256_cmpeq_epi16(land(a, b), _mm256_setzero_si256()), a);
    }
    static V order(V a, V magnitude) { return _mm256_sign_epi16(land(a, magnitude), a); }
};

struct Doublewords : Vector<int32_t>, Masks<Doublewords, int32_t> {
    using V = __m256i;
    static V set(int32_t a) { return _mm256_set1_epi32(a); }
    static V min(V a, V b) { return _mm256_min_epi32(a, b); }
    static V max(V a, V b) { return _mm256_max_epi32(a, b); }
    static uint64_t bits(V a) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a))); }
    static V gt(V a, V b) { return _mm256_cmpgt_epi32(a, b); }
    static V test(V a, V b) { return ~_mm256_cmpeq_epi32(land(a, b), _mm256_setzero_si256()); }
    template <class Body> static V words(const Body &body, int i) {
        return _mm256_permute4x64_epi64(_mm256_packs_epi32(body(i), body(i + 8)), 0xd8); // quarters came as 0 2 1 3
    }
    template <class Body> static V bytes(const Body &body, int i) {
        const V low = _mm256_packs_epi32(body(i), body(i + 8)), high = _mm256_packs_epi32(body(i + 16), body(i + 24));
        const V order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    }
    static V sum(V a, V b) { return _mm256_add_epi32(a, b); }
    template <int m, int r> static V rotate(V a) {
        if constexpr (m == 4)
            return _mm256_shuffle_epi32(a, r == 1 ? 0x39 : r == 2 ? 0x4e : 0x93);
        else
            return _mm256_permutevar8x32_epi32(a, load(kRing<int32_t, m, r>.lane));
    }
    static V wins(V a, V b, V right) { return gt(a, sum(b, right)); } // no key is the lowest integer
    static V from_bits(uint64_t bits) {
        const V bit_of_lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        return _mm256_cmpeq_epi32(land(_mm256_set1_epi32(static_cast<int>(bits)), bit_of_lane), bit_of_lane);
    }
    static V nonzero(V a, V b) {
        return _mm256_andnot_si256(_mm256_cmpeq_epi32(land(a, b), _mm256_setzero_si256()), a);
    }
    static V order(V a, V magnitude) { return _mm256_sign_epi32(land(a, magnitude), a); }
};

struct Quadwords : Vector<int64_t>, Masks<Quadwords, int64_t> {
    using V = __m256i;
    static V set(int64_t a) { return _mm256_set1_epi64x(a); }
    static V min(V a, V b) { return _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(a, b)); }
    static V max(V a, V b) { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b)); }
    static uint64_t bits(V a) { return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(a))); }
    static V gt(V a, V b) { return _mm256_cmpgt_epi64(a, b); }
    static V test(V a, V b) { return ~_mm256_cmpeq_epi64(land(a, b), _mm256_setzero_si256()); }
    template <class Body> static V bytes(const Body &body, int i) {
        const auto doublewords = [&](int at) { // the lower halves
            const __m256 low = _mm256_castsi256_ps(body(at)), high = _mm256_castsi256_ps(body(at + 4));
            return _mm256_permute4x64_epi64(_mm256_castps_si256(_mm256_shuffle_ps(low, high, 0x88)), 0xd8);
        };
        return Doublewords::bytes(doublewords, i);
    }
    static V sum(V a, V b) { return _mm256_add_epi64(a, b); }
    template <int m, int r> static V rotate(V a) {
        if constexpr (m == 2)
            return _mm256_permute4x64_epi64(a, 0xb1);
        else
            return _mm256_permute4x64_epi64(a, r == 1 ? 0x39 : r == 2 ? 0x4e : 0x93);
    }
    static V wins(V a, V b, V right) { return gt(a, sum(b, right)); } // no key is the lowest integer
    static V order(V a, V magnitude) {
        const V sign = _mm256_cmpgt_epi64(_mm256_setzero_si256(), a);
        return _mm256_sub_epi64(lxor(land(a, magnitude), sign), sign);
    }
};

template <class Int>
using Of = std::conditional_t<
    sizeof(Int) == 1, Bytes,
    std::conditional_t<sizeof(Int) == 2, Words, std::conditional_t<sizeof(Int) == 4, Doublewords, Quadwords>>>;

__m128i load4(const void *p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    return _mm_cvtsi32_si128(four);
}
__m128i load8(const void *p) { return _mm_loadl_epi64(static_cast<const __m128i *>(p)); }

__m128i load16(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
__m256i two(__m128i low, __m128i high) { return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1); }

// By which of eight columns are live, the bytes of the four values that are kept, for lanes of one byte and of two. A
// value that is not live is zero.
struct Values {
    alignas(64) uint8_t bytes[2][256][4] = {}, words[256][8] = {}; // of bytes, for the first and the second eight of 16

    constexpr Values() {
        for (int live = 0; live < 256; ++live)
            for (int value = 0; value < 4; ++value) {
                const int four = live >> value / 2 * 4 & 15, column = value / 2 * 4 + kept(four, value % 2);
                const bool is = live >> column & 1;
                for (int half = 0; half < 2; ++half) {
                    bytes[half][live][value] = is ? static_cast<uint8_t>(8 * half + column) : Columns::kNone;
                    words[live][2 * value + half] = is ? static_cast<uint8_t>(2 * column + half) : Columns::kNone;
                }
            }
    }
    // Of four columns the two that are kept: those that are live, then the lowest.
    static constexpr int kept(int four, int which) {
        int two[2] = {}, found = 0;
        for (int live = 1; live >= 0; --live)
            for (int column = 0; column < 4; ++column)
                if ((four >> column & 1) == live && found < 2)
                    two[found++] = column;
        return (two[0] < two[1]) == (which == 0) ? two[0] : two[1];
    }
};
constexpr Values kValuesOf;

__m256i all64(const void *p) { return _mm256_castpd_si256(_mm256_broadcast_sd(static_cast<const double *>(p))); }
__m256i all32(const void *p) { return _mm256_castps_si256(_mm256_broadcast_ss(static_cast<const float *>(p))); }

// The quarters 0 and 2 of a, then of b.
__m256i halves(__m256i a, __m256i b) { return _mm256_permute4x64_epi64(_mm256_unpacklo_epi64(a, b), 0xd8); }

// A vector of the values that are kept of two vectors of columns, by those that are live.
__m256i pack_lanes(const int8_t *p, const uint8_t *live) {
    const auto some = [&](int i) {
        const auto index = [&](int at) { return all32(kValuesOf.bytes[at & 1][live[4 * i + at]]); };
        const __m256i low = _mm256_blend_epi32(index(0), index(1), 0x22),
                      high = _mm256_blend_epi32(index(2), index(3), 0x22);
        return _mm256_shuffle_epi8(Bytes::load(p + 32 * i), _mm256_blend_epi32(low, high, 0xf0));
    };
    return halves(some(0), some(1));
}
__m256i pack_lanes(const int16_t *p, const uint8_t *live) {
    const auto some = [&](int i) {
        const __m256i low = all64(kValuesOf.words[live[2 * i]]), high = all64(kValuesOf.words[live[2 * i + 1]]);
        return _mm256_shuffle_epi8(Words::load(p + 16 * i), _mm256_blend_epi32(low, high, 0xf0));
    };
    return halves(some(0), some(1));
}
__m256i pack_lanes(const int32_t *p, const uint8_t *live) {
    const auto some = [&](int i) {
        const __m256i index = _mm256_cvtepi8_epi32(load4(kValuesOf.bytes[0][live[i]])); // of none: negative
        const __m256i all = _mm256_permutevar8x32_epi32(Doublewords::load(p + 8 * i), index);
        return _mm256_andnot_si256(_mm256_srai_epi32(index, 31), all);
    };
    return two(_mm256_castsi256_si128(some(0)), _mm256_castsi256_si128(some(1)));
}

// Of eight columns those that are kept, next to one another; eight are written.
void gather8(const int8_t *p, uint64_t kept, int8_t *out) {
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_shuffle_epi8(load8(p), load8(kColumnsOf.kept[kept])));
}
void gather8(const int16_t *p, uint64_t kept, int16_t *out) {
    const __m128i all = _mm_shuffle_epi8(load16(p), load16(kColumnsOf.kept_bytes[kept]));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), all);
}
void gather8(const int32_t *p, uint64_t kept, int32_t *out) {
    const __m256i index = _mm256_cvtepu8_epi32(load8(kColumnsOf.kept[kept]));
    Doublewords::store(out, _mm256_permutevar8x32_epi32(Doublewords::load(p), index));
}

// Four values to eight columns.
void unpack8(const int8_t *values, uint64_t kept, int8_t *out) {
    const __m128i place = load8(kColumnsOf.place[kept]);
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_shuffle_epi8(load4(values), place));
}
void unpack8(const int16_t *values, uint64_t kept, int16_t *out) {
    const __m128i place = load16(kColumnsOf.place_bytes[kept]);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm_shuffle_epi8(load8(values), place));
}
void unpack8(const int32_t *values, uint64_t kept, int32_t *out) {
    const __m256i index = _mm256_cvtepi8_epi32(load8(kColumnsOf.place[kept])); // of none: negative
    const __m256i all = _mm256_permutevar8x32_epi32(_mm256_castsi128_si256(load16(values)), index);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_andnot_si256(_mm256_srai_epi32(index, 31), all));
}

struct Avx2 {
    template <class Int> using Lanes = Of<Int>;

    static void fence() { _mm_sfence(); }

    // What is kept follows from what is live.
    template <class W, class Clean> static void pack(const W *p, uint64_t, uint64_t live, const Clean &clean, W *out) {
        using L = Lanes<W>;
        uint8_t eights[8];
        std::memcpy(eights, &live, sizeof live);
#pragma GCC unroll 8
        for (int i = 0; i < kWord; i += 2 * L::kLanes)
            L::store(out + i / 2, clean(pack_lanes(p + i, eights + i / 8)));
    }
    template <class W> static void gather(const W *p, uint64_t kept, W *out) {
        if constexpr (sizeof(W) == 8)
            return gather_each(p, kept, out);
        else
            for (; kept; kept >>= 8, p += 8) {
                gather8(p, kept & 255, out);
                out += __builtin_popcountll(kept & 255);
            }
    }
    static uint64_t first(uint64_t bits, int count) {
        return _pdep_u64(_bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count)), bits);
    }
    template <class W> static void unpack(const W *values, uint64_t kept, W *out) {
        for (int i = 0; i < kWord / 8; ++i)
            unpack8(values + 4 * i, kept >> 8 * i & 255, out + 8 * i);
    }
};

} // namespace

const Format24Path kFormat24Avx2 = path<Avx2>();

} // namespace sparsekit::cpu
