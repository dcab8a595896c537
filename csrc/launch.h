// The one list of launchers: pointers, sizes, stream -> error code.
#pragma once
#include <cstdint>
#ifdef SPARSEKIT_CUDA
#include <cuda_runtime.h>
#endif

namespace sparsekit {

// The codes of sparsekit/ops.py.
enum DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum Activation : int { kNone = 0, kRelu = 1, kGelu = 2 /* erf */, kGeluTanh = 3, kSilu = 4 };

// y[m, n] = act(sum_k x[m, k] * w[n, k] + bias[n]), w stored 2:4 (sparsekit/format.py), kp = k rounded up to 8.
// x [m, k] with rows ldx elements apart, values [n, kp / 2] and meta [n, kp / 8] contiguous; bias [n] (or null) and
// y [m, n] have x's dtype. Sums in fp32; x_dtype and w_dtype may differ. Bit for bit the same for every `threads`.
void linear24_cpu(const void *x, const void *values, const uint8_t *meta, const void *bias, void *y, int64_t m,
                  int64_t n, int64_t k, int64_t ldx, int x_dtype, int w_dtype, int activation, int threads);

#ifdef SPARSEKIT_CUDA
// The same product where x and w are both fp16 or both bf16 (`dtype`).
cudaError_t launch_linear24_sm80(const void *x, const void *values, const void *meta, const void *bias, void *y, int m,
                                 int n, int k, int64_t ldx, int dtype, int activation, cudaStream_t stream);

// The same for sm_90a, from fragment order (sparsekit/format.py); values of tiles 6 to 8 are canonical. tile: 0 chooses
// by m; 1 to 8 are 128x64, 128x128, 256x128, 128x256, 192x192 (features x tokens; w through registers) and 256x128,
// 128x256, 192x256 (w through shared memory). cudaErrorNotSupported where TMA cannot take x (or the canonical values):
// rows and address must be multiples of 16 bytes.
cudaError_t launch_linear24_sm90a(const void *x, const void *values, const void *meta, const void *bias, void *y, int m,
                                  int n, int k, int64_t ldx, int dtype, int activation, int tile, cudaStream_t stream);
#endif

} // namespace sparsekit
