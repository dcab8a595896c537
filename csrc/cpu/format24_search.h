// The k-th highest of a row, of one instruction set `Isa` (see format24_body.h).
//
// Two keys are looked for between which it lies with few others. The first two are about the cut of the row before, as
// far from it as the last rows' cuts were from one another; of the first row, and where that was wrong, they come from
// a sample. A pass counts what is above the two, six operations a vector, and the next two are about the place that the
// rank has among the numbers between. The counts are exact, so they also say where a guess was wrong, which costs time
// and nothing else. After three passes numbers lie unevenly between, many on one key perhaps: then one of them is asked
// for, and every other time the keys between are divided in three, which ends whatever the row holds. Who wants the cut
// then gathers the few, among which the range of keys is quartered until it is left.
//
// Isa::gather puts those of 64 numbers that are kept next to one another; past them up to a word may be written.
#pragma once
#include "epilogue.h"
#include "format24_body.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace sparsekit::cpu {
namespace {

// The key of a number's bits.
template <class Int> Int order_of(Int bits) {
    const Int size = static_cast<Int>(bits & std::numeric_limits<Int>::max());
    return bits < 0 ? static_cast<Int>(-size) : size;
}

// One by one, those of 64 numbers that are kept.
template <class Int> inline void gather_each(const Int *p, uint64_t kept, Int *out) {
    for (; kept; kept &= kept - 1)
        *out++ = p[__builtin_ctzll(kept)];
}

// One by one, the lowest `count` of the bits; all where there are fewer.
inline uint64_t first_each(uint64_t bits, int64_t count) {
    uint64_t rest = bits;
    for (; count > 0 && rest; --count)
        rest &= rest - 1;
    return bits & ~rest;
}

// The columns whose key is above `key`, from the bits of the scores. To bits that are flipped but for the sign, the
// lower of two negative numbers is the lower integer. Any key will do, one that no number has too: a search that was
// given one learns what is so, and ends.
template <class Isa, class Int> class Above {
    using L = Lanes<Isa, Int>;
    typename L::V flip_, bound_;
    bool all_;

  public:
    Above(int64_t key, bool integer) {
        const bool negative = key < 0 && !integer;
        all_ = key < std::numeric_limits<Int>::min() + int64_t{negative};
        flip_ = L::set(negative ? std::numeric_limits<Int>::max() : Int{0});
        bound_ = L::set(static_cast<Int>(all_ ? 0 : min(key, std::numeric_limits<Int>::max()) - negative));
    }
    // Whatever they hold; mask() is then of no use.
    bool all() const { return all_; }
    auto mask(typename L::V v) const { return L::gt(L::lxor(v, flip_), bound_); }
    uint64_t operator()(const Int *p) const {
        return all_ ? ~uint64_t{0} : each<Isa>(p, [&](auto v) { return mask(v); });
    }
};

// The next lower key. That of the lowest is below all numbers; of fp64, whose lowest key is no number's, it is itself.
inline int64_t before(int64_t key) { return key > INT64_MIN ? key - 1 : key; }

// Keys above it are kept, and the first `room` of the `ties` that equal it.
struct Cut {
    int64_t key, room, ties;
};

// What is above `high`, and what is from there down to just above `low`. Where high < low there is nothing between.
struct Bracket {
    int64_t low, high;
};

struct Counts {
    int64_t over, between;
};

// What is known of the rank-th highest key: it lies in low + 1..high; `least` keys are above low, `over` above high.
struct Known {
    int64_t low, high, least, over;

    void learn(int64_t rank, const Bracket &b, const Counts &found) {
        learn(rank, b.low, found.over + found.between);
        learn(rank, b.high, found.over);
    }
    int64_t between() const { return least - over; }
    bool one() const { return low + 1 == high; }

  private:
    void learn(int64_t rank, int64_t key, int64_t above) {
        if (above >= rank && key > low)
            low = key, least = above;
        else if (above < rank && key < high)
            high = key, over = above;
    }
};

// Where to look first for a row's cut: about that of the row before. Only time depends on it.
struct Guess {
    bool known = false;
    Bracket bracket{0, 0};
    double centre = 0, width = 0; // of the bracket, as numbers: half of it
};

// Half way, rounded down.
inline int64_t middle(int64_t low, int64_t high) {
    return int64_t(uint64_t(low) + (uint64_t(high) - uint64_t(low)) / 2);
}

// Searches in rows of one dtype.
template <class Isa, class Int> class Search {
    using Test = Above<Isa, Int>;

  public:
    static constexpr int64_t kLowest = std::numeric_limits<Int>::min(), kHighest = std::numeric_limits<Int>::max();
    static constexpr int64_t kSampled = 1024; // a row of as many numbers is worth a sample
    static constexpr int64_t kMostSampled = 65536;
    static constexpr int64_t kFew = 96;

    const bool integer;

    explicit Search(DType dtype) : integer(numbers(dtype).integer), fraction_(52 - numbers(dtype).fraction) {}

    template <class Body> static void for_row(const Int *row, int64_t cols, const Body &body) {
        for_words(Tile<Int>{row, 0}, Span{0, 1, 0, cols}, Int{0},
                  [&](int64_t, int64_t col, const Int *at, int64_t count, int64_t) { body(col, at, count); });
    }

    // How many keys are above b.high, and how many more above b.low.
    [[gnu::noinline, gnu::flatten]] Counts count(const Int *row, int64_t cols, const Bracket &b) const {
        using L = Lanes<Isa, Int>;
        const Test over(b.high, integer), some(b.low, integer);
        const int64_t words = cols / kWord;
        auto [higher, least] = L::count(
            words, [&](int64_t i) { return over.mask(L::load(row + i)); },
            [&](int64_t i) { return some.mask(L::load(row + i)); });
        higher = over.all() ? words * kWord : higher;
        least = some.all() ? words * kWord : least;
        for_row(row + words * kWord, cols % kWord, [&](int64_t, const Int *at, int64_t count) {
            higher += __builtin_popcountll(over(at) & low_bits(count));
            least += __builtin_popcountll(some(at) & low_bits(count));
        });
        return {higher, least - higher};
    }

    // Where the rank-th of those between lies.
    int64_t place(const Int *row, int64_t cols, const Bracket &b, int64_t rank) const {
        const Test over(b.high, integer), some(b.low, integer);
        for (int64_t col = 0;; col += kWord) {
            Int copy[kWord];
            const int64_t count = min(kWord, cols - col);
            const Int *at = count == kWord ? row + col : std::copy_n(row + col, count, copy) - count;
            uint64_t between = some(at) & ~over(at) & low_bits(count);
            if (const int64_t found = __builtin_popcountll(between); found < rank) {
                rank -= found;
                continue;
            }
            for (; rank > 1; --rank)
                between &= between - 1;
            return col + __builtin_ctzll(between);
        }
    }

    [[gnu::noinline, gnu::flatten]] int64_t above(const Int *row, int64_t cols, int64_t key) const {
        using L = Lanes<Isa, Int>;
        const Test test(key, integer);
        const int64_t words = cols / kWord;
        int64_t found =
            test.all() ? words * kWord : L::count(words, [&](int64_t i) { return test.mask(L::load(row + i)); })[0];
        for_row(row + words * kWord, cols % kWord, [&](int64_t, const Int *at, int64_t count) {
            found += __builtin_popcountll(test(at) & low_bits(count));
        });
        return found;
    }

    int64_t equal(const Int *row, int64_t cols, int64_t key) const {
        return count(row, cols, {before(key), key}).between;
    }

    // What is between goes to `list`, while a word more than it has room there.
    [[gnu::noinline, gnu::flatten]] Counts gather(const Int *row, int64_t cols, const Bracket &b, Int *list,
                                                  int64_t room) const {
        const Test over(b.high, integer), some(b.low, integer);
        Counts found{0, 0};
        for_row(row, cols, [&](int64_t, const Int *at, int64_t count) {
            const uint64_t higher = over(at) & low_bits(count), between = some(at) & low_bits(count) & ~higher;
            if (found.between + kWord <= room)
                Isa::gather(at, between, list + found.between);
            found.over += __builtin_popcountll(higher);
            found.between += __builtin_popcountll(between);
        });
        return found;
    }

    // The rank-th highest of a list whose keys lie in low..high, which is quartered. A word past the list's end may be
    // read; it is overwritten.
    [[gnu::noinline, gnu::flatten]] Cut nth(Int *list, int64_t size, int64_t rank, int64_t low, int64_t high) const {
        int64_t over = 0, least = size; // keys above high, from low on
        while (low < high) {
            const int64_t half = middle(low, high);
            const int64_t keys[] = {low, middle(low, half), half, middle(half, high), high};
            const Test tests[] = {{keys[1], integer}, {keys[2], integer}, {keys[3], integer}};
            int64_t above[] = {least, 0, 0, 0, over};
            for (int64_t i = 0; i < size; i += kWord)
                for (int part = 0; part < 3; ++part)
                    above[part + 1] += __builtin_popcountll(tests[part](list + i) & low_bits(size - i));
            const int part = (above[1] >= rank) + (above[2] >= rank) + (above[3] >= rank);
            low = keys[part] + (part > 0);
            high = keys[part + 1];
            least = above[part];
            over = above[part + 1];
            const int64_t left = least - over;
            if (left == size || (left > kRanked && size <= kWord))
                continue;
            gather(list, size, {before(low), high}, list, size + kWord);
            rank -= over;
            over = 0;
            size = least = left;
            if (size <= kRanked)
                return among_few(list, size, rank);
        }
        return {low, rank - over, least - over};
    }

    // Of a long row, keys about the rank-th highest, as far from it as a sample's place may be wrong: 2.5 to 4.5
    // standard deviations. `guess` is tried first. `sample` has room for kMostSampled.
    Bracket sampled(const Int *row, int64_t cols, int64_t rank, const Bracket &guess, Int *sample) const {
        constexpr int kNeighbours = 16 / sizeof(Int); // taken together
        const int64_t wanted = cols < 1 << 20 ? min(cols / 16, 1024) : min(cols / 1024, kMostSampled);
        const int64_t size = max(512, wanted / kWord * kWord), pieces = size / kNeighbours;
        const int64_t step = cols / pieces;
        for (int64_t i = 0; i < pieces; ++i)
            std::memcpy(sample + i * kNeighbours, row + i * step, 16);
        const double share = double(rank) / double(cols), place = share * double(size);
        const double deviation = std::sqrt(place * (1 - share)) + 1;
        const auto at = [&](double deviations) { return int64_t(place + deviations * deviation); };
        Bracket found{kLowest, kHighest};
        if (at(-2.5) > 0)
            found.high = pivot(sample, size, guess.high, max(0, at(-4.5)), at(-2.5), -1);
        if (at(2.5) < size)
            found.low = pivot(sample, size, guess.low, at(2.5), min(size, at(4.5)), 0);
        return found;
    }

    // What is known of the rank-th highest of a long row once it is one key, or kFew or fewer of the row are between:
    // to count is far faster than to gather. `sample` has room for kMostSampled or, if that is less, the row.
    Known find(const Int *row, int64_t cols, int64_t rank, Guess &guess, Int *sample) const {
        Known known{before(kLowest), kHighest, cols, 0};
        const auto look = [&](const Bracket &b) {
            const Counts found = count(row, cols, b);
            known.learn(rank, b, found);
            return found.over < rank && rank <= found.over + found.between;
        };
        if (!guess.known || !look(guess.bracket)) {
            guess = {false, sampled(row, cols, rank, guess.bracket, sample), 0, 0};
            look(guess.bracket);
        }
        for (int pass = 0; !known.one() && known.between() > kFew; ++pass)
            look(pass < kInterpolated ? interpolated(known, rank)
                 : pass % 2           ? one_of_them(row, cols, known)
                                      : thirds(known));
        return known;
    }

    // The cut of a row of which a bracket has `size`, of any length: `list` holds them, and a word more is overwritten.
    Cut among(const Known &known, int64_t rank, Int *list) const {
        if (known.one())
            return {known.high, rank - known.over, known.between()};
        return nth(list, known.between(), rank - known.over, known.low + 1, known.high);
    }

    // list has room for the row and two words.
    Cut cut(const Int *row, int64_t cols, int64_t rank, Guess &guess, Int *list, Int *sample) const {
        Known known{before(kLowest), kHighest, cols, 0};
        if (cols < kSampled)
            std::memcpy(list, row, cols * sizeof(Int));
        else if (known = find(row, cols, rank, guess, sample); !known.one())
            gather(row, cols, {known.low, known.high}, list, cols + kWord);
        return among(known, rank, list);
    }

    int64_t order(Int number) const { return integer ? number : order_of(number); }

    // After a row whose cut is `found`, for the next one.
    void learn(int64_t found, Guess &guess) const {
        const double at = value(found), off = std::abs(at - guess.centre);
        if (!guess.known) {
            guess.width = std::max(0.0, std::min(value(guess.bracket.high) - at, at - value(guess.bracket.low)) / 2);
        } else if (off > 8 * guess.width) {
            guess.known = false;
            return;
        } else {
            guess.width = std::max(0.95 * guess.width, 3 * off);
        }
        guess.known = true;
        guess.centre = at;
        guess.bracket = {min(key(at - guess.width), before(found)), max(key(at + guess.width), found)};
    }

  private:
    static constexpr int kRanked = 8;       // are compared with one another
    static constexpr int kInterpolated = 3; // passes

    const int fraction_; // where it would be as fp64's

    // Keys inside what is known, which has two or more.
    static Bracket inside(const Known &known, int64_t low, int64_t high) {
        const int64_t first = known.low + 1, last = known.high - 1;
        low = min(max(low, first), last);
        return {low, min(max(high, low), last)};
    }

    // About the key alone that the middle one in the row of those between has.
    Bracket one_of_them(const Int *row, int64_t cols, const Known &known) const {
        const int64_t key = order(row[place(row, cols, {known.low, known.high}, (known.between() + 1) / 2)]);
        return inside(known, before(key), key);
    }

    static Bracket thirds(const Known &known) {
        const auto third = static_cast<int64_t>((uint64_t(known.high) - uint64_t(known.low)) / 3);
        return inside(known, known.low + third, known.high - third);
    }

    // Were the numbers between spread evenly, the rank-th would lie between these two with as many on either side
    // as 1.5 standard deviations of its place.
    Bracket interpolated(const Known &known, int64_t rank) const {
        const double all = double(known.between()), place = double(rank - known.over) - 0.5;
        const double margin = 1.5 * std::sqrt(place * (1 - place / all)) + 1, top = value(known.high),
                     bottom = value(known.low);
        const auto at = [&](double i) {
            const double share = std::max(0.0, std::min(1.0, i / all));
            return key(top * (1 - share) + bottom * share);
        };
        return inside(known, at(place + margin) - 1, at(place - margin));
    }

    // A key as its number, up to a factor, and back.
    double value(int64_t key) const {
        if (integer)
            return double(key);
        const int64_t bits = min(std::abs(max(key, -kHighest)), kHighest) << fraction_,
                      finite = min(bits, 0x7fefffffffffffff);
        return key < 0 ? -bit_cast<double>(finite) : bit_cast<double>(finite);
    }
    int64_t key(double value) const {
        if (integer)
            return max(before(kLowest), min(int64_t(std::floor(value)), kHighest));
        const int64_t size = min(bit_cast<int64_t>(std::abs(value)) >> fraction_, kHighest);
        return value < 0 ? -size : size;
    }

    Cut among_few(const Int *list, int64_t size, int64_t rank) const {
        int64_t keys[kRanked];
        for (int i = 0; i < kRanked; ++i)
            keys[i] = i >= size ? INT64_MIN : integer ? list[i] : order_of(list[i]);
        for (int i = 0;; ++i) {
            int64_t over = 0, ties = 0;
            for (int j = 0; j < kRanked; ++j) {
                over += keys[j] > keys[i];
                ties += keys[j] == keys[i];
            }
            if (over < rank && rank <= over + ties)
                return {keys[i], rank - over, ties};
        }
    }

    // A key above which `least` to `most` of a sample are; where too many have one key, that key, or the one `beside`
    // it.
    int64_t pivot(const Int *sample, int64_t size, int64_t key, int64_t least, int64_t most, int beside) const {
        int64_t low = kLowest, high = kHighest;
        for (;; key = middle(low, high)) {
            const int64_t over = above(sample, size, key);
            if (least <= over && over <= most)
                return key;
            if (over > most)
                low = key + 1;
            else
                high = key;
            if (low == high)
                return max(kLowest, low + beside);
        }
    }
};

} // namespace
} // namespace sparsekit::cpu
