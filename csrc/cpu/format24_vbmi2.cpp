// The AVX-512 path of the format ops, for CPUs that gather bytes and 16-bit lanes by a mask (VBMI2, Ice Lake and Zen 4
// on).
#include "format24_path.h"

#include <immintrin.h>
#include <type_traits>

namespace sparsekit::cpu {
namespace {

template <class Int> struct Vector {
    using V = __m512i;
    static constexpr int kLanes = 64 / sizeof(Int);

    static V load(const Int *p) { return _mm512_loadu_si512(p); }
    static void store(Int *p, V a) { _mm512_storeu_si512(p, a); }
    static void stream(Int *p, V a) { _mm512_stream_si512(reinterpret_cast<V *>(p), a); }
    static V land(V a, V b) { return _mm512_and_si512(a, b); }
    static V lor(V a, V b) { return _mm512_or_si512(a, b); }
    static V lxor(V a, V b) { return _mm512_xor_si512(a, b); }
    static V flipped_abs(V a) { return _mm512_xor_si512(_mm512_abs_epi8(a), _mm512_set1_epi8(-128)); }
};

struct Bytes : Vector<int8_t>, MasksOfBits<Bytes, Bytes> {
    static V set(int8_t a) { return _mm512_set1_epi8(a); }
    static V min(V a, V b) { return _mm512_min_epi8(a, b); }
    static V max(V a, V b) { return _mm512_max_epi8(a, b); }
    static V sum(V a, V b) { return _mm512_add_epi8(a, b); }
    static uint64_t gt(V a, V b) { return _mm512_cmpgt_epi8_mask(a, b); }
    static V select(uint64_t mask, V a, V b) { return _mm512_mask_mov_epi8(b, static_cast<__mmask64>(mask), a); }
    static uint64_t test(V a, V b) { return _mm512_test_epi8_mask(a, b); }
    static V from_bits(uint64_t bits) { return _mm512_movm_epi8(bits); }
    static V nonzero(V a, V b) { return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(a, b), a); }
    template <int r> static V rotate(V a) { return _mm512_ror_epi32(a, 8 * r); }
    static V order(V a, V magnitude) {
        const V size = _mm512_and_si512(a, magnitude);
        return _mm512_mask_sub_epi8(size, _mm512_movepi8_mask(a), _mm512_setzero_si512(), size);
    }
    static __m512i compress(uint64_t kept, V a) { return _mm512_maskz_compress_epi8(kept, a); }
    static V expand(uint64_t kept, __m512i a) { return _mm512_maskz_expand_epi8(kept, a); }
};

struct Words : Vector<int16_t>, MasksOfBits<Words, Bytes> {
    static V set(int16_t a) { return _mm512_set1_epi16(a); }
    static V min(V a, V b) { return _mm512_min_epi16(a, b); }
    static V max(V a, V b) { return _mm512_max_epi16(a, b); }
    static V sum(V a, V b) { return _mm512_add_epi16(a, b); }
    static uint64_t gt(V a, V b) { return _mm512_cmpgt_epi16_mask(a, b); }
    static V select(uint64_t mask, V a, V b) { return _mm512_mask_mov_epi16(b, static_cast<__mmask32>(mask), a); }
    static uint64_t test(V a, V b) { return _mm512_test_epi16_mask(a, b); }
    static V from_bits(uint64_t bits) { return _mm512_movm_epi16(static_cast<__mmask32>(bits)); }
    static V nonzero(V a, V b) { return _mm512_maskz_mov_epi16(_mm512_test_epi16_mask(a, b), a); }
    template <int r> static V rotate(V a) { return _mm512_ror_epi64(a, 16 * r); }
    static V order(V a, V magnitude) {
        const V size = _mm512_and_si512(a, magnitude);
        return _mm512_mask_sub_epi16(size, _mm512_movepi16_mask(a), _mm512_setzero_si512(), size);
    }
    static __m512i compress(uint64_t kept, V a) { return _mm512_maskz_compress_epi16(static_cast<__mmask32>(kept), a); }
    static V expand(uint64_t kept, __m512i a) { return _mm512_maskz_expand_epi16(static_cast<__mmask32>(kept), a); }
};

struct Doublewords : Vector<int32_t>, MasksOfBits<Doublewords, Bytes> {
    static V set(int32_t a) { return _mm512_set1_epi32(a); }
    static V min(V a, V b) { return _mm512_min_epi32(a, b); }
    static V max(V a, V b) { return _mm512_max_epi32(a, b); }
    static V sum(V a, V b) { return _mm512_add_epi32(a, b); }
    static uint64_t gt(V a, V b) { return _mm512_cmpgt_epi32_mask(a, b); }
    static V select(uint64_t mask, V a, V b) { return _mm512_mask_mov_epi32(b, static_cast<__mmask16>(mask), a); }
    static uint64_t test(V a, V b) { return _mm512_test_epi32_mask(a, b); }
    static V from_bits(uint64_t bits) { return _mm512_movm_epi32(static_cast<__mmask16>(bits)); }
    static V nonzero(V a, V b) { return _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(a, b), a); }
    template <int r> static V rotate(V a) {
        return _mm512_shuffle_epi32(a, static_cast<_MM_PERM_ENUM>(r == 1 ? 0x39 : r == 2 ? 0x4e : 0x93));
    }
    static V order(V a, V magnitude) {
        const V size = _mm512_and_si512(a, magnitude);
        return _mm512_mask_sub_epi32(size, _mm512_movepi32_mask(a), _mm512_setzero_si512(), size);
    }
    static __m512i compress(uint64_t kept, V a) { return _mm512_maskz_compress_epi32(static_cast<__mmask16>(kept), a); }
    static V expand(uint64_t kept, __m512i a) { return _mm512_maskz_expand_epi32(static_cast<__mmask16>(kept), a); }
};

struct Quadwords : Vector<int64_t>, MasksOfBits<Quadwords, Bytes> {
    static V set(int64_t a) { return _mm512_set1_epi64(a); }
    static V min(V a, V b) { return _mm512_min_epi64(a, b); }
    static V max(V a, V b) { return _mm512_max_epi64(a, b); }
    static V sum(V a, V b) { return _mm512_add_epi64(a, b); }
    static uint64_t gt(V a, V b) { return _mm512_cmpgt_epi64_mask(a, b); }
    static V select(uint64_t mask, V a, V b) { return _mm512_mask_mov_epi64(b, static_cast<__mmask8>(mask), a); }
    static uint64_t test(V a, V b) { return _mm512_test_epi64_mask(a, b); }
    static V from_bits(uint64_t bits) { return _mm512_movm_epi64(static_cast<__mmask8>(bits)); }
    template <int r> static V rotate(V a) { return _mm512_permutex_epi64(a, r == 1 ? 0x39 : r == 2 ? 0x4e : 0x93); }
    static V order(V a, V magnitude) {
        const V size = _mm512_and_si512(a, magnitude);
        return _mm512_mask_sub_epi64(size, _mm512_movepi64_mask(a), _mm512_setzero_si512(), size);
    }
    static __m512i compress(uint64_t kept, V a) { return _mm512_maskz_compress_epi64(static_cast<__mmask8>(kept), a); }
};

template <class Int>
using Of = std::conditional_t<
    sizeof(Int) == 1, Bytes,
    std::conditional_t<sizeof(Int) == 2, Words, std::conditional_t<sizeof(Int) == 4, Doublewords, Quadwords>>>;

struct Vbmi2 {
    template <class Int> using Lanes = Of<Int>;

    static void fence() { _mm_sfence(); }

    // To a register and then a plain store: compressing to memory takes some CPUs a hundred cycles.
    template <class W, class Clean>
    static void pack(const W *p, uint64_t kept, uint64_t live, const Clean &clean, W *out) {
        using L = Lanes<W>;
        constexpr int kHalf = L::kLanes / 2;
#pragma GCC unroll 4
        for (int i = 0; i < kWord; i += L::kLanes) {
            const __m512i all = L::land(clean(L::load(p + i)), L::from_bits(live >> i));
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(out + i / L::kLanes * kHalf),
                                _mm512_castsi512_si256(L::compress(kept >> i, all)));
        }
    }
    template <class W> static void gather(const W *p, uint64_t kept, W *out) {
        using L = Lanes<W>;
#pragma GCC unroll 8
        for (int i = 0; i < kWord; i += L::kLanes) {
            L::store(out, L::compress(kept >> i, L::load(p + i)));
            out += __builtin_popcountll(kept >> i & low_bits(L::kLanes));
        }
    }
    static uint64_t first(uint64_t bits, int count) {
        return _pdep_u64(_bzhi_u64(~uint64_t{0}, static_cast<unsigned>(count)), bits);
    }
    template <class W> static void unpack(const W *values, uint64_t kept, W *out) {
        using L = Lanes<W>;
        constexpr int kHalf = L::kLanes / 2;
#pragma GCC unroll 4
        for (int i = 0; i < kWord; i += L::kLanes) {
            const auto *from = reinterpret_cast<const __m256i *>(values + i / L::kLanes * kHalf);
            L::store(out + i, L::expand(kept >> i, _mm512_castsi256_si512(_mm256_loadu_si256(from))));
        }
    }
};

} // namespace

const Format24Path kFormat24Vbmi2 = path<Vbmi2>();

} // namespace sparsekit::cpu
