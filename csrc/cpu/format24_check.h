// Is a packed weight what the format says? Plain integers, which each path's compiler turns into its vectors: about
// seven operations on a vector of metadata. Bound by memory: the metadata read once, and the values of the last eight
// columns of a row where some of them are past the end.
#pragma once
#include "format24_body.h"

namespace sparsekit::cpu {
namespace {

// The first nibble of `bytes` bytes of metadata that is none of the six, or INT64_MAX.
[[gnu::flatten]] inline int64_t first_bad_nibble(const uint8_t *meta, int64_t bytes) {
    constexpr int64_t kStep = 512;
    for (int64_t at = 0; at < bytes; at += kStep) {
        const int64_t here = min(kStep, bytes - at);
        uint64_t any = 0;
        if (here == kStep)
            for (int64_t i = 0; i < kStep; i += 8) {
                uint64_t word;
                std::memcpy(&word, meta + at + i, 8); // in whatever order: here only whether one is bad
                any |= bad_nibbles(word);
            }
        if (here == kStep && !any)
            continue;
        for (int64_t i = at; i < at + here; i += 8) {
            const int64_t count = min(8, at + here - i);
            if (const uint64_t bad = bad_nibbles(load_meta64(meta + i, count)) & low_bits(8 * count))
                return 2 * i + __builtin_ctzll(bad) / 4;
        }
    }
    return INT64_MAX;
}

// Every nibble; then the kept values of columns past the end, which only the last byte of a row can name.
template <class W> void check(const Check24 &c, int threads) {
    const int64_t bytes = ceil_div(c.cols, 8), all = c.rows * bytes, batch = 65536;
    const int used = static_cast<int>(min(min(threads, kMaxThreads), 1 + (all >> 17)));
    First nibble, value;
    parallel_for(ceil_div(all, batch), used, [&](int64_t task, int) {
        const int64_t at = task * batch, bad = first_bad_nibble(c.meta + at, min(batch, all - at));
        if (bad != INT64_MAX)
            nibble.report(2 * at + bad);
    });
    c.status[0] = nibble.place();
    if (c.cols % 8) {
        const W magnitude = static_cast<W>(numbers(c.dtype).magnitude);
        const int64_t rows = max(1, batch / (8 * bytes)); // of a task
        parallel_for(ceil_div(c.rows, rows), static_cast<int>(min(used, 1 + c.rows / 4096)), [&](int64_t task, int) {
            for (int64_t row = task * rows; row < min(c.rows, (task + 1) * rows); ++row) {
                const W *values = static_cast<const W *>(c.values) + row * 4 * bytes;
                const int last = c.meta[(row + 1) * bytes - 1];
                for (int64_t i = 0; i < 4; ++i) {
                    const int64_t place = 4 * (bytes - 1) + i, column = place / 2 * 4 + (last >> 2 * i & 3);
                    if (column >= c.cols && (values[place] & magnitude))
                        return value.report(row * 4 * bytes + place);
                }
            }
        });
    }
    c.status[1] = value.place();
}

inline void check(const Check24 &c, int threads) {
    with_integer(width_of(c.dtype), [&](auto w) { check<decltype(w)>(c, threads); });
}

} // namespace
} // namespace sparsekit::cpu
