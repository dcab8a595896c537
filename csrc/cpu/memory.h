// Large outputs in fresh memory. Unnamed namespace: see epilogue.h.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsekit::cpu {
namespace {

// Asks for huge pages under what is about to be written. A matrix of a model comes from the allocator untouched, and to
// fault it in 4 KiB at a time takes longer than all that is done here to its bytes. A wish: nothing depends on it.
inline void prefer_huge_pages(void *memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = uintptr_t{1} << 21;
    const auto begin = reinterpret_cast<uintptr_t>(memory);
    const uintptr_t first = (begin + page - 1) / page * page,
                    last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
    if (memory != nullptr && first < last)
        madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

} // namespace
} // namespace sparsekit::cpu
