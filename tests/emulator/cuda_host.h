// The part of CUDA C++ and its runtime that sparsekit's .cu files use, for a host compiler. Forced into every
// translation unit (-include); cuda_runtime.h, cuda_fp16.h and cuda_bf16.h beside it stand in for the toolkit's. A
// kernel must reach dynamic shared memory through ptx::dynamic_shared_memory() and be launched through
// cudaLaunchKernelEx. Global memory should be read and written through ptx.cuh, __ldg and __stcs: those are checked
// byte for byte, a plain pointer is not.
#pragma once
#include "machine.h"
#include <algorithm>
#include <cmath>
#include <map>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using std::max;
using std::min;

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline const emulator::Index &threadIdx = emulator::machine.thread_index, &blockIdx = emulator::machine.block_index,
                             &blockDim = emulator::machine.block_dim, &gridDim = emulator::machine.grid_dim;

inline void __syncthreads() { emulator::machine.barrier(); }

template <typename T> T __ldg(const T *p) {
    emulator::machine.check_global(p, sizeof(T), sizeof(T), false, "a load");
    return *p;
}
template <typename T> void __stcs(T *p, T v) {
    emulator::machine.check_global(p, sizeof(T), sizeof(T), true, "a store");
    *p = v;
}

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __half2float(__half v) {
    _Float16 f;
    memcpy(&f, &v.bits, 2);
    return f;
}
inline __half __float2half_rn(float v) {
    const _Float16 f = static_cast<_Float16>(v);
    __half h;
    memcpy(&h.bits, &f, 2);
    return h;
}
inline float __bfloat162float(__nv_bfloat16 v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
    uint32_t bits;
    memcpy(&bits, &v, 4);
    if (v != v)
        return {0x7FFF};
    return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)}; // to nearest, ties to even
}

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorSymbolNotFound = 500,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
};
using cudaStream_t = void *;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim; // y and z must be 1 here
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute *attrs = nullptr;
    unsigned numAttrs = 0;
};

namespace emulator {
inline std::map<const void *, size_t> dynamic_shared_limit; // by kernel; 48 KiB where none was set
inline cudaError_t last_error = cudaSuccess;
inline int multiprocessors = 1; // what a launcher is told; blocks run one after another all the same
} // namespace emulator

// A limit that differs from the one before is refused: another thread may be about to launch by that.
template <typename... P> cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute, int value) {
    const auto limit = static_cast<size_t>(value);
    if (value < 0 || limit > emulator::kSharedLimit)
        return cudaErrorInvalidValue;
    const auto [place, fresh] = emulator::dynamic_shared_limit.emplace(reinterpret_cast<const void *>(kernel), limit);
    return fresh || place->second == limit ? cudaSuccess : cudaErrorInvalidValue;
}

// A device of its own for each number of multiprocessors: a launcher may remember what it was told of a device.
inline cudaError_t cudaGetDevice(int *device) { return *device = emulator::multiprocessors, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? emulator::multiprocessors : int(emulator::kSharedLimit);
    return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last_error, cudaSuccess); }

template <typename... P, typename... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(P...), A &&...arguments) {
    const dim3 g = config->gridDim, b = config->blockDim;
    const auto limit = emulator::dynamic_shared_limit.find(reinterpret_cast<const void *>(kernel));
    const size_t allowed = limit == emulator::dynamic_shared_limit.end() ? 48 * 1024 : limit->second;
    const uint64_t threads = uint64_t(b.x) * b.y * b.z;
    if (config->dynamicSmemBytes > allowed)
        return emulator::last_error = cudaErrorInvalidValue;
    if (threads == 0 || threads > 1024 || g.x == 0 || g.y == 0 || g.z == 0 || g.y > 65535 || g.z > 65535)
        return emulator::last_error = cudaErrorInvalidConfiguration;
    unsigned cluster = 1;
    for (unsigned i = 0; i < config->numAttrs; ++i)
        cluster = config->attrs[i].val.clusterDim.x;
    if (cluster == 0 || cluster > 8 || g.x % cluster != 0)
        return emulator::last_error = cudaErrorInvalidConfiguration;
    const bool finished = emulator::machine.launch(
        {g.x, g.y, g.z}, {b.x, b.y, b.z}, config->dynamicSmemBytes, [&] { kernel(static_cast<P>(arguments)...); },
        cluster);
    return finished ? cudaSuccess : emulator::last_error = cudaErrorLaunchFailure;
}
