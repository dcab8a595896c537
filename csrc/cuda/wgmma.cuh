// Hopper's asynchronous instructions, one a function, no policy: wgmma.sp, mbarriers, TMA loads, clusters, setmaxnreg.
// Shared-memory operands are generic pointers into the block's own shared memory; a cluster address, from
// map_to_rank, names the same place in another block of the cluster. Only compiled for sm_90a.
#ifndef SPARSEKIT_CUDA_WGMMA_CUH // a macro, not #pragma once: tests/emulator defines it and supplies these functions
                                 // itself
#define SPARSEKIT_CUDA_WGMMA_CUH
#include "ptx.cuh"
#include <cuda.h>

namespace sparsekit::ptx {

// ---- wgmma.sp. All are collective over the warpgroup, four consecutive warps of which the first is a multiple of 4.

// Orders the warpgroup's register accesses before its next wgmma: needed before the first, and again after any register
// that one reads or adds to has been written otherwise.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes the group of wgmma issued so far.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING of the latest groups are unfinished. Until then their registers must not be touched.
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// d (64 x N, fp32, N = 2 COUNT) += a (64 x 32, 2:4 sparse) * b (32 x N). T is __half or __nv_bfloat16. b, and a in the
// shared form, are matrix descriptors of K-major tiles. In the register form warp w gives rows 16 w .. 16 w + 15 of a
// as it would to mma.sp.m16n8k32. Metadata as there: only lanes 2 * SELECTOR and 2 * SELECTOR + 1 of a quad are asked.
#define SPARSEKIT_TEXT_32                                                                                              \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "   \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define SPARSEKIT_TEXT_64                                                                                              \
    SPARSEKIT_TEXT_32                                                                                                  \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, " \
    "%54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARSEKIT_TEXT_96                                                                                              \
    SPARSEKIT_TEXT_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, "   \
                      "%82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SPARSEKIT_TEXT_128                                                                                             \
    SPARSEKIT_TEXT_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
                      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SPARSEKIT_SUMS_8(i)                                                                                            \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define SPARSEKIT_SUMS_32(i)                                                                                           \
    SPARSEKIT_SUMS_8(i), SPARSEKIT_SUMS_8(i + 8), SPARSEKIT_SUMS_8(i + 16), SPARSEKIT_SUMS_8(i + 24)
#define SPARSEKIT_SUMS_64(i) SPARSEKIT_SUMS_32(i), SPARSEKIT_SUMS_32(i + 32)
#define SPARSEKIT_SUMS_96(i) SPARSEKIT_SUMS_64(i), SPARSEKIT_SUMS_32(i + 64)
#define SPARSEKIT_SUMS_128(i) SPARSEKIT_SUMS_64(i), SPARSEKIT_SUMS_64(i + 64)
#define SPARSEKIT_WGMMA_SP(N, COUNT, OPERANDS, ...)                                                                    \
    do {                                                                                                               \
        if constexpr (is_half<T>)                                                                                      \
            asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" N "k32.f32.f16.f16 {" SPARSEKIT_TEXT_##COUNT           \
                         "}, " OPERANDS                                                                                \
                         : SPARSEKIT_SUMS_##COUNT(0)                                                                   \
                         : __VA_ARGS__, "l"(b), "r"(metadata), "n"(SELECTOR));                                         \
        else                                                                                                           \
            asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" N "k32.f32.bf16.bf16 {" SPARSEKIT_TEXT_##COUNT         \
                         "}, " OPERANDS                                                                                \
                         : SPARSEKIT_SUMS_##COUNT(0)                                                                   \
                         : __VA_ARGS__, "l"(b), "r"(metadata), "n"(SELECTOR));                                         \
    } while (false)

template <typename T> inline constexpr bool is_half = std::is_same_v<T, __half>;

template <typename T, int SELECTOR, int COUNT> struct WgmmaSp {
    static_assert(COUNT == 32 || COUNT == 64 || COUNT == 96 || COUNT == 128, "wgmma_sp: N is 64, 128, 192 or 256");
    static_assert(SELECTOR == 0 || SELECTOR == 1, "m64nNk32 takes its metadata from one of two pairs of lanes");
    static_assert(is_half<T> || std::is_same_v<T, __nv_bfloat16>, "wgmma_sp: T is __half or __nv_bfloat16");
};

// Register form.
template <typename T, int SELECTOR, int COUNT>
__device__ __forceinline__ void wgmma_sp(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, uint32_t metadata) {
    (void)WgmmaSp<T, SELECTOR, COUNT>();
#define SPARSEKIT_FRAGMENT "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
    if constexpr (COUNT == 128)
        SPARSEKIT_WGMMA_SP("256", 128, "{%128, %129, %130, %131}, %132, %133, %134, 1, 1, 1, 0;", SPARSEKIT_FRAGMENT);
    else if constexpr (COUNT == 96)
        SPARSEKIT_WGMMA_SP("192", 96, "{%96, %97, %98, %99}, %100, %101, %102, 1, 1, 1, 0;", SPARSEKIT_FRAGMENT);
    else if constexpr (COUNT == 64)
        SPARSEKIT_WGMMA_SP("128", 64, "{%64, %65, %66, %67}, %68, %69, %70, 1, 1, 1, 0;", SPARSEKIT_FRAGMENT);
    else
        SPARSEKIT_WGMMA_SP("64", 32, "{%32, %33, %34, %35}, %36, %37, %38, 1, 1, 1, 0;", SPARSEKIT_FRAGMENT);
#undef SPARSEKIT_FRAGMENT
}

// Shared form.
template <typename T, int SELECTOR, int COUNT>
__device__ __forceinline__ void wgmma_sp(float (&d)[COUNT], uint64_t a, uint64_t b, uint32_t metadata) {
    (void)WgmmaSp<T, SELECTOR, COUNT>();
    if constexpr (COUNT == 128)
        SPARSEKIT_WGMMA_SP("256", 128, "%128, %129, %130, %131, 1, 1, 1, 0, 0;", "l"(a));
    else if constexpr (COUNT == 96)
        SPARSEKIT_WGMMA_SP("192", 96, "%96, %97, %98, %99, 1, 1, 1, 0, 0;", "l"(a));
    else if constexpr (COUNT == 64)
        SPARSEKIT_WGMMA_SP("128", 64, "%64, %65, %66, %67, 1, 1, 1, 0, 0;", "l"(a));
    else
        SPARSEKIT_WGMMA_SP("64", 32, "%32, %33, %34, %35, 1, 1, 1, 0, 0;", "l"(a));
}

#undef SPARSEKIT_TEXT_32
#undef SPARSEKIT_TEXT_64
#undef SPARSEKIT_TEXT_96
#undef SPARSEKIT_TEXT_128
#undef SPARSEKIT_SUMS_8
#undef SPARSEKIT_SUMS_32
#undef SPARSEKIT_SUMS_64
#undef SPARSEKIT_SUMS_96
#undef SPARSEKIT_SUMS_128
#undef SPARSEKIT_WGMMA_SP

// ---- mbarriers: 64-bit words of shared memory. A phase ends when all arrivals and all announced bytes have come.

__device__ __forceinline__ void mbarrier_init(uint64_t *barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the cluster and to TMA; a cluster barrier must follow.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and announces `bytes` that TMA loads will bring in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t *barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Arrives at the barrier at a cluster address.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of that parity; a new barrier is in phase 0, and so counts as past a phase of
// parity 1.
__device__ __forceinline__ void mbarrier_wait(uint64_t *barrier, int parity) {
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra wait;\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}

// ---- TMA

// Starts loading the box of `map` whose first element is (column, row) to the same place in the shared memory of every
// block of the cluster whose bit is set in `blocks`; the barrier at the same place there counts the bytes that come.
// What lies outside the tensor comes as zeros and counts too. One thread calls.
__device__ __forceinline__ void tma_load_multicast(void *shared, const CUtensorMap *map, int column, int row,
                                                   uint64_t *barrier, uint16_t blocks) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(blocks)
                 : "memory");
}

// The same for the block's own shared memory alone.
__device__ __forceinline__ void tma_load(void *shared, const CUtensorMap *map, int column, int row, uint64_t *barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
}

// So that the first load does not wait for its map.
__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// 8 bytes that L1 may keep, or 16 that are read once and so kept out of it. Unlike read-only loads these stay where
// they are written: the compiler moves those down to their use, past the work that is to hide them.
__device__ __forceinline__ uint2 ld_global(const uint2 *global) {
    uint2 v;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(global) : "memory");
    return v;
}
__device__ __forceinline__ uint4 ld_global_once(const uint4 *global) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global)
                 : "memory");
    return v;
}

// ---- blocks and clusters

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The cluster address of `shared` in the block of that rank.
__device__ __forceinline__ uint32_t map_to_rank(const void *shared, uint32_t rank) {
    uint32_t address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
    return address;
}

// All threads of the cluster arrive, then wait; what was written before is seen after.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
// Orders nothing but what fence_mbarrier_init did before it: no wait for stores that others may still do.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// `threads` threads of the block, whole warps, meet at barrier ID (0 is __syncthreads' own).
__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Collective over the warpgroup: gives registers back to the block's pool, or takes them from it.
template <int REGISTERS> __device__ __forceinline__ void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

} // namespace sparsekit::ptx
#endif
