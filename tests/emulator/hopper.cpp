// What tests/test_cuda_hopper.py calls through ctypes: the machine's controls, the launcher, single instructions.
#include "../../csrc/launch.h"
#include "controls.h"
#include "hopper_host.h"

namespace ptx = sparsekit::ptx;
using emulator::machine;

namespace {

constexpr int kTileBytes = 256 * 128, kFragments = 64 * 64;

struct Product {
    float *d;                 // [128][count]
    const uint32_t *a;        // [128][4], or null
    const char *a_tile;       // kFragments bytes as they lie in shared memory, at kTileBytes
    const char *b_tile;       // kTileBytes bytes, at 0
    const uint32_t *metadata; // [128]
    uint64_t a_descriptor, b_descriptor;
};

template <typename T, int SELECTOR, int COUNT> void multiply(Product p) {
    const unsigned t = threadIdx.x;
    char *shared = ptx::dynamic_shared_memory();
    if (t == 0) {
        memcpy(shared, p.b_tile, kTileBytes);
        memcpy(shared + kTileBytes, p.a_tile, kFragments);
    }
    __syncthreads();
    float d[COUNT];
    uint32_t a[4];
    const uint32_t metadata = p.metadata[t];
    memcpy(d, p.d + t * COUNT, sizeof d);
    ptx::wgmma_fence();
    if (p.a != nullptr) {
        memcpy(a, p.a + t * 4, sizeof a);
        ptx::wgmma_sp<T, SELECTOR>(d, a, p.b_descriptor, metadata);
    } else {
        ptx::wgmma_sp<T, SELECTOR>(d, p.a_descriptor, p.b_descriptor, metadata);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    memcpy(p.d + t * COUNT, d, sizeof d);
}

struct Load {
    CUtensorMap map;
    int column, row, bytes, blocks;
    char *out; // [2 blocks][bytes]
};

// Block 1 loads, both write their shared memory out once block 1 has waited for its own copy.
void load(Load p) {
    char *shared = ptx::dynamic_shared_memory();
    uint64_t *barrier = reinterpret_cast<uint64_t *>(shared + p.bytes);
    const bool target = p.blocks >> ptx::cluster_rank() & 1;
    if (threadIdx.x == 0) {
        memset(shared, 0, p.bytes);
        ptx::mbarrier_init(barrier, 1);
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (threadIdx.x == 0) {
        if (target)
            ptx::mbarrier_arrive_expect(barrier, p.bytes);
        if (ptx::cluster_rank() == 1)
            ptx::tma_load_multicast(shared, &p.map, p.column, p.row, barrier, static_cast<uint16_t>(p.blocks));
        if (target)
            ptx::mbarrier_wait(barrier, 0);
        memcpy(p.out + ptx::cluster_rank() * p.bytes, shared, p.bytes);
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

} // namespace

extern "C" {

int emulated_linear24_sm90a(const void *x, const void *values, const void *meta, const void *bias, void *y,
                            void *workspace, int m, int n, int k, int64_t ldx, int dtype, int activation, int tile,
                            int split) {
    return sparsekit::launch_linear24_sm90a(x, values, meta, bias, y, workspace, m, n, k, ldx, dtype, activation, tile,
                                            split, nullptr);
}

int64_t emulated_linear24_sm90a_workspace(int m, int n, int k, int tile, int split) {
    return sparsekit::linear24_sm90a_workspace(m, n, k, tile, split);
}

// The tile, and in the upper half the parts.
int emulated_linear24_sm90a_plan(int m, int n, int k, int tile, int split, int multiprocessors) {
    const auto plan = sparsekit::linear24_sm90a_plan(m, n, k, tile, split, multiprocessors);
    return plan.tile | plan.split << 16;
}

// One warpgroup, one wgmma.sp m64nNk32 with N = 2 count: d[128][count] += a * b. a null: the shared form.
int emulated_wgmma_sp(float *d, const uint32_t *a, const char *a_tile, const char *b_tile, const uint32_t *metadata,
                      uint64_t a_descriptor, uint64_t b_descriptor, int count, int dtype, int selector) {
    const Product p{d, a, a_tile, b_tile, metadata, a_descriptor, b_descriptor};
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(128), config.dynamicSmemBytes = kTileBytes + kFragments;
    const auto run = [&](auto zero, auto selector_constant, auto count_constant) {
        return cudaLaunchKernelEx(
            &config, multiply<decltype(zero), decltype(selector_constant)::value, decltype(count_constant)::value>, p);
    };
    const auto with_count = [&](auto zero, auto s) {
        return count == 32   ? run(zero, s, std::integral_constant<int, 32>())
               : count == 96 ? run(zero, s, std::integral_constant<int, 96>())
                             : run(zero, s, std::integral_constant<int, 128>());
    };
    const auto with = [&](auto zero) {
        return selector == 0 ? with_count(zero, std::integral_constant<int, 0>())
                             : with_count(zero, std::integral_constant<int, 1>());
    };
    return dtype == sparsekit::kFloat16 ? with(__half()) : with(__nv_bfloat16());
}

void emulator_refuse_maps(int refuse) { emulator::refuses_maps = refuse != 0; }

// One TMA load of a box of 16-bit elements, by block 1 of 2 into those whose bit is set in `blocks`; swizzle in bytes.
int emulated_tma_load(const void *data, int rows, int columns, int64_t row_bytes, int box_rows, int box_columns,
                      int swizzle, int row, int column, int blocks, char *out) {
    Load p = {};
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t stride = static_cast<cuuint64_t>(row_bytes);
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)},
                     steps[] = {1, 1};
    const CUtensorMapSwizzle mode = swizzle == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                    : swizzle == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                    : CU_TENSOR_MAP_SWIZZLE_NONE;
    if (cuTensorMapEncodeTiled(&p.map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void *>(data), sizes, &stride,
                               box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, mode, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
        return cudaErrorNotSupported;
    p.column = column, p.row = row, p.bytes = box_rows * box_columns * 2, p.blocks = blocks, p.out = out;
    cudaLaunchAttribute cluster = {cudaLaunchAttributeClusterDimension, {{2, 1, 1}}};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(2), config.blockDim = dim3(32), config.dynamicSmemBytes = p.bytes + 8;
    config.attrs = &cluster, config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, load, p);
}

} // extern "C"
