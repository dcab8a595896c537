// A CUDA block, or a cluster of blocks, on one host thread: every CUDA thread is a fiber that runs until it must wait
// for others. Which ready thread runs next, when an asynchronous copy lands and the order of clusters follow a seed, so
// a race that hardware would hide shows under some seed, and the same seed always shows it again. Clusters run one
// after another, the blocks of one together.
//
// What counts as a failure (the launch returns cudaErrorLaunchFailure, emulator_error() has the sentence): an access
// outside the memory that the caller allowed, a misaligned or out-of-range shared-memory operand, an instruction that
// only part of its group reaches, a wait that nobody ends, a write past a block's shared memory, a copy that lands
// after its block has left, and what an instruction itself forbids. Shared memory starts as 0xFF bytes: NaN as fp16,
// bf16 and fp32, and no valid 2:4 metadata.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <setjmp.h>
#include <string>
#include <ucontext.h>
#include <utility>
#include <vector>

namespace emulator {

constexpr size_t kSharedLimit = 227 * 1024, kRedZone = 4096, kStackBytes = 128 * 1024;
constexpr unsigned char kPoison = 0xFF, kRedByte = 0xA5;

struct Index {
    unsigned x, y, z;
};

struct Copy { // a cp.async on its way
    char *shared;
    const char *global;
    int bytes, filled; // bytes read, then zeros up to `filled`
    void land() const {
        memcpy(shared, global, bytes);
        memset(shared + bytes, 0, filled - bytes);
    }
};

struct Thread {
    ucontext_t start;
    jmp_buf resume;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool started = false;
    Index index{}, block{};
    std::vector<Copy> open;               // not yet committed
    std::deque<std::vector<Copy>> groups; // committed, oldest first
};

struct Meeting { // a warp or warpgroup gathering for one instruction
    const char *what;
    int arrived = 0;
    void *operands[128];
};

struct Range {
    uintptr_t begin, end;
    bool writable;
    size_t bytes_read = 0;
};

using Collective = void (*)(void *const *operands);

class Machine {
  public:
    std::vector<Range> ranges;
    std::string error;
    unsigned run = 0;        // how many clusters have been started
    long bank_conflicts = 0; // extra passes over shared memory that ldmatrix and ld.shared have needed so far
    Index thread_index{}, block_index{}, block_dim{}, grid_dim{};

    void seed(uint64_t s) { state_ = s * 0x9E3779B97F4A7C15u + 0xD1B54A32D192ED03u; }
    uint32_t random(uint32_t below) {
        state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
        return static_cast<uint32_t>((state_ >> 32) % below);
    }

    Thread &self() { return *threads_[current_]; }
    int current() const { return current_; } // counted through the cluster
    int rank() const { return current_ / block_threads_; }
    int cluster() const { return static_cast<int>(blocks_.size()); }
    int live(int rank) const { return blocks_[rank].live; }
    char *shared() { return shared(rank()); }
    char *shared(int rank) { return blocks_[rank].shared; }
    size_t shared_bytes() const { return shared_bytes_; }

    // Ends the launch; never returns to the caller's thread.
    [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char *format, ...) {
        char text[512];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        error = "block " + std::to_string(block_index.x) + ", thread " + std::to_string(current_ % block_threads_) +
                ": " + text;
        _longjmp(scheduler_, 1);
    }

    // Parks the calling thread until somebody wakes it.
    void wait() {
        ready_[current_ / 32] &= ~(1u << current_ % 32);
        if (!_setjmp(self().resume))
            _longjmp(scheduler_, 1);
    }
    void wake(int thread) { ready_[thread / 32] |= 1u << thread % 32; }

    // Work that hardware does by itself, some time from now and in any order; it cannot fail().
    void later(std::function<void()> event) { events_.push_back(std::move(event)); }

    void check_global(const void *pointer, size_t bytes, size_t alignment, bool write, const char *what) {
        const auto begin = reinterpret_cast<uintptr_t>(pointer);
        if (begin % alignment != 0)
            fail("%s needs a global address that is a multiple of %zu, got %p", what, alignment, pointer);
        if (bytes == 0)
            return;
        for (Range &r : ranges)
            if (begin >= r.begin && begin + bytes <= r.end && (r.writable || !write)) {
                r.bytes_read += write ? 0 : bytes;
                return;
            }
        fail("%s of %zu bytes at %p lies outside the memory given to the kernel", what, bytes, pointer);
    }
    void check_shared(const void *pointer, size_t bytes, size_t alignment, const char *what) {
        const char *p = static_cast<const char *>(pointer);
        if (p < shared() || p + bytes > shared() + shared_bytes_)
            fail("%s lies outside the block's %zu bytes of shared memory: offset %td", what, shared_bytes_,
                 p - shared());
        if ((p - shared()) % alignment != 0)
            fail("%s needs a shared address that is a multiple of %zu, got offset %td", what, alignment, p - shared());
    }

    // All `width` threads of the caller's warp (32) or warpgroup (128) meet; the last one does the work for all.
    void collective(int width, const char *what, void *operands, Collective work) {
        Meeting &m = meetings_[current_ / width * width + (width > 32)]; // a warp may be ahead of its warpgroup
        if (m.arrived == 0)
            m.what = what;
        else if (strcmp(m.what, what) != 0)
            fail("the warp has diverged: it is at %s, others are at %s", what, m.what);
        m.operands[current_ % width] = operands;
        if (++m.arrived == width) {
            m.arrived = 0;
            work(m.operands);
            for (int i = 0; i < width; ++i)
                wake(current_ / width * width + i);
        } else
            wait();
    }

    void barrier() {
        ++blocks_[rank()].at_barrier;
        waiting_at_barrier_[current_] = true;
        if (!release_barrier(rank()))
            wait();
    }

    // Runs body() once a thread; `cluster` neighbouring blocks along x run together. False on failure.
    template <typename Body>
    bool launch(Index grid, Index block, size_t shared_bytes, Body body, unsigned cluster = 1) {
        grid_dim = grid, block_dim = block, shared_bytes_ = shared_bytes;
        body_ = [](void *b) { (*static_cast<Body *>(b))(); };
        body_argument_ = &body;
        error.clear();
        std::vector<unsigned> order(static_cast<size_t>(grid.x / cluster) * grid.y * grid.z);
        std::iota(order.begin(), order.end(), 0u);
        for (size_t i = order.size(); i > 1; --i)
            std::swap(order[i - 1], order[random(static_cast<uint32_t>(i))]);
        const unsigned clusters_x = grid.x / cluster;
        for (unsigned c : order)
            if (!run_cluster({c % clusters_x * cluster, c / clusters_x % grid.y, c / clusters_x / grid.y},
                             static_cast<int>(cluster), static_cast<int>(block.x * block.y * block.z)))
                return false;
        return true;
    }

  private:
    std::vector<std::unique_ptr<Thread>> threads_;
    std::vector<uint32_t> ready_; // a bit a lane, a word a warp
    std::vector<Meeting> meetings_;
    std::vector<bool> waiting_at_barrier_;
    struct Block {
        std::unique_ptr<char[]> storage{new char[kSharedLimit + kRedZone + 1024]};
        char *shared = storage.get() + (1024 - reinterpret_cast<uintptr_t>(storage.get()) % 1024);
        int live = 0, at_barrier = 0;
    };
    std::vector<Block> blocks_; // of the cluster that runs
    std::vector<std::function<void()>> events_;
    size_t shared_bytes_ = 0;
    int current_ = 0, live_ = 0, block_threads_ = 1;
    uint64_t state_ = 1;
    jmp_buf scheduler_;
    void (*body_)(void *) = nullptr;
    void *body_argument_ = nullptr;

    bool release_barrier(int rank) {
        Block &block = blocks_[rank];
        if (block.at_barrier < block.live)
            return false;
        block.at_barrier = 0;
        for (int i = rank * block_threads_; i < (rank + 1) * block_threads_; ++i)
            if (waiting_at_barrier_[i]) {
                waiting_at_barrier_[i] = false;
                wake(i);
            }
        return true;
    }

    void run_event() {
        std::swap(events_[random(static_cast<uint32_t>(events_.size()))], events_.back());
        const std::function<void()> event = std::move(events_.back());
        events_.pop_back();
        event();
    }

    static void thread_main();

    void resume(int thread) {
        current_ = thread;
        Thread &t = self();
        thread_index = t.index, block_index = t.block;
        if (_setjmp(scheduler_))
            return;
        if (t.started)
            _longjmp(t.resume, 1);
        t.started = true;
        setcontext(&t.start);
    }

    bool run_cluster(Index first, int cluster, int block_threads) {
        const int count = cluster * block_threads;
        block_threads_ = block_threads, block_index = first;
        ++run;
        events_.clear();
        blocks_.resize(cluster);
        for (Block &block : blocks_) {
            memset(block.shared, kPoison, shared_bytes_);
            memset(block.shared + shared_bytes_, kRedByte, kRedZone);
            block.live = block_threads, block.at_barrier = 0;
        }
        while (static_cast<int>(threads_.size()) < count)
            threads_.push_back(std::make_unique<Thread>());
        threads_.resize(count);
        meetings_.assign(count, Meeting());
        waiting_at_barrier_.assign(count, false);
        ready_.assign((count + 31) / 32, 0);
        live_ = count;
        for (int i = 0; i < count; ++i) {
            Thread &t = *threads_[i];
            const unsigned u = static_cast<unsigned>(i % block_threads);
            t.index = {u % block_dim.x, u / block_dim.x % block_dim.y, u / block_dim.x / block_dim.y};
            t.block = {first.x + static_cast<unsigned>(i / block_threads), first.y, first.z};
            t.started = false;
            t.open.clear(), t.groups.clear();
            getcontext(&t.start);
            t.start.uc_stack.ss_sp = t.stack.get(), t.start.uc_stack.ss_size = kStackBytes;
            t.start.uc_link = nullptr;
            makecontext(&t.start, &thread_main, 0);
            wake(i);
        }
        const int warps = static_cast<int>(ready_.size());
        int warp = 0;
        while (live_ > 0) {
            if (!events_.empty() && random(8) == 0)
                run_event();
            // A warp mostly runs on until it must wait, so that it can get as far ahead of the others as the code lets
            // it.
            if (ready_[warp] == 0 || random(16) == 0) {
                warp = static_cast<int>(random(warps));
                int tried = 0;
                while (ready_[warp] == 0 && tried++ < warps)
                    warp = (warp + 1) % warps;
                if (ready_[warp] == 0 && !events_.empty()) {
                    run_event();
                    continue;
                }
                if (ready_[warp] == 0) {
                    int at_barrier = 0;
                    for (const Block &block : blocks_)
                        at_barrier += block.at_barrier;
                    error = "block " + std::to_string(first.x) + ": " + std::to_string(live_) +
                            " threads wait for threads that never come (" + std::to_string(at_barrier) +
                            " at __syncthreads)";
                    return false;
                }
            }
            const int turn = static_cast<int>(random(32));
            const uint32_t turned = ready_[warp] >> turn | (turn ? ready_[warp] << (32 - turn) : 0);
            resume(warp * 32 + (turn + __builtin_ctz(turned)) % 32);
            if (!error.empty())
                return false;
        }
        if (!events_.empty()) {
            error = "the block has left while copies to its shared memory were on their way";
            return false;
        }
        for (const Block &block : blocks_)
            for (size_t i = 0; i < kRedZone; ++i)
                if (static_cast<unsigned char>(block.shared[shared_bytes_ + i]) != kRedByte) {
                    error =
                        "a thread wrote past the block's shared memory, at offset " + std::to_string(shared_bytes_ + i);
                    return false;
                }
        return true;
    }
};

inline Machine machine;

inline void Machine::thread_main() {
    machine.body_(machine.body_argument_);
    machine.ready_[machine.current_ / 32] &= ~(1u << machine.current_ % 32);
    --machine.live_;
    if (--machine.blocks_[machine.rank()].live > 0)
        machine.release_barrier(machine.rank());
    _longjmp(machine.scheduler_, 1);
}

} // namespace emulator
