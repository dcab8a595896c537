// AVX-512 for a host without it, from the operation sections of Intel's Intrinsics Guide: loops over the lanes of a
// register. Forced into the translation units of csrc/cpu that use it (-include), which are then compiled for AVX2. A
// name in a file's own namespace hides the compiler's, which would ask for the instruction set: one that is missing
// here does not compile. Faults that a CPU would raise, or hide, are kept for the test to ask for.
#pragma once
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <immintrin.h>

// The kernels themselves are compiled at -O0: to optimise them takes a minute, which no test's run is worth.
#pragma GCC push_options
#pragma GCC optimize("O2")

namespace emulator {

template <class To, class From> To as(const From &from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class T, size_t count = 64 / sizeof(T)> struct Lanes {
    T lane[count];

    T &operator[](size_t i) { return lane[i]; }
    const T &operator[](size_t i) const { return lane[i]; }
};

// A register of type V whose lane i is f(i).
template <class T, class V = __m512i, class F> inline V each(const F &f) {
    Lanes<T> lanes;
    for (size_t i = 0; i < 64 / sizeof(T); ++i)
        lanes[i] = static_cast<T>(f(i));
    return as<V>(lanes);
}
// The mask of the lanes where f(i) holds.
template <class T, class F> inline uint64_t where(const F &f) {
    uint64_t mask = 0;
    for (size_t i = 0; i < 64 / sizeof(T); ++i)
        mask |= uint64_t{f(i)} << i;
    return mask;
}
inline bool has(uint64_t mask, size_t lane) { return mask >> lane & 1; }

template <class T> inline __m512i compress(uint64_t mask, __m512i a) {
    const auto from = as<Lanes<T>>(a);
    Lanes<T> to{};
    for (size_t i = 0, found = 0; i < 64 / sizeof(T); ++i)
        if (has(mask, i))
            to[found++] = from[i];
    return as<__m512i>(to);
}
template <class T> inline __m512i expand(uint64_t mask, __m512i a) {
    const auto from = as<Lanes<T>>(a);
    size_t found = 0;
    return each<T>([&](size_t i) { return has(mask, i) ? from[found++] : T{0}; });
}

// IEEE half precision to single; a NaN becomes quiet.
inline float from_half(uint16_t half) {
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const uint32_t sign = static_cast<uint32_t>(half >> 15) << 31;
    if (exponent == 31)
        return as<float>(sign | 0x7f800000u | (fraction ? 0x400000u | fraction << 13 : 0u));
    const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
    return sign ? -size : size;
}

// Streamed stores are to be fenced by the thread that made them, and go to whole lines.
inline std::atomic<long> misaligned{0}, unfenced_threads{0};
inline thread_local bool unfenced = false;

inline void stream(void *p, __m512i a) {
    misaligned += reinterpret_cast<uintptr_t>(p) % 64 != 0;
    unfenced_threads += !unfenced;
    unfenced = true;
    std::memcpy(p, &a, sizeof a);
}
inline void fence() {
    unfenced_threads -= unfenced;
    unfenced = false;
}

} // namespace emulator

// Macros where nothing is optimised, or of some compilers always.
#undef _mm512_permute_ps
#undef _mm512_permutex_epi64
#undef _mm512_ror_epi32
#undef _mm512_ror_epi64
#undef _mm512_setr_epi32
#undef _mm512_slli_epi32
#undef _mm512_ternarylogic_epi32
#undef _mm512_shuffle_epi32
#define _mm512_shuffle_epi32 emulated_shuffle_epi32 // its enum is of the namespace of the compiler's

// Called, though [[gnu::flatten]] asks for all in one: half of the time to compile.
#define EMULATED [[gnu::noinline, gnu::unused]] static

namespace sparsekit::cpu {
namespace {

using emulator::as, emulator::each, emulator::where, emulator::has;
using Floats = emulator::Lanes<float>;

// ---- of every width ----

#define EMULATED_WIDTH(bits, set, mask_t)                                                                              \
    EMULATED __m512i _mm512_set1_##set(int##bits##_t a) {                                                              \
        return each<int##bits##_t>([&](size_t) { return a; });                                                         \
    }                                                                                                                  \
    EMULATED __m512i _mm512_min_epi##bits(__m512i a, __m512i b) {                                                      \
        const auto x = as<emulator::Lanes<int##bits##_t>>(a), y = as<emulator::Lanes<int##bits##_t>>(b);               \
        return each<int##bits##_t>([&](size_t i) { return x[i] < y[i] ? x[i] : y[i]; });                               \
    }                                                                                                                  \
    EMULATED __m512i _mm512_max_epi##bits(__m512i a, __m512i b) {                                                      \
        const auto x = as<emulator::Lanes<int##bits##_t>>(a), y = as<emulator::Lanes<int##bits##_t>>(b);               \
        return each<int##bits##_t>([&](size_t i) { return x[i] > y[i] ? x[i] : y[i]; });                               \
    }                                                                                                                  \
    EMULATED __m512i _mm512_add_epi##bits(__m512i a, __m512i b) {                                                      \
        const auto x = as<emulator::Lanes<uint##bits##_t>>(a), y = as<emulator::Lanes<uint##bits##_t>>(b);             \
        return each<uint##bits##_t>([&](size_t i) { return x[i] + y[i]; });                                            \
    }                                                                                                                  \
    EMULATED mask_t _mm512_cmpgt_epi##bits##_mask(__m512i a, __m512i b) {                                              \
        const auto x = as<emulator::Lanes<int##bits##_t>>(a), y = as<emulator::Lanes<int##bits##_t>>(b);               \
        return static_cast<mask_t>(where<int##bits##_t>([&](size_t i) { return x[i] > y[i]; }));                       \
    }                                                                                                                  \
    EMULATED mask_t _mm512_test_epi##bits##_mask(__m512i a, __m512i b) {                                               \
        const auto x = as<emulator::Lanes<int##bits##_t>>(a), y = as<emulator::Lanes<int##bits##_t>>(b);               \
        return static_cast<mask_t>(where<int##bits##_t>([&](size_t i) { return (x[i] & y[i]) != 0; }));                \
    }                                                                                                                  \
    EMULATED __m512i _mm512_mask_mov_epi##bits(__m512i from, mask_t mask, __m512i a) {                                 \
        const auto x = as<emulator::Lanes<int##bits##_t>>(a), y = as<emulator::Lanes<int##bits##_t>>(from);            \
        return each<int##bits##_t>([&](size_t i) { return has(mask, i) ? x[i] : y[i]; });                              \
    }                                                                                                                  \
    EMULATED __m512i _mm512_mask_sub_epi##bits(__m512i from, mask_t mask, __m512i a, __m512i b) {                      \
        const auto x = as<emulator::Lanes<uint##bits##_t>>(a), y = as<emulator::Lanes<uint##bits##_t>>(b);             \
        return _mm512_mask_mov_epi##bits(from, mask, each<uint##bits##_t>([&](size_t i) { return x[i] - y[i]; }));     \
    }                                                                                                                  \
    EMULATED __m512i _mm512_maskz_mov_epi##bits(mask_t mask, __m512i a) {                                              \
        return _mm512_mask_mov_epi##bits(__m512i{}, mask, a);                                                          \
    }                                                                                                                  \
    EMULATED mask_t _mm512_movepi##bits##_mask(__m512i a) {                                                            \
        const auto x = as<emulator::Lanes<int##bits##_t>>(a);                                                          \
        return static_cast<mask_t>(where<int##bits##_t>([&](size_t i) { return x[i] < 0; }));                          \
    }                                                                                                                  \
    EMULATED __m512i _mm512_movm_epi##bits(mask_t mask) {                                                              \
        return each<int##bits##_t>([&](size_t i) { return has(mask, i) ? -1 : 0; });                                   \
    }                                                                                                                  \
    EMULATED __m512i _mm512_maskz_compress_epi##bits(mask_t mask, __m512i a) {                                         \
        return emulator::compress<int##bits##_t>(mask, a);                                                             \
    }                                                                                                                  \
    EMULATED __m512i _mm512_maskz_expand_epi##bits(mask_t mask, __m512i a) {                                           \
        return emulator::expand<int##bits##_t>(mask, a);                                                               \
    }
EMULATED_WIDTH(8, epi8, __mmask64)
EMULATED_WIDTH(16, epi16, __mmask32)
EMULATED_WIDTH(32, epi32, __mmask16)
EMULATED_WIDTH(64, epi64, __mmask8)
#undef EMULATED_WIDTH

// ---- integers ----

EMULATED __m512i _mm512_loadu_si512(const void *p) {
    __m512i a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
EMULATED void _mm512_storeu_si512(void *p, __m512i a) { std::memcpy(p, &a, sizeof a); }
EMULATED void _mm512_stream_si512(__m512i *p, __m512i a) { emulator::stream(p, a); }
EMULATED void _mm_sfence() { emulator::fence(); }

EMULATED __m512i _mm512_setzero_si512() { return __m512i{}; }
template <class... I> EMULATED __m512i _mm512_setr_epi32(I... lanes) {
    static_assert(sizeof...(lanes) == 16);
    return as<__m512i>(emulator::Lanes<int32_t>{lanes...});
}
EMULATED __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
EMULATED __m512i _mm512_abs_epi8(__m512i a) { // of -128 the same bits
    const auto x = as<emulator::Lanes<int8_t>>(a);
    return each<uint8_t>([&](size_t i) { return x[i] < 0 ? -x[i] : x[i]; });
}
EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned by) {
    const auto x = as<emulator::Lanes<uint32_t>>(a);
    return each<uint32_t>([&](size_t i) { return by > 31 ? 0 : x[i] << by; });
}
EMULATED __m512i _mm512_srlv_epi32(__m512i a, __m512i by) {
    const auto x = as<emulator::Lanes<uint32_t>>(a), n = as<emulator::Lanes<uint32_t>>(by);
    return each<uint32_t>([&](size_t i) { return n[i] > 31 ? 0 : x[i] >> n[i]; });
}
EMULATED __m512i _mm512_ror_epi32(__m512i a, int by) {
    const auto x = as<emulator::Lanes<uint32_t>>(a);
    return each<uint32_t>([&](size_t i) { return x[i] >> by % 32 | x[i] << (32 - by % 32) % 32; });
}
EMULATED __m512i _mm512_ror_epi64(__m512i a, int by) {
    const auto x = as<emulator::Lanes<uint64_t>>(a);
    return each<uint64_t>([&](size_t i) { return x[i] >> by % 64 | x[i] << (64 - by % 64) % 64; });
}
EMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
    const auto x = as<emulator::Lanes<uint32_t>>(a), y = as<emulator::Lanes<uint32_t>>(b),
               z = as<emulator::Lanes<uint32_t>>(c);
    return each<uint32_t>([&](size_t i) {
        uint32_t bits = 0;
        for (int bit = 0; bit < 32; ++bit) {
            const int row = (x[i] >> bit & 1) << 2 | (y[i] >> bit & 1) << 1 | (z[i] >> bit & 1);
            bits |= static_cast<uint32_t>(table >> row & 1) << bit;
        }
        return bits;
    });
}
EMULATED __m512i _mm512_shuffle_epi8(__m512i a, __m512i from) { // within 16 bytes
    const auto x = as<emulator::Lanes<uint8_t>>(a), n = as<emulator::Lanes<uint8_t>>(from);
    return each<uint8_t>([&](size_t i) { return n[i] & 0x80 ? 0 : x[i / 16 * 16 + (n[i] & 15)]; });
}
EMULATED __m512i _mm512_shuffle_epi32(__m512i a, int order) { // within four lanes
    const auto x = as<emulator::Lanes<uint32_t>>(a);
    return each<uint32_t>([&](size_t i) { return x[i / 4 * 4 + (order >> i % 4 * 2 & 3)]; });
}
EMULATED __m512i _mm512_permutex_epi64(__m512i a, int order) { // within four lanes
    const auto x = as<emulator::Lanes<uint64_t>>(a);
    return each<uint64_t>([&](size_t i) { return x[i / 4 * 4 + (order >> i % 4 * 2 & 3)]; });
}
EMULATED __m512i _mm512_broadcast_i32x4(__m128i a) {
    const auto x = as<emulator::Lanes<uint32_t, 4>>(a);
    return each<uint32_t>([&](size_t i) { return x[i % 4]; });
}
EMULATED __m512i _mm512_cvtepu16_epi32(__m256i a) {
    const auto x = as<emulator::Lanes<uint16_t, 16>>(a);
    return each<uint32_t>([&](size_t i) { return x[i]; });
}
EMULATED __m256i _mm512_castsi512_si256(__m512i a) {
    __m256i low;
    std::memcpy(&low, &a, sizeof low);
    return low;
}
// Intel leaves the upper half undefined: ones, which nobody may mistake for zeros.
EMULATED __m512i _mm512_castsi256_si512(__m256i a) {
    __m512i all = ~__m512i{};
    std::memcpy(&all, &a, sizeof a);
    return all;
}

// ---- floats ----

EMULATED __m512 _mm512_setzero_ps() { return __m512{}; }
EMULATED __m512 _mm512_loadu_ps(const void *p) {
    __m512 a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
EMULATED void _mm512_storeu_ps(void *p, __m512 a) { std::memcpy(p, &a, sizeof a); }
EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return as<__m512>(a); }
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
    const auto x = as<emulator::Lanes<uint16_t, 16>>(a);
    return each<float, __m512>([&](size_t i) { return emulator::from_half(x[i]); });
}
EMULATED __m512 _mm512_broadcast_f32x4(__m128 a) {
    const auto x = as<emulator::Lanes<float, 4>>(a);
    return each<float, __m512>([&](size_t i) { return x[i % 4]; });
}
EMULATED __m512 _mm512_permute_ps(__m512 a, int order) { // within four lanes
    const auto x = as<Floats>(a);
    return each<float, __m512>([&](size_t i) { return x[i / 4 * 4 + (order >> i % 4 * 2 & 3)]; });
}
EMULATED __m512 _mm512_permutex2var_ps(__m512 a, __m512i from, __m512 b) {
    const auto x = as<Floats>(a), y = as<Floats>(b);
    const auto n = as<emulator::Lanes<uint32_t>>(from);
    return each<float, __m512>([&](size_t i) { return n[i] & 16 ? y[n[i] & 15] : x[n[i] & 15]; });
}
EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    const auto x = as<Floats>(a), y = as<Floats>(b), z = as<Floats>(c);
    return each<float, __m512>([&](size_t i) { return std::fma(x[i], y[i], z[i]); });
}
EMULATED float _mm512_reduce_add_ps(__m512 a) { // halves, and halves of those
    auto x = as<Floats>(a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            x[i] += x[i + half];
    return x[0];
}

} // namespace
} // namespace sparsekit::cpu

#pragma GCC pop_options
