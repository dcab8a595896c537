// The AVX-512 path: a word of 2:4 weight is one vector.
#include "linear24_body.h"

#include <immintrin.h>

namespace sparsekit::cpu {
namespace {

struct Avx512 {
    using F = __m512;
    using Choice = __m512i;
    // kPanelRows: on an Ice Lake server, of a panel that was slower. By the instructions of this one it would be about
    // 24 there and 33 on a Zen 4: not measured.
    static constexpr int kLanes = 16, kDotBlock = 4, kPanelRows = 49;

    static F zero() { return _mm512_setzero_ps(); }
    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static F load(const Half *p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p))); }
    static F load(const BFloat16 *p) {
        const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
    }
    static void store(float *p, F a) { _mm512_storeu_ps(p, a); }
    static F load_four(const float *p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
    static F load_four(const Half *p) { return _mm512_cvtph_ps(_mm256_set1_epi64x(eight_bytes(p))); }
    static F load_four(const BFloat16 *p) { // to the upper halves of the lanes
        const __m512i from =
            _mm512_broadcast_i32x4(_mm_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7));
        return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64(eight_bytes(p)), from));
    }
    template <int lane> static F spread(F four) { return _mm512_permute_ps(four, 0x55 * lane); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static float sum(F a) { return _mm512_reduce_add_ps(a); }

    static void arrange(float *) {}
    // Lane j: 4 * (j / 2), the first column of its group, plus its two bits of metadata.
    static Choice decode(uint32_t meta, int) {
        const __m512i shift = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
        const __m512i group = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
        const __m512i bits = _mm512_srlv_epi32(_mm512_set1_epi32(static_cast<int>(meta)), shift);
        return _mm512_ternarylogic_epi32(bits, _mm512_set1_epi32(3), group, 0xea); // (bits & 3) | group
    }
    static F pick(const float *word, int, Choice c) {
        return _mm512_permutex2var_ps(_mm512_loadu_ps(word), c, _mm512_loadu_ps(word + 16));
    }
};

} // namespace

void linear24_avx512(const Linear24 &problem, int threads) { linear24<Avx512>(problem, threads); }

} // namespace sparsekit::cpu
