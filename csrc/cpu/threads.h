// Threads for the kernels: those of the OpenMP runtime already in the process, or a small pool of our own.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsekit::cpu {

constexpr int kMaxThreads = 256;

// One unit of work: `index` of [0, count), run by `worker` of [0, threads). Must not throw.
using Task = void (*)(void *context, int64_t index, int worker);

// Runs task(context, i, worker) for every i of [0, count) and returns when all are done. The caller works too. Tasks
// are handed out one by one, so which worker gets which is not fixed: a task's result must not depend on it. Safe from
// several threads at once, where all but one caller work alone, and in a child of fork.
void parallel_for(int64_t count, int threads, Task task, void *context);

template <class Body> void parallel_for(int64_t count, int threads, Body &&body) {
    parallel_for(
        count, threads,
        [](void *context, int64_t index, int worker) { (*static_cast<Body *>(context))(index, worker); }, &body);
}

} // namespace sparsekit::cpu
