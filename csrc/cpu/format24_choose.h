// The n best of each of 64 groups of m keys, of one instruction set `Isa` (see format24_body.h).
//
// A lane is a group. Of up to four keys each is compared with each; of more, the n-th highest is found first, by a
// sorting network. Groups whose keys are neighbours are turned over for that.
#pragma once
#include "format24_turned.h"

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>

namespace sparsekit::cpu {
namespace {

// A byte a column, of `count` columns.
template <class Isa> inline void store_mask(uint64_t bits, uint8_t *out, int64_t count) {
    using L = Lanes<Isa, int8_t>;
    int8_t copy[kWord], *to = count == kWord ? reinterpret_cast<int8_t *>(out) : copy;
    for (int i = 0; i < kWord; i += L::kLanes)
        L::store(to + i, L::land(L::from_bits(bits >> i), L::set(1)));
    if (to == copy)
        std::memcpy(out, copy, count);
}

// The same of 64 columns; past the caches if it is a line of them.
template <class Isa> inline void store_line(uint64_t bits, uint8_t *out, bool past) {
    using L = Lanes<Isa, int8_t>;
    if (!past)
        return store_mask<Isa>(bits, out, kWord);
    for (int i = 0; i < kWord; i += L::kLanes)
        L::stream(reinterpret_cast<int8_t *>(out) + i, L::land(L::from_bits(bits >> i), L::set(1)));
}

typedef uint64_t FourWords [[gnu::vector_size(32)]];

// Of words that are neighbours, or every second one: each low half of a block of bits of the one and the high half of
// the other's change places.
template <int apart> inline FourWords turn_neighbours(FourWords words, uint64_t low) {
    const FourWords other = __builtin_shufflevector(words, words, 0 ^ apart, 1 ^ apart, 2 ^ apart, 3 ^ apart);
    const FourWords upper = -FourWords{0, apart == 1, apart == 2, 1}, mine = low ^ upper;
    return (words & mine) | (((other << apart & ~upper) | (other >> apart & upper)) & ~mine);
}

// Bit j of word i and bit i of word j change places, in every block of kSize words and kSize bits.
template <int kSize = kWord, int apart = kSize / 2> inline void turn_bits(uint64_t *words) {
    constexpr uint64_t low = ~uint64_t{0} / ((uint64_t{1} << apart) + 1); // of every two blocks of bits the lower
    if constexpr (apart <= 2)
        for (int i = 0; i < kSize; i += 4) {
            FourWords some;
            std::memcpy(&some, words + i, sizeof some);
            some = turn_neighbours<apart>(some, low);
            std::memcpy(words + i, &some, sizeof some);
        }
    else
        for (int start = 0; start < kSize; start += 2 * apart)
#pragma GCC ivdep
            for (int i = start; i < start + apart; ++i) {
                const uint64_t change = (words[i] >> apart ^ words[i + apart]) & low;
                words[i] ^= change << apart;
                words[i + apart] ^= change;
            }
    if constexpr (apart > 1)
        turn_bits<kSize, apart / 2>(words);
}

// Batcher's network: these pairs, exchanged in this order where they are out of order, sort kSize of anything.
template <int kSize> struct Network {
    int first[64] = {}, second[64] = {}, pairs = 0;

    constexpr Network() {
        for (int run = 1; run < kSize; run *= 2)
            for (int apart = run; apart >= 1; apart /= 2)
                for (int start = apart % run; start + apart < kSize; start += 2 * apart)
                    for (int i = start; i < start + apart && i + apart < kSize; ++i)
                        if (i / (2 * run) == (i + apart) / (2 * run)) {
                            first[pairs] = i;
                            second[pairs++] = i + apart;
                        }
    }
};
template <int kSize> constexpr Network<kSize> kNetwork;

// Lane by lane, the highest first.
template <class L, int kSize, size_t... kPair>
inline void sort_lanes(typename L::V (&v)[kSize], std::index_sequence<kPair...>) {
    const auto exchange = [](auto &high, auto &low) {
        const auto least = L::min(high, low);
        high = L::max(high, low);
        low = least;
    };
    (exchange(v[kNetwork<kSize>.first[kPair]], v[kNetwork<kSize>.second[kPair]]), ...);
}

// What ranks below no number and above none.
template <class Key> struct Ends {
    Key lowest, highest;
    explicit Ends(const Numbers &n)
        : lowest(static_cast<Key>(n.integer ? n.lowest : -n.largest)),
          highest(n.integer ? std::numeric_limits<Key>::max() : static_cast<Key>(n.largest)) {}
};

// The n-th highest of each of 64 groups of m <= kMost keys, which are turned over: a lane is a group and a vector the
// same member of every group; returns a bit for each group that has a NaN. `turned` has room for kMost members. Of a
// group, each half is sorted; its n-th highest is the largest of min(i-th of one, (n - i)-th of the other).
template <class Isa, int kMost, class Key>
[[gnu::noinline, gnu::flatten]] uint64_t find_cuts(Key *turned, int n, int m, const Ends<Key> &ends, Key *cut) {
    using L = Lanes<Isa, Key>;
    constexpr int kHalf = kMost / 2;
    std::fill(turned + m * kWord, turned + kMost * kWord, ends.lowest); // they lose, if by a tie: the last

    Key sorted[2][(kHalf + 1) * L::kLanes];
    const auto highest = L::set(ends.highest), lowest = L::set(ends.lowest);
    for (auto &half : sorted)
        L::store(half, L::set(std::numeric_limits<Key>::max())); // the 0-th
    uint64_t bad = 0;
    for (int lane = 0; lane < kWord; lane += L::kLanes) {
        for (int half = 0; half < 2; ++half) {
            typename L::V v[kHalf];
#pragma GCC unroll 16
            for (int i = 0; i < kHalf; ++i)
                v[i] = L::load(turned + (half * kHalf + i) * kWord + lane);
            sort_lanes<L>(v, std::make_index_sequence<kNetwork<kHalf>.pairs>());
            bad |= L::bits(L::gt(v[0], highest) | L::gt(lowest, v[kHalf - 1])) << lane;
#pragma GCC unroll 16
            for (int i = 0; i < kHalf; ++i)
                L::store(sorted[half] + (i + 1) * L::kLanes, v[i]);
        }
        auto nth = L::set(std::numeric_limits<Key>::min());
        for (int i = n > kHalf ? n - kHalf : 0; i <= n && i <= kHalf; ++i)
            nth = L::max(nth, L::min(L::load(sorted[0] + i * L::kLanes), L::load(sorted[1] + (n - i) * L::kLanes)));
        L::store(cut + lane, nth);
    }

    return bad;
}

// By the n-th highest of each group, what is kept of groups that are turned over: of those that equal it the first. A
// row is a member of each group, of which a word says where it is kept.
template <class Isa, class Key>
[[gnu::noinline, gnu::flatten]] void keep_lanes(const Key *turned, const Key *cut, int n, int m, uint64_t *kept) {
    using L = Lanes<Isa, Key>;
    constexpr int kVectors = kWord / L::kLanes;
    const auto none = L::set(0);
    typename L::V nth[kVectors], room[kVectors]; // room for those that equal it
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
        nth[i] = L::load(cut + i * L::kLanes);
        room[i] = L::set(static_cast<Key>(n));
    }
    for (int member = 0; member < m; ++member)
#pragma GCC unroll 16
        for (int i = 0; i < kVectors; ++i) {
            const auto key = L::load(turned + member * kWord + i * L::kLanes);
            room[i] = L::sum(room[i], L::lanes(L::gt(key, nth[i])));
        }
    for (int member = 0; member < m; ++member)
        kept[member] = L::word([&](int i) {
            const auto key = L::load(turned + member * kWord + i);
            auto &left = room[i / L::kLanes];
            const auto over = L::gt(key, nth[i / L::kLanes]);
            const auto taken = L::gt(left, none) & ~(over | L::gt(nth[i / L::kLanes], key));
            left = L::sum(left, L::lanes(taken));
            return over | taken;
        });
}

// The n best of each of 64 groups of m <= kMost keys that are turned over; returns a bit for each group that has a NaN.
template <class Isa, int kMost, class Key>
uint64_t choose_lanes(Key *turned, int n, int m, const Ends<Key> &ends, uint64_t *kept) {
    Key cut[kWord];
    const uint64_t bad = find_cuts<Isa, kMost>(turned, n, m, ends, cut);
    keep_lanes<Isa>(turned, cut, n, m, kept);
    return bad;
}

// The same of m <= 4, each compared with each.
template <class Isa, int m, class Key>
[[gnu::noinline, gnu::flatten]] uint64_t choose_few(Key *turned, int n, int, const Ends<Key> &ends, uint64_t *kept) {
    using L = Lanes<Isa, Key>;
    constexpr int kVectors = kWord / L::kLanes;
    decltype(L::gt(L::set(0), L::set(0))) found[m][kVectors];
    const auto limit = L::set(static_cast<Key>(-n));
    auto highest = L::load(turned), lowest = highest;
#pragma GCC unroll 16
    for (int i = 0; i < kVectors; ++i) {
        typename L::V key[m], lost[m]; // to how many others: a minus one for each
#pragma GCC unroll 4
        for (int member = 0; member < m; ++member) {
            key[member] = L::load(turned + member * kWord + i * L::kLanes);
            lost[member] = L::set(0);
            highest = L::max(highest, key[member]);
            lowest = L::min(lowest, key[member]);
        }
        if constexpr (m == 4)
            if (n == 2) {
                const TwoBest best([&](int right, int left) { return L::gt(key[right], key[left]); });
                for (int member = 0; member < m; ++member)
                    found[member][i] = best.kept[member];
                continue;
            }
#pragma GCC unroll 4
        for (int right = 1; right < m; ++right)
#pragma GCC unroll 4
            for (int left = 0; left < right; ++left) {
                const auto beats = L::gt(key[right], key[left]);
                lost[left] = L::sum(lost[left], L::lanes(beats));
                lost[right] = L::sum(lost[right], L::lanes(~beats));
            }
#pragma GCC unroll 4
        for (int member = 0; member < m; ++member)
            found[member][i] = L::gt(lost[member], limit);
    }
#pragma GCC unroll 4
    for (int member = 0; member < m; ++member)
        kept[member] = L::word([&](int i) { return found[member][i / L::kLanes]; });
    return L::bits(L::gt(highest, L::set(ends.highest)) | L::gt(L::set(ends.lowest), lowest));
}

// choose_lanes of groups of m.
template <class Isa, class Key> auto lanes_chooser(int m) {
    return m == 2    ? choose_few<Isa, 2, Key>
           : m == 3  ? choose_few<Isa, 3, Key>
           : m == 4  ? choose_few<Isa, 4, Key>
           : m <= 8  ? choose_lanes<Isa, 8, Key>
           : m <= 16 ? choose_lanes<Isa, 16, Key>
                     : choose_lanes<Isa, 32, Key>;
}

// Where the mask of 64 groups goes, a byte a key, and what memory is asked for meanwhile.
struct Target {
    uint8_t *mask;
    bool past; // the caches, in whole lines
    const char *next;
    int64_t bytes;

    // One of three parts of it: more at once than memory is ready for would be waited for.
    [[gnu::always_inline]] void ask(int part) const {
        for (int64_t i = bytes / 3 * part; i < bytes / 3 * (part + 1); i += 64)
            __builtin_prefetch(next + i);
    }
};

// The group of a lane of those that choose turns over: whose masks, when they are turned over, are neighbours.
template <int kMost> constexpr int group_of(int lane) { return lane % kMost * (kWord / kMost) + lane / kMost; }

// The mask of 64 groups of kMost by the n-th highest of each; the keys are read as they lie.
template <class Isa, int kMost, class Key>
[[gnu::noinline, gnu::flatten]] void keep_words(const Key *keys, const Key *cut, int n, const Target &to) {
    using L = Lanes<Isa, Key>;
    constexpr int kGroups = kWord / kMost; // of a word
    for (int word = 0; word < kMost; ++word, keys += kWord) {
        alignas(64) Key cuts[kWord];
        const auto nth = [&](int i) {
            if constexpr (kMost < L::kLanes)
                return L::load(cuts + i);
            else
                return L::set(cut[i / kMost * kMost + word]);
        };
        if constexpr (kMost < L::kLanes)
            for (int i = 0; i < kWord; i += kMost)
                std::fill_n(cuts + i, kMost, cut[i + word]);
        uint64_t kept = ~L::word([&](int i) { return L::gt(nth(i), L::load(keys + i)); }); // n or more of each group
        // Of bytes many are equal, and no branch is foreseen.
        if (sizeof(Key) == 1 || __builtin_popcountll(kept) != n * kGroups) {
            const uint64_t over = L::word([&](int i) { return L::gt(L::load(keys + i), nth(i)); }), ties = kept & ~over;
            kept = over;
            for (int i = 0; i < kWord; i += kMost) {
                const int room = n - __builtin_popcountll(over >> i & low_bits(kMost));
                kept |= Isa::first(ties >> i & low_bits(kMost), room) << i;
            }
        }
        store_line<Isa>(kept, to.mask + word * kWord, to.past);
    }
}

// The same of groups of m <= kMost keys that are turned over.
template <class Isa, int kMost, class Key>
[[gnu::noinline, gnu::flatten]] void keep_turned(const Key *turned, const Key *cut, int n, int m, const Target &to) {
    using L = Lanes<Isa, int8_t>;
    constexpr int kGroups = kWord / kMost;
    uint64_t kept[kMost] = {};
    keep_lanes<Isa>(turned, cut, n, m, kept);
    turn_bits<kMost>(kept);
    if (m == kMost) {
        for (int word = 0; word < kMost; ++word)
            store_line<Isa>(kept[word], to.mask + word * kWord, to.past);
        return;
    }
    for (int group = 0; group < kWord; ++group) // what is past a group falls on the next one, written later
        for (int i = 0; i < kMost; i += L::kLanes) {
            const uint64_t bits = kept[group / kGroups] >> (group % kGroups * kMost + i);
            L::store(reinterpret_cast<int8_t *>(to.mask) + group * m + i, L::land(L::from_bits(bits), L::set(1)));
        }
}

// The n best of each of 64 groups of m <= kMost keys that are neighbours, a byte a key; returns the first group that
// has a NaN, or 64. Up to 64 bytes are written past the last group where m < kMost.
template <class Isa, int kMost, class Key>
[[gnu::noinline, gnu::flatten]] int choose(const Key *keys, int n, int m, const Ends<Key> &ends, const Target &to) {
    using L = Lanes<Isa, Key>;
    Key turned[kMost * kWord], cut[kWord];
    constexpr int kRows = min(L::kLanes, kMost), kCols = min(16 / int(sizeof(Key)), kRows), kGroups = kWord / kMost;
    to.ask(0);
    for (int member = 0; member < m; member += kRows)
        for (int lane = 0; lane < kWord; lane += kCols)
            turn_block<kCols, kRows>(keys + group_of<kMost>(lane) * m + member, kGroups * m,
                                     turned + member * kWord + lane, kWord);
    to.ask(1);
    const uint64_t bad = find_cuts<Isa, kMost>(turned, n, m, ends, cut);
    to.ask(2);
    if (m == kMost && (sizeof(Key) > 1 || kMost == 32))
        keep_words<Isa, kMost>(keys, cut, n, to);
    else
        keep_turned<Isa, kMost>(turned, cut, n, m, to);
    int first = kWord;
    for (int lane = 0; lane < kWord && bad; ++lane)
        if (bad >> lane & 1)
            first = min(first, group_of<kMost>(lane));
    return first;
}

} // namespace
} // namespace sparsekit::cpu
