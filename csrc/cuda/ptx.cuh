// One PTX instruction a function, no policy. Shared-memory operands are generic pointers into shared memory.
// "Collective" means that all 32 lanes of the warp must call together. tests/isa_model.py holds the fragment tables.
#ifndef SPARSEKIT_CUDA_PTX_CUH // a macro, not #pragma once: tests/emulator defines it and supplies these functions
                               // itself
#define SPARSEKIT_CUDA_PTX_CUH
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <type_traits>

namespace sparsekit::ptx {

// The block's dynamic shared memory, aligned for every instruction below (and for a 1024-byte swizzle atom).
__device__ __forceinline__ char *dynamic_shared_memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}

__device__ __forceinline__ uint32_t shared_address(const void *shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Starts a copy of `bytes` <= BYTES bytes from global to shared memory; the rest of the BYTES are zero-filled. Both
// addresses are multiples of BYTES. 16-byte copies bypass L1; smaller ones cannot.
template <int BYTES> __device__ __forceinline__ void cp_async(void *shared, const void *global, int bytes) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                     "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(shared)), "l"(global),
                     "r"(bytes), "n"(BYTES)
                     : "memory");
}

// Closes the calling thread's group of copies; a group may be empty.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the calling thread's latest groups are unfinished. Other threads see the data after a
// barrier.
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Collective. Loads four 8x8 matrices of 16-bit elements: lanes 8i..8i+7 give the 16-byte-aligned rows of matrix i,
// whose elements (lane / 4, 2 * (lane % 4) + {0, 1}) come back in r[i].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// Collective. The same for two matrices, whose rows lanes 0..15 give.
__device__ __forceinline__ void ldmatrix_x2(uint32_t (&r)[2], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
}

// 16 bytes of shared memory, at a multiple of 16. A warp's 512 bytes in one piece meet no bank twice.
__device__ __forceinline__ void ld_shared(uint32_t (&r)[4], const void *shared) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// 16 bytes that no kernel writes, read once and so kept out of L1; L2 fetches ahead. The address is a multiple of 16.
__device__ __forceinline__ uint4 ld_global_streaming(const void *global) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

// Collective. d (16x8, fp32) += a (16x32, 2:4 sparse) * b (32x8). T is __half or __nv_bfloat16. Only lanes 2 * SELECTOR
// and 2 * SELECTOR + 1 of each quad give metadata: columns 0-15 and 16-31, row lane / 4 in the low half-word, + 8 in
// the high.
template <typename T, int SELECTOR>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                uint32_t metadata) {
    static_assert(SELECTOR == 0 || SELECTOR == 1, "m16n8k32 takes its metadata from one of two pairs of lanes");
#define SPARSEKIT_MMA_SP(TYPES)                                                                                        \
    asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col." TYPES                                       \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"                \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),             \
                   "r"(metadata), "n"(SELECTOR))
    if constexpr (std::is_same_v<T, __half>)
        SPARSEKIT_MMA_SP("f32.f16.f16.f32");
    else if constexpr (std::is_same_v<T, __nv_bfloat16>)
        SPARSEKIT_MMA_SP("f32.bf16.bf16.f32");
    else
        static_assert(sizeof(T) == 0, "mma_sp_m16n8k32: T is __half or __nv_bfloat16");
#undef SPARSEKIT_MMA_SP
}

} // namespace sparsekit::ptx
#endif
