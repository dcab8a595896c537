// Threads for a job, which is counters that they take indices from. They come from the OpenMP runtime that the process
// has loaded already, where there is one: torch's workers spin for the next region, and a pool beside them would share
// their cores for whole time slices. Elsewhere, and in a child of fork, where no runtime's threads live on, they come
// from a pool of our own. Its workers start at the first job that needs them and are never joined: the pool is leaked
// on purpose, so that exit never waits for a sleeper.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <dlfcn.h>
#include <link.h>
#include <mutex>
#include <system_error>
#include <thread>
#include <unistd.h>

namespace sparsekit::cpu {
namespace {

// A parallel region of GNU's OpenMP, an entry point that Intel's and LLVM's runtimes have too.
using Region = void (*)(void (*)(void *), void *, unsigned threads, unsigned flags);

// A runtime's way to open a region, and to tell a thread its number there; both or neither.
struct Runtime {
    Region region = nullptr;
    int (*number)() = nullptr;

    bool find(void *in) {
        region = reinterpret_cast<Region>(dlsym(in, "GOMP_parallel"));
        number = reinterpret_cast<int (*)()>(dlsym(in, "omp_get_thread_num"));
        return region && number;
    }
};

// Looks through the libraries of the process; links and loads nothing.
Runtime find_runtime() {
    Runtime runtime;
    if (runtime.find(RTLD_DEFAULT))
        return runtime;
    const int found = dl_iterate_phdr(
        [](dl_phdr_info *library, size_t, void *to) -> int {
            if (!strstr(library->dlpi_name, "libgomp") && !strstr(library->dlpi_name, "libiomp5"))
                return 0;
            void *handle = dlopen(library->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
            return handle && static_cast<Runtime *>(to)->find(handle);
        },
        &runtime);
    return found ? runtime : Runtime{};
}

// Taken as the module is loaded, not at the first job: that one may come in a child of fork, whose parent, by torch,
// has used the runtime already. A region would wait there for threads that did not come along.
const pid_t loader = getpid();

// The runtime, or null where there is none or this process is a fork of the one that loaded the module.
const Runtime *runtime() {
    if (getpid() != loader)
        return nullptr;
    static const Runtime found = find_runtime();
    return found.region ? &found : nullptr;
}

// Each thread has a run of neighbouring indices, the same one in every job alike, and so finds in its caches what it
// read the last time; when that is done it takes from the others' runs.
struct Job {
    struct alignas(64) Run {
        std::atomic<int64_t> next; // the first index nobody has taken
        int64_t end;
    };

    const Runtime &runtime;
    int threads;
    Task task;
    void *context;
    Run runs[kMaxThreads];

    Job(const Runtime &runtime, int64_t count, int threads, Task task, void *context)
        : runtime(runtime), threads(threads), task(task), context(context) {
        for (int i = 0; i < threads; ++i) {
            runs[i].next.store(count * i / threads, std::memory_order_relaxed);
            runs[i].end = count * (i + 1) / threads;
        }
    }

    void work() {
        const int worker = runtime.number();
        for (int turn = 0; turn < threads; ++turn) {
            Run &run = runs[(worker + turn) % threads];
            for (int64_t i; (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end;)
                task(context, i, worker);
        }
    }
};

// A worker spins about 20 us for the next job before it sleeps: as long as the Python between two layers takes.
constexpr int kSpins = 400;

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    explicit Pool(pid_t owner) : owner_(owner) {}

    pid_t owner() const { return owner_; }

    // False when another caller has the pool.
    bool try_run(int64_t count, int threads, Task task, void *context) {
        std::unique_lock<std::mutex> only(job_mutex_, std::try_to_lock);
        if (!only.owns_lock())
            return false;
        const int helpers = start_workers(std::min(threads, kMaxThreads) - 1);
        task_ = task;
        context_ = context;
        count_ = count;
        next_.store(0, std::memory_order_relaxed);
        left_.store(0, std::memory_order_relaxed);
        {
            std::lock_guard<std::mutex> lock(sleep_mutex_);
            tickets_.store(helpers, std::memory_order_release);
            if (sleepers_ > 0)
                wake_.notify_all();
        }
        work(0);
        // Whoever holds no ticket by now stays out, so the caller waits only for workers that are in the middle of one.
        const int entered = helpers - tickets_.exchange(0, std::memory_order_acq_rel);
        for (int spins = 0; left_.load(std::memory_order_acquire) != entered; ++spins)
            spins < kSpins ? relax() : std::this_thread::yield();
        return true;
    }

  private:
    void work(int worker) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;)
            task_(context_, i, worker);
    }

    int start_workers(int wanted) {
        try {
            for (; workers_ < wanted; ++workers_)
                std::thread([this] { serve(); }).detach();
        } catch (const std::system_error &) {
            // No more threads to be had: the job runs on those there are.
        }
        return std::min(workers_, wanted);
    }

    // A ticket is a worker's number and its right to read the job. Taking one pairs with the store that opened the job.
    int take_ticket() {
        int ticket = tickets_.load(std::memory_order_relaxed);
        while (ticket > 0 && !tickets_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acquire,
                                                             std::memory_order_relaxed)) {
        }
        return ticket;
    }

    void serve() {
        for (;;) {
            for (int spins = 0; spins < kSpins && tickets_.load(std::memory_order_relaxed) <= 0; ++spins)
                relax();
            if (const int ticket = take_ticket(); ticket > 0) {
                work(ticket);
                left_.fetch_add(1, std::memory_order_release);
                continue;
            }
            std::unique_lock<std::mutex> lock(sleep_mutex_);
            ++sleepers_;
            wake_.wait(lock, [this] { return tickets_.load(std::memory_order_relaxed) > 0; });
            --sleepers_;
        }
    }

    const pid_t owner_;
    std::mutex job_mutex_; // one job at a time
    int workers_ = 0;      // started so far, under job_mutex_
    Task task_ = nullptr;
    void *context_ = nullptr;
    int64_t count_ = 0;
    std::atomic<int64_t> next_{0}; // the first index nobody has taken
    std::atomic<int> tickets_{0};  // workers that may still enter the job
    std::atomic<int> left_{0};     // workers that entered it and are done
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    int sleepers_ = 0; // under sleep_mutex_
};

std::atomic<Pool *> current{nullptr};

// The pool of this process. A child of fork has its parent's pool but none of the threads: it gets a new one, and the
// old one, whose locks may be held for ever, is left alone.
Pool *pool() {
    const pid_t me = getpid();
    Pool *seen = current.load(std::memory_order_acquire);
    while (!seen || seen->owner() != me) {
        Pool *fresh = new Pool(me);
        if (current.compare_exchange_strong(seen, fresh, std::memory_order_acq_rel))
            return fresh;
        delete fresh;
    }
    return seen;
}

} // namespace

void parallel_for(int64_t count, int threads, Task task, void *context) {
    threads = static_cast<int>(std::min<int64_t>({threads, count, kMaxThreads}));
    if (const Runtime *const found = threads > 1 ? runtime() : nullptr) {
        Job job(*found, count, threads, task, context);
        found->region([](void *data) { static_cast<Job *>(data)->work(); }, &job, threads, 0);
        return;
    }
    if (threads > 1 && pool()->try_run(count, threads, task, context))
        return;
    for (int64_t i = 0; i < count; ++i)
        task(context, i, 0);
}

} // namespace sparsekit::cpu
