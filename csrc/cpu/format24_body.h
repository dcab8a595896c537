// The 2:4 format ops of one instruction set `Isa`: tiles of them all, what is pruned and compressed of a tile, expand.
//
// Everything goes by words, 64 columns of one row: what is chosen becomes 64 bits, a bit a column, and ranking,
// metadata and the search for what is wrong are arithmetic on those. Vectors compare numbers and move values, nothing
// else. A task owns tiles of the matrix. Rows that lie along memory are read where they are; of any other matrix a tile
// is turned over into a buffer in the first-level cache. Bound by memory: the weight (and scores) read once, what is
// written written once.
//
// Isa provides Lanes<Int>, a vector of kLanes signed integers: load, store, stream (a store past the caches, to a whole
// aligned vector), set, land (and), lor, lxor, min, max, sum, the masks gt (of a > b) and test (of a & b != 0),
// from_bits (all ones in the lanes of a bit mask), nonzero(a, b) (a where a & b is not zero, else zero), rotate<r>, in
// which the lane of column j of a group of four has its column (j + r) % 4, order (integers ordered as the numbers are,
// -0.0 as +0.0) and flipped_abs (|int8| with the sign bit flipped). A mask is bits, or a vector whose lanes are all
// ones or none: select(mask, a, b) has a where it is, bits(mask) are its bits, word(body) those of 64 columns, of which
// body(i) gives the mask of the i-th on, store_ones(body, out) makes them bytes, lanes(mask) is the mask as a vector.
// count(words, body) is how many columns of so many words have the mask. best<m>(v, n) has the n highest keys of every
// group of m, a tie going to the left, for m = 4 and, from kLeastRanked up to kMostRanked, 2 and 8. Isa::pack gathers
// the 32 kept of 64 values, those that are live as clean makes them and zeros for the rest: of every group the first
// two that are live are kept, then the lowest. Isa::unpack puts 32 values at the kept of 64 places and zeros elsewhere;
// Isa::fence ends a run of streamed stores. Unnamed namespace: see epilogue.h.
#pragma once
#include "format24.h"
#include "format24_bits.h"
#include "threads.h"

#include <algorithm>
#include <type_traits>
#include <utility>

namespace sparsekit::cpu {
namespace {

constexpr int kRoomBytes = 32768; // of a tile that is turned over
constexpr int kTileWords = 64;    // most of a tile, and rows of one that is turned over: a line of the cache or a few
constexpr int kStrip = 8;         // such tiles side by side, before those below: their metadata are a line
constexpr int kDown = 512;        // bytes of a column that are read at once: memory gives them as fast as a row's

// A matrix that leaves no room in the caches for what is written of it.
constexpr int64_t kPastBytes = int64_t{1} << 22;

constexpr int kTileSteps = 32; // most of a tile in place

template <class Int> constexpr int kRoom = kRoomBytes / sizeof(Int);

template <class Body> auto with_integer(int width, const Body &body) {
    switch (width) {
    case 1:
        return body(int8_t{});
    case 2:
        return body(int16_t{});
    case 4:
        return body(int32_t{});
    default:
        return body(int64_t{});
    }
}

// ---- tiles ----

struct Span {
    int64_t row, rows, col, cols;
};

// `step` columns are what is never divided: a word, or as many of its columns as are whole groups.
struct Tiling {
    int64_t rows, cols, tile_rows, tile_cols, down, across, strip;

    Tiling(int64_t rows, int64_t cols, int64_t step, int turned) : rows(rows), cols(cols) {
        if (turned) { // down the columns, which are a page of memory or more apart: a strip's pages are soon in use
                      // again
            tile_cols = step;
            tile_rows = min(kTileWords, kRoomBytes / turned / (ceil_div(step, kWord) * kWord));
        } else {
            tile_cols = step * min(ceil_div(cols, step), kTileSteps);
            tile_rows = max(1, kTileSteps / ceil_div(tile_cols, step));
        }
        down = ceil_div(rows, tile_rows);
        across = ceil_div(cols, tile_cols);
        strip = turned ? min(kStrip, across) : across;
    }

    void set_rows(int64_t count) {
        tile_rows = count;
        down = ceil_div(rows, count);
    }

    Span span(int64_t tile) const {
        const int64_t left = tile / (strip * down) * strip, width = min(strip, across - left), at = tile - left * down;
        const int64_t row = at / width * tile_rows, col = (left + at % width) * tile_cols;
        return {row, min(tile_rows, rows - row), col, min(tile_cols, cols - col)};
    }
};

// body(span, next) for every tile and the one after it (of the last, an empty one), on as many threads as `bytes` read
// and written are worth; done() after some tiles, on the thread that had them.
template <class Body, class Done>
void for_tiles(const Tiling &t, int64_t bytes, int threads, const Body &body, const Done &done) {
    const int64_t tiles = t.down * t.across, of_task = max(1 << 16, min(1 << 18, bytes / (16 * threads)));
    const int64_t batch = max(min(t.strip, kStrip), of_task / max(1, bytes / tiles));
    const int used = static_cast<int>(min(min(threads, kMaxThreads), 1 + (bytes >> 17)));
    parallel_for(ceil_div(tiles, batch), used, [&](int64_t task, int) {
        Span here = t.span(task * batch);
        for (int64_t tile = task * batch + 1, end = min(tiles, (task + 1) * batch); tile <= end; ++tile) {
            const Span next = tile < tiles ? t.span(tile) : Span{};
            body(here, next);
            here = next;
        }
        done();
    });
}

template <class Int> struct Tile {
    const Int *data;
    int64_t stride; // of a row; those of a column are neighbours
};

// In every lane of kCols numbers: half of a's, from the `first` on, interleaved with b's.
template <int kCols, int first, class V, size_t... i>
inline void interleave(const V &a, const V &b, V &to, std::index_sequence<i...>) {
    to = __builtin_shufflevector(a, b, (i / kCols * kCols + first + i % kCols / 2 + i % 2 * sizeof...(i))...);
}

constexpr int kSide = 8; // of a block that is turned over in registers

// to[r * stride + c] = from[c * col_stride + r], of kRows >= kCols rows, all of a column in one vector. Each pass
// interleaves the first half of the columns with the second, in lanes of kCols.
template <int kCols = kSide, int kRows = kSide, class Int>
inline void turn_block(const Int *from, int64_t col_stride, Int *to, int64_t stride) {
    using Lane = Integer<Int>;
    typedef Lane V [[gnu::vector_size(kRows * sizeof(Lane))]];
    constexpr std::make_index_sequence<kRows> places;
    V a[kCols], b[kCols];
#pragma GCC unroll 16
    for (int i = 0; i < kCols; ++i)
        std::memcpy(&a[i], from + i * col_stride, sizeof(V));
#pragma GCC unroll 4
    for (int pass = 1; pass < kCols; pass *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < kCols / 2; ++i) {
            interleave<kCols, 0>(a[i], a[i + kCols / 2], b[2 * i], places);
            interleave<kCols, kCols / 2>(a[i], a[i + kCols / 2], b[2 * i + 1], places);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kCols; ++i)
            a[i] = b[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCols; ++i)
#pragma GCC unroll 8
        for (int lane = 0; lane < kRows / kCols; ++lane)
            std::memcpy(to + (lane * kCols + i) * stride, reinterpret_cast<const Int *>(&a[i]) + lane * kCols,
                        kCols * sizeof(Int));
}

// Copies a span of a matrix to `room`, rows `stride` apart.
template <class Isa, class Int>
[[gnu::noinline, gnu::flatten]] void turn(const Matrix &m, const Span &s, Int *room, int64_t stride) {
    const Int *from = static_cast<const Int *>(m.data) + s.row * m.row_stride + s.col * m.col_stride;
    constexpr int kRows = Isa::template Lanes<Int>::kLanes, kCols = min(16 / int(sizeof(Int)), kRows);
    const auto copy = [&](int64_t row, int64_t row_end, int64_t col, int64_t col_end) {
        for (int64_t r = row; r < row_end; ++r)
            for (int64_t c = col; c < col_end; ++c)
                room[r * stride + c] = from[r * m.row_stride + c * m.col_stride];
    };
    if (m.row_stride != 1)
        return copy(0, s.rows, 0, s.cols);
    const int64_t rows = s.rows / kRows * kRows, cols = s.cols / kCols * kCols;
    for (int64_t c = 0; c < cols; c += kCols)
        for (int64_t r = 0; r < rows; r += kRows) {
            const Int *at = from + c * m.col_stride + r;
            if (r * sizeof(Int) % 64 == 0) // the next columns: too far apart for the hardware to guess
                for (int64_t i = kCols; i < 2 * kCols; ++i)
                    __builtin_prefetch(at + i * m.col_stride);
            turn_block<kCols, kRows>(at, m.col_stride, room + r * stride + c, stride);
        }
    copy(0, rows, cols, s.cols);
    copy(rows, s.rows, 0, s.cols);
}

// A span of a matrix, in place where its columns are neighbours, else in `room`, which holds a tile.
template <class Isa, class Int> Tile<Int> fetch(const Matrix &m, const Span &s, Int *room) {
    if (m.col_stride == 1)
        return {static_cast<const Int *>(m.data) + s.row * m.row_stride + s.col, m.row_stride};
    const int64_t stride = ceil_div(s.cols, kWord) * kWord;
    turn<Isa>(m, s, room, stride);
    return {room, stride};
}

// Asks for the next tile, a part of it with each word of this one: memory then works while words are chosen and
// written. Of one that will be turned over a part is a column, else a word. Inlined by force: a compiler may take a
// function that only asks for one without effect.
template <class Int> class Ahead {
    const Int *from_ = nullptr;
    int64_t apart_ = 0, size_ = 0, parts_ = 0;

  public:
    Ahead(const Matrix &m, const Span &next) {
        const bool row = m.col_stride == 1 && next.rows == 1;
        if (!row && (m.row_stride != 1 || m.col_stride == 1))
            return;
        from_ = static_cast<const Int *>(m.data) + next.row * m.row_stride + next.col * m.col_stride;
        apart_ = row ? kWord : m.col_stride;
        size_ = row ? kWord : next.rows;
        parts_ = row ? ceil_div(next.cols, kWord) : next.cols;
    }
    [[gnu::always_inline]] void word(int64_t word) const {
        if (word < parts_)
            for (int64_t i = 0; i < size_; i += 64 / sizeof(Int))
                __builtin_prefetch(from_ + word * apart_ + i, 0, 2);
    }
    [[gnu::always_inline]] void all() const {
        for (int64_t word = 0; word < parts_; ++word)
            this->word(word);
    }
};

// body(row, col, p, count, word) for every word of a tile: p points at 64 numbers, of which `count` are the matrix's,
// the rest `fill`.
template <class Int, class Body>
inline void for_words(const Tile<Int> &tile, const Span &s, Int fill, const Body &body) {
    int64_t word = 0;
    for (int64_t row = 0; row < s.rows; ++row)
        for (int64_t col = 0; col < s.cols; col += kWord, ++word) {
            const Int *p = tile.data + row * tile.stride + col;
            const int64_t count = s.cols - col;
            if (count >= kWord) { // a body of its own, since compress is a fifth slower where the count is a variable
                body(row, col, p, int64_t{kWord}, word);
            } else {
                Int copy[kWord];
                std::fill(std::copy_n(p, count, copy), copy + kWord, fill);
                body(row, col, copy, count, word);
            }
        }
}

// ---- numbers to bits ----

template <class Isa, class Int> using Lanes = typename Isa::template Lanes<Int>;

// The bits that `test` finds in each vector of 64 numbers.
template <class Isa, class Int, class Test> inline uint64_t each(const Int *p, const Test &test) {
    return Lanes<Isa, Int>::word([&](int i) { return test(Lanes<Isa, Int>::load(p + i)); });
}

// The constants of a dtype in every lane.
template <class Isa, class Int> struct Reader {
    using L = Lanes<Isa, Int>;
    using V = typename L::V;
    V magnitude, largest;
    const bool int8;

    explicit Reader(DType dtype)
        : magnitude(L::set(static_cast<Int>(numbers(dtype).magnitude))),
          largest(L::set(static_cast<Int>(numbers(dtype).largest))), int8(numbers(dtype).integer) {}

    bool integer() const { return sizeof(Int) == 1 && int8; }

    // The number; the largest magnitude so far goes to `largest`, a lane each.
    V seen(V v, V &largest) const {
        largest = L::max(largest, L::land(v, magnitude));
        return v;
    }
    uint64_t nan(const Int *p) const {
        return integer() ? 0 : each<Isa>(p, [&](V v) { return L::gt(L::land(v, magnitude), largest); });
    }
    // Integers in the order of |x|, or of x.
    V size(V v) const { return integer() ? L::flipped_abs(v) : L::land(v, magnitude); }
    V order(V v) const { return integer() ? v : L::order(v, magnitude); }
    // Was one of the numbers a NaN, of whose magnitudes this is the largest?
    bool past(V highest) const { return !integer() && L::bits(L::gt(highest, largest)) != 0; }
};

// ---- prune and compress ----

// What is kept of each word of a tile, two of every four; by mask, of those, the live keep their values, the rest
// become zeros. The loops are what a compiler turns into vectors.
struct Choice {
    uint64_t kept[kTileWords], live[kTileWords], meta[kTileWords];

    // Of what is kept already.
    void describe(int64_t words) {
        for (int64_t i = 0; i < words; ++i)
            meta[i] = meta_of(kept[i]);
    }
    // Of `live`; returns whether a group has more than two.
    bool keep_live(int64_t words) {
        uint64_t over = 0;
        for (int64_t i = 0; i < words; ++i) {
            over |= more_than_two(live[i]);
            kept[i] = two_of(live[i]);
            meta[i] = meta_of(kept[i]);
        }
        return over != 0;
    }
};

inline int64_t words_of(const Span &s) { return s.rows * ceil_div(s.cols, kWord); }

// The flat index of a group of four, kp / 4 a row.
inline int64_t group_at(int64_t row, int64_t col, int64_t cols) { return row * (2 * ceil_div(cols, 8)) + col / 4; }

// Reports the group of the first of the columns `bad` of the word at (row, col).
inline void report_word(First &first, uint64_t bad, int64_t row, int64_t col, int64_t cols) {
    if (bad)
        first.report(group_at(row, col + __builtin_ctzll(bad), cols));
}

struct Found {
    First nan, over;
};

// The two best of every four by key(v); the words are fill past the end.
template <class Isa, class Int, class Key, class Also>
inline void choose_best(const Tile<Int> &tile, const Span &s, Int fill, Choice &choice, const Key &key,
                        const Also &also) {
    for_words(tile, s, fill, [&](int64_t row, int64_t col, const Int *at, int64_t, int64_t word) {
        choice.kept[word] = each<Isa>(at, [&](auto v) { return Lanes<Isa, Int>::template best<4>(key(v), 2); });
        also(row, col, at, word);
    });
    choice.describe(words_of(s));
}

// Those of `live`; a group that has more than two is reported.
inline void choose_live(const Prune24 &p, const Span &s, Choice &choice, Found &found) {
    if (!choice.keep_live(words_of(s)))
        return;
    const int64_t across = ceil_div(s.cols, kWord);
    for (int64_t word = 0; word < words_of(s); ++word)
        report_word(found.over, more_than_two(choice.live[word]), s.row + word / across, s.col + word % across * kWord,
                    p.cols);
}

// Reports the group of the first NaN of a tile.
template <class Isa, class W>
[[gnu::noinline, gnu::flatten]] void report_nan(const Prune24 &p, const Span &s, const Tile<W> &w, Found &found) {
    const Reader<Isa, W> reader(p.w.dtype);
    for_words(w, s, W{0}, [&](int64_t row, int64_t col, const W *at, int64_t, int64_t) {
        report_word(found.nan, reader.nan(at), s.row + row, s.col + col, p.cols);
    });
}

// The same where it is not known that there is one.
template <class Isa, class W>
[[gnu::flatten]] void check_nan(const Prune24 &p, const Span &s, const Tile<W> &w, Found &found) {
    const Reader<Isa, W> reader(p.w.dtype);
    auto largest = Lanes<Isa, W>::set(0);
    for_words(w, s, W{0}, [&](int64_t, int64_t, const W *at, int64_t, int64_t) {
#pragma GCC unroll 16
        for (int i = 0; i < kWord; i += Lanes<Isa, W>::kLanes)
            reader.seen(Lanes<Isa, W>::load(at + i), largest);
    });
    if (reader.past(largest))
        report_nan<Isa>(p, s, w, found);
}

// By the numbers themselves: the largest, or those that are not zero, which may be two of a group at most.
template <class Isa, class W>
[[gnu::flatten]] void choose_by_weight(const Prune24 &p, const Span &s, const Tile<W> &w, Choice &choice,
                                       Found &found) {
    using L = Lanes<Isa, W>;
    const Reader<Isa, W> reader(p.w.dtype);
    auto largest = L::set(0);
    const auto size = [&](auto v) { return L::land(reader.seen(v, largest), reader.magnitude); };
    const auto best = [&](const auto &key) { choose_best<Isa>(w, s, W{0}, choice, key, [](auto...) {}); };
    const auto live = [&](const auto &test) {
        for_words(w, s, W{0}, [&](int64_t, int64_t, const W *at, int64_t, int64_t word) {
            choice.live[word] = each<Isa>(at, test);
        });
        choose_live(p, s, choice, found);
    };
    if (p.kind != kByNonzero)
        reader.integer() ? best([&](auto v) { return L::flipped_abs(v); }) : best(size);
    else if (reader.integer())
        live([&](auto v) { return L::test(v, reader.magnitude); });
    else
        live([&](auto v) { return L::gt(size(v), L::set(0)); });
    if (reader.past(largest))
        report_nan<Isa>(p, s, w, found);
}

template <class Isa, class S>
[[gnu::flatten]] void choose_by_rank(const Prune24 &p, const Span &s, const Span &next, Choice &choice, Found &found) {
    S room[kRoom<S>];
    const Tile<S> rank = fetch<Isa>(p.rank, s, room);
    const Ahead<S> ahead(p.rank, next);
    if (p.kind == kByMask) {
        const auto any = Lanes<Isa, S>::set(-1);
        for_words(rank, s, S{0}, [&](int64_t, int64_t, const S *at, int64_t, int64_t word) {
            ahead.word(word);
            choice.live[word] = each<Isa>(at, [&](auto v) { return Lanes<Isa, S>::test(v, any); });
        });
        return choose_live(p, s, choice, found);
    }
    const Reader<Isa, S> reader(p.rank.dtype);
    const S lowest = static_cast<S>(numbers(p.rank.dtype).lowest); // what is past the end loses: it is the last, too
    choose_best<Isa>(
        rank, s, lowest, choice, [&](auto v) { return reader.order(v); },
        [&](int64_t row, int64_t col, const S *at, int64_t word) {
            ahead.word(word);
            report_word(found.nan, reader.nan(at), s.row + row, s.col + col, p.cols);
        });
}

inline bool whole_lines(const void *to, int64_t bytes) {
    return bytes % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

// A copy whose whole lines of the cache go past it: of what fills the caches they would read each from memory first.
template <class Isa> inline void put_past(void *to, const void *from, int64_t bytes) {
    using L = Lanes<Isa, int8_t>;
    int8_t *out = static_cast<int8_t *>(to);
    const int8_t *at = static_cast<const int8_t *>(from);
    const int64_t head = min(bytes, -reinterpret_cast<uintptr_t>(to) % 64), end = head + (bytes - head) / 64 * 64;
    std::memcpy(out, at, head);
    for (int64_t i = head; i < end; i += L::kLanes)
        L::stream(out + i, L::load(at + i));
    std::memcpy(out + end, at + end, bytes - end);
}

// How a tile of a dense matrix knows what is kept: by its choice, of which a mask may let fewer live; or by the
// weights.
enum class Kept { kChosen, kMasked, kLargest };

template <Kept kept_by, class Isa, class W>
[[gnu::flatten]] void write_dense(const Prune24 &p, const Span &s, const Span &next, const Tile<W> &w,
                                  const Choice &choice, bool past, Found &found) {
    using L = Lanes<Isa, W>;
    const Reader<Isa, W> reader(p.w.dtype);
    const Ahead<W> ahead(p.w, next);
    auto largest = L::set(0);
    for_words(w, s, W{0}, [&](int64_t row, int64_t col, const W *at, int64_t count, int64_t word) {
        ahead.word(word);
        alignas(64) W copy[kWord];
        W *out = static_cast<W *>(p.dense) + (s.row + row) * p.cols + s.col + col, *to = count == kWord ? out : copy;
        const bool lines = past && to == out && whole_lines(out, sizeof copy);
#pragma GCC unroll 16
        for (int i = 0; i < kWord; i += L::kLanes) {
            const auto all = reader.seen(L::load(at + i), largest);
            auto v = L::nonzero(all, reader.magnitude); // -0.0 becomes +0.0
            if (kept_by == Kept::kMasked)
                v = L::land(v, L::from_bits(choice.live[word] >> i));
            v = L::land(v, kept_by == Kept::kLargest ? L::lanes(L::template best<4>(reader.size(all), 2))
                                                     : L::from_bits(choice.kept[word] >> i));
            lines ? L::stream(to + i, v) : L::store(to + i, v);
        }
        if (to == copy)
            std::memcpy(out, copy, count * sizeof(W));
    });
    if (reader.past(largest))
        report_nan<Isa>(p, s, w, found);
}

// Of what is kept of a tile the values, zero where they are not live, and the metadata.
template <class Isa, class W>
[[gnu::noinline, gnu::flatten]] void write_packed(const Prune24 &p, const Span &s, const Span &next, const Tile<W> &w,
                                                  const uint64_t *live, const Choice &choice, bool past) {
    constexpr int kHalf = kWord / 2;
    const auto magnitude = Lanes<Isa, W>::set(static_cast<W>(numbers(p.w.dtype).magnitude));
    // -0.0 becomes +0.0: compressing what was expanded then gives the same bits.
    const auto clean = [&](auto v) { return Lanes<Isa, W>::nonzero(v, magnitude); };
    const int64_t bytes = ceil_div(p.cols, 8), across = ceil_div(s.cols, kWord), whole = s.cols / kWord;
    const int64_t used = ceil_div(s.cols, 8), rest = used - 8 * whole;
    const uint64_t *kept = choice.kept, *codes = choice.meta;
    const Ahead<W> ahead(p.w, next);
    alignas(64) W room[kTileWords * kHalf];
    for (int64_t row = 0; row < s.rows; ++row, kept += across, live += across, codes += across) {
        W *const out = static_cast<W *>(p.values) + (s.row + row) * (4 * bytes) + s.col / 2,
                 *values = past ? room : out;
        uint8_t *const meta = p.meta + (s.row + row) * bytes + s.col / 8;
        const W *at = w.data + row * w.stride;
        for (int64_t word = 0; word < whole; ++word) {
            ahead.word(row * across + word);
            Isa::pack(at + word * kWord, kept[word], live[word], clean, values + word * kHalf);
        }
        if (rest) {
            W copy[kWord] = {}, some[kHalf];
            std::copy_n(at + whole * kWord, s.cols - whole * kWord, copy);
            Isa::pack(copy, kept[whole], live[whole], clean, some);
            std::memcpy(values + whole * kHalf, some, 4 * rest * sizeof(W));
        }
        if (past)
            put_past<Isa>(out, room, 4 * used * sizeof(W));
        uint8_t some[8 * kTileWords], *const to = past ? some : meta;
        for (int64_t word = 0; word < whole; ++word)
            store_meta64(codes[word], to + 8 * word);
        if (rest)
            store_meta64(codes[whole], to + 8 * whole, rest);
        if (past)
            put_past<Isa>(meta, some, used);
    }
}

// Without gaps, so that all rows are one where they end with a byte of metadata.
inline bool dense_rows(const Matrix &m, int64_t rows, int64_t cols) {
    return m.col_stride == 1 && (m.row_stride == cols || rows == 1);
}

// One tile; `choose` is for what is chosen by rank.
template <class Isa, class W, class Choose>
void prune_tile(const Prune24 &p, const Span &s, const Span &next, const Choose &choose, Found &found) {
    W room[kRoom<W>];
    const Tile<W> w = fetch<Isa>(p.w, s, room);
    const bool ranked = p.kind == kByScores || p.kind == kByMask;
    const bool past = p.rows * p.cols * int64_t(sizeof(W)) >= kPastBytes;
    Choice choice;
    if (ranked)
        choose(p, s, next, choice, found);
    else if (!p.dense)
        choose_by_weight<Isa, W>(p, s, w, choice, found);
    if (p.dense) {
        const auto write = p.kind == kByMask     ? write_dense<Kept::kMasked, Isa, W>
                           : p.kind == kByScores ? write_dense<Kept::kChosen, Isa, W>
                                                 : write_dense<Kept::kLargest, Isa, W>;
        return write(p, s, next, w, choice, past, found);
    }
    if (ranked)
        check_nan<Isa>(p, s, w, found);
    const bool masked = p.kind == kByMask || p.kind == kByNonzero;
    write_packed<Isa>(p, s, next, w, masked ? choice.live : choice.kept, choice, past);
}

// ---- expand ----

template <class Isa, class W> [[gnu::flatten]] void expand_tile(const Expand24 &p, const Span &s) {
    const int64_t bytes = ceil_div(p.cols, 8);
    for (int64_t row = s.row; row < s.row + s.rows; ++row)
        for (int64_t col = s.col; col < s.col + s.cols; col += kWord) {
            const W *values = static_cast<const W *>(p.values) + row * (4 * bytes) + col / 2;
            const uint8_t *meta = p.meta + row * bytes + col / 8;
            W *out = static_cast<W *>(p.dense) + row * p.cols + col;
            if (const int64_t count = p.cols - col; count >= kWord) {
                Isa::unpack(values, kept_of(load_meta64(meta)), out);
            } else {
                const int64_t used = ceil_div(count, 8);
                W some[kWord / 2] = {}, copy[kWord];
                std::memcpy(some, values, 4 * used * sizeof(W));
                Isa::unpack(some, kept_of(load_meta64(meta, used)), copy);
                std::memcpy(out, copy, count * sizeof(W));
            }
        }
}

template <class Isa> void expand(const Expand24 &problem, int threads) {
    Expand24 p = problem;
    if (p.cols % 8 == 0) {
        p.cols *= p.rows;
        p.rows = 1;
    }
    const auto tile = p.itemsize == 1   ? expand_tile<Isa, int8_t>
                      : p.itemsize == 2 ? expand_tile<Isa, int16_t>
                                        : expand_tile<Isa, int32_t>;
    for_tiles(
        Tiling(p.rows, p.cols, kWord, 0), 2 * p.rows * p.cols * p.itemsize, threads,
        [&](const Span &s, const Span &) { tile(p, s); }, [] {});
}

} // namespace
} // namespace sparsekit::cpu
