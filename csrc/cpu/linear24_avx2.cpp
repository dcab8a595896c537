// The AVX2 path: a word of 2:4 weight is two vectors of eight kept values, 16 columns each.
#include "linear24_body.h"

#include <immintrin.h>

namespace sparsekit::cpu {
namespace {

struct Avx2 {
    using F = __m256;
    using Choice = __m256i;
    static constexpr int kLanes = 8, kDotBlock = 4, kPanelRows = 6; // on a Zen 3

    static F zero() { return _mm256_setzero_ps(); }
    static F load(const float *p) { return _mm256_loadu_ps(p); }
    static F load(const Half *p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p))); }
    // Both halves get all eight and each shuffles its four to the upper halves of its lanes: one shuffle, where to
    // widen and to shift are two instructions on the ports that dot is short of.
    static F load(const BFloat16 *p) {
        const __m256i from = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1,
                                              -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
        const __m256i eight = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(eight, from));
    }
    static void store(float *p, F a) { _mm256_storeu_ps(p, a); }
    static F load_four(const float *p) { return _mm256_broadcast_ps(reinterpret_cast<const __m128 *>(p)); }
    static F load_four(const Half *p) { return _mm256_cvtph_ps(_mm_set1_epi64x(eight_bytes(p))); }
    static F load_four(const BFloat16 *p) { // to the upper halves of the lanes
        const __m256i from =
            _mm256_broadcastsi128_si256(_mm_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight_bytes(p)), from));
    }
    template <int lane> static F spread(F four) { return _mm256_permute_ps(four, 0x55 * lane); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static float sum(F a) {
        __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        s = _mm_add_ps(s, _mm_movehl_ps(s, s));
        return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
    }

    // A permute stays within half a vector and a half holds the kept values of two groups: of 16 columns the even
    // groups come first, c0-3 c8-11, then the odd ones, c4-7 c12-15.
    static void arrange(float *word) {
        for (float *p = word; p < word + kColumns; p += 16) {
            const __m256 low = _mm256_loadu_ps(p), high = _mm256_loadu_ps(p + 8);
            _mm256_storeu_ps(p, _mm256_permute2f128_ps(low, high, 0x20));
            _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(low, high, 0x31));
        }
    }
    // The permute reads the low two bits of a lane and no others.
    static Choice decode(uint32_t meta, int part) {
        const __m256i shift = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
        const __m256i first = _mm256_add_epi32(shift, _mm256_set1_epi32(16 * part));
        return _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(meta)), first);
    }
    static F pick(const float *word, int part, Choice c) {
        const __m256 even = _mm256_permutevar_ps(_mm256_loadu_ps(word + 16 * part), c);
        const __m256 odd = _mm256_permutevar_ps(_mm256_loadu_ps(word + 16 * part + 8), c);
        return _mm256_blend_ps(even, odd, 0xcc);
    }
};

} // namespace

void linear24_avx2(const Linear24 &problem, int threads) { linear24<Avx2>(problem, threads); }

} // namespace sparsekit::cpu
