// What happens to a finished fp32 sum: bias, activation, rounding to the output type. Shared by the CUDA linear
// kernels.
#pragma once
#include "../launch.h"
#include <cstdint>
#include <cstring>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace sparsekit {

__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <typename T> __device__ __forceinline__ T round_to(float v);
template <> __device__ __forceinline__ __half round_to<__half>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

// activation is uniform over the grid, so the switch does not diverge.
__device__ __forceinline__ float activate(float v, int activation) {
    switch (activation) {
    case kRelu:
        return v < 0.0f ? 0.0f : v; // keeps NaN, as torch does
    case kGelu:
        return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case kGeluTanh:
        return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case kSilu:
        return v / (1.0f + expf(-v));
    default:
        return v;
    }
}

template <int ACTIVATION> struct Chosen { // stands for the number
    __device__ __forceinline__ operator int() const { return ACTIVATION; }
};

// f with the activation as a constant, so that it is chosen once for many elements.
template <typename F> __device__ __forceinline__ void with_activation(int activation, F f) {
    switch (activation) {
    case kRelu:
        return f(Chosen<kRelu>());
    case kGelu:
        return f(Chosen<kGelu>());
    case kGeluTanh:
        return f(Chosen<kGeluTanh>());
    case kSilu:
        return f(Chosen<kSilu>());
    default:
        return f(Chosen<kNone>());
    }
}

// bias[column]; 0 from n on, and where bias is null.
template <typename T> __device__ __forceinline__ float bias_at(const T *bias, int column, int n) {
    return bias != nullptr && column < n ? to_float(__ldg(bias + column)) : 0.0f;
}

// row[column .. column + 3] = act(sums + bias(0 .. 3)), columns from n on left out. aligned: every row starts at a
// multiple of 8 bytes and n is a multiple of 4, as column always is.
template <typename T, typename Bias>
__device__ __forceinline__ void store_four_with(T *row, Bias bias, const float (&sums)[4], int column, int n,
                                                int activation, bool aligned) {
    T out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        out[i] = round_to<T>(activate(sums[i] + bias(i), activation));
        if (!aligned && column + i < n)
            __stcs(row + column + i, out[i]);
    }
    if (aligned && column < n) {
        uint2 packed;
        memcpy(&packed, out, sizeof packed);
        __stcs(reinterpret_cast<uint2 *>(row + column), packed);
    }
}

// The same with the bias read where it lies; it may be null.
template <typename T>
__device__ __forceinline__ void store_four(T *row, const T *bias, const float (&sums)[4], int column, int n,
                                           int activation, bool aligned) {
    store_four_with(row, [&](int i) { return bias_at(bias, column + i, n); }, sums, column, n, activation, aligned);
}

} // namespace sparsekit
