// What tests/test_cuda_hopper.py calls through ctypes, beside entry.cpp.
#include "../../csrc/launch.h"
#include "hopper_host.h"

extern "C" {

void emulator_multiprocessors(int count) { emulator::multiprocessors = count; }

int emulated_linear24_sm90a(const void *x, const void *values, const void *meta, const void *bias, void *y, int m,
                            int n, int k, int64_t ldx, int dtype, int activation, int tile) {
    return sparsekit::launch_linear24_sm90a(x, values, meta, bias, y, m, n, k, ldx, dtype, activation, tile, nullptr);
}

} // extern "C"
