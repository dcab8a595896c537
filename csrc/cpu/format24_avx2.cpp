// The AVX2 path of the format ops: a shuffle moves the values of eight columns, by a table.
#include "format24_masks.h"

#include <immintrin.h>
#include <type_traits>

namespace sparsekit::cpu {
namespace {

// By the mask of eight columns: the first four that it has, and for each column its place among those that it has.
struct Columns {
    static constexpr uint8_t kNone =
        0xc0; // a shuffle writes a zero for an index with the top bit, here also when doubled
    alignas(64) uint8_t kept[256][4] = {}, place[256][8] = {};

    constexpr Columns() {
        for (int mask = 0; mask < 256; ++mask)
            for (int column = 0, found = 0; column < 8; ++column) {
                place[mask][column] = kNone;
                if (mask >> column & 1) {
                    if (found < 4)
                        kept[mask][found] = static_cast<uint8_t>(column);
                    place[mask][column] = static_cast<uint8_t>(found++);
                }
            }
    }
};
constexpr Columns kColumnsOf;

template <class Int> struct Vector {
    using V = __m256i;
    static constexpr int kLanes = 32 / sizeof(Int);

    static V load(const Int *p) { return _mm256_loadu_si256(reinterpret_cast<const V *>(p)); }
    static void store(Int *p, V a) { _mm256_storeu_si256(reinterpret_cast<V *>(p), a); }
    static void stream(Int *p, V a) { _mm256_stream_si256(reinterpret_cast<V *>(p), a); }
    static V land(V a, V b) { return _mm256_and_si256(a, b); }
    static V lxor(V a, V b) { return _mm256_xor_si256(a, b); }
    static V flipped_abs(V a) { return _mm256_xor_si256(_mm256_abs_epi8(a), _mm256_set1_epi8(-128)); }
};

struct Bytes : Vector<int8_t> {
    static V set(int8_t a) { return _mm256_set1_epi8(a); }
    static V min(V a, V b) { return _mm256_min_epi8(a, b); }
    static V max(V a, V b) { return _mm256_max_epi8(a, b); }
    static uint64_t bits(V a) { return static_cast<uint32_t>(_mm256_movemask_epi8(a)); }
    static uint64_t gt(V a, V b) { return bits(_mm256_cmpgt_epi8(a, b)); }
    static uint64_t test(V a, V b) { return bits(_mm256_cmpeq_epi8(land(a, b), _mm256_setzero_si256())) ^ 0xffffffff; }
    static V from_bits(uint64_t bits) {
        const V byte_of_lane = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
        const V bit_of_lane = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        const V spread = _mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(bits)), byte_of_lane);
        return _mm256_cmpeq_epi8(land(spread, bit_of_lane), bit_of_lane);
    }
    static V nonzero(V a, V b) { return _mm256_andnot_si256(_mm256_cmpeq_epi8(land(a, b), _mm256_setzero_si256()), a); }
    template <int r> static V rotate(V a) {
        const __m128i from = _mm_add_epi8(_mm_setr_epi8(r, (r + 1) % 4, (r + 2) % 4, (r + 3) % 4, r, (r + 1) % 4,
                                                        (r + 2) % 4, (r + 3) % 4, r, (r + 1) % 4, (r + 2) % 4,
                                                        (r + 3) % 4, r, (r + 1) % 4, (r + 2) % 4, (r + 3) % 4),
                                          _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12));
        return _mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(from));
    }
    static V order(V a, V magnitude) {
        const V sign = _mm256_cmpgt_epi8(_mm256_setzero_si256(), a);
        return _mm256_sub_epi8(lxor(land(a, magnitude), sign), sign);
    }
};

struct Words : Vector<int16_t> {
    static V set(int16_t a) { return _mm256_set1_epi16(a); }
    static V min(V a, V b) { return _mm256_min_epi16(a, b); }
    static V max(V a, V b) { return _mm256_max_epi16(a, b); }
    static uint64_t bits(V a) {
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
        return static_cast<uint32_t>(_mm_movemask_epi8(bytes));
    }
    static uint64_t gt(V a, V b) { return bits(_mm256_cmpgt_epi16(a, b)); }
    static uint64_t test(V a, V b) { return bits(_mm256_cmpeq_epi16(land(a, b), _mm256_setzero_si256())) ^ 0xffff; }
    static V from_bits(uint64_t bits) {
        const V bit_of_lane =
            _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
        return _mm256_cmpeq_epi16(land(_mm256_set1_epi16(static_cast<int16_t>(bits)), bit_of_lane), bit_of_lane);
    }
    static V nonzero(V a, V b) {
        return _mm256_andnot_si256(_mm256_cmpeq_epi16(land(a, b), _mm256_setzero_si256()), a);
    }
    template <int r> static V rotate(V a) {
        constexpr int kOrder = r == 1 ? 0x39 : r == 2 ? 0x4e : 0x93;
        return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(a, kOrder), kOrder);
    }
    static V order(V a, V magnitude) {
        const V sign = _mm256_srai_epi16(a, 15);
        return _mm256_sub_epi16(lxor(land(a, magnitude), sign), sign);
    }
};

struct Doublewords : Vector<int32_t> {
    static V set(int32_t a) { return _mm256_set1_epi32(a); }
    static V min(V a, V b) { return _mm256_min_epi32(a, b); }
    static V max(V a, V b) { return _mm256_max_epi32(a, b); }
    static uint64_t bits(V a) { return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(a))); }
    static uint64_t gt(V a, V b) { return bits(_mm256_cmpgt_epi32(a, b)); }
    static uint64_t test(V a, V b) { return bits(_mm256_cmpeq_epi32(land(a, b), _mm256_setzero_si256())) ^ 0xff; }
    static V from_bits(uint64_t bits) {
        const V bit_of_lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        return _mm256_cmpeq_epi32(land(_mm256_set1_epi32(static_cast<int>(bits)), bit_of_lane), bit_of_lane);
    }
    static V nonzero(V a, V b) {
        return _mm256_andnot_si256(_mm256_cmpeq_epi32(land(a, b), _mm256_setzero_si256()), a);
    }
    template <int r> static V rotate(V a) { return _mm256_shuffle_epi32(a, r == 1 ? 0x39 : r == 2 ? 0x4e : 0x93); }
    static V order(V a, V magnitude) {
        const V sign = _mm256_srai_epi32(a, 31);
        return _mm256_sub_epi32(lxor(land(a, magnitude), sign), sign);
    }
};

struct Quadwords : Vector<int64_t> {
    static V set(int64_t a) { return _mm256_set1_epi64x(a); }
    static V min(V a, V b) { return _mm256_blendv_epi8(a, b, _mm256_cmpgt_epi64(a, b)); }
    static V max(V a, V b) { return _mm256_blendv_epi8(b, a, _mm256_cmpgt_epi64(a, b)); }
    static uint64_t bits(V a) { return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(a))); }
    static uint64_t gt(V a, V b) { return bits(_mm256_cmpgt_epi64(a, b)); }
    static uint64_t test(V a, V b) { return bits(_mm256_cmpeq_epi64(land(a, b), _mm256_setzero_si256())) ^ 0xf; }
    template <int r> static V rotate(V a) { return _mm256_permute4x64_epi64(a, r == 1 ? 0x39 : r == 2 ? 0x4e : 0x93); }
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

// Indices of 16-bit lanes as those of their bytes.
__m128i byte_indices(__m128i lanes) {
    const __m128i twice = _mm_unpacklo_epi8(lanes, lanes);
    return _mm_add_epi8(_mm_add_epi8(twice, twice), _mm_set1_epi16(0x0100));
}

// Eight columns, of which four are kept.
void pack8(const int8_t *p, const uint8_t *kept, int8_t *out) {
    const int32_t four = _mm_cvtsi128_si32(_mm_shuffle_epi8(load8(p), load4(kept)));
    std::memcpy(out, &four, sizeof four);
}
void pack8(const int16_t *p, const uint8_t *kept, int16_t *out) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p));
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_shuffle_epi8(all, byte_indices(load4(kept))));
}
void pack8(const int32_t *p, const uint8_t *kept, int32_t *out) {
    const __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
    const __m256i four = _mm256_permutevar8x32_epi32(all, _mm256_cvtepu8_epi32(load4(kept)));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm256_castsi256_si128(four));
}

// Four values to eight columns.
void unpack8(const int8_t *values, const uint8_t *place, int8_t *out) {
    _mm_storel_epi64(reinterpret_cast<__m128i *>(out), _mm_shuffle_epi8(load4(values), load8(place)));
}
void unpack8(const int16_t *values, const uint8_t *place, int16_t *out) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(out), _mm_shuffle_epi8(load8(values), byte_indices(load8(place))));
}
void unpack8(const int32_t *values, const uint8_t *place, int32_t *out) {
    const __m256i four = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(values)));
    const __m256i index = _mm256_cvtepi8_epi32(load8(place)); // of none: negative
    const __m256i all = _mm256_permutevar8x32_epi32(four, index);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(out), _mm256_andnot_si256(_mm256_srai_epi32(index, 31), all));
}

struct Avx2 {
    template <class Int> using Lanes = Of<Int>;

    static void fence() { _mm_sfence(); }

    template <class W, class Clean> static void pack(const W *p, uint64_t kept, const Clean &clean, W *out) {
        using L = Lanes<W>;
        W copy[kWord];
        for (int i = 0; i < kWord; i += L::kLanes)
            L::store(copy + i, clean(L::load(p + i), i));
        for (int i = 0; i < kWord / 8; ++i)
            pack8(copy + 8 * i, kColumnsOf.kept[kept >> 8 * i & 255], out + 4 * i);
    }
    template <class W> static void gather(const W *p, uint64_t kept, W *out) { gather_each(p, kept, out); }
    template <class W> static void unpack(const W *values, uint64_t kept, W *out) {
        for (int i = 0; i < kWord / 8; ++i)
            unpack8(values + 4 * i, kColumnsOf.place[kept >> 8 * i & 255], out + 8 * i);
    }
};

} // namespace

const Format24Path kFormat24Avx2 = path<Avx2>();

} // namespace sparsekit::cpu
