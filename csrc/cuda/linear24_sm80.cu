// y[m, n] = act(sum_k x[m, k] * w[n, k] + bias[n]) for w stored 2:4 in the canonical layout; fp16 or bf16, sums in
// fp32.
//
// The tensor core's sparse operand is its first, so a block computes a piece of y transposed: w is A (features down), x
// is B (tokens across). A block of four warps owns TILE_N features x TILE_M tokens. The warps tile that piece first;
// what is left of them splits k, each taking 64 columns of every stage (two mma.sp.m16n8k32, which share one metadata
// word a lane through the two selectors), and the parts are added in a fixed order at the end: the same inputs give the
// same bits.
//   TILE_N x TILE_M   warps (features x tokens x k)   columns a stage
//    32 x   8, 16     1 x 1 x 4                       256
//    64 x  64         2 x 1 x 2                       128
//   128 x 128         2 x 2 x 1                        64
// Warp tiles are 64 x 64 in the large instance because shared memory feeds them: 64 columns are 48 KiB of fragments a
// block, 384 clocks to read, under the 512 clocks that their products take on sm_80.
//
// Floors. Operations: 2 m n k over the sparse fp16 rate. Bytes: 9/8 n k (w) + 2 m k (x) + 2 m n (y) over copy
// bandwidth, the first term alone at decode sizes. Not yet run on hardware; tests/test_cuda_emulated.py runs this
// source on the CPU.
#include "../launch.h"
#include "epilogue.cuh"
#include "ptx.cuh"
#include <climits>

namespace sparsekit {
namespace {

constexpr int kThreads = 128;
constexpr int kSliceK = 64; // columns a warp takes of a stage: one 32-bit metadata word a lane
constexpr int kRasterM = 8; // token tiles that share a pass over w, for L2

template <typename T> struct Linear24 {
    const T *x;          // [m, k], row stride ldx elements
    const T *values;     // [n, kp / 2], kp = k rounded up to 8; a row is kp bytes
    const uint8_t *meta; // [n, kp / 8]
    const T *bias;       // [n] or null
    T *y;                // [m, n]
    int m, n, k;
    int64_t ldx;
    int activation;
    // Every row starts at a multiple of 16 (x, values) or 8 (meta, y) bytes.
    bool x_aligned, values_aligned, meta_aligned, y_aligned;
};

template <int TILE_N, int TILE_M> struct Tile {
    static constexpr int warp_n = TILE_N < 128 ? 32 : 64, warp_m = TILE_M < 64 ? TILE_M : 64;
    static constexpr int warps_n = TILE_N / warp_n, warps_m = TILE_M / warp_m;
    static constexpr int warps_k = kThreads / 32 / (warps_n * warps_m);
    static constexpr int k = kSliceK * warps_k;
    static constexpr int values_row = k, x_row = 2 * k; // bytes a row of a stage
    // One stage: values [TILE_N][k / 2], x [TILE_M][k], meta [warps_k][TILE_N][8 bytes].
    static constexpr int x_offset = TILE_N * values_row, meta_offset = x_offset + TILE_M * x_row;
    static constexpr int stage_bytes = meta_offset + TILE_N * k / 8;
    // After the loop: fp32 sums [warps_k][TILE_M][sums_row]. 4 more than TILE_N: eight features x four token pairs, 32
    // banks.
    static constexpr int sums_row = TILE_N + 4;
    static constexpr int sums_bytes = warps_k * TILE_M * sums_row * 4;
    static_assert(warps_n * warps_m * warps_k == kThreads / 32, "the tile must divide over four warps");
    static_assert(x_offset % 128 == 0 && meta_offset % 8 == 0 && stage_bytes % 128 == 0,
                  "a stage breaks its alignment");
};

template <int TILE_N, int TILE_M, int STAGES> constexpr int shared_bytes() {
    using S = Tile<TILE_N, TILE_M>;
    return STAGES * S::stage_bytes > S::sums_bytes ? STAGES * S::stage_bytes : S::sums_bytes;
}

__host__ __device__ constexpr int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Byte offset of a 16-byte chunk, permuted within its row so that the eight rows of an ldmatrix fall into different
// banks.
template <int ROW_BYTES> __device__ __forceinline__ int swizzled(int row, int chunk) {
    return row * ROW_BYTES + ((chunk ^ (ROW_BYTES >= 128 ? row & 7 : row >> 1 & 3)) << 4);
}

struct Piece {
    char *shared;
    const void *global;
    int bytes; // what there is to read, 0..BYTES
};

// COUNT pieces of BYTES bytes, spread over the block; piece(i) says where. Rows that cp.async cannot take go through
// registers an Element at a time. FILL is what a plain copy puts past the end of a row.
template <int COUNT, int BYTES, typename Element, unsigned FILL, typename F>
__device__ __forceinline__ void copy_pieces(bool aligned, F piece) {
    static_assert(COUNT % kThreads == 0, "every thread copies the same number of pieces");
    if (aligned) {
#pragma unroll
        for (int step = 0; step < COUNT / kThreads; ++step) {
            const Piece p = piece(step * kThreads + threadIdx.x);
            ptx::cp_async<BYTES>(p.shared, p.global, p.bytes);
        }
    } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < COUNT; i += kThreads) {
            const Piece p = piece(i);
            constexpr int SIZE = sizeof(Element);
#pragma unroll
            for (int e = 0; e < BYTES / SIZE; ++e)
                reinterpret_cast<Element *>(p.shared)[e] =
                    e * SIZE < p.bytes ? __ldg(static_cast<const Element *>(p.global) + e) : static_cast<Element>(FILL);
        }
    }
}

// Brings columns k0 .. k0 + S::k of the block's rows into one stage. Tokens past m and columns past k become zeros.
// Features past n repeat the last one, and metadata is never made up (0 is no valid nibble): their sums are not stored.
template <int TILE_N, int TILE_M, typename T>
__device__ __forceinline__ void load_stage(const Linear24<T> &p, char *stage, int n0, int m0, int k0) {
    using S = Tile<TILE_N, TILE_M>;
    const int kp = ceil_div(p.k, 8) * 8;
    copy_pieces<TILE_N * S::values_row / 16, 16, uint16_t, 0>(p.values_aligned, [&](int i) {
        const int row = i / (S::values_row / 16), chunk = i % (S::values_row / 16);
        const int byte = k0 + chunk * 16; // two bytes a value, one value every two columns
        const char *source =
            reinterpret_cast<const char *>(p.values) + static_cast<int64_t>(min(n0 + row, p.n - 1)) * kp + byte;
        return Piece{stage + swizzled<S::values_row>(row, chunk), source, max(0, min(16, kp - byte))};
    });
    copy_pieces<TILE_M * S::x_row / 16, 16, uint16_t, 0>(p.x_aligned, [&](int i) {
        const int row = i / (S::x_row / 16), chunk = i % (S::x_row / 16);
        const int column = k0 + chunk * 8;
        return Piece{stage + S::x_offset + swizzled<S::x_row>(row, chunk), p.x + (m0 + row) * p.ldx + column,
                     m0 + row < p.m ? max(0, min(8, p.k - column)) * 2 : 0};
    });
    copy_pieces<TILE_N * S::warps_k, 8, uint8_t, 0x44>(p.meta_aligned, [&](int i) {
        const int row = i % TILE_N, slice = i / TILE_N;
        const int byte = k0 / 8 + slice * 8;
        return Piece{stage + S::meta_offset + i * 8,
                     p.meta + static_cast<int64_t>(min(n0 + row, p.n - 1)) * (kp / 8) + byte,
                     max(0, min(8, kp / 8 - byte))};
    });
}

template <typename T, int TILE_N, int TILE_M, int STAGES>
__global__ void __launch_bounds__(kThreads, 2) linear24_sm80(const __grid_constant__ Linear24<T> p) {
    using S = Tile<TILE_N, TILE_M>;
    constexpr int MMAS_N = S::warp_n / 16, MMAS_M = S::warp_m / 8;
    char *shared = ptx::dynamic_shared_memory();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warp_k = warp % S::warps_k, warp_m = warp / S::warps_k % S::warps_m,
              warp_n = warp / (S::warps_k * S::warps_m);

    // Blocks walk the token tiles of a raster group first: neighbours read the same rows of w.
    const int tiles_n = ceil_div(p.n, TILE_N), tiles_m = ceil_div(p.m, TILE_M);
    const int group = blockIdx.x / (kRasterM * tiles_n), in_group = blockIdx.x % (kRasterM * tiles_n);
    const int group_m = min(kRasterM, tiles_m - group * kRasterM);
    const int m0 = (group * kRasterM + in_group % group_m) * TILE_M, n0 = in_group / group_m * TILE_N;

    float sums[MMAS_N][MMAS_M][4] = {};

    const int steps = ceil_div(p.k, S::k);
    auto fetch = [&](int step) {
        if (step < steps)
            load_stage<TILE_N, TILE_M>(p, shared + step % STAGES * S::stage_bytes, n0, m0, step * S::k);
        ptx::cp_async_commit(); // empty past the end, so that the count of groups goes on
    };
    auto multiply = [&](int step) {
        if (step * S::k + warp_k * kSliceK >= p.k)
            return; // the whole slice lies past k
        const char *stage = shared + step % STAGES * S::stage_bytes;
        // Lane q of a quad holds columns 16 q .. 16 q + 15 of its two rows: selector 0 reads q = 0, 1, selector 1 reads
        // q = 2, 3.
        const uint16_t *meta = reinterpret_cast<const uint16_t *>(stage + S::meta_offset) +
                               (warp_k * TILE_N + warp_n * S::warp_n + lane / 4) * 4 + lane % 4;
        uint32_t metadata[MMAS_N];
#pragma unroll
        for (int i = 0; i < MMAS_N; ++i)
            metadata[i] = meta[i * 16 * 4] | static_cast<uint32_t>(meta[(i * 16 + 8) * 4]) << 16;
        auto half_slice = [&](auto selector) { // 32 columns
            constexpr int SELECTOR = decltype(selector)::value;
            uint32_t a[MMAS_N][4];
#pragma unroll
            for (int i = 0; i < MMAS_N; ++i)
                ptx::ldmatrix_x4(a[i], stage + swizzled<S::values_row>(warp_n * S::warp_n + i * 16 + lane % 16,
                                                                       warp_k * 4 + SELECTOR * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < MMAS_M; ++j) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b, stage + S::x_offset +
                                        swizzled<S::x_row>(warp_m * S::warp_m + j * 8 + lane % 8,
                                                           warp_k * 8 + SELECTOR * 4 + lane / 8));
#pragma unroll
                for (int i = 0; i < MMAS_N; ++i)
                    ptx::mma_sp_m16n8k32<T, SELECTOR>(sums[i][j], a[i], b, metadata[i]);
            }
        };
        half_slice(std::integral_constant<int, 0>());
        half_slice(std::integral_constant<int, 1>());
    };

    for (int step = 0; step < STAGES - 1; ++step)
        fetch(step);
    for (int step = 0; step < steps; ++step) {
        ptx::cp_async_wait<STAGES - 2>();
        __syncthreads(); // step's stage is there for all, and the stage before it has been read by all
        fetch(step + STAGES - 1);
        multiply(step);
    }

    // Through shared memory, where each lane's sums lie along tokens, so that rows of y are written along features.
    __syncthreads();
    float *parts = reinterpret_cast<float *>(shared);
#pragma unroll
    for (int i = 0; i < MMAS_N; ++i)
#pragma unroll
        for (int j = 0; j < MMAS_M; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int token = warp_m * S::warp_m + j * 8 + lane % 4 * 2 + e % 2;
                const int feature = warp_n * S::warp_n + i * 16 + lane / 4 + e / 2 * 8;
                parts[(warp_k * TILE_M + token) * S::sums_row + feature] = sums[i][j][e];
            }
    __syncthreads();
    for (int i = threadIdx.x; i < TILE_M * TILE_N / 4; i += kThreads) {
        const int token = i / (TILE_N / 4), feature = i % (TILE_N / 4) * 4;
        if (m0 + token >= p.m)
            break;
        float total[4] = {};
#pragma unroll
        for (int part = 0; part < S::warps_k; ++part)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                total[e] += parts[(part * TILE_M + token) * S::sums_row + feature + e];
        store_four(p.y + static_cast<int64_t>(m0 + token) * p.n, p.bias, total, n0 + feature, p.n, p.activation,
                   p.y_aligned);
    }
}

template <typename T, int TILE_N, int TILE_M, int STAGES>
cudaError_t launch_tile(const Linear24<T> &p, cudaStream_t stream) {
    constexpr int bytes = shared_bytes<TILE_N, TILE_M, STAGES>();
    static_assert(bytes <= 99 * 1024, "a block has 99 KiB of shared memory on sm_86, sm_89 and sm_120");
    const auto kernel = linear24_sm80<T, TILE_N, TILE_M, STAGES>;
    const int64_t blocks = static_cast<int64_t>(ceil_div(p.n, TILE_N)) * ceil_div(p.m, TILE_M);
    if (blocks > INT_MAX)
        return cudaErrorInvalidValue;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    cudaError_t error = cudaSuccess;
    if (bytes > 48 * 1024)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess)
        error = cudaLaunchKernelEx(&config, kernel, p);
    if (error != cudaSuccess)
        cudaGetLastError(); // reported here, so not to be found by the next launch
    return error;
}

// Which tile for m tokens; not yet measured. Up to m = 16 the stages keep 27 KiB or more of w in flight a block.
template <typename T> struct Choice {
    int m_max;
    cudaError_t (*launch)(const Linear24<T> &, cudaStream_t);
};
template <typename T>
constexpr Choice<T> kChoices[] = {{8, launch_tile<T, 32, 8, 5>},
                                  {16, launch_tile<T, 32, 16, 4>},
                                  {64, launch_tile<T, 64, 64, 3>},
                                  {INT_MAX, launch_tile<T, 128, 128, 3>}};

bool is_multiple(const void *pointer, int64_t row_bytes, int of) {
    return reinterpret_cast<uintptr_t>(pointer) % of == 0 && row_bytes % of == 0;
}

template <typename T> cudaError_t launch(Linear24<T> p, cudaStream_t stream) {
    const int64_t kp = ceil_div(p.k, 8) * 8;
    p.x_aligned = is_multiple(p.x, p.ldx * 2, 16);
    p.values_aligned = is_multiple(p.values, kp, 16);
    p.meta_aligned = is_multiple(p.meta, kp / 8, 8);
    p.y_aligned = is_multiple(p.y, int64_t(p.n) * 2, 8);
    const Choice<T> *choice = kChoices<T>;
    while (p.m > choice->m_max)
        ++choice;
    return choice->launch(p, stream);
}

} // namespace

cudaError_t launch_linear24_sm80(const void *x, const void *values, const void *meta, const void *bias, void *y, int m,
                                 int n, int k, int64_t ldx, int dtype, int activation, cudaStream_t stream) {
    constexpr int limit = INT_MAX - 1024; // tiles may reach past an end without overflow
    if (m < 0 || n < 0 || k < 0 || m > limit || n > limit || k > limit || ldx < k || activation < kNone ||
        activation > kSilu)
        return cudaErrorInvalidValue;
    if (dtype != kFloat16 && dtype != kBFloat16)
        return cudaErrorInvalidValue;
    if (m == 0 || n == 0)
        return cudaSuccess;
    auto run = [&](auto zero) {
        using T = decltype(zero);
        Linear24<T> p = {};
        p.x = static_cast<const T *>(x), p.values = static_cast<const T *>(values),
        p.meta = static_cast<const uint8_t *>(meta);
        p.bias = static_cast<const T *>(bias), p.y = static_cast<T *>(y);
        p.m = m, p.n = n, p.k = k, p.ldx = ldx, p.activation = activation;
        return launch(p, stream);
    };
    return dtype == kFloat16 ? run(__half()) : run(__nv_bfloat16());
}

} // namespace sparsekit
