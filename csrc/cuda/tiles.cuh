// What the kernels that stage tiles in shared memory have in common: sizes, the swizzle, the launch.
#pragma once
#include <cstdint>
#include <cuda_runtime.h>

namespace sparsekit {

__host__ __device__ constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Byte offset of a 16-byte chunk, permuted within its row so that the eight rows of an ldmatrix fall into different
// banks.
template <int ROW_BYTES> __device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (ROW_BYTES >= 128 ? row & 7 : row >> 1 & 3)) << 4);
}

inline bool is_multiple(const void *pointer, int64_t row_bytes, int of) {
    return reinterpret_cast<uintptr_t>(pointer) % of == 0 && row_bytes % of == 0;
}

// Of the current device.
inline cudaError_t count_multiprocessors(int *count) {
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
    if (error != cudaSuccess)
        cudaGetLastError(); // reported here, so not to be found by the next launch
    return error;
}

// Blocks in clusters of `cluster` along x; above 1, for sm_90 and later.
template <typename... P>
cudaError_t launch_clusters(void (*kernel)(P...), dim3 grid, int cluster, int threads, int shared_bytes,
                            cudaStream_t stream, const P &...arguments) {
    cudaLaunchAttribute shape = {};
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim.x = cluster, shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &shape, config.numAttrs = cluster > 1;
    cudaError_t error = cudaSuccess;
    if (shared_bytes > 48 * 1024)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, kernel, arguments...);
    if (error != cudaSuccess)
        cudaGetLastError(); // reported here, so not to be found by the next launch
    return error;
}

template <typename... P>
cudaError_t launch_kernel(void (*kernel)(P...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                          P... arguments) {
    return launch_clusters(kernel, grid, 1, threads, shared_bytes, stream, arguments...);
}

} // namespace sparsekit
