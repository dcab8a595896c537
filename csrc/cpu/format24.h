// What the paths of the format ops share: the problems, and the table of functions that each path fills.
#pragma once
#include "../launch.h"
#include <cstdint>

namespace sparsekit::cpu {

// Strides in elements, none negative.
struct Matrix {
    const void *data;
    int64_t row_stride, col_stride;
    DType dtype;
};

// To the 2:4 form (values and meta) or, where dense is not null, to a dense matrix with zeros where nothing is kept.
struct Prune24 {
    int64_t rows, cols;
    Matrix w;
    RankKind kind;
    Matrix rank; // the scores; by mask, bytes
    void *values;
    uint8_t *meta;
    void *dense;
    int64_t *status;
};

struct Expand24 {
    const void *values;
    const uint8_t *meta;
    int itemsize;
    int64_t rows, cols;
    void *dense;
};

struct MaskNM {
    int64_t rows, cols;
    Matrix scores;
    int n, m;
    bool pairs;
    uint8_t *mask;
    int64_t *status;
};

struct MaskRows {
    int64_t rows, cols;
    Matrix scores;
    int64_t kept;
    uint8_t *mask;
    int64_t *status;
};

struct Check24 {
    const void *values;
    const uint8_t *meta;
    int64_t rows, cols;
    DType dtype;
    int64_t *status;
};

struct Format24Path {
    void (*prune)(const Prune24 &problem, int threads);
    void (*expand)(const Expand24 &problem, int threads);
    void (*mask_nm)(const MaskNM &problem, int threads);
    void (*mask_rows)(const MaskRows &problem, int threads);
    void (*check)(const Check24 &problem, int threads);
};

// One an instruction set, all from the headers that format24_path.h includes.
extern const Format24Path kFormat24Portable, kFormat24Avx2, kFormat24Vbmi2;

} // namespace sparsekit::cpu
