// The mask that keeps the k highest of every row, of one instruction set `Isa` (see format24_body.h).
//
// First the cut, the k-th highest key: a sample of the row gives two keys between which it lies, all but surely. Passes
// that count what is above a key, three operations a vector, halve what is between, where the first-level cache holds
// the row and a vector much of it; what is left is gathered, and among those few the range of keys is quartered until
// the cut is left. The counts are exact, so they also say where the sample was wrong: such a row is quartered as a
// whole. A last pass writes the mask. Where rows are too few for the threads, all work on one: every pass is cut into
// parts, whose counts are added up, so that who counted what changes nothing. Bound by memory (scores read once and
// again from the caches, a byte a column written) about as much as by the comparisons, two a column and pass.
//
// Isa::gather puts those of 64 numbers that are kept next to one another; past them up to a word may be written.
#pragma once
#include "format24_body.h"
#include "linear24.h"

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

// A byte a column, of `count` columns.
template <class Isa> inline void store_mask(uint64_t bits, uint8_t *out, int64_t count) {
    using L = Lanes<Isa, int8_t>;
    int8_t copy[kWord], *to = count == kWord ? reinterpret_cast<int8_t *>(out) : copy;
    for (int i = 0; i < kWord; i += L::kLanes)
        L::store(to + i, L::land(L::from_bits(bits >> i), L::set(1)));
    if (to == copy)
        std::memcpy(out, copy, count);
}

// The columns whose key is above `key`, from the bits of the scores: for a negative key those whose magnitude is not,
// as a negative number's, at least as large.
template <class Isa, class Int> class Above {
    using L = Lanes<Isa, Int>;
    typename L::V flip_, bound_;
    uint64_t invert_;

  public:
    Above(int64_t key, bool integer) {
        const bool negative = key < 0 && !integer, all = key < std::numeric_limits<Int>::min();
        flip_ = L::set(static_cast<Int>(negative ? uint64_t{1} << (8 * sizeof(Int) - 1) : 0));
        bound_ = L::set(static_cast<Int>(all ? std::numeric_limits<Int>::max() : negative ? ~key : key));
        invert_ = negative || all ? ~uint64_t{0} : 0;
    }
    uint64_t operator()(const Int *p) const {
        return invert_ ^ each<Isa>(p, [&](auto v) { return L::gt(L::lxor(v, flip_), bound_); });
    }
    // How many of so many words.
    int64_t count(const Int *p, int64_t words) const {
        const int64_t found = L::count(words, [&](int64_t i) { return L::gt(L::lxor(L::load(p + i), flip_), bound_); });
        return invert_ ? words * kWord - found : found;
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

    const bool integer;
    const int64_t binade; // of keys, where numbers double

    explicit Search(DType dtype)
        : integer(numbers(dtype).integer),
          binade(integer ? kHighest : numbers(dtype).largest & -numbers(dtype).largest) {}

    template <class Body> static void for_row(const Int *row, int64_t cols, const Body &body) {
        for_words(Tile<Int>{row, 0}, Span{0, 1, 0, cols}, Int{0},
                  [&](int64_t, int64_t col, const Int *at, int64_t count, int64_t) { body(col, at, count); });
    }

    [[gnu::noinline, gnu::flatten]] int64_t above(const Int *row, int64_t cols, int64_t key) const {
        const Test test(key, integer);
        const int64_t words = cols / kWord;
        int64_t found = test.count(row, words);
        for_row(row + words * kWord, cols % kWord, [&](int64_t, const Int *at, int64_t count) {
            found += __builtin_popcountll(test(at) & low_bits(count));
        });
        return found;
    }

    int64_t equal(const Int *row, int64_t cols, int64_t key) const {
        return above(row, cols, before(key)) - above(row, cols, key);
    }

    // What is between goes to `list`, while a word more than it has room there.
    [[gnu::noinline, gnu::flatten]] Counts gather(const Int *row, int64_t cols, const Bracket &b, Int *list,
                                                  int64_t room, int64_t next = 0) const {
        const Test over(b.high, integer), some(b.low, integer);
        Counts found{0, 0};
        for_row(row, cols, [&](int64_t, const Int *at, int64_t count) {
            if (next)
                for (int i = 0; i < kWord; i += 64 / int(sizeof(Int)))
                    __builtin_prefetch(at + next + i);
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
            if (left == size || (left > kFew && size <= kWord))
                continue;
            gather(list, size, {before(low), high}, list, size + kWord);
            rank -= over;
            over = 0;
            size = least = left;
            if (size <= kFew)
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

    // `row` may be `list`. list has room for the row and two words, sample for kMostSampled or, if that is less, the
    // row.
    Cut find(const Int *row, int64_t cols, int64_t rank, Bracket &guess, Int *list, Int *sample,
             int64_t next = 0) const {
        if (cols >= kSampled) {
            const Bracket b = guess = sampled(row, cols, rank, guess, sample);
            const bool near = sizeof(Int) <= 2 && cols * int64_t(sizeof(Int)) <= kNearBytes;
            const Counts found = near ? count(row, cols, b) : gather(row, cols, b, list, cols + kWord, next);
            const int64_t over = found.over, least = over + found.between;
            if (rank <= over) { // among those above: all of one key?
                const int64_t higher = above(row, cols, b.high + 1);
                if (higher < rank)
                    return {b.high + 1, rank - higher, over - higher};
            } else if (rank <= least) {
                return near ? between(row, cols, rank, b, found, list, next)
                            : nth(list, found.between, rank - over, b.low + 1, b.high);
            } else {
                const int64_t all = above(row, cols, before(b.low));
                if (all >= rank)
                    return {b.low, rank - least, all - least};
            }
        }
        std::memcpy(list, row, cols * sizeof(Int));
        return nth(list, cols, rank, kLowest, kHighest);
    }

  private:
    static constexpr int kFew = 8;               // are compared with one another
    static constexpr int kHalvings = 8;          // most of a bracket
    static constexpr int64_t kNearBytes = 32768; // of a row that the first-level cache holds: counting again is cheap

    Counts count(const Int *row, int64_t cols, const Bracket &b) const {
        const int64_t over = above(row, cols, b.high);
        return {over, b.low < b.high ? above(row, cols, b.low) - over : 0};
    }

    // The cut, which is known to lie in a bracket. To count is far faster than to gather: the bracket is halved until
    // it holds few of the row.
    Cut between(const Int *row, int64_t cols, int64_t rank, Bracket b, Counts found, Int *list, int64_t next) const {
        for (int i = 0; i < kHalvings && b.low + 1 < b.high && found.between > max(kWord, cols / 256); ++i) {
            const int64_t half = half_way(b), over = above(row, cols, half), least = found.over + found.between;
            if (over < rank) {
                b.high = half;
                found = {over, least - over};
            } else {
                b.low = half;
                found = {found.over, over - found.over};
            }
        }
        if (b.low + 1 == b.high)
            return {b.high, rank - found.over, found.between};
        gather(row, cols, b, list, cols + kWord, next);
        return nth(list, found.between, rank - found.over, b.low + 1, b.high);
    }

    // A key inside a bracket of more than one: half way between its numbers, about, be they far apart as keys.
    int64_t half_way(const Bracket &b) const {
        const int64_t half = middle(b.low, b.high);
        if (b.low >= 0)
            return max(half, b.high - binade);
        return b.high <= 0 ? min(half, b.low + binade) : half;
    }

    Cut among_few(const Int *list, int64_t size, int64_t rank) const {
        int64_t keys[kFew];
        for (int i = 0; i < kFew; ++i)
            keys[i] = i >= size ? INT64_MIN : integer ? list[i] : order_of(list[i]);
        for (int i = 0;; ++i) {
            int64_t over = 0, ties = 0;
            for (int j = 0; j < kFew; ++j) {
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

// Writes the mask of `cols` columns of a row, of whose ties the first `room` are kept; returns whether one is NaN.
template <class Isa, class Int>
[[gnu::noinline, gnu::flatten]] bool write_row(const Reader<Isa, Int> &reader, const Int *row, int64_t cols,
                                               const Cut &cut, uint8_t *mask) {
    using L = Lanes<Isa, Int>;
    const Above<Isa, Int> over(cut.key, reader.integer()), least(before(cut.key), reader.integer());
    int64_t room = cut.room;
    const bool all = room >= cut.ties;
    auto highest = L::set(0);
    Search<Isa, Int>::for_row(row, cols, [&](int64_t col, const Int *at, int64_t count) {
        uint64_t kept = all ? least(at) : over(at);
        if (!all && room > 0) {
            uint64_t ties = least(at) & ~kept & low_bits(count);
            if (const int64_t equal = __builtin_popcountll(ties); equal <= room) {
                room -= equal;
                kept |= ties;
            } else {
                for (; room > 0; --room, ties &= ties - 1)
                    kept |= ties & -ties;
            }
        }
        store_mask<Isa>(kept, mask + col, count);
#pragma GCC unroll 16
        for (int i = 0; i < kWord; i += L::kLanes)
            highest = L::max(highest, L::land(L::load(at + i), reader.magnitude));
    });
    return reader.past(highest);
}

// The cut of all or none of a row's columns.
template <class Int> Cut of_all(int64_t cols, int64_t kept) {
    return kept == cols ? Cut{std::numeric_limits<Int>::min(), cols, 0} : Cut{std::numeric_limits<Int>::max(), 0, 1};
}

template <class Isa, class Int>
void mask_row(const MaskRows &p, const Int *row, int64_t place, int64_t next, Bracket &guess, Int *list, Int *sample,
              First &nan) {
    const Reader<Isa, Int> reader(p.scores.dtype);
    const Search<Isa, Int> search(p.scores.dtype);
    const Cut cut = p.kept == 0 || p.kept == p.cols ? of_all<Int>(p.cols, p.kept)
                                                    : search.find(row, p.cols, p.kept, guess, list, sample, next);
    if (write_row<Isa>(reader, row, p.cols, cut, p.mask + place * p.cols))
        nan.report(place);
}

// A row that all threads work on.
template <class Isa, class Int> class SharedRow {
    using S = Search<Isa, Int>;
    static constexpr int kParts = 256;
    static constexpr int64_t kLeast = 16384; // numbers of a part

    struct Part {
        const Int *between; // in its worker's list
        Counts counts;
        int64_t ties;
    };

    const MaskRows &p_;
    const Reader<Isa, Int> reader_;
    const S search_;
    const Int *row_ = nullptr;
    const int threads_;
    const int64_t cols_, size_, parts_, room_; // of a part; parts; of a worker's list
    const Scratch scratch_;
    Part part_[kParts];
    Int *end_[kMaxThreads]; // of what a worker's list holds

  public:
    SharedRow(const MaskRows &p, int threads)
        : p_(p), reader_(p.scores.dtype), search_(p.scores.dtype),
          threads_(static_cast<int>(min(threads, kMaxThreads))), cols_(p.cols),
          size_(max(kLeast, ceil_div(ceil_div(p.cols, kParts), kWord) * kWord)), parts_(ceil_div(cols_, size_)),
          room_(cols_ / 8 + 2 * kWord), scratch_(floats((threads_ + 2) * room_ + S::kMostSampled)) {}

    void mask(const Int *scores, int64_t place, First &nan) {
        row_ = scores;
        const Cut cut = p_.kept == 0 || p_.kept == cols_ ? of_all<Int>(cols_, p_.kept) : find();
        int64_t room = cut.room;
        if (room < cut.ties)
            for (int64_t i = 0; i < parts_; ++i) { // what is left for the part
                const int64_t ties = part_[i].ties;
                part_[i].ties = room;
                room = max(0, room - ties);
            }
        each_part([&](Part &part, const Int *row, int64_t cols, int) {
            const bool all = cut.room >= cut.ties;
            const Cut own = all ? cut : Cut{cut.key, part.ties, cols + part.ties + 1};
            if (write_row<Isa>(reader_, row, cols, own, p_.mask + place * cols_ + (row - row_)))
                nan.report(place);
        });
    }

  private:
    static int64_t floats(int64_t numbers) { return ceil_div(numbers * int64_t(sizeof(Int)), sizeof(float)); }

    template <class Body> void each_part(const Body &body) {
        parallel_for(parts_, threads_, [&](int64_t i, int worker) {
            body(part_[i], row_ + i * size_, min(size_, cols_ - i * size_), worker);
        });
    }

    template <class Value> int64_t sum(const Value &value) const {
        int64_t total = 0;
        for (int64_t i = 0; i < parts_; ++i)
            total += value(part_[i]);
        return total;
    }

    // The counts of every part, and of all.
    Counts gather(const Bracket &b) {
        Int *const lists = reinterpret_cast<Int *>(scratch_.data());
        for (int i = 0; i < threads_; ++i)
            end_[i] = lists + i * room_;
        each_part([&](Part &part, const Int *row, int64_t cols, int worker) {
            Int *&end = end_[worker];
            part = {end, search_.gather(row, cols, b, end, lists + (worker + 1) * room_ - end), 0};
            end += part.counts.between;
        });
        return {sum([](const Part &part) { return part.counts.over; }),
                sum([](const Part &part) { return part.counts.between; })};
    }

    // By part, what differs between the number of keys above `key` and what is known of it; all of it.
    template <class Known> int64_t count_ties(int64_t key, const Known &known) {
        each_part([&](Part &part, const Int *row, int64_t cols, int) {
            part.ties = std::abs(search_.above(row, cols, key) - known(part.counts));
        });
        return sum([](const Part &part) { return part.ties; });
    }

    // A sample first; where it was wrong, halvings of the range until what is left goes into a list.
    Cut find() {
        const int64_t rank = p_.kept;
        Int *const list = reinterpret_cast<Int *>(scratch_.data()) + threads_ * room_, *const spare = list + room_,
                   *const sample = spare + room_;
        int64_t low = S::kLowest, high = S::kHighest; // of the cut
        int64_t least = cols_, beyond = 0;            // keys from low on, keys above high
        const auto fits = [&] { return least - beyond + 2 * kWord <= room_; };
        for (Bracket b = search_.sampled(row_, cols_, rank, {0, 0}, sample);;) {
            const Counts found = gather(b);
            const int64_t below = found.over + found.between;
            if (rank <= found.over) {
                const int64_t key = b.high + 1, ties = count_ties(key, [](const Counts &c) { return c.over; });
                low = key + 1;
                least = found.over - ties;
                if (least < rank)
                    return {key, rank - least, ties};
            } else if (rank > below) {
                const int64_t ties = count_ties(before(b.low), [](const Counts &c) { return c.over + c.between; });
                high = b.low - 1;
                beyond = below + ties;
                if (beyond >= rank)
                    return {b.low, rank - below, ties};
            } else {
                low = b.low + 1;
                high = b.high;
                least = below;
                beyond = found.over;
                if (fits())
                    return among(found, list, spare, sample);
            }
            const int64_t half = middle(low, high);
            b = fits() ? Bracket{before(low), high} : Bracket{half, half};
        }
    }

    // The cut is one of those between.
    Cut among(const Counts &found, Int *list, Int *spare, Int *sample) {
        Int *end = list;
        for (int64_t i = 0; i < parts_; ++i)
            end = std::copy_n(part_[i].between, part_[i].counts.between, end);
        Bracket guess{0, 0};
        const Cut cut = search_.find(list, found.between, p_.kept - found.over, guess, spare, sample);
        if (cut.room < cut.ties)
            parallel_for(parts_, threads_, [&](int64_t i, int) {
                part_[i].ties = search_.equal(part_[i].between, part_[i].counts.between, cut.key);
            });
        return cut;
    }
};

template <class Isa, class Int> void mask_rows(const MaskRows &p, int threads) {
    const bool turned = p.scores.col_stride != 1;
    const int64_t bytes = p.rows * p.cols * int64_t(sizeof(Int) + 1);
    First nan;
    if (!turned && p.rows < 4 * threads && p.cols >= 1 << 17) {
        SharedRow<Isa, Int> shared(p, static_cast<int>(min(threads, 1 + (bytes / p.rows >> 17))));
        for (int64_t row = 0; row < p.rows; ++row)
            shared.mask(static_cast<const Int *>(p.scores.data) + row * p.scores.row_stride, row, nan);
        p.status[0] = nan.place();
        return;
    }
    const int64_t stride = ceil_div(p.cols, kWord) * kWord + kWord; // not a multiple of a page: see linear24_body.h
    const int64_t most =
        turned ? max(1, min(512 / sizeof(Int), (4 << 20) / (stride * sizeof(Int)))) : max(1, 16384 / p.cols);
    const int64_t band = min(p.rows, most), bands = ceil_div(p.rows, band);
    const int used = static_cast<int>(min(min(threads, min(kMaxThreads, bands)), 1 + (bytes >> 17)));
    // Of a worker: the row's gathered, the sample, and the rows turned over.
    const int64_t listed = stride + kWord, sampled = min(p.cols, Search<Isa, Int>::kMostSampled),
                  room = listed + sampled + (turned ? band * stride : 0);
    const Scratch scratch(ceil_div(used * room * int64_t(sizeof(Int)), sizeof(float)));
    parallel_for(bands, used, [&](int64_t task, int worker) {
        const int64_t row = task * band, rows = min(band, p.rows - row);
        Int *list = reinterpret_cast<Int *>(scratch.data()) + worker * room, *sample = list + listed,
            *copy = sample + sampled;
        Tile<Int> tile{static_cast<const Int *>(p.scores.data) + row * p.scores.row_stride, p.scores.row_stride};
        if (turned) {
            for (int64_t col = 0; col < p.cols; col += kWord)
                turn<Isa>(p.scores, Span{row, rows, col, min(kWord, p.cols - col)}, copy + col, stride);
            tile = {copy, stride};
        }
        Bracket guess{0, 0};
        for (int64_t r = 0; r < rows; ++r)
            mask_row<Isa>(p, tile.data + r * tile.stride, row + r, tile.stride, guess, list, sample, nan);
    });
    p.status[0] = nan.place();
}

template <class Isa> void mask_rows(const MaskRows &p, int threads) {
    with_integer(width_of(p.scores.dtype), [&](auto s) { mask_rows<Isa, decltype(s)>(p, threads); });
}

} // namespace
} // namespace sparsekit::cpu
