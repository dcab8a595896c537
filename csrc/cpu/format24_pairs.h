// Sums of pairs of fp8 e4m3 as integers in the same order, by the instructions that read fp16. Unnamed namespace: see
// epilogue.h.
#pragma once
#include "sizes.h"

#include <cstring>
#if defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
#endif

namespace sparsekit::cpu {
namespace {

// Of a row's pairs, what has no partner with a zero, the keys, and up to 15 more behind them. False, and no keys, where
// a number is NaN or this instruction set cannot.
inline bool sum_pairs_e4m3(const uint8_t *row, int64_t cols, int32_t *keys) {
#if defined(__AVX2__) && defined(__F16C__)
    const __m256i nan = _mm256_set1_epi8(0x7f);
    __m256i largest = _mm256_setzero_si256();
    const auto some = [&](const uint8_t *at, int32_t *to) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(at));
        largest = _mm256_max_epi8(largest, _mm256_and_si256(both, nan));
        // From the upper byte of 16 bits, all but the sign a place down: an fp16, of a 256th of the number.
        const auto fp16 = [](__m256i upper) {
            return _mm256_and_si256(_mm256_srai_epi16(upper, 1), _mm256_set1_epi16(static_cast<int16_t>(0xbf80)));
        };
        const __m256i left = fp16(_mm256_slli_epi16(both, 8)), right = fp16(both);
        // Multiples of 2^-17 below 2: next to 96, whose last bit that is, sums are exact and their bits in order.
        const auto key = [&](__m128i a, __m128i b) {
            const __m256 shifted = _mm256_add_ps(_mm256_cvtph_ps(a), _mm256_set1_ps(96));
            return _mm256_castps_si256(_mm256_add_ps(shifted, _mm256_cvtph_ps(b)));
        };
        __m256i *out = reinterpret_cast<__m256i *>(to);
        _mm256_storeu_si256(out, key(_mm256_castsi256_si128(left), _mm256_castsi256_si128(right)));
        _mm256_storeu_si256(out + 1, key(_mm256_extracti128_si256(left, 1), _mm256_extracti128_si256(right, 1)));
    };
    int64_t col = 0;
    for (; col + 32 <= cols; col += 32)
        some(row + col, keys + col / 2);
    if (col < cols) {
        uint8_t rest[32] = {};
        std::memcpy(rest, row + col, cols - col);
        some(rest, keys + col / 2);
    }
    return _mm256_testz_si256(_mm256_cmpeq_epi8(largest, nan), _mm256_set1_epi8(-1)) != 0;
#else
    (void)row, (void)cols, (void)keys;
    return false;
#endif
}

} // namespace
} // namespace sparsekit::cpu
