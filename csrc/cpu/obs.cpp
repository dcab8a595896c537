// The portable OBS step, and the choice of a path: the one that the linear has made.
#include "obs_body.h"

namespace sparsekit::cpu {

void obs_block_portable(const ObsBlock &problem, int threads) { obs_block<4>(problem, threads); }

} // namespace sparsekit::cpu

namespace sparsekit {

void obs_block_cpu(float *w, const float *upper, int64_t batch, int64_t rows, int64_t cols, int64_t batch_stride,
                   int64_t row_stride, bool given, int n, int m, bool pairs, uint8_t *mask, float *errors, float *loss,
                   int64_t *status, int threads) {
    status[0] = INT64_MAX;
    if (batch == 0 || rows == 0)
        return;
    const cpu::ObsBlock problem{w, upper, batch, rows, cols,   batch_stride, row_stride, given,
                                n, m,     pairs, mask, errors, loss,         status};
#if defined(__x86_64__)
    if (std::strcmp(cpu::cpu_isa(), "avx512") == 0)
        return cpu::obs_block_avx512(problem, threads);
    if (std::strcmp(cpu::cpu_isa(), "avx2") == 0)
        return cpu::obs_block_avx2(problem, threads);
#endif
    cpu::obs_block_portable(problem, threads);
}

} // namespace sparsekit
