// Bias, activation and rounding of finished sums, and the conversions between fp32 and the 16-bit types.
// Everything sits in an unnamed namespace: each path must own a copy compiled for its instruction set, or the linker
// may hand the portable path a function that uses AVX-512.
#pragma once
#include "linear24.h"
#include <cstring>

namespace sparsekit::cpu {
namespace {

template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float to_float(float v) { return v; }

inline float to_float(BFloat16 v) { return bit_cast<float>(uint32_t{v.bits} << 16); }

inline float to_float(Half v) {
    const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16, rest = uint32_t{v.bits & 0x7fffu} << 13;
    const uint32_t past = -uint32_t{rest >= 0x0f800000} & 0x7f800000; // infinity and NaN: the exponent becomes all ones
    return bit_cast<float>(sign | past | bit_cast<uint32_t>(bit_cast<float>(rest) * 0x1p112f)); // exact, subnormals too
}

inline void from_float(float v, float *out) { *out = v; }

inline void from_float(float v, BFloat16 *out) {
    const uint32_t bits = bit_cast<uint32_t>(v);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    out->bits = static_cast<uint16_t>((nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void from_float(float v, Half *out) {
    const uint32_t bits = bit_cast<uint32_t>(v), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    uint32_t half;
    if (rest > 0x7f800000)
        half = 0x7e00;
    else if (rest >= 0x47800000) // 65536; what rounds up to it gets there below, by the carry
        half = 0x7c00;
    else if (rest < 0x38800000) // below 2^-14: let the fp32 adder round at the bit where fp16 ends
        half = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000;
    else
        half = (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13;
    out->bits = static_cast<uint16_t>(sign | half);
}

// The activations are free of branches and calls, so that the compiler turns a loop over them into vectors.

// exp to 1e-7 relative for -87 <= v <= 88, the nearer of the ends beyond. NaN gives a number.
inline float exp_clamped(float v) {
    v = v < 88.0f ? v : 88.0f;
    v = v > -87.0f ? v : -87.0f;
    const float magic = 0x1.8p23f; // adding it rounds to an integer
    const float whole = (v * 1.44269504f + magic) - magic;
    const float r = (v - whole * 0x1.62ep-1f) - whole * 0x1.0bfbe8p-15f; // v - whole * ln 2, |r| < 0.35
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
}

// v / (1 + exp(-u)): silu for u = v; gelu_tanh for u = 2 * sqrt(2 / pi) * (v + 0.044715 v^3), as 1 + tanh(w) = 2
// sigmoid(2w). Beyond the range of exp it is zero, however large v is, and NaN for an infinity.
inline float times_sigmoid(float v, float u) { return u < -88.0f ? v * 0.0f : v / (1.0f + exp_clamped(-u)); }

// v * Phi(v). With z = |v| / sqrt(2) and t = 1 / (1 + 0.3 z), erfc(z) = exp(-z^2) * t * P(t) to 2e-8 relative: a
// least-squares fit of erfcx(z) / t on 0 <= z <= 9.6, reweighted towards its largest error.
inline float gelu_erf(float v) {
    const float z = (v < 0 ? -v : v) * 0.707106781f, t = 1.0f / (1.0f + 0.3f * z);
    float p = -0.129458249f;
    p = p * t + 0.485223472f;
    p = p * t - 0.511512637f;
    p = p * t + 0.546755672f;
    p = p * t - 0.0939087793f;
    p = p * t + 0.214569643f;
    p = p * t + 0.148443401f;
    p = p * t + 0.170698285f;
    p = p * t + 0.16918917f;
    const float tail = 0.5f * exp_clamped(-z * z) * t * p; // Phi(-|v|)
    return v * (v < 0 ? tail : 1.0f - tail);
}

constexpr int kFinish = 16; // sums finished at a time

template <Activation act> void activate(float *v) {
    for (int i = 0; i < kFinish; ++i) {
        if constexpr (act == kRelu)
            v[i] = v[i] < 0 ? 0.0f : v[i];
        else if constexpr (act == kGelu)
            v[i] = gelu_erf(v[i]);
        else if constexpr (act == kGeluTanh)
            v[i] = times_sigmoid(v[i], v[i] * (1.59576912f + 0.0713548163f * v[i] * v[i]));
        else if constexpr (act == kSilu)
            v[i] = times_sigmoid(v[i], v[i]);
    }
}

// y[i] = act(sums[i] + bias[i]) for i < count <= kFinish. sums holds kFinish floats and is overwritten.
template <class T> void finish(float *sums, const T *bias, T *y, int count, Activation act) {
    if (bias)
        for (int i = 0; i < count; ++i)
            sums[i] += to_float(bias[i]);
    switch (act) {
    case kNone:
        break;
    case kRelu:
        activate<kRelu>(sums);
        break;
    case kGelu:
        activate<kGelu>(sums);
        break;
    case kGeluTanh:
        activate<kGeluTanh>(sums);
        break;
    case kSilu:
        activate<kSilu>(sums);
        break;
    }
    if (count == kFinish) // a constant count is a vector loop
        for (int i = 0; i < kFinish; ++i)
            from_float(sums[i], y + i);
    else
        for (int i = 0; i < count; ++i)
            from_float(sums[i], y + i);
}

} // namespace
} // namespace sparsekit::cpu
