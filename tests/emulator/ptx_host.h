// The functions of csrc/cuda/ptx.cuh on the emulated machine, written from the PTX ISA's text and fragment tables
// ("Warp-level matrix instructions", "Sparse matrix storage", "cp.async", "ldmatrix"), not from any kernel's use of
// them.
#pragma once
#define SPARSEKIT_CUDA_PTX_CUH // csrc/cuda/ptx.cuh steps aside
#include "cuda_host.h"
#include <type_traits>

namespace sparsekit::ptx {

using emulator::machine;

inline char *dynamic_shared_memory() { return machine.shared(); }

// A copy may land at once or as late as the wait that ends it: the seed tosses the coin. Until it lands, its target is
// poison.
template <int BYTES> void cp_async(void *shared, const void *global, int bytes) {
    machine.check_shared(shared, BYTES, BYTES, "cp.async");
    if (bytes < 0 || bytes > BYTES)
        machine.fail("cp.async of %d bytes cannot read %d", BYTES, bytes);
    machine.check_global(global, bytes, BYTES, false, "cp.async");
    const emulator::Copy copy{static_cast<char *>(shared), static_cast<const char *>(global), bytes, BYTES};
    if (machine.random(2)) {
        copy.land();
    } else {
        memset(shared, emulator::kPoison, BYTES);
        machine.self().open.push_back(copy);
    }
}

inline void cp_async_commit() {
    machine.self().groups.push_back({});
    machine.self().groups.back().swap(machine.self().open);
}

template <int PENDING> void cp_async_wait() {
    auto &groups = machine.self().groups;
    for (; groups.size() > PENDING; groups.pop_front())
        for (const emulator::Copy &copy : groups.front())
            copy.land();
}

inline uint4 ld_global_streaming(const void *global) {
    machine.check_global(global, 16, 16, false, "ld.global.v4");
    uint4 v;
    memcpy(&v, global, 16);
    return v;
}

// The passes over shared memory that eight lanes' 16 bytes need beyond the first: lanes 8 i .. 8 i + 7 go together,
// four banks each; what is asked for twice is read once.
template <typename F> long extra_passes(F address, int i) {
    int in_banks[8] = {};
    for (int lane = 8 * i; lane < 8 * i + 8; ++lane) {
        bool again = false;
        for (int before = 8 * i; before < lane; ++before)
            again |= address(before) == address(lane);
        if (!again)
            ++in_banks[(address(lane) - machine.shared()) / 16 % 8];
    }
    return *std::max_element(in_banks, in_banks + 8) - 1;
}

// Not collective on hardware; all lanes meet here so that their banks can be counted.
inline void ld_shared(uint32_t (&r)[4], const void *shared) {
    struct Operands {
        const char *shared;
        uint32_t *r;
    } mine{static_cast<const char *>(shared), r};
    machine.check_shared(shared, 16, 16, "ld.shared.v4");
    machine.collective(32, "ld.shared.v4", &mine, [](void *const *lanes) {
        const auto address = [&](int lane) { return static_cast<Operands *>(lanes[lane])->shared; };
        for (int lane = 0; lane < 32; ++lane)
            memcpy(static_cast<Operands *>(lanes[lane])->r, address(lane), 16);
        for (int i = 0; i < 4; ++i)
            machine.bank_conflicts += extra_passes(address, i);
    });
}

// Row j of matrix i comes from lane 8 i + j; lane T receives elements 2 (T % 4) and 2 (T % 4) + 1 of row T / 4.
template <int MATRICES> void ldmatrix(uint32_t *r, const void *row) {
    struct Operands {
        const char *row;
        uint32_t *r;
    } mine{static_cast<const char *>(row), r};
    machine.collective(32, MATRICES == 4 ? "ldmatrix.x4" : "ldmatrix.x2", &mine, [](void *const *lanes) {
        for (int matrix = 0; matrix < MATRICES; ++matrix) {
            const auto row_of = [&](int lane) { return static_cast<Operands *>(lanes[lane])->row; };
            for (int lane = 0; lane < 32; ++lane) {
                const char *source = row_of(matrix * 8 + lane / 4);
                machine.check_shared(source, 16, 16, "a row of ldmatrix");
                memcpy(static_cast<Operands *>(lanes[lane])->r + matrix, source + lane % 4 * 4, 4);
            }
            machine.bank_conflicts += extra_passes(row_of, matrix);
        }
    });
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void *row) { ldmatrix<4>(r, row); }
inline void ldmatrix_x2(uint32_t (&r)[2], const void *row) { ldmatrix<2>(r, row); }

template <typename T> float element(const uint32_t *registers, int i) { // the i-th 16-bit element of a fragment
    const T v{static_cast<uint16_t>(registers[i / 2] >> (i % 2 * 16))};
    if constexpr (std::is_same_v<T, __half>)
        return __half2float(v);
    else
        return __bfloat162float(v);
}

// Two kept values of every chunk of four columns; exact products, one rounding to fp32 a step.
template <typename T, int SELECTOR>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
    struct Operands {
        float *d;
        const uint32_t *a, *b;
        uint32_t metadata;
    } mine{d, a, b, metadata};
    machine.collective(32, SELECTOR == 0 ? "mma.sp, selector 0" : "mma.sp, selector 1", &mine, [](void *const *lanes) {
        const auto lane = [&](int t) -> Operands & { return *static_cast<Operands *>(lanes[t]); };
        float kept[16][16], dense[32][8];
        int column[16][16];
        for (int t = 0; t < 32; ++t) {
            const int group = t / 4, in_group = t % 4;
            for (int i = 0; i < 8; ++i) {
                const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
                const int first_column = in_group * 4 + (i < 4 ? 0 : 16);
                // T0 (or T2) of the row's quad has columns 0-15, T1 (or T3) columns 16-31; rows 8-15 are in the high
                // half.
                const uint32_t word = lane(row % 8 * 4 + 2 * SELECTOR + first_column / 16).metadata >> (row / 8 * 16);
                const uint32_t nibble = word >> (first_column % 16) & 15;
                if (nibble != 0x4 && nibble != 0x8 && nibble != 0x9 && nibble != 0xC && nibble != 0xD && nibble != 0xE)
                    machine.fail("mma.sp::ordered_metadata: 0x%X is no valid metadata (row %d, columns %d-%d)", nibble,
                                 row, first_column, first_column + 3);
                const int slot = first_column / 2 + i % 2;
                kept[row][slot] = element<T>(lane(t).a, i);
                column[row][slot] = first_column + static_cast<int>(i % 2 == 0 ? nibble & 3 : nibble >> 2);
                dense[in_group * 2 + i % 2 + i / 2 * 8][group] = element<T>(lane(t).b, i);
            }
        }
        for (int t = 0; t < 32; ++t)
            for (int i = 0; i < 4; ++i) {
                const int row = t / 4 + (i < 2 ? 0 : 8), col = t % 4 * 2 + i % 2;
                double sum = lane(t).d[i];
                for (int slot = 0; slot < 16; ++slot)
                    sum += static_cast<double>(kept[row][slot]) * dense[column[row][slot]][col];
                lane(t).d[i] = static_cast<float>(sum);
            }
    });
}

} // namespace sparsekit::ptx
