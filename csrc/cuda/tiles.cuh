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
inline cudaError_t device_attribute(cudaDeviceAttr attribute, int *value) {
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(value, attribute, device);
    if (error != cudaSuccess)
        cudaGetLastError(); // reported here, so not to be found by the next launch
    return error;
}

inline cudaError_t count_multiprocessors(int *count) { return device_attribute(cudaDevAttrMultiProcessorCount, count); }

// Bytes of shared memory of a block, and the most that a launch of this kernel ever asks for. The limit that a device
// keeps for a kernel is set to the latter: set to the former, it could be lowered by another thread between the two
// calls that a launch is.
struct SharedMemory {
    int bytes, most;
    SharedMemory(int bytes) : bytes(bytes), most(bytes) {}
    SharedMemory(int bytes, int most) : bytes(bytes), most(most) {}
};

template <typename... P> cudaError_t allow_shared_memory(void (*kernel)(P...), SharedMemory shared) {
    if (shared.most <= 48 * 1024)
        return cudaSuccess;
    int held;
    const cudaError_t error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &held);
    if (error != cudaSuccess)
        return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                shared.most < held ? shared.most : held);
}

// use(the configuration of a launch): blocks in clusters of `cluster` along x; above 1, for sm_90 and later.
template <typename Kernel, typename Use>
cudaError_t with_clusters(Kernel *kernel, dim3 grid, int cluster, int threads, SharedMemory shared, cudaStream_t stream,
                          Use use) {
    cudaLaunchAttribute shape = {};
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim.x = cluster, shape.val.clusterDim.y = shape.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared.bytes;
    config.stream = stream;
    config.attrs = &shape, config.numAttrs = cluster > 1;
    cudaError_t error = allow_shared_memory(kernel, shared);
    if (error == cudaSuccess)
        error = use(config);
    if (error != cudaSuccess)
        cudaGetLastError(); // reported here, so not to be found by the next launch
    return error;
}

template <typename... P>
cudaError_t launch_clusters(void (*kernel)(P...), dim3 grid, int cluster, int threads, SharedMemory shared,
                            cudaStream_t stream, const P &...arguments) {
    return with_clusters(kernel, grid, cluster, threads, shared, stream, [&](const cudaLaunchConfig_t &config) {
        return cudaLaunchKernelEx(&config, kernel, arguments...);
    });
}

// How many of its clusters the current device holds at once: fewer than multiprocessors / cluster where those of a GPC
// are no multiple of it.
template <typename Kernel>
cudaError_t count_clusters(Kernel *kernel, int cluster, int threads, SharedMemory shared, int *count) {
    return with_clusters(
        kernel, dim3(cluster), cluster, threads, shared, nullptr,
        [&](const cudaLaunchConfig_t &config) { return cudaOccupancyMaxActiveClusters(count, kernel, &config); });
}

template <typename... P>
cudaError_t launch_kernel(void (*kernel)(P...), dim3 grid, int threads, SharedMemory shared, cudaStream_t stream,
                          P... arguments) {
    return launch_clusters(kernel, grid, 1, threads, shared, stream, arguments...);
}

} // namespace sparsekit
