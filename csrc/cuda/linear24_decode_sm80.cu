// y[m, n] = act(sum_k x[m, k] * w[n, k] + bias[n]) for few tokens m, w stored 2:4 in fragment order (Fragments24 of
// sparsekit/format.py); fp16 or bf16, sums in fp32. Any m, n and k; made for m = 1 .. 64.
//
// A block owns `rows` features x up to TOKENS tokens, and one of `split` parts of k. Its warps tile the features first;
// warps_k of them share a row tile and take turns at its chunks of 256 columns (one 16-byte load of metadata a lane).
// A stage is one or two blocks of 64 columns for each warp, two mma.sp.m16n8k32 each, which share a metadata word.
//   TOKENS   warps   row tiles a warp   64-column blocks a warp and stage   rows (`tile`)
//      8       8            1                          2                     16, 32, 64, 128
//     16       8            1                          2                     16, 32, 64, 128
//     32       8            2                          1                     32, 64, 128, 256
//     64       4            4                          1                     64, 128, 256
// Values go from global memory to a ring in shared memory by cp.async, 16 bytes a lane, and come back to the same lane
// as its A fragment: nobody else reads them, so the wait for the copies is all they need. x is shared by warps that
// have the same columns, hence the one barrier a stage. Metadata go straight to registers, one chunk ahead.
// Tokens past m are not staged: their lanes of B repeat the last token, and columns of B do not mix.
//
// Sums of the warps_k warps are added through shared memory, those of the `split` blocks as split.cuh has it, both in a
// fixed order: the same bits every time.
//
// Floor: packed bytes, 9/8 n k, over copy bandwidth. On the way to it:
//   In flight. Three stages of 16 KiB of values a block, and x beside them. Two blocks on an SM of sm_90 are 96 KiB,
//   one on sm_80 (two up to 81 KiB a block), 86, 89 or 120 is 48 KiB. H200: 4.8 TB/s x 0.8 us / 132 SMs = 29 KB;
//   A100: 2.0 TB/s x 0.7 us / 108 = 13 KB. A ring of registers would hold no more (two chunks a lane, 72 registers, 16
//   warps: 72 KiB) and leave none for 64 tokens.
//   L2. Blocks read x again: 16 m / (9 rows) bytes a byte of w, so the default is rows >= 4 m (0.44 or less). Parts are
//   8 m n split bytes.
//   Shared memory. Bytes read as B a byte of values: TOKENS / 8 / (row tiles) / 2, at most 1; values pass twice.
// Prediction: 85 to 92 % of copy bandwidth up to m = 16, 60 to 75 % at m = 64, where x, the parts and mma.sp itself
// (546 TFLOP/s dense-equivalent at 4.8 TB/s) count too; 1.5 us to fill and drain come on top, 1 us more with a split.
// Not yet run on hardware; tests/test_cuda_decode.py runs this source on the CPU.
#include "../launch.h"
#include "epilogue.cuh"
#include "ptx.cuh"
#include "split.cuh"
#include "tiles.cuh"
#include <climits>

namespace sparsekit {
namespace {

constexpr int kStages = 4;
constexpr int kBlockBytes = 1024; // values of 16 rows x 64 columns
constexpr int kHalfBytes = 512;   // one mma.sp: 16 bytes a lane
constexpr int kMetaBytes = 512;   // metadata of 16 rows x 256 columns

template <typename T> struct Decode {
    const T *x;         // [m, k], row stride ldx elements
    const char *values; // [row tile][64 columns][k32 step][lane][16 bytes]
    const char *meta;   // [row tile][256 columns][lane][16 bytes]
    const T *bias;      // [n] or null
    T *y;               // [m, n]
    float *parts;       // [split][m][n rounded up to 4], or null where nothing is split
    int m, n, k;
    int64_t ldx;
    int activation;
    int log_warps_k, x_rows, stage_bytes; // x_rows: tokens that a stage has room for
    bool x_aligned, y_aligned;            // every row starts at a multiple of 16 (x) or 8 (y) bytes
};

template <int TOKENS> struct Shape {
    static constexpr int warps = TOKENS == 64 ? 4 : 8, threads = 32 * warps;
    static constexpr int row_tiles = TOKENS <= 16 ? 1 : TOKENS / 16; // of a warp
    static constexpr int blocks = 16 / (warps * row_tiles);          // 64 columns each, of a warp in a stage
    static constexpr int steps = 4 / blocks;                         // stages of a 256-column chunk
    static constexpr int warp_values = row_tiles * blocks * kBlockBytes;
    static constexpr int values_bytes = warps * warp_values; // of a stage; then x [warps_k][x_rows][x_row bytes]
    static constexpr int x_row = blocks * 128, x_chunks = x_row / 16;
    // The most that a block takes: all warps share one row tile.
    static constexpr int most_bytes = kStages * (values_bytes + TOKENS * x_row * warps);
    static_assert(values_bytes == 16 * 1024 && blocks * steps == 4, "a stage is 16 blocks of 64 columns");
};

// One 16-byte piece of x, of which `columns` (0 to 8) exist; the rest are zeros.
template <typename T>
__device__ __forceinline__ void stage_x(char *shared, const T *source, int columns, bool aligned) {
    if (aligned) {
        ptx::cp_async<16>(shared, source, columns * 2);
    } else {
#pragma unroll 1
        for (int i = 0; i < 8; ++i)
            reinterpret_cast<uint16_t *>(shared)[i] =
                i < columns ? __ldg(reinterpret_cast<const uint16_t *>(source) + i) : static_cast<uint16_t>(0);
    }
}

template <typename T, int TOKENS>
__global__ void __launch_bounds__(Shape<TOKENS>::threads, 2) linear24_decode_sm80(const __grid_constant__ Decode<T> p) {
    using S = Shape<TOKENS>;
    constexpr int TILES = S::row_tiles, TOKEN_TILES = TOKENS / 8;
    char *shared = ptx::dynamic_shared_memory();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int warps_k = 1 << p.log_warps_k, warp_k = warp & (warps_k - 1), warp_n = warp >> p.log_warps_k;
    const int rows = (16 * TILES * S::warps) >> p.log_warps_k, row_blocks = ceil_div(p.n, rows);
    const int n0 = static_cast<int>(blockIdx.x) % row_blocks * rows;
    const int m0 = static_cast<int>(blockIdx.x) / row_blocks * TOKENS, tokens = min(TOKENS, p.m - m0);

    // This block's chunks of 256 columns; warp_k takes the warp_k-th of every warps_k.
    const int blocks = ceil_div(p.k, 64), chunks = ceil_div(blocks, 4);
    const int first = static_cast<int>(static_cast<int64_t>(chunks) * blockIdx.y / gridDim.y);
    const int last = static_cast<int>(static_cast<int64_t>(chunks) * (blockIdx.y + 1) / gridDim.y);
    const int rounds = (last - first + warps_k - 1) >> p.log_warps_k;

    // A warp whose row tiles all lie past n has nothing to do; one that has some repeats the last, which is not stored.
    const int row_tiles = ceil_div(p.n, 16), tile0 = n0 / 16 + warp_n * TILES;
    const bool present = tile0 < row_tiles;
    auto place = [&](int i, int count, int which) { // of the which-th of `count` pieces of row tile i
        return static_cast<int64_t>(min(tile0 + i, row_tiles - 1)) * count + which;
    };
    const int own = warp * S::warp_values + lane * 16; // where this lane's values lie in a stage
    auto chunk_of = [&](int round, int group) { return first + (round << p.log_warps_k) + group; };

    auto fetch = [&](int stage_index) {
        const int round = stage_index / S::steps, step = stage_index % S::steps;
        char *stage = shared + stage_index % kStages * p.stage_bytes;
        if (round < rounds) {
            const int chunk = chunk_of(round, warp_k);
#pragma unroll
            for (int b = 0; b < S::blocks; ++b) {
                const int block = chunk * 4 + step * S::blocks + b;
                if (present && chunk < last && block < blocks) {
#pragma unroll
                    for (int i = 0; i < TILES; ++i) {
                        char *target = stage + own + (i * S::blocks + b) * kBlockBytes;
                        const char *source = p.values + place(i, blocks, block) * kBlockBytes + lane * 16;
                        ptx::cp_async<16>(target, source, 16);
                        ptx::cp_async<16>(target + kHalfBytes, source + kHalfBytes, 16);
                    }
                }
            }
            for (int i = threadIdx.x; i < (tokens * S::x_chunks) << p.log_warps_k; i += S::threads) {
                const int piece = i % S::x_chunks, group = i / S::x_chunks & (warps_k - 1);
                const int token = i / S::x_chunks >> p.log_warps_k, x_chunk = chunk_of(round, group);
                if (x_chunk >= last)
                    continue;
                const int column = x_chunk * 256 + step * S::blocks * 64 + piece * 8;
                stage_x(stage + S::values_bytes + group * p.x_rows * S::x_row + swizzled<S::x_row>(token, piece),
                        p.x + (m0 + token) * p.ldx + column, max(0, min(8, p.k - column)), p.x_aligned);
            }
        }
        ptx::cp_async_commit(); // empty past the end, so that the count of groups goes on
    };

    uint4 metadata[TILES] = {}, coming[TILES] = {};
    auto fetch_metadata = [&](int round) {
        const int chunk = chunk_of(round, warp_k);
        if (present && round < rounds && chunk < last) {
#pragma unroll
            for (int i = 0; i < TILES; ++i)
                coming[i] = ptx::ld_global_streaming(p.meta + place(i, chunks, chunk) * kMetaBytes + lane * 16);
        }
    };

    float sums[TILES][TOKEN_TILES][4] = {};
    auto multiply = [&](int stage_index) {
        const int step = stage_index % S::steps, chunk = chunk_of(stage_index / S::steps, warp_k);
        const char *stage = shared + stage_index % kStages * p.stage_bytes;
        const char *x = stage + S::values_bytes + warp_k * p.x_rows * S::x_row;
#pragma unroll
        for (int b = 0; b < S::blocks; ++b) {
            const int block = step * S::blocks + b; // of the chunk
            if (!present || chunk >= last || chunk * 4 + block >= blocks)
                continue;
            uint32_t words[TILES];
#pragma unroll
            for (int i = 0; i < TILES; ++i) {
                const uint2 pair =
                    block < 2 ? uint2{metadata[i].x, metadata[i].y} : uint2{metadata[i].z, metadata[i].w};
                words[i] = block % 2 == 0 ? pair.x : pair.y;
            }
            auto half_block = [&](auto selector) { // 32 columns
                constexpr int SELECTOR = decltype(selector)::value;
                uint32_t a[TILES][4];
#pragma unroll
                for (int i = 0; i < TILES; ++i)
                    memcpy(a[i], // not ptx::ld_shared: with it ptxas spills for 64 tokens on sm_120
                           __builtin_assume_aligned(
                               stage + own + (i * S::blocks + b) * kBlockBytes + SELECTOR * kHalfBytes, 16),
                           16);
#pragma unroll
                for (int j = 0; j < TOKEN_TILES; ++j) {
                    uint32_t tokens_b[4];
                    ptx::ldmatrix_x4(tokens_b, x + swizzled<S::x_row>(min(j * 8 + lane % 8, tokens - 1),
                                                                      b * 8 + SELECTOR * 4 + lane / 8));
#pragma unroll
                    for (int i = 0; i < TILES; ++i)
                        ptx::mma_sp_m16n8k32<T, SELECTOR>(sums[i][j], a[i], tokens_b, words[i]);
                }
            };
            half_block(std::integral_constant<int, 0>());
            half_block(std::integral_constant<int, 1>());
        }
    };

    fetch_metadata(0);
    for (int i = 0; i < kStages - 1; ++i)
        fetch(i);
#pragma unroll 1
    for (int stage_index = 0; stage_index < rounds * S::steps; ++stage_index) {
        if (stage_index % S::steps == 0) {
#pragma unroll
            for (int i = 0; i < TILES; ++i)
                metadata[i] = coming[i];
            fetch_metadata(stage_index / S::steps + 1);
        }
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads(); // the stage is there for all, and the stage before it has been read by all
        fetch(stage_index + kStages - 1);
        multiply(stage_index);
    }

    // Through shared memory, where each lane's sums lie along tokens, so that rows of y are written along features.
    // Rows are 4 longer than need be: eight features x four token pairs, 32 banks.
    const int sums_row = rows + 4;
    __syncthreads();
    float *sums_of_warps = reinterpret_cast<float *>(shared); // [warps_k][TOKENS][sums_row]
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int j = 0; j < TOKEN_TILES; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int token = j * 8 + lane % 4 * 2 + e % 2;
                const int feature = (warp_n * TILES + i) * 16 + lane / 4 + e / 2 * 8;
                sums_of_warps[(warp_k * TOKENS + token) * sums_row + feature] = sums[i][j][e];
            }
    __syncthreads();
    const int log_fours = (TOKENS <= 16 ? 5 : 6) - p.log_warps_k; // rows / 4
    for (int i = threadIdx.x; i < tokens << log_fours; i += S::threads) {
        const int token = i >> log_fours, feature = (i & ((1 << log_fours) - 1)) * 4;
        float total[4] = {};
        for (int part = 0; part < warps_k; ++part) {
            const float4 v =
                *reinterpret_cast<const float4 *>(sums_of_warps + (part * TOKENS + token) * sums_row + feature);
            total[0] += v.x, total[1] += v.y, total[2] += v.z, total[3] += v.w;
        }
        const int64_t row = m0 + token;
        if (p.parts == nullptr)
            store_four(p.y + row * p.n, p.bias, total, n0 + feature, p.n, p.activation, p.y_aligned);
        else if (n0 + feature < p.n)
            store_part(p.parts, blockIdx.y, p.m, p.n, row, n0 + feature, total);
    }
}

// Which block for which problem. rows == 0: the arguments are out of range.
struct Plan {
    int rows = 0, split = 1, log_warps_k = 0;
};

template <int TOKENS> Plan plan_for(int m, int n, int k, int tile, int split) {
    using S = Shape<TOKENS>;
    constexpr int least = 16 * S::row_tiles, most = least * S::warps;
    const int chunks = max(1, ceil_div(k, 256));
    Plan plan;
    int multiprocessors = 1;
    if ((tile == 0 || split == 0) && count_multiprocessors(&multiprocessors) != cudaSuccess)
        return plan;
    // Defaults, not yet measured: rows for at most 0.44 bytes of x from L2 a byte of w, more while two blocks an SM are
    // left. Then k is split, while every warp keeps a chunk: until three quarters of the SMs have a block, or more, up
    // to all, for fewer rounds a block; into no more parts than so few rounds take; and not at all where it would save
    // no more than the second launch costs, about four stages (0.4 us each where an SM gets its share of 4.8 TB/s).
    auto row_blocks = [&](int rows) { return static_cast<int64_t>(ceil_div(n, rows)) * ceil_div(m, TOKENS); };
    int rows = tile;
    if (tile == 0) {
        for (rows = least; rows < most && rows < 4 * min(m, TOKENS);)
            rows *= 2;
        while (rows < most && row_blocks(rows * 2) >= 2 * multiprocessors)
            rows *= 2;
    }
    if (rows < least || rows > most || (rows & (rows - 1)) != 0)
        return plan;
    const int warps_k = most / rows;
    if (split == 0) {
        const int64_t blocks = row_blocks(rows), most_split = max(1, chunks / warps_k);
        const int64_t wanted = (3 * multiprocessors + 4 * blocks - 1) / (4 * blocks);
        auto rounds = [&](int64_t parts) { return ceil_div(ceil_div(chunks, static_cast<int>(parts)), warps_k); };
        int64_t best = min(wanted, most_split);
        for (int64_t parts = best + 1; parts <= min(multiprocessors / blocks, most_split); ++parts)
            if (rounds(parts) < rounds(best))
                best = parts;
        while (best > 1 && rounds(best - 1) == rounds(best))
            --best;
        if ((rounds(1) - rounds(best)) * S::steps <= 4)
            best = 1;
        split = static_cast<int>(best);
    }
    plan.rows = rows, plan.split = min(split, min(chunks, 65535));
    while (1 << plan.log_warps_k < warps_k)
        ++plan.log_warps_k;
    return plan;
}

constexpr int kLimit = INT_MAX - 4096; // tiles may reach past an end without overflow

// run(constant TOKENS, plan); `otherwise` where the arguments are out of range or there is nothing to do.
template <typename R, typename F> R with_plan(int m, int n, int k, int tile, int split, R refused, R nothing, F run) {
    if (m < 0 || n < 0 || k < 0 || m > kLimit || n > kLimit || k > kLimit || tile < 0 || split < 0)
        return refused;
    if (m == 0 || n == 0)
        return nothing;
    auto with = [&](auto tokens) {
        const Plan plan = plan_for<decltype(tokens)::value>(m, n, k, tile, split);
        return plan.rows == 0 ? refused : run(tokens, plan);
    };
    return m <= 8    ? with(std::integral_constant<int, 8>())
           : m <= 16 ? with(std::integral_constant<int, 16>())
           : m <= 32 ? with(std::integral_constant<int, 32>())
                     : with(std::integral_constant<int, 64>());
}

template <typename T, int TOKENS> cudaError_t launch_plan(Decode<T> p, Plan plan, cudaStream_t stream) {
    using S = Shape<TOKENS>;
    p.log_warps_k = plan.log_warps_k;
    p.x_rows = min(p.m, TOKENS);
    p.stage_bytes = S::values_bytes + (p.x_rows * S::x_row << plan.log_warps_k);
    if (plan.split == 1)
        p.parts = nullptr;
    const int sums_bytes = (TOKENS * (plan.rows + 4) * 4) << plan.log_warps_k;
    const int64_t blocks = static_cast<int64_t>(ceil_div(p.n, plan.rows)) * ceil_div(p.m, TOKENS);
    if (blocks > INT_MAX || (plan.split > 1 && !is_multiple(p.parts, 0, 16)) || (plan.split > 1 && p.parts == nullptr))
        return cudaErrorInvalidValue;
    const cudaError_t error =
        launch_kernel(linear24_decode_sm80<T, TOKENS>, dim3(static_cast<unsigned>(blocks), plan.split), S::threads,
                      SharedMemory(max(kStages * p.stage_bytes, sums_bytes), S::most_bytes), stream, p);
    if (error != cudaSuccess || plan.split == 1)
        return error;
    return launch_sum(p, plan.split, stream);
}

} // namespace

int64_t linear24_decode_workspace(int m, int n, int k, int tile, int split) {
    return with_plan<int64_t>(m, n, k, tile, split, -1, 0,
                              [&](auto, Plan plan) { return parts_bytes(m, n, plan.split); });
}

cudaError_t launch_linear24_decode_sm80(const void *x, const void *values, const void *meta, const void *bias, void *y,
                                        void *workspace, int m, int n, int k, int64_t ldx, int dtype, int activation,
                                        int tile, int split, cudaStream_t stream) {
    if (ldx < k || activation < kNone || activation > kSilu || (dtype != kFloat16 && dtype != kBFloat16) ||
        !is_multiple(values, 0, 16) || !is_multiple(meta, 0, 16))
        return cudaErrorInvalidValue;
    auto run = [&](auto zero) {
        using T = decltype(zero);
        Decode<T> p = {};
        p.x = static_cast<const T *>(x), p.values = static_cast<const char *>(values);
        p.meta = static_cast<const char *>(meta), p.bias = static_cast<const T *>(bias), p.y = static_cast<T *>(y);
        p.parts = static_cast<float *>(workspace);
        p.m = m, p.n = n, p.k = k, p.ldx = ldx, p.activation = activation;
        p.x_aligned = is_multiple(x, ldx * 2, 16);
        p.y_aligned = is_multiple(y, int64_t(n) * 2, 8);
        return with_plan(m, n, k, tile, split, cudaErrorInvalidValue, cudaSuccess, [&](auto tokens, Plan plan) {
            return launch_plan<T, decltype(tokens)::value>(p, plan, stream);
        });
    };
    return dtype == kFloat16 ? run(__half()) : run(__nv_bfloat16());
}

} // namespace sparsekit
