// The functions of csrc/cuda/wgmma.cuh on the emulated machine, written from the PTX ISA ("Asynchronous warpgroup-level
// matrix instructions", "Matrix descriptor", "Tensor copy", "mbarrier"), and the part of the driver that encodes tensor
// maps. Forced into every translation unit after ptx_host.h; cuda.h beside it stands in for the toolkit's.
//
// What is asynchronous happens as early or as late as it may. A TMA load poisons its target when it is issued and lands
// when the seed says, in each block of a multicast for itself. A warp's part of a wgmma reads its operands at its issue
// or at the wait that ends it; until that wait its sums are poison, and a register that changes fails the launch.
#pragma once
#define SPARSEKIT_CUDA_WGMMA_CUH // csrc/cuda/wgmma.cuh steps aside
#include "ptx_host.h"
#include <array>
#include <set>

#define CUDART_VERSION 13000

// ---- tensor maps

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle {
    CU_TENSOR_MAP_SWIZZLE_NONE = 0,
    CU_TENSOR_MAP_SWIZZLE_32B = 1,
    CU_TENSOR_MAP_SWIZZLE_64B = 2,
    CU_TENSOR_MAP_SWIZZLE_128B = 3
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

struct alignas(64) CUtensorMap { // of two dimensions and 16-bit elements
    const char *data;
    int64_t columns, rows, row_bytes;
    int box_columns, box_rows, swizzle_bytes;
    bool encoded;
};

namespace emulator {
inline bool refuses_maps = false; // the driver, whatever it is asked for
}

inline CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType, cuuint32_t rank, void *data,
                                       const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *steps, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    const int swizzle_bytes = swizzle == CU_TENSOR_MAP_SWIZZLE_NONE ? 0 : 16 << swizzle;
    if (emulator::refuses_maps || rank != 2 || reinterpret_cast<uintptr_t>(map) % 64 != 0 ||
        reinterpret_cast<uintptr_t>(data) % 16 != 0 || strides[0] % 16 != 0 || strides[0] >= 1ull << 40 ||
        steps[0] != 1 || steps[1] != 1 || box[0] * 2 % 16 != 0 ||
        (swizzle_bytes != 0 && box[0] * 2 > static_cast<unsigned>(swizzle_bytes)))
        return CUDA_ERROR_INVALID_VALUE;
    for (int d = 0; d < 2; ++d)
        if (sizes[d] == 0 || sizes[d] > 1ull << 32 || box[d] == 0 || box[d] > 256)
            return CUDA_ERROR_INVALID_VALUE;
    *map = {static_cast<const char *>(data),
            int64_t(sizes[0]),
            int64_t(sizes[1]),
            int64_t(strides[0]),
            int(box[0]),
            int(box[1]),
            swizzle_bytes,
            true};
    return CUDA_SUCCESS;
}

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;

inline cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult *found) {
    const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
    *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    *function = known ? reinterpret_cast<void *>(cuTensorMapEncodeTiled) : nullptr;
    return cudaSuccess;
}

template <typename... P>
cudaError_t cudaOccupancyMaxActiveClusters(int *count, void (*)(P...), const cudaLaunchConfig_t *config) {
    const int cluster = static_cast<int>(config->attrs[0].val.clusterDim.x);
    return *count = emulator::multiprocessors / cluster, cudaSuccess;
}

// ---- what the machine's cluster holds besides threads and memory

namespace emulator {

struct Barrier {
    int arrivals, pending; // of a phase; still missing in this one
    int64_t bytes = 0;     // announced and not yet come, or come and not yet announced
    unsigned phase = 0;
    std::vector<int> waiting;
    int maker = 0;
    bool fenced = false;
};

struct Product { // one warp's 16 rows of a wgmma on its way
    std::array<float *, 32> d;
    std::array<const uint32_t *, 32> a, metadata; // registers; a is null in the shared form
    std::array<std::array<uint32_t, 4>, 32> a_issued;
    std::array<uint32_t, 32> metadata_issued;
    uint64_t a_descriptor, b_descriptor;
    int warp, count; // count sums a lane: N / 2
    bool done = false;
    void (*run)(Product &);
};

struct Warp {
    std::vector<Product> open;                  // not yet committed
    std::deque<std::vector<Product>> groups;    // committed, oldest first
    std::map<float *, std::vector<float>> sums; // the true ones of registers that are in flight
    bool fenced = false;
};

struct NamedBarrier {
    int threads = 0;
    std::vector<int> waiting;
};

struct Hopper {
    unsigned run = 0;
    std::map<const char *, Barrier> barriers; // by address in the emulated shared memory
    std::map<int, Warp> warps;
    std::map<std::pair<int, int>, NamedBarrier> named; // by block and number
    std::vector<int> cluster_waiting;
    std::map<int, unsigned> cluster_arrived; // by thread, the phase it arrived in
    int cluster_count = 0;
    unsigned cluster_phase = 0;
};

inline Hopper &hopper() { // of the cluster that runs
    static Hopper state;
    if (state.run != machine.run)
        state = Hopper(), state.run = machine.run;
    return state;
}

inline Barrier &barrier_at(const char *address, const char *what) {
    const auto found = hopper().barriers.find(address);
    if (found == hopper().barriers.end())
        machine.fail("%s at offset %td, where no mbarrier has been initialised", what, address - machine.shared());
    return found->second;
}

// For TMA and other blocks, who see an mbarrier only after its maker's fence.
inline Barrier &fenced_barrier_at(const char *address, const char *what) {
    Barrier &b = barrier_at(address, what);
    if (!b.fenced)
        machine.fail("%s at an mbarrier whose initialisation was not fenced", what);
    return b;
}

inline void end_phase(Barrier &b) {
    if (b.pending > 0 || b.bytes != 0)
        return;
    b.pending = b.arrivals, ++b.phase;
    for (int thread : b.waiting)
        machine.wake(thread);
    b.waiting.clear();
}

inline void arrive(Barrier &b) {
    if (--b.pending < 0)
        machine.fail("an mbarrier got more arrivals in a phase than the %d it was made for", b.arrivals);
    end_phase(b);
}

// A shared address, as the hardware has it in a cluster: the offset in a block's memory, and from bit 24 on its rank.
inline char *at_cluster_address(uint32_t address) {
    const int rank = static_cast<int>(address >> 24);
    if (rank >= machine.cluster())
        machine.fail("0x%X is no address of this cluster", address);
    if (machine.live(rank) == 0)
        machine.fail("an access to the shared memory of block %d of the cluster, which has left", rank);
    return machine.shared(rank) + (address & 0xFFFFFF);
}

// Where 128-, 64- and 32-byte swizzles put a byte: bits 4.. of the address are xored with those three above.
inline uint32_t swizzled(uint32_t offset, int swizzle_bytes) {
    return swizzle_bytes == 0 ? offset : offset ^ (offset >> 3 & (swizzle_bytes - 16));
}

// Element (row, column) of a K-major tile of 16-bit elements that a matrix descriptor names.
inline const char *described(uint64_t descriptor, int row, int column, int rank) {
    const uint32_t start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    const int mode = static_cast<int>(descriptor >> 62), swizzle_bytes = mode == 0 ? 0 : 256 >> mode;
    const int leading = static_cast<int>(descriptor >> 16 & 0x3FFF); // of a swizzled tile "not used, assumed to be 1"
    if (mode == 0 || (descriptor >> 49 & 7) != 0 || leading > 1 || (descriptor & 0x3FF1'C000'C000'C000) != 0)
        machine.fail("a descriptor of a kind that the emulator does not know: %016llX",
                     static_cast<unsigned long long>(descriptor));
    if (start % swizzle_bytes + column * 2 >= static_cast<uint32_t>(swizzle_bytes))
        machine.fail("a descriptor's columns reach past the %d bytes of its swizzle", swizzle_bytes);
    const uint32_t offset = start + row / 8 * stride + row % 8 * swizzle_bytes + column * 2;
    if (offset + 2 > machine.shared_bytes())
        machine.fail("a descriptor reaches offset %u of %zu bytes of shared memory", offset, machine.shared_bytes());
    return machine.shared(rank) + swizzled(offset, swizzle_bytes);
}

} // namespace emulator

namespace sparsekit::ptx {

inline uint32_t shared_address(const void *shared) {
    machine.check_shared(shared, 1, 1, "a shared address");
    return static_cast<uint32_t>(static_cast<const char *>(shared) - machine.shared()) | machine.rank() << 24;
}

// ---- wgmma.sp

inline emulator::Warp &this_warp() { return emulator::hopper().warps[machine.current() / 32]; }

inline void wgmma_fence() {
    machine.collective(32, "wgmma.fence", nullptr, [](void *const *) { this_warp().fenced = true; });
}

inline void wgmma_commit() {
    machine.collective(32, "wgmma.commit_group", nullptr, [](void *const *) {
        emulator::Warp &warp = this_warp();
        warp.groups.push_back(std::move(warp.open));
        warp.open.clear(), warp.fenced = false;
    });
}

inline void check_registers(const emulator::Product &p) {
    for (int lane = 0; lane < 32; ++lane)
        if (*p.metadata[lane] != p.metadata_issued[lane] ||
            (p.a[lane] != nullptr && memcmp(p.a[lane], p.a_issued[lane].data(), 16) != 0))
            machine.fail("an operand register of a wgmma was changed while it was in flight");
}

inline void run_product(emulator::Product &p) {
    if (!p.done)
        p.run(p), p.done = true;
}

// Per warp: another warp of the group may still be reading.
template <int PENDING> void wgmma_wait() {
    machine.collective(32, "wgmma.wait_group", nullptr, [](void *const *) {
        emulator::Warp &warp = this_warp();
        std::set<float *> still;
        while (warp.groups.size() > PENDING) {
            for (emulator::Product &p : warp.groups.front()) {
                run_product(p);
                check_registers(p);
            }
            warp.groups.pop_front();
        }
        for (const auto &group : warp.groups)
            for (const emulator::Product &p : group)
                still.insert(p.d.begin(), p.d.end());
        for (auto it = warp.sums.begin(); it != warp.sums.end();) {
            if (still.count(it->first)) {
                ++it;
                continue;
            }
            for (size_t i = 0; i < it->second.size(); ++i) {
                if (it->first[i] == it->first[i])
                    machine.fail("a sum of a wgmma was written while it was in flight");
                it->first[i] = it->second[i];
            }
            it = warp.sums.erase(it);
        }
    });
}

// Sums of one warp, 16 x N; the fragments of a, d and the metadata are those of mma.sp.m16n8k32, d's repeated along N.
template <typename T, int SELECTOR> void multiply(emulator::Product &p) {
    const int rank = p.warp * 32 / static_cast<int>(blockDim.x), n = p.count * 2;
    float kept[16][16];
    int column[16][16];
    for (int t = 0; t < 32; ++t)
        for (int i = 0; i < 8; ++i) {
            const int row = t / 4 + (i / 2 % 2 == 0 ? 0 : 8), first_column = t % 4 * 4 + (i < 4 ? 0 : 16);
            const uint32_t word = *p.metadata[row % 8 * 4 + 2 * SELECTOR + first_column / 16] >> (row / 8 * 16);
            const uint32_t nibble = word >> (first_column % 16) & 15;
            if ((nibble & 3) >= nibble >> 2) // wgmma has no ::ordered_metadata, but ours is ordered
                machine.fail("wgmma.sp: 0x%X is no valid metadata (row %d, columns %d-%d)", nibble, row, first_column,
                             first_column + 3);
            const int slot = first_column / 2 + i % 2;
            uint16_t bits;
            if (p.a[t] != nullptr)
                bits = static_cast<uint16_t>(p.a[t][i / 2] >> (i % 2 * 16));
            else
                memcpy(&bits, emulator::described(p.a_descriptor, p.warp % 4 * 16 + row, slot, rank), 2);
            const uint32_t pair = bits;
            kept[row][slot] = element<T>(&pair, 0);
            column[row][slot] = first_column + static_cast<int>(i % 2 == 0 ? nibble & 3 : nibble >> 2);
        }
    std::vector<float> b(static_cast<size_t>(32) * n); // [column of a][n]
    for (int j = 0; j < n; ++j)
        for (int c = 0; c < 32; ++c) {
            uint16_t bits;
            memcpy(&bits, emulator::described(p.b_descriptor, j, c, rank), 2);
            const uint32_t pair = bits;
            b[c * n + j] = element<T>(&pair, 0);
        }
    auto &all = emulator::hopper().warps[p.warp].sums;
    std::vector<double> sums(n);
    for (int row = 0; row < 16; ++row) {
        for (int j = 0; j < n; ++j)
            sums[j] = all[p.d[row % 8 * 4 + j % 8 / 2]][j / 8 * 4 + row / 8 * 2 + j % 2];
        for (int slot = 0; slot < 16; ++slot) {
            const double w = kept[row][slot];
            const float *x = &b[column[row][slot] * n];
            for (int j = 0; j < n; ++j)
                sums[j] += w * x[j];
        }
        for (int j = 0; j < n; ++j)
            all[p.d[row % 8 * 4 + j % 8 / 2]][j / 8 * 4 + row / 8 * 2 + j % 2] = static_cast<float>(sums[j]);
    }
}

struct WgmmaOperands {
    float *d;
    const uint32_t *a, *metadata;
    uint64_t a_descriptor, b_descriptor;
};

template <typename T, int SELECTOR, int COUNT> void issue(WgmmaOperands mine) {
    const char *what = SELECTOR == 0 ? "wgmma.sp, selector 0" : "wgmma.sp, selector 1";
    machine.collective(128, what, &mine, [](void *const *lanes) {
        for (int w = 0; w < 4; ++w) {
            emulator::Product p{};
            p.warp = machine.current() / 128 * 4 + w, p.count = COUNT, p.run = multiply<T, SELECTOR>;
            emulator::Warp &warp = emulator::hopper().warps[p.warp];
            if (!warp.fenced)
                machine.fail("wgmma.sp without a wgmma.fence since the last commit");
            for (int t = 0; t < 32; ++t) {
                const WgmmaOperands &o = *static_cast<WgmmaOperands *>(lanes[w * 32 + t]);
                const WgmmaOperands &first = *static_cast<WgmmaOperands *>(lanes[0]);
                if (o.a_descriptor != first.a_descriptor || o.b_descriptor != first.b_descriptor)
                    machine.fail("wgmma.sp: a descriptor differs within the warpgroup");
                p.d[t] = o.d, p.a[t] = o.a, p.metadata[t] = o.metadata, p.metadata_issued[t] = *o.metadata;
                if (o.a != nullptr)
                    memcpy(p.a_issued[t].data(), o.a, 16);
                if (!warp.sums.count(o.d)) {
                    warp.sums[o.d].assign(o.d, o.d + COUNT);
                    memset(o.d, emulator::kPoison, COUNT * sizeof(float));
                }
                p.a_descriptor = o.a_descriptor, p.b_descriptor = o.b_descriptor;
            }
            if (machine.random(2)) { // early, and with it what stands before it
                for (auto &group : warp.groups)
                    for (emulator::Product &before : group)
                        run_product(before);
                for (emulator::Product &before : warp.open)
                    run_product(before);
                run_product(p);
            }
            warp.open.push_back(p);
        }
    });
}

template <typename T, int SELECTOR, int COUNT>
void wgmma_sp(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, const uint32_t &metadata) {
    issue<T, SELECTOR, COUNT>({d, a, &metadata, 0, b});
}
template <typename T, int SELECTOR, int COUNT>
void wgmma_sp(float (&d)[COUNT], uint64_t a, uint64_t b, const uint32_t &metadata) {
    issue<T, SELECTOR, COUNT>({d, nullptr, &metadata, a, b});
}

// ---- mbarriers

inline char *barrier_address(uint64_t *barrier, const char *what) {
    machine.check_shared(barrier, 8, 8, what);
    return reinterpret_cast<char *>(barrier);
}

inline void mbarrier_init(uint64_t *barrier, int arrivals) {
    emulator::Barrier b = {};
    b.arrivals = b.pending = arrivals, b.maker = machine.current();
    emulator::hopper().barriers[barrier_address(barrier, "mbarrier.init")] = b;
}
inline void fence_mbarrier_init() {
    for (auto &[address, b] : emulator::hopper().barriers)
        b.fenced |= b.maker == machine.current();
}

inline void mbarrier_arrive_expect(uint64_t *barrier, int bytes) {
    emulator::Barrier &b = emulator::barrier_at(barrier_address(barrier, "mbarrier.arrive"), "mbarrier.arrive");
    b.bytes += bytes;
    if (b.bytes >= 1 << 20)
        machine.fail("an mbarrier awaits %lld bytes, and counts to 2^20 - 1", static_cast<long long>(b.bytes));
    emulator::arrive(b);
}

inline void mbarrier_arrive_cluster(uint32_t barrier) {
    emulator::arrive(emulator::fenced_barrier_at(emulator::at_cluster_address(barrier), "mbarrier.arrive"));
}

inline void mbarrier_wait(uint64_t *barrier, int parity) {
    const char *address = barrier_address(barrier, "mbarrier.try_wait");
    emulator::Barrier &b = emulator::barrier_at(address, "mbarrier.try_wait");
    while ((b.phase & 1) == static_cast<unsigned>(parity)) {
        b.waiting.push_back(machine.current());
        machine.wait();
    }
}

// ---- TMA

inline void tma_load_multicast(void *shared, const CUtensorMap *map, int column, int row, uint64_t *barrier,
                               uint16_t blocks) {
    const CUtensorMap m = *map;
    if (!m.encoded || reinterpret_cast<uintptr_t>(map) % 64 != 0)
        machine.fail("a TMA load by a tensor map that was not encoded, or does not lie at a multiple of 64 bytes");
    const int box_row = m.box_columns * 2, bytes = m.box_rows * box_row;
    const uint32_t period = m.swizzle_bytes == 0 ? 128 : m.swizzle_bytes * 8; // in which the swizzle repeats
    machine.check_shared(shared, bytes, period, "the target of a TMA load");
    if (m.swizzle_bytes != 0 && box_row != m.swizzle_bytes)
        machine.fail("a box row of %d bytes in a %d-byte swizzle is not known to the emulator", box_row,
                     m.swizzle_bytes);
    const char *full = barrier_address(barrier, "the mbarrier of a TMA load");
    for (int r = 0; r < m.box_rows; ++r) {
        const int64_t from = std::max<int64_t>(column, 0), to = std::min<int64_t>(column + m.box_columns, m.columns);
        if (row + r >= 0 && row + r < m.rows && from < to)
            machine.check_global(m.data + (row + r) * m.row_bytes + from * 2, (to - from) * 2, 2, false, "a TMA load");
    }
    const auto offset = static_cast<uint32_t>(static_cast<char *>(shared) - machine.shared());
    for (int rank = 0; rank < 16; ++rank) {
        if (!(blocks >> rank & 1))
            continue;
        if (rank >= machine.cluster() || machine.live(rank) == 0)
            machine.fail("a multicast to block %d of the cluster, which is not there", rank);
        char *memory = machine.shared(rank);
        emulator::Barrier &b = emulator::fenced_barrier_at(memory + (full - machine.shared()), "a TMA load");
        memset(memory + offset, emulator::kPoison, bytes);
        machine.later([=, &b] {
            for (int r = 0; r < m.box_rows; ++r)
                for (int c = 0; c < m.box_columns; ++c) {
                    const int64_t from_row = int64_t(row) + r, from_column = int64_t(column) + c;
                    const bool inside =
                        from_row >= 0 && from_row < m.rows && from_column >= 0 && from_column < m.columns;
                    char *to = memory + emulator::swizzled(offset + r * box_row + c * 2, m.swizzle_bytes);
                    if (inside)
                        memcpy(to, m.data + from_row * m.row_bytes + from_column * 2, 2);
                    else
                        memset(to, 0, 2);
                }
            b.bytes -= bytes;
            emulator::end_phase(b);
        });
    }
}

inline void prefetch_tensor_map(const CUtensorMap *map) {
    if (!map->encoded || reinterpret_cast<uintptr_t>(map) % 64 != 0)
        machine.fail("a prefetch of a tensor map that was not encoded, or does not lie at a multiple of 64 bytes");
}

inline void tma_load(void *shared, const CUtensorMap *map, int column, int row, uint64_t *barrier) {
    tma_load_multicast(shared, map, column, row, barrier, static_cast<uint16_t>(1 << machine.rank()));
}

inline uint2 ld_global(const uint2 *global) {
    machine.check_global(global, 8, 8, false, "ld.global.v2");
    return *global;
}
inline uint4 ld_global_once(const uint4 *global) {
    machine.check_global(global, 16, 16, false, "ld.global.v4");
    return *global;
}

// ---- blocks and clusters

inline uint32_t cluster_rank() { return static_cast<uint32_t>(machine.rank()); }

inline uint32_t map_to_rank(const void *shared, uint32_t rank) {
    if (rank >= static_cast<uint32_t>(machine.cluster()))
        machine.fail("mapa to rank %u of a cluster of %d", rank, machine.cluster());
    return (shared_address(shared) & 0xFFFFFF) | rank << 24;
}

inline void cluster_arrive() {
    emulator::Hopper &h = emulator::hopper();
    const auto before = h.cluster_arrived.find(machine.current());
    if (before != h.cluster_arrived.end() && before->second == h.cluster_phase)
        machine.fail("a second barrier.cluster.arrive without a wait");
    h.cluster_arrived[machine.current()] = h.cluster_phase;
    if (++h.cluster_count < machine.cluster() * static_cast<int>(blockDim.x))
        return;
    h.cluster_count = 0, ++h.cluster_phase;
    for (int thread : h.cluster_waiting)
        machine.wake(thread);
    h.cluster_waiting.clear();
}

inline void cluster_arrive_relaxed() { cluster_arrive(); }

inline void cluster_wait() {
    emulator::Hopper &h = emulator::hopper();
    if (!h.cluster_arrived.count(machine.current()))
        machine.fail("barrier.cluster.wait without an arrive");
    while (h.cluster_arrived[machine.current()] == h.cluster_phase) {
        h.cluster_waiting.push_back(machine.current());
        machine.wait();
    }
}

inline void named_barrier(int id, int threads) {
    emulator::NamedBarrier &b = emulator::hopper().named[{machine.rank(), id}];
    if (id < 1 || id > 15 || threads % 32 != 0 || (!b.waiting.empty() && b.threads != threads))
        machine.fail("bar.sync %d, %d among threads that say %d", id, threads, b.threads);
    b.threads = threads;
    if (static_cast<int>(b.waiting.size()) + 1 < threads) {
        b.waiting.push_back(machine.current());
        machine.wait();
        return;
    }
    for (int thread : b.waiting)
        machine.wake(thread);
    b.waiting.clear();
}

template <int REGISTERS> void set_registers(const char *what) {
    static_assert(REGISTERS >= 24 && REGISTERS <= 256 && REGISTERS % 8 == 0);
    machine.collective(128, what, nullptr, [](void *const *) {});
}
template <int REGISTERS> void release_registers() { set_registers<REGISTERS>("setmaxnreg.dec"); }
template <int REGISTERS> void take_registers() { set_registers<REGISTERS>("setmaxnreg.inc"); }

} // namespace sparsekit::ptx
