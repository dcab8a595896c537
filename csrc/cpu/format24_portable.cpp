// The portable path of the format ops.
#include "format24_path.h"

#include <cstring>
#include <type_traits>
#include <utility>

namespace sparsekit::cpu {
namespace {

// The integers of 16 bytes, or four: what a compiler turns into registers of SSE2 or NEON.
template <class Int> struct Several : MasksOfLanes<Several<Int>, Int, 4> {
    static constexpr int kLanes = sizeof(Int) < 4 ? 16 / sizeof(Int) : 4, kByteLanes = sizeof(Int) < 4 ? 8 : 4;
    typedef Int V [[gnu::vector_size(kLanes * sizeof(Int))]];
    typedef int8_t Bytes [[gnu::vector_size(kByteLanes)]];
    using Sum = std::conditional_t<kByteLanes == 8, uint64_t, uint32_t>;

    static V load(const Int *p) {
        V a;
        std::memcpy(&a, p, sizeof a);
        return a;
    }
    static void store(Int *p, V a) { std::memcpy(p, &a, sizeof a); }
    static void stream(Int *p, V a) { store(p, a); }
    static V set(Int a) { return V{} + a; }
    static V land(V a, V b) { return a & b; }
    static V lor(V a, V b) { return a | b; }
    static V lxor(V a, V b) { return a ^ b; }
    static V select(V mask, V a, V b) { return (a & mask) | (b & ~mask); }
    static V min(V a, V b) { return a < b ? a : b; }
    static V max(V a, V b) { return a > b ? a : b; }
    static V sum(V a, V b) { return a + b; }
    static V gt(V a, V b) { return a > b; }
    static V test(V a, V b) { return (a & b) != 0; }
    static V nonzero(V a, V b) { return a & test(a, b); }
    static V order(V a, V magnitude) {
        const V negative = a < 0;
        return ((a & magnitude) ^ negative) - negative;
    }
    static V flipped_abs(V a) { return (a < 0 ? -a : a) ^ -128; }
    static V wins(V a, V b, V right) { return (a > b) | ((a == b) & right); }
    template <int m, int r> static V rotate(V a) { return rotate<m, r>(a, std::make_integer_sequence<int, kLanes>()); }

    static uint64_t bits(V mask) {
        uint64_t found = 0;
        for (int i = 0; i < kLanes; i += kByteLanes) {
            const Bytes some = bytes(mask, i) & bit_of_byte();
            Sum all;
            std::memcpy(&all, &some, sizeof all);
            found |= uint64_t{all * Sum(0x0101010101010101) >> (8 * sizeof all - 8)} << i; // the sum of the bytes
        }
        return found;
    }
    static V from_bits(uint64_t bits) {
        Int lanes[kLanes];
        for (int i = 0; i < kLanes; i += kByteLanes)
            store_bytes(lanes + i, ((Bytes{} + static_cast<int8_t>(bits >> i)) & bit_of_byte()) != 0);
        return load(lanes);
    }
    template <class Body> static uint64_t word(const Body &body) {
        uint64_t found = 0;
        for (int i = 0; i < kWord; i += kLanes)
            found |= bits(body(i)) << i;
        return found;
    }
    template <class Body> static void store_ones(const Body &body, uint8_t *out) {
        for (int i = 0; i < kWord; i += kLanes) {
            const V mask = body(i);
            for (int at = 0; at < kLanes; at += kByteLanes) {
                const Bytes ones = bytes(mask, at) & 1;
                std::memcpy(out + i + at, &ones, sizeof ones);
            }
        }
    }

  private:
    static Bytes bit_of_byte() {
        constexpr int8_t kBits[] = {1, 2, 4, 8, 16, 32, 64, -128};
        Bytes found;
        std::memcpy(&found, kBits, sizeof found);
        return found;
    }
    template <int m, int r, int... i> static V rotate(V a, std::integer_sequence<int, i...>) {
        return __builtin_shufflevector(a, a, (i / m * m + (i + r) % m)...);
    }
    // The masks of the lanes from `first` on.
    static Bytes bytes(V mask, int first) {
        if constexpr (sizeof(Int) == 1) {
            Bytes some;
            std::memcpy(&some, reinterpret_cast<const char *>(&mask) + first, sizeof some);
            return some;
        } else {
            return __builtin_convertvector(mask, Bytes);
        }
    }
    static void store_bytes(Int *lanes, Bytes mask) {
        if constexpr (sizeof(Int) == 1) {
            std::memcpy(lanes, &mask, sizeof mask);
        } else {
            const V wide = __builtin_convertvector(mask, V);
            std::memcpy(lanes, &wide, sizeof wide);
        }
    }
};

struct Portable {
    template <class W> using Lanes = Several<Integer<W>>;

    static void fence() {}

    template <class W, class Clean>
    static void pack(const W *p, uint64_t kept, uint64_t live, const Clean &clean, W *out) {
        using L = Lanes<W>;
        W copy[kWord];
        for (int i = 0; i < kWord; i += L::kLanes)
            L::store(copy + i, L::land(clean(L::load(p + i)), L::from_bits(live >> i)));
        for (; kept; kept &= kept - 1)
            *out++ = copy[__builtin_ctzll(kept)];
    }
    template <class W> static void gather(const W *p, uint64_t kept, W *out) { gather_each(p, kept, out); }
    static uint64_t first(uint64_t bits, int count) { return first_each(bits, count); }
    template <class W> static void unpack(const W *values, uint64_t kept, W *out) {
        for (int column = 0; column < kWord; ++column)
            out[column] = kept >> column & 1 ? *values++ : W{0};
    }
};

} // namespace

const Format24Path kFormat24Portable = path<Portable>();

} // namespace sparsekit::cpu
