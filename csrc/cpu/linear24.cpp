// The choice of a path of the 2:4 linear, and what they all share that has no vector code.
#include "linear24.h"
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace sparsekit::cpu {
namespace {

struct Path {
    const char *name;
    void (*run)(const Linear24 &, int);
    bool supported;
};

const Path kPaths[] = {
#if defined(__x86_64__)
    {"avx512", linear24_avx512,
     __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2")},
    // Every CPU with AVX2 and FMA converts fp16 (F16C) too, and the name of that one is unknown to older compilers.
    {"avx2", linear24_avx2,
     __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")},
#endif
    {"portable", linear24_portable, true},
};

const Path *best_path() {
    for (const Path &path : kPaths)
        if (path.supported)
            return &path;
    return nullptr; // never: the last is always supported
}

std::atomic<const Path *> path_in_use{best_path()};

} // namespace

const char *cpu_isa() { return path_in_use.load()->name; }

bool set_cpu_isa(const char *name) {
    for (const Path &path : kPaths)
        if (path.supported && std::strcmp(path.name, name) == 0) {
            path_in_use.store(&path);
            return true;
        }
    return false;
}

Scratch::Scratch(int64_t floats) : data_(nullptr) {
    void *memory = nullptr;
    if (floats > 0 && posix_memalign(&memory, 64, floats * sizeof(float)) != 0)
        throw std::bad_alloc();
    data_ = static_cast<float *>(memory);
}

Scratch::~Scratch() { std::free(data_); }

} // namespace sparsekit::cpu

namespace sparsekit {

void linear24_cpu(const void *x, const void *values, const uint8_t *meta, const void *bias, void *y, int64_t m,
                  int64_t n, int64_t k, int64_t ldx, int x_dtype, int w_dtype, int activation, int threads) {
    if (m == 0 || n == 0)
        return;
    // A thread for every 10 us of one core's work: a shorter task costs more to hand over than it takes.
    const double worth = 1.0 + static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) / (1 << 18);
    const int used = static_cast<int>(std::min({worth, double(threads), double(cpu::kMaxThreads)}));
    const cpu::Linear24 problem{
        x, values, meta, bias, y, m, n, k, ldx, DType(x_dtype), DType(w_dtype), Activation(activation)};
    cpu::path_in_use.load()->run(problem, used);
}

} // namespace sparsekit
