// The OBS step of a block of columns: the problem, and the paths that run it.
#pragma once
#include "../launch.h"
#include <cstdint>

namespace sparsekit::cpu {

// The arguments of sparsekit::obs_block_cpu.
struct ObsBlock {
    float *w;           // [batch, rows, cols], strides below in elements
    const float *upper; // [batch, cols, cols]
    int64_t batch, rows, cols, batch_stride, row_stride;
    bool given; // whether mask holds what to keep already
    int n, m;   // else n of each m columns, or pairs of columns
    bool pairs;
    uint8_t *mask;   // [batch, rows, cols], bytes 0 and 1
    float *errors;   // [batch, rows, cols]
    float *loss;     // [batch, rows]
    int64_t *status; // [1]
};

// One an instruction set, all from obs_body.h.
void obs_block_portable(const ObsBlock &problem, int threads);
void obs_block_avx2(const ObsBlock &problem, int threads);
void obs_block_avx512(const ObsBlock &problem, int threads);

} // namespace sparsekit::cpu
