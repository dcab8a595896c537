// Where blocks share the columns: each leaves its fp32 sums as a part in a workspace, and a second kernel adds the
// parts in their order. No atomics and no state between calls, so the bits are the same every time.
#pragma once
#include "epilogue.cuh"
#include "tiles.cuh"

namespace sparsekit {
namespace {

constexpr int kSumThreads = 128;

__host__ __device__ constexpr int padded_features(int n) { return ceil_div(n, 4) * 4; }

// Of parts [split][m][n rounded up to 4]; none where nothing is split.
inline int64_t parts_bytes(int m, int n, int split) {
    return split == 1 ? 0 : int64_t(split) * m * (ceil_div(n, 4) * int64_t(16));
}

// Sums of `row` and columns column .. column + 3, a multiple of 4 and less than n, in part `part`.
__device__ __forceinline__ void store_part(float *parts, int part, int m, int n, int64_t row, int column,
                                           const float (&sums)[4]) {
    __stcs(reinterpret_cast<float4 *>(parts + (part * static_cast<int64_t>(m) + row) * padded_features(n) + column),
           make_float4(sums[0], sums[1], sums[2], sums[3]));
}

template <typename T> struct Sum {
    const float *parts; // [split][m][n rounded up to 4]
    const T *bias;      // [n] or null
    T *y;               // [m, n]
    int m, n, split, activation;
    bool y_aligned; // every row starts at a multiple of 8 bytes and n is a multiple of 4
};

// y = act(sum of the parts + bias). A thread owns four features of every gridDim.y-th token.
template <typename T> __global__ void __launch_bounds__(kSumThreads, 8) linear24_sum(const __grid_constant__ Sum<T> p) {
    const int column = static_cast<int>(blockIdx.x * kSumThreads + threadIdx.x) * 4;
    if (column >= p.n)
        return;
#pragma unroll 1
    for (int token = blockIdx.y; token < p.m; token += gridDim.y) {
        float total[4] = {};
#pragma unroll 8
        for (int part = 0; part < p.split; ++part) {
            const float4 v = __ldg(reinterpret_cast<const float4 *>(
                p.parts + (part * static_cast<int64_t>(p.m) + token) * padded_features(p.n) + column));
            total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        store_four(p.y + static_cast<int64_t>(token) * p.n, p.bias, total, column, p.n, p.activation, p.y_aligned);
    }
}

// After the kernel that left the parts. K has the fields of Sum.
template <typename T, template <typename> typename K>
cudaError_t launch_sum(const K<T> &p, int split, cudaStream_t stream) {
    const Sum<T> sum = {p.parts, p.bias, p.y, p.m, p.n, split, p.activation, p.y_aligned};
    return launch_kernel(linear24_sum<T>, dim3(ceil_div(p.n, 4 * kSumThreads), min(p.m, 65535)), kSumThreads, 0, stream,
                         sum);
}

} // namespace
} // namespace sparsekit
