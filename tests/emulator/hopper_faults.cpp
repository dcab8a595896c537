// A kernel of Hopper's instructions with one fault at a time, which the emulator must catch (test_cuda_hopper.py), and
// its sound twin. Two blocks share x (64 tokens, kSteps * 64 columns): each loads half a stage for both, and its
// warpgroup adds x's columns c with c % 4 < 2, by a wgmma.sp of ones. out [block][128 lanes][32 sums].
#include "hopper_host.h"

namespace ptx = sparsekit::ptx;

namespace {

enum Fault {
    kNone,
    kNoFullWait,
    kWrongParity,
    kNoProductWait,
    kEarlyRelease,
    kOtherBlockNotReleased,
    kNoEmptyWait,
    kOneWarpReleases,
    kChangedOperand,
    kChangedSum,
    kNoFence,
    kNoBarrierInit,
    kNoBarrierFence,
    kSecondArrival,
    kTooFewBytes,
    kMisalignedTarget,
    kNoMap,
    kNoSuchBlock,
    kLeavesEarly,
    kDescriptorPastShared,
    kDescriptorPastSwizzle,
    kDescriptorsDiffer,
    kBadMetadata,
    kWarpStaysAway,
    kNamedBarrierCount,
    kOutsideMemory,
    kRankInDescriptor,
    kTooManyBytes
};
constexpr int kSteps = 6, kStages = 2, kTokens = 64, kStageBytes = kTokens * 128;
constexpr int kShared = kStages * kStageBytes + 2 * kStages * 8;

struct Arguments {
    CUtensorMap x, no_map;
    float *out;
    Fault fault;
};

void add_columns(Arguments p) {
    const Fault fault = p.fault;
    char *shared = ptx::dynamic_shared_memory();
    uint64_t *full = reinterpret_cast<uint64_t *>(shared + kStages * kStageBytes), *empty = full + kStages;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, rank = static_cast<int>(ptx::cluster_rank());
    if (thread == 0 && (fault != kNoBarrierInit || rank == 0)) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(full + i, 1);
            ptx::mbarrier_init(empty + i, fault == kOtherBlockNotReleased || fault == kOneWarpReleases ? 4 : 8);
        }
        if (fault != kNoBarrierFence)
            ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (thread == 128) {
        for (int step = 0; step < kSteps; ++step) {
            const int stage = step % kStages;
            char *target = shared + stage * kStageBytes + rank * (kStageBytes / 2);
            if (fault != kNoEmptyWait)
                ptx::mbarrier_wait(empty + stage, (step / kStages & 1) ^ 1);
            ptx::mbarrier_arrive_expect(
                full + stage, fault == kTooManyBytes ? 1 << 20 : kStageBytes - (fault == kTooFewBytes ? 1024 : 0));
            ptx::tma_load_multicast(target + (fault == kMisalignedTarget ? 512 : 0), fault == kNoMap ? &p.no_map : &p.x,
                                    step * 64, rank * (kTokens / 2), full + stage, fault == kNoSuchBlock ? 5 : 3);
        }
        if (fault == kSecondArrival)
            ptx::mbarrier_arrive_expect(full, 256), ptx::mbarrier_arrive_expect(full, 0);
    }
    if (thread < 128 && !(fault == kWarpStaysAway && thread >= 96)) {
        const uint32_t release = ptx::map_to_rank(empty, fault == kOtherBlockNotReleased ? rank : lane % 2);
        float sums[32] = {};
        uint32_t ones[4], metadata[2];
        for (uint32_t &pair : ones)
            pair = 0x3C003C00;
        metadata[0] = fault == kBadMetadata && thread == 1 ? 0x44454444 : 0x44444444, metadata[1] = 0x44444444;
        auto arrive = [&](int stage) {
            const bool mine = fault == kOtherBlockNotReleased ? lane == 0 : lane < 2;
            if (mine && (fault != kOneWarpReleases || thread < 32))
                for (int times = 0; times < (fault == kOneWarpReleases ? 2 : 1); ++times)
                    ptx::mbarrier_arrive_cluster(release + stage * 8);
        };
        for (int step = 0; step < kSteps; ++step) {
            const int stage = step % kStages;
            if (fault != kNoFullWait)
                ptx::mbarrier_wait(full + stage, (step / kStages & 1) ^ (fault == kWrongParity));
            if (fault != kNoFence)
                ptx::wgmma_fence();
            const uint32_t address = ptx::shared_address(shared + stage * kStageBytes);
            uint64_t x = (address & (fault == kRankInDescriptor ? ~0u : 0x3FFFF)) >> 4 | 64ull << 32 | 1ull << 62;
            x += fault == kDescriptorPastShared ? kShared / 16 : fault == kDescriptorPastSwizzle ? 6 : 0;
            ptx::wgmma_sp<__half, 0>(sums, ones, x + (fault == kDescriptorsDiffer && thread == 70), metadata[0]);
            ptx::wgmma_sp<__half, 1>(sums, ones, x + 4, metadata[1]);
            ptx::wgmma_commit();
            if (fault == kChangedOperand)
                ones[thread % 4] ^= 1;
            if (fault == kChangedSum && step == 2)
                sums[5] = 1.0f;
            if (fault == kEarlyRelease) {
                arrive(stage);
                ptx::wgmma_wait<1>();
                continue;
            }
            ptx::wgmma_wait<1>();
            if (step > 0)
                arrive((step - 1) % kStages);
        }
        if (fault != kNoProductWait)
            ptx::wgmma_wait<0>();
        if (fault != kEarlyRelease)
            arrive((kSteps - 1) % kStages);
        for (int i = 0; i < 32; ++i)
            __stcs(p.out + (rank * 128 + thread) * 32 + i, sums[i]);
        if (fault == kNamedBarrierCount)
            ptx::named_barrier(1, thread < 32 ? 64 : 96);
        ptx::named_barrier(2, 128);
    }
    if (fault != kLeavesEarly) {
        ptx::cluster_arrive();
        ptx::cluster_wait();
    }
}

} // namespace

// x [rows][columns] fp16, of which the kernel is told so many.
extern "C" int emulated_hopper_fault(const char *x, int rows, int columns, float *out, int fault) {
    Arguments p = {};
    p.out = out, p.fault = static_cast<Fault>(fault);
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns),
                                static_cast<cuuint64_t>(rows) + (fault == kOutsideMemory)};
    const cuuint64_t stride = static_cast<cuuint64_t>(columns) * 2;
    const cuuint32_t box[] = {64, kTokens / 2}, steps[] = {1, 1};
    if (cuTensorMapEncodeTiled(&p.x, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<char *>(x), sizes, &stride, box,
                               steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
        return -1;
    cudaLaunchAttribute cluster = {cudaLaunchAttributeClusterDimension, {{2, 1, 1}}};
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(2), config.blockDim = dim3(256), config.dynamicSmemBytes = kShared;
    config.attrs = &cluster, config.numAttrs = 1;
    cudaLaunchKernelEx(&config, add_columns, p);
    return cudaGetLastError();
}
