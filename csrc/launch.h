// The one list of launchers: pointers, sizes, stream -> error code.
#pragma once
#include <cstdint>
#ifdef SPARSEKIT_CUDA
#include <cuda_runtime.h>
#endif

namespace sparsekit {

// The codes of sparsekit/ops/registry.py.
enum DType : int {
    kFloat32 = 0,
    kFloat16 = 1,
    kBFloat16 = 2,
    kFloat8E4M3 = 3,
    kInt8 = 4,
    kFloat64 = 5,
    kFloat8E5M2 = 6
};
enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2 /* erf */, kGeluTanh = 3, kSilu = 4 };

// y[m, n] = act(sum_k x[m, k] * w[n, k] + bias[n]), w stored 2:4 (sparsekit/format.py), kp = k rounded up to 8.
// x [m, k] with rows ldx elements apart, values [n, kp / 2] and meta [n, kp / 8] contiguous; bias [n] (or null) and
// y [m, n] have x's dtype. Sums in fp32; x_dtype and w_dtype may differ. Bit for bit the same for every `threads`.
void linear24_cpu(const void *x, const void *values, const uint8_t *meta, const void *bias, void *y, int64_t m,
                  int64_t n, int64_t k, int64_t ldx, int x_dtype, int w_dtype, int activation, int threads);

// The 2:4 form of a weight w [rows, cols] (kFloat32 to kInt8), kp = cols rounded up to 8: values [rows, kp / 2] in w's
// dtype and meta [rows, kp / 8]. Inputs may lie in any way, strides in elements; what is written is contiguous.
// `status` receives the first bad place of each kind, a flat index, or INT64_MAX. The same bits for every `threads`.
enum RankKind : int { kByWeight = 0, kByScores = 1, kByMask = 2, kByNonzero = 3 /* compress24 alone */ };

// A w that holds 2:4. status [2]: the first group (of kp / 4 a row) with NaN, the first with more than two non-zeros.
void compress24_cpu(const void *w, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype,
                    void *values, uint8_t *meta, int64_t *status, int threads);

// Two of every four: the largest, those with the highest scores (`rank`, of any dtype), or those that a mask of bytes
// (`rank`) keeps. status [2]: the first group with NaN in w or scores, the first of which the mask keeps more than two.
void prune_compress24_cpu(const void *w, int64_t rows, int64_t cols, int64_t w_row_stride, int64_t w_col_stride,
                          int dtype, const void *rank, int rank_kind, int rank_dtype, int64_t rank_row_stride,
                          int64_t rank_col_stride, void *values, uint8_t *meta, int64_t *status, int threads);

// The same, as the dense weight out [rows, cols], zeros where nothing is kept.
void prune24_cpu(const void *w, int64_t rows, int64_t cols, int64_t w_row_stride, int64_t w_col_stride, int dtype,
                 const void *rank, int rank_kind, int rank_dtype, int64_t rank_row_stride, int64_t rank_col_stride,
                 void *out, int64_t *status, int threads);

// The dense weight out [rows, cols] of values and meta. itemsize 1, 2 or 4; bad metadata give bad numbers, no more.
void expand24_cpu(const void *values, const uint8_t *meta, int itemsize, int64_t rows, int64_t cols, void *out,
                  int threads);

constexpr int kMostM = 32;

// mask [rows, cols], bytes 0 and 1: the n best of every m <= kMostM columns, or pairs of columns by the sums of their
// scores (any dtype). status [1]: the first group with NaN.
void mask_nm_cpu(const void *scores, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype,
                 int n, int m, bool pairs, uint8_t *mask, int64_t *status, int threads);

// mask [rows, cols]: the `kept` best of every row. status [1]: the first row with NaN.
void mask_rows_cpu(const void *scores, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, int dtype,
                   int64_t kept, uint8_t *mask, int64_t *status, int threads);

// status [2]: the first nibble (of kp / 4 a row) that is none of 4, 8, 9, C, D, E; the first of the values (of kp / 2 a
// row) that is not zero though its column is past the end.
void validate24_cpu(const void *values, const uint8_t *meta, int dtype, int64_t rows, int64_t cols, int64_t *status,
                    int threads);

// The OBS step of blocks of columns, sparsekit/ops/obs.py: w [batch, rows, cols], rows row_stride and weights
// batch_stride elements apart, is pruned in place; upper [batch, cols, cols]. What to keep stands in mask [batch, rows,
// cols], bytes 0 and 1, where `given`; else it is the n best of each m columns, or pairs of columns, and is written
// there. errors [batch, rows, cols] and loss [batch, rows]; all but w contiguous. status [1]: the first row with NaN,
// counted over the batch, or INT64_MAX. The same bits for every `threads`.
void obs_block_cpu(float *w, const float *upper, int64_t batch, int64_t rows, int64_t cols, int64_t batch_stride,
                   int64_t row_stride, bool given, int n, int m, bool pairs, uint8_t *mask, float *errors, float *loss,
                   int64_t *status, int threads);

#ifdef SPARSEKIT_CUDA
// The product of linear24_cpu where x and w are both fp16 or both bf16 (`dtype`), w in fragment order (Fragments24 of
// sparsekit/format.py), both arrays 16-byte aligned. tile: 0 chooses by m; 1 to 4 are 32x8, 32x16, 64x64 and 128x128
// (features x tokens).
cudaError_t launch_linear24_sm80(const void *x, const void *values, const void *meta, const void *bias, void *y, int m,
                                 int n, int k, int64_t ldx, int dtype, int activation, int tile, cudaStream_t stream);

// The same for few tokens. tile: features a block (16 to 256, a power of two, which ones depends on m); split: blocks
// that share the columns; 0 chooses for the current device. workspace: as many bytes, 16-byte aligned, as
// linear24_decode_workspace says for the same arguments on the same device (-1: they are out of range); its content
// does not matter.
cudaError_t launch_linear24_decode_sm80(const void *x, const void *values, const void *meta, const void *bias, void *y,
                                        void *workspace, int m, int n, int k, int64_t ldx, int dtype, int activation,
                                        int tile, int split, cudaStream_t stream);
int64_t linear24_decode_workspace(int m, int n, int k, int tile, int split);

// The same for sm_90a, from fragment order (sparsekit/format.py); values of tiles 8 to 10 are canonical. Tiles 1 to 10
// are 128x64, 128x128, 256x128, 128x256, 192x192 (features x tokens), 256x128 and 128x256 in clusters of four (w
// through registers), and 256x128, 128x256, 192x256 (w through shared memory). split: parts of the columns, for other
// blocks (1 in tiles of 192 features); 0 is linear24_sm90a_plan's choice, not yet measured: the largest of the first
// three tiles that gives almost every multiprocessor a block, and parts where none does. workspace as above.
// cudaErrorNotSupported where TMA cannot take x (or the canonical values): rows and address must be multiples of 16
// bytes.
struct Linear24Plan {
    int tile, split;
};
Linear24Plan linear24_sm90a_plan(int m, int n, int k, int tile, int split, int multiprocessors);
int64_t linear24_sm90a_workspace(int m, int n, int k, int tile, int split);
cudaError_t launch_linear24_sm90a(const void *x, const void *values, const void *meta, const void *bias, void *y,
                                  void *workspace, int m, int n, int k, int64_t ldx, int dtype, int activation,
                                  int tile, int split, cudaStream_t stream);
#endif

} // namespace sparsekit
