// y[m, n] = act(sum_k x[m, k] * w[n, k] + bias[n]) for w stored 2:4 in fragment order (Fragments24 of
// sparsekit/format.py); fp16 or bf16, sums in fp32. Any m, n and k.
//
// The tensor core's sparse operand is its first, so a block computes a piece of y transposed: w is A (features down), x
// is B (tokens across). A block of four warps owns TILE_N features x TILE_M tokens. The warps tile that piece first;
// what is left of them splits k, each taking every warps_k-th chunk of 256 columns (for which one 16-byte load gives a
// lane its metadata) and of that 64 columns a stage: two mma.sp.m16n8k32 that share a metadata word through the two
// selectors. The parts are added in a fixed order at the end: the same inputs give the same bits.
//   tile   TILE_N x TILE_M   warps (features x tokens x k)   stages
//    1        32 x   8        1 x 1 x 4                       5
//    2        32 x  16        1 x 1 x 4                       4
//    3        64 x  64        2 x 1 x 2                       3
//    4       128 x 128        2 x 2 x 1                       3
// x and the values come by cp.async, 16 bytes a lane; a row tile's 64 columns are 1 KiB in one piece and are read back
// as they lie, one 16-byte load a lane and mma.sp, so only x needs ldmatrix and the swizzle. Metadata go straight to
// registers, ahead of their use by a chunk, or by a step in the large instance, whose steps are long and whose
// registers are few: staged, they would be read four words at a time for one that is used.
//
// In the large instance shared memory must feed 64 x 64 warp tiles: 64 columns are 48 KiB of fragments a block, 384
// clocks to read, under the 512 clocks that their products take on sm_80; the copies write 24 KiB besides, 192 clocks
// more where they do not overlap. Values loaded past shared memory would save 64 of the 192, but the two warps that
// share features would each fetch them from L2, and 64 columns ahead are 32 registers a lane, which 128 of sums and 20
// of metadata do not leave for two blocks on an SM.
//
// Floors. Operations: 2 m n k over the sparse fp16 rate. Bytes: 9/8 n k (w) + 2 m k (x) + 2 m n (y) over copy
// bandwidth, the first term alone at decode sizes. Not yet run on hardware; tests/test_cuda_emulated.py runs this
// source on the CPU.
#include "../launch.h"
#include "epilogue.cuh"
#include "ptx.cuh"
#include "tiles.cuh"
#include <climits>

namespace sparsekit {
namespace {

constexpr int kThreads = 128;
constexpr int kValuesBytes = 1024; // of 16 rows x 64 columns, which one warp takes of a stage
constexpr int kHalfBytes = 512;    // of one mma.sp: 16 bytes a lane
constexpr int kMetaBytes = 512;    // of 16 rows x 256 columns: 16 bytes a lane
constexpr int kXRow = 128;         // bytes of a token's 64 columns
constexpr int kRasterM = 8;        // token tiles that share a pass over w, for L2

template <typename T> struct Linear24 {
    const T *x;         // [m, k], row stride ldx elements
    const char *values; // [row tile][64 columns][k32 step][lane][16 bytes]
    const char *meta;   // [row tile][256 columns][lane][16 bytes]
    const T *bias;      // [n] or null
    T *y;               // [m, n]
    int m, n, k;
    int64_t ldx;
    int activation;
    bool x_aligned, y_aligned; // every row starts at a multiple of 16 (x) or 8 (y) bytes
};

template <int TILE_N, int TILE_M> struct Tile {
    static constexpr int warp_n = TILE_N < 128 ? 32 : 64, warp_m = TILE_M < 64 ? TILE_M : 64;
    static constexpr int warps_n = TILE_N / warp_n, warps_m = TILE_M / warp_m;
    static constexpr int warps_k = kThreads / 32 / (warps_n * warps_m);
    // One stage: values [warps_k][TILE_N / 16][kValuesBytes], x [warps_k][TILE_M][kXRow].
    static constexpr int x_offset = warps_k * TILE_N / 16 * kValuesBytes;
    static constexpr int stage_bytes = x_offset + warps_k * TILE_M * kXRow;
    // After the loop: fp32 sums [warps_k][TILE_M][sums_row]. 4 more than TILE_N: eight features x four token pairs, 32
    // banks.
    static constexpr int sums_row = TILE_N + 4;
    static constexpr int sums_bytes = warps_k * TILE_M * sums_row * 4;
    static_assert(warps_n * warps_m * warps_k == kThreads / 32, "the tile must divide over four warps");

    // Which 64 columns warp_k takes of a step, and how many steps there are for so many times 64.
    __device__ static int block_of(int step, int warp_k) { return ((step / 4 * warps_k + warp_k) * 4) + step % 4; }
    __device__ static int steps(int blocks) {
        const int before_last = (ceil_div(blocks, 4 * warps_k) - 1) * 4; // steps of all rounds but the last
        return before_last + min(4, blocks - before_last * warps_k);
    }
};

template <int TILE_N, int TILE_M, int STAGES> constexpr int shared_bytes() {
    using S = Tile<TILE_N, TILE_M>;
    return STAGES * S::stage_bytes > S::sums_bytes ? STAGES * S::stage_bytes : S::sums_bytes;
}

// Brings one step's columns into a stage. Row tiles past the last repeat it: their sums are not stored. What lies past
// the last 64 columns of w is not read (and not multiplied); tokens past m and columns past k become zeros.
template <int TILE_N, int TILE_M, typename T>
__device__ __forceinline__ void load_stage(const Linear24<T> &p, char *stage, int n0, int m0, int step) {
    using S = Tile<TILE_N, TILE_M>;
    constexpr int PIECES = kValuesBytes / 16, X_PIECES = kXRow / 16;
    constexpr int COUNT = S::x_offset / 16, X_COUNT = S::warps_k * TILE_M * X_PIECES;
    static_assert(COUNT % kThreads == 0 && X_COUNT % kThreads == 0, "every thread copies the same number of pieces");
    const int blocks = ceil_div(p.k, 64), last_tile = ceil_div(p.n, 16) - 1;
#pragma unroll
    for (int copy = 0; copy < COUNT / kThreads; ++copy) {
        const int i = copy * kThreads + threadIdx.x, tile = i / PIECES % (TILE_N / 16);
        const int block = S::block_of(step, i / PIECES / (TILE_N / 16));
        const char *source =
            p.values + (static_cast<int64_t>(min(n0 / 16 + tile, last_tile)) * blocks + block) * kValuesBytes;
        ptx::cp_async<16>(stage + i * 16, source + i % PIECES * 16, block < blocks ? 16 : 0);
    }
    auto x_piece = [&](int i, auto copy) { // copy(where to, where from, how many of the eight columns there are)
        const int token = i / X_PIECES % TILE_M, group = i / X_PIECES / TILE_M;
        const int column = S::block_of(step, group) * 64 + i % X_PIECES * 8;
        copy(stage + S::x_offset + group * TILE_M * kXRow + swizzled<kXRow>(token, i % X_PIECES),
             p.x + (m0 + token) * p.ldx + column, m0 + token < p.m ? max(0, min(8, p.k - column)) : 0);
    };
    if (p.x_aligned) {
#pragma unroll
        for (int copy = 0; copy < X_COUNT / kThreads; ++copy)
            x_piece(copy * kThreads + threadIdx.x,
                    [](char *shared, const T *source, int columns) { ptx::cp_async<16>(shared, source, columns * 2); });
    } else { // rows that cp.async cannot take, through registers
#pragma unroll 1
        for (int i = threadIdx.x; i < X_COUNT; i += kThreads)
            x_piece(i, [](char *shared, const T *source, int columns) {
#pragma unroll
                for (int e = 0; e < 8; ++e)
                    reinterpret_cast<uint16_t *>(shared)[e] =
                        e < columns ? __ldg(reinterpret_cast<const uint16_t *>(source) + e) : static_cast<uint16_t>(0);
            });
    }
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

    const int blocks = ceil_div(p.k, 64), chunks = ceil_div(blocks, 4), steps = S::steps(blocks);
    auto fetch = [&](int step) {
        if (step < steps)
            load_stage<TILE_N, TILE_M>(p, shared + step % STAGES * S::stage_bytes, n0, m0, step);
        ptx::cp_async_commit(); // empty past the end, so that the count of groups goes on
    };

    const int tile0 = n0 / 16 + warp_n * MMAS_N, last_tile = ceil_div(p.n, 16) - 1;
    constexpr bool ONE_SET = MMAS_N > 2; // of metadata registers: loaded a step ahead, otherwise four
    uint4 metadata[MMAS_N] = {}, coming[MMAS_N] = {};
    auto fetch_metadata = [&](uint4(&target)[MMAS_N], int round) {
        const int chunk = round * S::warps_k + warp_k;
        if (chunk < chunks) {
#pragma unroll
            for (int i = 0; i < MMAS_N; ++i) {
                const int64_t tile = min(tile0 + i, last_tile);
                target[i] = ptx::ld_global_streaming(p.meta + (tile * chunks + chunk) * kMetaBytes + lane * 16);
            }
        }
    };

    auto multiply = [&](int step, const uint32_t (&words)[MMAS_N]) {
        if (S::block_of(step, warp_k) >= blocks)
            return;
        const char *stage = shared + step % STAGES * S::stage_bytes;
        const char *values = stage + (warp_k * S::warps_n + warp_n) * MMAS_N * kValuesBytes + lane * 16;
        const char *x = stage + S::x_offset + warp_k * TILE_M * kXRow;
        auto half_block = [&](auto selector) { // 32 columns
            constexpr int SELECTOR = decltype(selector)::value;
            uint32_t a[MMAS_N][4];
#pragma unroll
            for (int i = 0; i < MMAS_N; ++i)
                ptx::ld_shared(a[i], values + i * kValuesBytes + SELECTOR * kHalfBytes);
#pragma unroll
            for (int j = 0; j < MMAS_M; ++j) {
                uint32_t b[4];
                ptx::ldmatrix_x4(b,
                                 x + swizzled<kXRow>(warp_m * S::warp_m + j * 8 + lane % 8, SELECTOR * 4 + lane / 8));
#pragma unroll
                for (int i = 0; i < MMAS_N; ++i)
                    ptx::mma_sp_m16n8k32<T, SELECTOR>(sums[i][j], a[i], b, words[i]);
            }
        };
        half_block(std::integral_constant<int, 0>());
        half_block(std::integral_constant<int, 1>());
    };

    fetch_metadata(ONE_SET ? metadata : coming, 0);
    for (int step = 0; step < STAGES - 1; ++step)
        fetch(step);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        if (!ONE_SET && step % 4 == 0) {
#pragma unroll
            for (int i = 0; i < MMAS_N; ++i)
                metadata[i] = coming[i];
            fetch_metadata(coming, step / 4 + 1);
        }
        uint32_t words[MMAS_N]; // lane q of a quad holds columns 16 q .. 16 q + 15 of its two rows
#pragma unroll
        for (int i = 0; i < MMAS_N; ++i) {
            const uint2 pair = step % 4 < 2 ? uint2{metadata[i].x, metadata[i].y} : uint2{metadata[i].z, metadata[i].w};
            words[i] = step % 2 == 0 ? pair.x : pair.y;
        }
        if (ONE_SET && step % 4 == 3)
            fetch_metadata(metadata, step / 4 + 1);
        ptx::cp_async_wait<STAGES - 2>();
        __syncthreads(); // step's stage is there for all, and the stage before it has been read by all
        fetch(step + STAGES - 1);
        multiply(step, words);
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
    const int64_t blocks = static_cast<int64_t>(ceil_div(p.n, TILE_N)) * ceil_div(p.m, TILE_M);
    if (blocks > INT_MAX)
        return cudaErrorInvalidValue;
    return launch_kernel(linear24_sm80<T, TILE_N, TILE_M, STAGES>, dim3(static_cast<unsigned>(blocks)), kThreads, bytes,
                         stream, p);
}

// The tiles, in the order of their numbers, and up to which m each is the default; not yet measured. Up to m = 16 a
// block has 24 KiB or more of values in flight.
template <typename T> struct Choice {
    int m_max;
    cudaError_t (*launch)(const Linear24<T> &, cudaStream_t);
};
template <typename T>
constexpr Choice<T> kChoices[] = {{8, launch_tile<T, 32, 8, 5>},
                                  {16, launch_tile<T, 32, 16, 4>},
                                  {64, launch_tile<T, 64, 64, 3>},
                                  {INT_MAX, launch_tile<T, 128, 128, 3>}};
constexpr int kTiles = 4;

} // namespace

cudaError_t launch_linear24_sm80(const void *x, const void *values, const void *meta, const void *bias, void *y, int m,
                                 int n, int k, int64_t ldx, int dtype, int activation, int tile, cudaStream_t stream) {
    constexpr int limit = INT_MAX - 1024; // tiles may reach past an end without overflow
    if (m < 0 || n < 0 || k < 0 || m > limit || n > limit || k > limit || ldx < k || activation < kNone ||
        activation > kSilu || tile < 0 || tile > kTiles || (dtype != kFloat16 && dtype != kBFloat16) ||
        !is_multiple(values, 0, 16) || !is_multiple(meta, 0, 16))
        return cudaErrorInvalidValue;
    if (m == 0 || n == 0)
        return cudaSuccess;
    auto run = [&](auto zero) {
        using T = decltype(zero);
        Linear24<T> p = {};
        p.x = static_cast<const T *>(x), p.values = static_cast<const char *>(values);
        p.meta = static_cast<const char *>(meta), p.bias = static_cast<const T *>(bias), p.y = static_cast<T *>(y);
        p.m = m, p.n = n, p.k = k, p.ldx = ldx, p.activation = activation;
        p.x_aligned = is_multiple(x, ldx * 2, 16);
        p.y_aligned = is_multiple(y, int64_t(n) * 2, 8);
        int which = tile - 1;
        if (tile == 0)
            for (which = 0; m > kChoices<T>[which].m_max;)
                ++which;
        return kChoices<T>[which].launch(p, stream);
    };
    return dtype == kFloat16 ? run(__half()) : run(__nv_bfloat16());
}

} // namespace sparsekit
