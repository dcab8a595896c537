// The mask that keeps the k highest of every row, of one instruction set `Isa` (see format24_body.h).
//
// A row that is long enough is narrowed to two keys (format24_search.h): what is above both is kept and what is below
// both is not. A pass writes the mask of those, and puts the few between aside with their places, to be written once
// the cut among them is known. Where many are equal to the cut, the first of them are counted before the mask is
// written. Where rows are too few for the threads, all work on one: every pass is cut into parts, whose counts are
// added up, so that who counted what changes nothing. Bound by memory (scores read once and three times again from the
// caches, a byte a column written) about as much as by the comparisons, two a column and pass.
#pragma once
#include "format24_search.h"
#include "linear24.h"

#include <algorithm>
#include <limits>

namespace sparsekit::cpu {
namespace {

// Writes the mask of a row, or of a part of one; each returns whether a number of it is NaN.
template <class Isa, class Int> class RowMask {
    using L = Lanes<Isa, Int>;
    using S = Search<Isa, Int>;
    using Test = Above<Isa, Int>;

    const Reader<Isa, Int> reader_;
    const S search_;

  public:
    explicit RowMask(DType dtype) : reader_(dtype), search_(dtype) {}

    const S &search() const { return search_; }

    // By a cut, of whose ties the first `room` are kept.
    [[gnu::noinline, gnu::flatten]] bool write(const Int *row, int64_t cols, const Cut &cut, uint8_t *mask) const {
        const int64_t end = cut.room >= cut.ties ? cols : end_of_ties(row, cols, cut);
        auto highest = L::set(0);
        const auto write = [&](int64_t from, int64_t to, const Test &test) {
            S::for_row(row + from, to - from, [&](int64_t col, const Int *at, int64_t count) {
                word(test, at, count, mask + from + col, highest);
            });
        };
        write(0, end, Test(before(cut.key), reader_.integer()));
        write(end, cols, Test(cut.key, reader_.integer()));
        return reader_.past(highest);
    }

    // By what is known of the rank-th highest, with kFew or fewer between: these are written last. The next row's
    // numbers lie `next` further on.
    [[gnu::noinline, gnu::flatten]] bool write(const Int *row, int64_t cols, int64_t rank, const Known &known,
                                               Guess &guess, int64_t next, uint8_t *mask) const {
        const Test over(known.high, reader_.integer()), least(known.low, reader_.integer());
        Int numbers[S::kFew], list[S::kFew + 2 * kWord];
        int64_t places[S::kFew], size = 0;
        auto highest = L::set(0);
        S::for_row(row, cols, [&](int64_t col, const Int *at, int64_t count) {
            for (int i = 0; i < kWord; i += 64 / int(sizeof(Int)))
                __builtin_prefetch(row + col + next + i);
            word(over, at, count, mask + col, highest);
            uint64_t between = each<Isa>(at, [&](auto v) { return least.mask(v) & ~over.mask(v); });
            if (least.all())
                between = ~over(at);
            for (between &= low_bits(count); between; between &= between - 1) {
                const int i = __builtin_ctzll(between);
                numbers[size] = at[i];
                places[size++] = col + i;
            }
        });
        std::copy_n(numbers, size, list);
        const Cut cut = search_.among(known, rank, list);
        search_.learn(cut.key, guess);
        int64_t room = cut.room;
        for (int64_t i = 0; i < size; ++i) {
            const int64_t key = search_.order(numbers[i]);
            const bool tie = key == cut.key;
            mask[places[i]] = key > cut.key || (tie && room > 0);
            room -= tie;
        }
        return reader_.past(highest);
    }

  private:
    void word(const Test &test, const Int *at, int64_t count, uint8_t *out, typename L::V &highest) const {
        uint8_t copy[kWord], *to = count == kWord ? out : copy;
        const auto kept = [&](int i) {
            const auto v = L::load(at + i);
            highest = L::max(highest, L::land(v, reader_.magnitude));
            return test.mask(v);
        };
        L::store_ones(kept, to);
        if (test.all())
            std::memset(to, 1, kWord);
        if (to == copy)
            std::memcpy(out, copy, count);
    }

    // Past the last tie that is kept, where not all are.
    int64_t end_of_ties(const Int *row, int64_t cols, const Cut &cut) const {
        constexpr int64_t kStep = 16 * kWord;
        const Bracket ties{before(cut.key), cut.key};
        int64_t room = cut.room;
        for (int64_t col = 0; room > 0 && col < cols; col += kStep) {
            const int64_t count = min(kStep, cols - col), found = search_.count(row + col, count, ties).between;
            if (found >= room)
                return col + search_.place(row + col, count, ties, room) + 1;
            room -= found;
        }
        return room > 0 ? cols : 0;
    }
};

// The cut of all or none of a row's columns.
template <class Int> Cut of_all(int64_t cols, int64_t kept) {
    return kept == cols ? Cut{std::numeric_limits<Int>::min(), cols, 0} : Cut{std::numeric_limits<Int>::max(), 0, 1};
}

template <class Isa, class Int>
void mask_row(const MaskRows &p, const Int *row, int64_t place, int64_t next, Guess &guess, Int *list, Int *sample,
              First &nan) {
    const RowMask<Isa, Int> writer(p.scores.dtype);
    const auto &search = writer.search();
    uint8_t *mask = p.mask + place * p.cols;
    const auto write = [&] {
        if (p.kept == 0 || p.kept == p.cols)
            return writer.write(row, p.cols, of_all<Int>(p.cols, p.kept), mask);
        if (p.cols < search.kSampled)
            return writer.write(row, p.cols, search.cut(row, p.cols, p.kept, guess, list, sample), mask);
        const Known known = search.find(row, p.cols, p.kept, guess, sample);
        if (known.between() <= search.kFew)
            return writer.write(row, p.cols, p.kept, known, guess, next, mask);
        search.learn(known.high, guess);
        return writer.write(row, p.cols, search.among(known, p.kept, list), mask);
    };
    if (write())
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
    const RowMask<Isa, Int> writer_;
    const S &search_;
    const Int *row_ = nullptr;
    const int threads_;
    const int64_t cols_, size_, parts_, room_; // of a part; parts; of a worker's list
    const Scratch scratch_;
    Part part_[kParts];
    Int *end_[kMaxThreads]; // of what a worker's list holds

  public:
    SharedRow(const MaskRows &p, int threads)
        : p_(p), writer_(p.scores.dtype), search_(writer_.search()),
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
            if (writer_.write(row, cols, own, p_.mask + place * cols_ + (row - row_)))
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
        Guess guess;
        const Cut cut = search_.cut(list, found.between, p_.kept - found.over, guess, spare, sample);
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
    // Turned over, two lines of the cache: of more rows so much is written that the caches have lost the first of it.
    // To read down the columns, with no work done, takes as long as a copy of all that is read and written (Zen 3, two
    // threads). No faster: to count down the columns, a lane a row; to turn over a byte a number, where it stands about
    // a sampled cut, and fetch the few at the cut.
    const int64_t most = turned ? max(1, min(128 / sizeof(Int), (4 << 20) / (stride * sizeof(Int))))
                                : max(1, min(131072 / p.cols, ceil_div(p.rows, 8 * threads)));
    const int64_t band = min(p.rows, most), bands = ceil_div(p.rows, band);
    const int used = static_cast<int>(min(min(threads, min(kMaxThreads, bands)), 1 + (bytes >> 17)));
    // Of a worker: the row's gathered, the sample, and the rows turned over.
    const int64_t listed = stride + kWord, sampled = min(p.cols, Search<Isa, Int>::kMostSampled),
                  room = listed + sampled + (turned ? band * stride : 0);
    const Scratch scratch(ceil_div(used * room * int64_t(sizeof(Int)), sizeof(float)));
    Guess guesses[kMaxThreads];
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
        Guess guess = guesses[worker];
        for (int64_t r = 0; r < rows; ++r)
            mask_row<Isa>(p, tile.data + r * tile.stride, row + r, tile.stride, guess, list, sample, nan);
        guesses[worker] = guess;
    });
    p.status[0] = nan.place();
}

template <class Isa> void mask_rows(const MaskRows &p, int threads) {
    with_integer(width_of(p.scores.dtype), [&](auto s) { mask_rows<Isa, decltype(s)>(p, threads); });
}

} // namespace
} // namespace sparsekit::cpu
