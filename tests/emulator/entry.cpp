// What tests/test_cuda_emulated.py calls through ctypes: the machine's controls, every launcher, single instructions.
#include "../../csrc/launch.h"
#include "controls.h"
#include "ptx_host.h"

using emulator::machine;

extern "C" {

size_t emulator_bytes_read(int range) { return machine.ranges[range].bytes_read; } // numbered as they were allowed
long emulator_bank_conflicts() { return std::exchange(machine.bank_conflicts, 0); }
int emulator_blocks() { return static_cast<int>(machine.grid_dim.x); } // of the last launch
size_t emulator_shared_bytes() { return machine.shared_bytes(); }      // of a block of it

int emulated_linear24_sm80(const void *x, const void *values, const void *meta, const void *bias, void *y, int m, int n,
                           int k, int64_t ldx, int dtype, int activation, int tile) {
    return sparsekit::launch_linear24_sm80(x, values, meta, bias, y, m, n, k, ldx, dtype, activation, tile, nullptr);
}

int emulated_linear24_decode_sm80(const void *x, const void *values, const void *meta, const void *bias, void *y,
                                  void *workspace, int m, int n, int k, int64_t ldx, int dtype, int activation,
                                  int tile, int split) {
    return sparsekit::launch_linear24_decode_sm80(x, values, meta, bias, y, workspace, m, n, k, ldx, dtype, activation,
                                                  tile, split, nullptr);
}
int64_t emulated_linear24_decode_workspace(int m, int n, int k, int tile, int split) {
    return sparsekit::linear24_decode_workspace(m, n, k, tile, split);
}

// One warp, one instruction, registers as arrays over lanes: d[32][4] += a[32][4] * b[32][4].
int emulated_mma_sp_m16n8k32(float (*d)[4], const uint32_t (*a)[4], const uint32_t (*b)[4], const uint32_t *metadata,
                             int dtype, int selector) {
    cudaLaunchConfig_t config = {};
    config.blockDim = dim3(32);
    struct Operands {
        float (*d)[4];
        const uint32_t (*a)[4], (*b)[4];
        const uint32_t *metadata;
    } operands{d, a, b, metadata};
    const auto run = [&](auto zero, auto selector_constant) {
        void (*kernel)(Operands) = [](Operands o) {
            const unsigned lane = threadIdx.x;
            sparsekit::ptx::mma_sp_m16n8k32<decltype(zero), decltype(selector_constant)::value>(
                o.d[lane], o.a[lane], o.b[lane], o.metadata[lane]);
        };
        return cudaLaunchKernelEx(&config, kernel, operands);
    };
    const auto with = [&](auto zero) {
        return selector == 0 ? run(zero, std::integral_constant<int, 0>())
                             : run(zero, std::integral_constant<int, 1>());
    };
    return dtype == sparsekit::kFloat16 ? with(__half()) : with(__nv_bfloat16());
}

} // extern "C"
