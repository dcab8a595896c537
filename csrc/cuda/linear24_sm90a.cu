// y[m, n] = act(sum_k x[m, k] * w[n, k] + bias[n]) for w stored 2:4 in fragment order; fp16 or bf16, sums in fp32.
// Hopper's wgmma.sp, whose sparse operand is its first: a block computes a piece of y transposed, w is A (features
// down), x is B (tokens across).
//
// Two or four blocks of TILE_N features x TILE_M tokens form a cluster along the features. In each, one thread of the
// last warpgroup loads x, its share of a token tile, by TMA into all (64 columns a stage, 128-byte swizzle, a ring of
// stages with a full and an empty mbarrier each); the other warpgroups multiply, 64 features x TILE_M tokens, or two
// such pieces, each. Four halve what L2 gives of x once more, but need four free multiprocessors of one GPC, whose
// number there (16 or 18) may leave two idle. Blocks are persistent: while the consumers write a tile out, the producer
// fills the ring for the next, and where registers suffice the first of w for the next are on their way too. Where
// tiles are too few for the multiprocessors, other clusters take other parts of k (split.cuh); the order of every sum
// is fixed, so the same inputs give the same bits.
//   Register form: w's fragments and metadata go straight from global memory to registers, into a ring of four steps of
//     64 columns. Warp w of a warpgroup takes row tile 4 t + w.
//   Shared form: w's values come by TMA beside x (canonical order, 64-byte swizzle), metadata as above. It is there to
//     be measured against the register form.
//   TILE_N x TILE_M   warpgroups x pieces   registers   stages (register, shared form)   shared memory
//   256 x 128         2 x 2                 232         12, 6                            209, 209 KiB
//   128 x 256         2 x 1                 232          6, 5                            209, 217 KiB
//   192 x 192         3 x 1                 160          8, -                            218 KiB
//   192 x 256         3 x 1                 160          -, 4                            202 KiB
//   128 x 128         2 x 1                 232         12, -                            209 KiB
//   128 x  64         2 x 1                 232         12, -                            113 KiB
// 192 x 256 has no register form, because ptxas (nvcc 13.0) makes none: with 128 sums a wgmma whose w is in registers
// stays asynchronous from some 176 registers a thread on, and then with two steps of w in hand, not four. Three
// warpgroups that multiply and one that loads have 160 and 32 of the 65536. At 160 every wgmma is drained (C7512), even
// with a step of w in hand (8 registers), no metadata loaded, no predicates and the sums stored as they lie. At 168,
// what three have without a fourth to load, it is drained unless metadata and predicates are left out, which they
// cannot be. A fourth warpgroup of a single warp counts as a whole one.
//
// A step keeps one wgmma group in flight: wait for x, fence, multiply, commit, wait for the group before, release its
// stage, refill its registers. In any other order, or with a branch between the loads and the next wait, ptxas drains
// every wgmma (C7513); tests/test_cuda_hopper_sass.py reads the machine code.
//
// Floors. Operations: 128 clocks an m64n256k32, so 2 m n k over twice the dense rate. Bytes: 9/8 n k (w) + 2 m k (x) +
// 2 m n (y) over copy bandwidth. At the first floor, reading x takes the whole of shared memory's 128 bytes a clock; if
// writing x (and in the shared form reading and writing w) comes on top, and L2 gives 34.6 bytes a clock, the share of
// the sparse peak is at most
//   register form   256 x 128: 80 %, L2 67 %   128 x 256: 67 %, L2 69 %   192 x 192: 75 %, L2 76 %
//     four blocks   256 x 128: 80 %, L2 79 %   128 x 256: 67 %, L2 100 %
//   shared form     256 x 128: 55 %, L2 67 %   128 x 256: 56 %, L2 69 %   192 x 256: 60 %, L2 88 %
// Parts of k, for m = 65 .. 256 and narrow w. A block has three steps of w in flight, 27 KiB, so at 0.8 us from memory
// it reads 34 bytes/ns: 4.2 ns a column for 128 features. At n = 1024, k = 4096, m = 128 that is 17 us on 8 of 132 SMs,
// where the bytes' floor is 1.2 us; 8 parts take 2.2 us, and their sums, 8 m n bytes a part written and read in L2 at
// some 5 TB/s, 1.7 us. A part more than s saves 4.2 k / (s (s + 1)) ns and costs m n / 625: worth it while
// m n s (s + 1) < 2600 k.
// These are predictions. Not yet run on hardware; tests/test_cuda_hopper.py runs this source on the CPU.
#include "../launch.h"
#include "epilogue.cuh"
#include "ptx.cuh"
#include "split.cuh"
#include "tiles.cuh"
#include "wgmma.cuh"
#include <atomic>
#include <climits>

namespace sparsekit {
namespace {

constexpr int kSliceK = 64; // columns a step: a 128-byte row of x, one metadata word a lane
constexpr int kRasterM = 8; // token tiles that share a pass over w, for L2
constexpr int kMostParts = 64;
constexpr int kLeastChunks = 2;   // of 256 columns a part, where the kernel chooses how many
constexpr int kPartsWorth = 2600; // see the head
// Three warpgroups leave a thread no registers to know of parts.
__host__ __device__ constexpr bool splits(int features) { return features != 192; }
constexpr int kChunkM = 32; // tokens that a warpgroup passes through shared memory at a time on the way out

template <typename T> struct Linear24 {
    CUtensorMap x_map;      // x [m, k] in boxes of TILE_M / 2 tokens x 64 columns
    CUtensorMap values_map; // shared form: values [n, kp / 2] in boxes of TILE_N features x 32 kept
    const uint4 *values;    // register form: [row tile][k64 block][2][32 lanes], see format.py
    const uint2 *meta;      // [row tile][k256 block][32 lanes][4], a word a k64 block
    const T *bias;          // [n] or null
    T *y;                   // [m, n]
    float *parts;           // [split][m][n rounded up to 4], or null where nothing is split
    int m, n, k, split;
    int activation;
    bool y_aligned; // every row starts at a multiple of 8 bytes and n is a multiple of 4
};

template <int TILE_N, int TILE_M, int CLUSTER, bool REGISTER_FORM> struct Tile {
    static constexpr int groups = TILE_N == 192 ? 3 : 2; // consumer warpgroups
    static constexpr int mmas = TILE_N / 64 / groups;    // pieces of 64 features a warpgroup
    static constexpr int threads = (groups + 1) * 128;   // the last warpgroup loads
    // Tokens a wgmma. Half of 192 x 256: ptxas gives no instruction 128 sums where a block starts with 128 registers a
    // thread (C7602).
    static constexpr int tokens = groups == 3 && TILE_M == 256 ? 128 : TILE_M, halves = TILE_M / tokens;
    static constexpr int ring = 4; // k64 steps of fragments in registers, register form
    static constexpr bool early =
        REGISTER_FORM && mmas == 1 && groups == 2;       // registers for the next tile's first loads
    static constexpr int rows = halves == 2 ? 1 : 4;     // tokens a thread has in hand on the way out
    static constexpr int x_bytes = TILE_M * kSliceK * 2; // a stage of x
    static constexpr int values_bytes = REGISTER_FORM ? 0 : TILE_N * kSliceK; // and of values
    static constexpr int stage_bytes = x_bytes + values_bytes;
    // On the way out: fp32 [kChunkM][sums_row] a warpgroup. 4 more than 64: eight features x four token pairs, 32
    // banks.
    static constexpr int sums_row = 64 + 4;
    static constexpr int sums_bytes = groups * kChunkM * sums_row * 4;
    static constexpr int stages =
        (226 * 1024 - sums_bytes) / stage_bytes < 12 ? (226 * 1024 - sums_bytes) / stage_bytes : 12;
    static constexpr int sums_offset = stages * stage_bytes, barriers_offset = sums_offset + sums_bytes;
    static constexpr int shared_bytes = barriers_offset + 2 * stages * 8;
    // Registers a thread: what the block was given, and what its consumers and its producer have of it.
    static constexpr int given = 65536 / threads / 8 * 8;
    static constexpr int consumer_registers = groups == 3 ? 160 : 232, producer_registers = groups == 3 ? 32 : 40;
    static_assert(groups * consumer_registers + producer_registers <= (groups + 1) * given, "the pool has no more");
    static_assert(mmas * groups * 64 == TILE_N && x_bytes / CLUSTER % 1024 == 0 && stage_bytes % 1024 == 0,
                  "a piece of a stage breaks the swizzle's period");
    static_assert(shared_bytes <= 227 * 1024, "a block has 227 KiB of shared memory");
};

__device__ __forceinline__ void copy(uint32_t (&to)[4], uint4 from) {
    to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// A K-major tile in shared memory, swizzled by its row length (1: 128 bytes, 2: 64), eight rows in eight_rows bytes. A
// block's shared addresses hold its rank in the cluster from bit 24 on, which would fall into the leading offset.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, int swizzle, int eight_rows) {
    return (address & 0x3FFFF) >> 4 | 1u << 16 | static_cast<uint64_t>(eight_rows >> 4) << 32 |
           static_cast<uint64_t>(swizzle) << 62;
}

// The stage of step 0, 1, 2 .. and the parity of its phase.
template <int STAGES> struct Position {
    int stage = 0, parity = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == STAGES)
            stage = 0, parity ^= 1;
    }
};

// A cluster's tiles are units blockIdx.x / CLUSTER, then + gridDim.x / CLUSTER, to the end: the first part of k of all
// tiles, then the next. They walk the token tiles of a raster group first: neighbours read the same rows of w.
template <int TILE_N, int TILE_M, int CLUSTER, typename T> __device__ __forceinline__ int units(const Linear24<T> &p) {
    return ceil_div(p.n, CLUSTER * TILE_N) * ceil_div(p.m, TILE_M) * p.split;
}

struct Place {
    int m0, n0;            // the block's first token and feature
    int part, first, last; // of k: which part, and its blocks of 256 columns
};
template <int TILE_N, int TILE_M, int CLUSTER, typename T>
__device__ __forceinline__ Place place(const Linear24<T> &p, int unit, int rank) {
    const int across = ceil_div(p.n, CLUSTER * TILE_N), tiles_m = ceil_div(p.m, TILE_M), blocks = ceil_div(p.k, 256);
    int part = 0, tile = unit;
    if constexpr (splits(TILE_N))
        part = unit / (across * tiles_m), tile = unit % (across * tiles_m);
    const int group = tile / (kRasterM * across), in_group = tile % (kRasterM * across);
    const int group_m = min(kRasterM, tiles_m - group * kRasterM);
    return {(group * kRasterM + in_group % group_m) * TILE_M, (in_group / group_m * CLUSTER + rank) * TILE_N, part,
            splits(TILE_N) ? blocks * part / p.split : 0, splits(TILE_N) ? blocks * (part + 1) / p.split : blocks};
}

template <typename T, int TILE_N, int TILE_M, int CLUSTER, bool REGISTER_FORM>
__global__ void __launch_bounds__((Tile<TILE_N, TILE_M, CLUSTER, REGISTER_FORM>::threads), 1)
    linear24_sm90a(const __grid_constant__ Linear24<T> p) {
    using S = Tile<TILE_N, TILE_M, CLUSTER, REGISTER_FORM>;
    char *shared = ptx::dynamic_shared_memory();
    uint64_t *full = reinterpret_cast<uint64_t *>(shared + S::barriers_offset), *empty = full + S::stages;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int rank = ptx::cluster_rank();
    const int blocks_k = ceil_div(p.k, kSliceK), blocks_k256 = ceil_div(blocks_k, 4);

    if (threadIdx.x == 0) {
        for (int i = 0; i < S::stages; ++i) {
            ptx::mbarrier_init(full + i, 1);
            ptx::mbarrier_init(empty + i, CLUSTER * S::groups * 4); // a lane a consumer warp of the cluster
        }
        ptx::fence_mbarrier_init();
    }
    ptx::cluster_arrive_relaxed();
    if (threadIdx.x == S::groups * 128 && p.k > 0) { // the thread that loads
        ptx::prefetch_tensor_map(&p.x_map);
        if constexpr (!REGISTER_FORM)
            ptx::prefetch_tensor_map(&p.values_map);
    }
    ptx::cluster_wait();

    const int stride = gridDim.x / CLUSTER;
    int unit = blockIdx.x / CLUSTER;
    Position<S::stages> at;
    if (warp >= S::groups * 4) {
        ptx::release_registers<S::producer_registers>();
        if (warp == S::groups * 4 && lane == 0)
            for (; unit < units<TILE_N, TILE_M, CLUSTER>(p); unit += stride) {
                const Place tile = place<TILE_N, TILE_M, CLUSTER>(p, unit, rank);
#pragma unroll 1
                for (int step = tile.first * 4; step < tile.last * 4; ++step, at.advance()) {
                    char *stage = shared + at.stage * S::stage_bytes;
                    ptx::mbarrier_wait(empty + at.stage, at.parity ^ 1);
                    ptx::mbarrier_arrive_expect(full + at.stage, S::stage_bytes);
                    ptx::tma_load_multicast(stage + rank * (S::x_bytes / CLUSTER), &p.x_map, step * kSliceK,
                                            tile.m0 + rank * (TILE_M / CLUSTER), full + at.stage, (1 << CLUSTER) - 1);
                    if constexpr (!REGISTER_FORM)
                        ptx::tma_load(stage + S::x_bytes, &p.values_map, step * (kSliceK / 2), tile.n0,
                                      full + at.stage);
                }
            }
    } else {
        ptx::take_registers<S::consumer_registers>();
        const int group = warp / 4;
        const uint32_t release = ptx::map_to_rank(empty, lane % CLUSTER);
        const int row_tiles = ceil_div(p.n, 16);
        float *staging = reinterpret_cast<float *>(shared + S::sums_offset) + group * kChunkM * S::sums_row;

        uint32_t a[S::ring][S::mmas][2][4], metadata[S::mmas][4];
        const uint4 *values[S::mmas];
        const uint2 *meta[S::mmas];
        int left; // k64 blocks from here to the end of the part
        auto load_values = [&](uint32_t (&slot)[S::mmas][2][4], int ahead) {
#pragma unroll
            for (int i = 0; i < S::mmas; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    uint4 v = {0, 0, 0, 0};
                    if (ahead < left)
                        v = ptx::ld_global_once(values[i] + ahead * 64 + half * 32);
                    copy(slot[i][half], v);
                }
        };
        // Half a k256 block's words at a time: those of the steps that are done make room for the next block's.
        auto load_metadata = [&](int half, int ahead) {
#pragma unroll
            for (int i = 0; i < S::mmas; ++i) {
                uint2 v = {0, 0};
                if (ahead * 4 < left)
                    v = ptx::ld_global(meta[i] + ahead * 64 + half);
                metadata[i][half * 2] = v.x, metadata[i][half * 2 + 1] = v.y;
            }
        };
        auto start = [&](int unit) { // the first loads of a tile
            const Place tile = place<TILE_N, TILE_M, CLUSTER>(p, unit, rank);
            const int row_tile = tile.n0 / 16 + group * S::mmas * 4 + warp % 4;
#pragma unroll
            for (int i = 0; i < S::mmas; ++i) {
                const int64_t row = min(row_tile + i * 4, row_tiles - 1);
                values[i] = p.values + (row * blocks_k + tile.first * 4) * 64 + lane;
                meta[i] = p.meta + (row * blocks_k256 + tile.first) * 64 + lane * 2;
            }
            left = min(blocks_k, tile.last * 4) - tile.first * 4;
            load_metadata(0, 0);
            if constexpr (REGISTER_FORM)
#pragma unroll
                for (int slot = 0; slot < S::ring - 1; ++slot)
                    load_values(a[slot], slot);
        };

        if (S::early && unit < units<TILE_N, TILE_M, CLUSTER>(p))
            start(unit);
        for (; unit < units<TILE_N, TILE_M, CLUSTER>(p); unit += stride) {
            if (!S::early)
                start(unit);
            float sums[S::mmas][S::halves][S::tokens / 2];
#pragma unroll
            for (int i = 0; i < S::mmas; ++i)
#pragma unroll
                for (int e = 0; e < TILE_M / 2; ++e)
                    sums[i][e / (S::tokens / 2)][e % (S::tokens / 2)] = 0.0f;
            int former = 0;
            int rounds = blocks_k256;
            if constexpr (splits(TILE_N)) {
                const Place tile = place<TILE_N, TILE_M, CLUSTER>(p, unit, rank);
                rounds = tile.last - tile.first;
            }
#pragma unroll 1
            for (int block = 0; block < rounds; ++block) {
#pragma unroll
                for (int step = 0; step < 4; ++step) {
                    const uint32_t stage = ptx::shared_address(shared) + at.stage * S::stage_bytes;
                    ptx::mbarrier_wait(full + at.stage, at.parity);
                    ptx::wgmma_fence();
#pragma unroll
                    for (int j = 0; j < S::mmas * S::halves; ++j) {
                        const int i = j / S::halves, half = j % S::halves;
                        const uint64_t x = matrix_descriptor(stage + half * S::tokens * kSliceK * 2, 1, 1024);
                        if constexpr (REGISTER_FORM) {
                            ptx::wgmma_sp<T, 0>(sums[i][half], a[step % S::ring][i][0], x, metadata[i][step]);
                            ptx::wgmma_sp<T, 1>(sums[i][half], a[step % S::ring][i][1], x + 4, metadata[i][step]);
                        } else {
                            const uint64_t w =
                                matrix_descriptor(stage + S::x_bytes + (group * S::mmas + i) * 64 * kSliceK, 2, 512);
                            ptx::wgmma_sp<T, 0>(sums[i][half], w, x, metadata[i][step]);
                            ptx::wgmma_sp<T, 1>(sums[i][half], w + 2, x + 4, metadata[i][step]);
                        }
                    }
                    ptx::wgmma_commit();
                    ptx::wgmma_wait<1>();
                    // The step before is done: its stage and its registers are free.
                    if ((step > 0 || block > 0) && lane < CLUSTER)
                        ptx::mbarrier_arrive_cluster(release + former * 8);
                    if constexpr (REGISTER_FORM)
                        load_values(a[(step + S::ring - 1) % S::ring], step - 1 + S::ring);
                    if (step == 2)
                        load_metadata(0, 1);
                    if (step == 0)
                        load_metadata(1, 0);
                    former = at.stage;
                    at.advance();
                }
#pragma unroll
                for (int i = 0; i < S::mmas; ++i)
                    values[i] += 4 * 64, meta[i] += 64;
                left -= 4;
            }
            ptx::wgmma_wait<0>();
            if (rounds > 0 && lane < CLUSTER)
                ptx::mbarrier_arrive_cluster(release + former * 8);
            if (S::early && unit + stride < units<TILE_N, TILE_M, CLUSTER>(p))
                start(unit + stride); // while this tile is written out

            // Through shared memory, where each lane's sums lie along tokens, so that rows of y are written along
            // features.
            const Place tile = place<TILE_N, TILE_M, CLUSTER>(p, unit, rank);
            constexpr int chunks = TILE_M / kChunkM, chunks_half = chunks / S::halves;
#pragma unroll 1
            for (int piece = 0; piece < S::mmas * chunks; ++piece) {
                ptx::named_barrier(1 + group, 128); // the piece before has been read
#pragma unroll
                for (int i = 0; i < S::mmas * chunks; ++i) // so that the sums keep their registers
                    if (i == piece)
#pragma unroll
                        for (int e = 0; e < kChunkM / 2; ++e) {
                            const int token = e / 4 * 8 + lane % 4 * 2 + e % 2;
                            const int feature = warp % 4 * 16 + lane / 4 + e / 2 % 2 * 8;
                            staging[token * S::sums_row + feature] =
                                sums[i / chunks][i % chunks / chunks_half][i % chunks_half * (kChunkM / 2) + e];
                        }
                ptx::named_barrier(1 + group, 128);
#pragma unroll 1
                for (int i = threadIdx.x % 128; i < kChunkM * 16; i += S::rows * 128) {
                    const int token = tile.m0 + piece % chunks * kChunkM + i / 16, feature = i % 16 * 4;
                    const int column = tile.n0 + (group * S::mmas + piece / chunks) * 64 + feature;
                    if (token >= p.m)
                        break;
                    float total[S::rows][4];
#pragma unroll
                    for (int r = 0; r < S::rows; ++r)
                        memcpy(total[r], staging + (i / 16 + r * 8) * S::sums_row + feature, sizeof total[r]);
                    if (splits(TILE_N) && p.parts != nullptr) {
#pragma unroll
                        for (int r = 0; r < S::rows; ++r)
                            if (token + r * 8 < p.m && column < p.n)
                                store_part(p.parts, tile.part, p.m, p.n, token + r * 8, column, total[r]);
                        continue;
                    }
                    T *y = p.y + static_cast<int64_t>(token) * p.n;
                    if constexpr (S::rows == 1) {
                        store_four(y, p.bias, total[0], column, p.n, p.activation, p.y_aligned);
                    } else {
                        float bias[4];
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            bias[e] = bias_at(p.bias, column + e, p.n);
                        auto bias_of = [&](int e) { return bias[e]; };
                        with_activation(p.activation, [&](auto activation) {
#pragma unroll
                            for (int r = 0; r < S::rows; ++r)
                                if (token + r * 8 < p.m)
                                    store_four_with(y + static_cast<int64_t>(r * 8) * p.n, bias_of, total[r], column,
                                                    p.n, activation, p.y_aligned);
                        });
                    }
                }
            }
        }
    }
    // No block leaves while another may still write to its shared memory.
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

// A row-major matrix of 16-bit elements, to be read in boxes whose rows are 64 or 128 bytes, the swizzle's width.
cudaError_t make_map(CUtensorMap *map, CUtensorMapDataType type, const void *data, int rows, int columns,
                     int64_t row_bytes, int box_rows, int box_columns) {
    // What TMA takes is asked here, so that a driver which refuses a map for another reason is an error, and no cause
    // to run another kernel in this one's place.
    if (!is_multiple(data, row_bytes, 16) || row_bytes >= int64_t{1} << 40)
        return cudaErrorNotSupported;
    // The driver is asked for its function at the first use, so that the module loads without one.
    static const auto encode = [] {
        void *function = nullptr;
        cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
        cudaGetLastError(); // reported here, so not to be found by the next launch
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
    }();
    if (encode == nullptr)
        return cudaErrorSymbolNotFound;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(row_bytes)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)},
                     steps[] = {1, 1};
    const CUresult result =
        encode(map, type, 2, const_cast<void *>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

struct Source {
    const void *x, *values;
    int64_t ldx;
};

// Clusters of this kernel that the current device holds at once; asked once, as it takes some microseconds.
template <typename S, typename Kernel> cudaError_t held_clusters(Kernel *kernel, int cluster, int *count) {
    static std::atomic<int> known[64]; // by device
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess && device < 64)
        *count = known[device];
    if (error != cudaSuccess || (device < 64 && *count > 0))
        return error;
    error = count_clusters(kernel, cluster, S::threads, S::shared_bytes, count);
    *count = max(*count, 1); // where none fits, the launch says so
    if (error == cudaSuccess && device < 64)
        known[device] = *count;
    return error;
}

template <typename T, int TILE_N, int TILE_M, int CLUSTER, bool REGISTER_FORM>
cudaError_t launch_tile(Linear24<T> &p, const Source &from, cudaStream_t stream) {
    using S = Tile<TILE_N, TILE_M, CLUSTER, REGISTER_FORM>;
    const auto kernel = linear24_sm90a<T, TILE_N, TILE_M, CLUSTER, REGISTER_FORM>;
    constexpr auto type =
        std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const int64_t units = static_cast<int64_t>(ceil_div(p.n, CLUSTER * TILE_N)) * ceil_div(p.m, TILE_M) * p.split;
    if (units > INT_MAX / 2)
        return cudaErrorInvalidValue;
    cudaError_t error = cudaSuccess;
    if (p.k > 0)
        error = make_map(&p.x_map, type, from.x, p.m, p.k, from.ldx * 2, TILE_M / CLUSTER, kSliceK);
    if (error == cudaSuccess && p.k > 0 && !REGISTER_FORM) {
        const int kept = ceil_div(p.k, 8) * 4;
        error = make_map(&p.values_map, type, from.values, p.n, kept, int64_t(kept) * 2, TILE_N, kSliceK / 2);
    }
    if (error != cudaSuccess)
        return error;
    int held;
    error = held_clusters<S>(kernel, CLUSTER, &held);
    if (error != cudaSuccess)
        return error;
    const int64_t clusters = min(units, int64_t(held));
    error = launch_clusters(kernel, dim3(static_cast<unsigned>(clusters * CLUSTER)), CLUSTER, S::threads,
                            S::shared_bytes, stream, p);
    return error != cudaSuccess || p.split == 1 ? error : launch_sum(p, p.split, stream);
}

// Tile 1, 2, .. of the launcher.
template <typename T> struct Choice {
    int features, tokens, cluster;
    cudaError_t (*launch)(Linear24<T> &, const Source &, cudaStream_t);
};
template <typename T, int TILE_N, int TILE_M, int CLUSTER, bool REGISTER_FORM>
constexpr Choice<T> kChoice = {TILE_N, TILE_M, CLUSTER, launch_tile<T, TILE_N, TILE_M, CLUSTER, REGISTER_FORM>};
template <typename T>
constexpr Choice<T> kTiles[] = {kChoice<T, 128, 64, 2, true>,   kChoice<T, 128, 128, 2, true>,
                                kChoice<T, 256, 128, 2, true>,  kChoice<T, 128, 256, 2, true>,
                                kChoice<T, 192, 192, 2, true>,  kChoice<T, 256, 128, 4, true>,
                                kChoice<T, 128, 256, 4, true>,  kChoice<T, 256, 128, 2, false>,
                                kChoice<T, 128, 256, 2, false>, kChoice<T, 192, 256, 2, false>};
constexpr int kLastTile = sizeof kTiles<__half> / sizeof(Choice<__half>);

bool in_range(int m, int n, int k, int tile, int split) {
    constexpr int limit = INT_MAX - 1024; // tiles may reach past an end without overflow
    return m >= 0 && n >= 0 && k >= 0 && m <= limit && n <= limit && k <= limit && tile >= 0 && tile <= kLastTile &&
           split >= 0;
}

} // namespace

Linear24Plan linear24_sm90a_plan(int m, int n, int k, int tile, int split, int multiprocessors) {
    const auto blocks = [&](int tile) {
        const auto &size = kTiles<__half>[tile - 1];
        return int64_t(ceil_div(n, size.cluster * size.features)) * size.cluster * ceil_div(m, size.tokens);
    };
    const int chunks = max(1, ceil_div(k, 256)), most = multiprocessors, nearly = most - most / 8;
    if (tile == 0)
        tile = m <= 64 ? 1 : blocks(3) >= nearly ? 3 : blocks(2) >= nearly || chunks >= 2 * kLeastChunks ? 2 : 1;
    if (!splits(kTiles<__half>[tile - 1].features))
        split = 1;
    if (split == 0)
        for (split = 1; blocks(tile) * (split + 1) <= most && chunks >= (split + 1) * kLeastChunks &&
                        int64_t(m) * n * split * (split + 1) < int64_t(kPartsWorth) * k;)
            ++split;
    return {tile, min(split, min(chunks, kMostParts))};
}

int64_t linear24_sm90a_workspace(int m, int n, int k, int tile, int split) {
    int multiprocessors;
    if (!in_range(m, n, k, tile, split) || count_multiprocessors(&multiprocessors) != cudaSuccess)
        return -1;
    return m == 0 || n == 0 ? 0 : parts_bytes(m, n, linear24_sm90a_plan(m, n, k, tile, split, multiprocessors).split);
}

cudaError_t launch_linear24_sm90a(const void *x, const void *values, const void *meta, const void *bias, void *y,
                                  void *workspace, int m, int n, int k, int64_t ldx, int dtype, int activation,
                                  int tile, int split, cudaStream_t stream) {
    if (!in_range(m, n, k, tile, split) || ldx < k || ldx > INT64_MAX / 2 || activation < kNone || activation > kSilu ||
        (dtype != kFloat16 && dtype != kBFloat16))
        return cudaErrorInvalidValue;
    if (m == 0 || n == 0)
        return cudaSuccess;
    if (!is_multiple(values, 0, 16) || !is_multiple(meta, 0, 16))
        return cudaErrorNotSupported;
    int multiprocessors;
    if (const cudaError_t error = count_multiprocessors(&multiprocessors); error != cudaSuccess)
        return error;
    const Linear24Plan plan = linear24_sm90a_plan(m, n, k, tile, split, multiprocessors);
    if (plan.split > 1 && (workspace == nullptr || !is_multiple(workspace, 0, 16)))
        return cudaErrorInvalidValue;
    auto run = [&](auto zero) {
        using T = decltype(zero);
        Linear24<T> p = {};
        p.values = static_cast<const uint4 *>(values), p.meta = static_cast<const uint2 *>(meta);
        p.bias = static_cast<const T *>(bias), p.y = static_cast<T *>(y);
        p.parts = plan.split > 1 ? static_cast<float *>(workspace) : nullptr;
        p.m = m, p.n = n, p.k = k, p.split = plan.split, p.activation = activation;
        p.y_aligned = is_multiple(y, int64_t(n) * 2, 8);
        return kTiles<T>[plan.tile - 1].launch(p, {x, values, ldx}, stream);
    };
    return dtype == kFloat16 ? run(__half()) : run(__nv_bfloat16());
}

} // namespace sparsekit
