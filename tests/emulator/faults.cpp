// Kernels with one fault each, which the emulator must catch under some seed (test_cuda_emulated.py), and their sound
// twin. Each copies 64 threads' 16-byte pieces of `in` to `out`, reversed by thread, through shared memory.
#include "ptx_host.h"

namespace ptx = sparsekit::ptx;

namespace {

enum Fault {
    kNone,
    kNoWait,
    kNoBarrier,
    kMisaligned,
    kReadPastEnd,
    kWritePastEnd,
    kUninitialised,
    kPastShared,
    kDiverged,
    kLostThread,
    kBadMetadata
};
constexpr int kThreads = 64;

void reverse(const char *in, char *out, Fault fault) {
    const int t = static_cast<int>(threadIdx.x), other = kThreads - 1 - t;
    char *shared = ptx::dynamic_shared_memory();
    if (fault == kNoWait)
        memcpy(shared + t * 16, in + t * 16,
               16); // what the copy will bring: only its poison can show that it is not there
    if (fault != kUninitialised || t != 7)
        ptx::cp_async<16>(shared + t * 16,
                          in + t * 16 +
                              (fault == kMisaligned    ? 8
                               : fault == kReadPastEnd ? 16
                                                       : 0),
                          16);
    ptx::cp_async_commit();
    if (fault == kNoWait)
        ptx::cp_async_wait<1>();
    else
        ptx::cp_async_wait<0>();
    if (fault == kLostThread && t == 40)
        return; // its warp waits for it at ldmatrix
    if (fault != kNoBarrier)
        __syncthreads();
    if (fault == kPastShared && t == 0)
        shared[kThreads * 16] = 1;
    uint32_t r[4], nothing[4] = {};
    if (fault == kDiverged && t == 3) {
        uint32_t two[2];
        ptx::ldmatrix_x2(two, shared);
    } else if (fault == kDiverged || fault == kLostThread) {
        ptx::ldmatrix_x4(r, shared);
    }
    if (fault == kBadMetadata) {
        float d[4] = {};
        ptx::mma_sp_m16n8k32<__half, 1>(d, nothing, nothing, t == 3 ? 0x44454444u : 0x44444444u);
    }
    uint4 piece;
    memcpy(&piece, shared + other * 16, 16);
    __stcs(reinterpret_cast<uint4 *>(out + t * 16 + (fault == kWritePastEnd ? 16 : 0)), piece);
}

} // namespace

extern "C" int emulated_fault(const char *in, char *out, int fault) {
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kThreads * 16;
    cudaLaunchKernelEx(&config, reverse, in, out, static_cast<Fault>(fault));
    return cudaGetLastError();
}
