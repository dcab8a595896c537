// What the paths of the CPU 2:4 linear share: the problem, the scratch memory, and the choice between them.
#pragma once
#include "../launch.h"
#include <cstddef>
#include <cstdint>

namespace sparsekit::cpu {

struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

// The arguments of sparsekit::linear24_cpu.
struct Linear24 {
    const void *x;        // [m, k], rows ldx elements apart
    const void *values;   // [n, kp / 2], kp = k rounded up to 8
    const uint8_t *meta;  // [n, kp / 8]
    const void *bias;     // [n] or null
    void *y;              // [m, n]
    int64_t m, n, k, ldx; // ldx in elements
    DType x_dtype, w_dtype;
    Activation activation;
};

// One path an instruction set, all from linear24_body.h.
void linear24_portable(const Linear24 &problem, int threads);
void linear24_avx2(const Linear24 &problem, int threads);
void linear24_avx512(const Linear24 &problem, int threads);

// The path in use: "avx512", "avx2" or "portable". Setting returns false for a name that this CPU or build lacks.
const char *cpu_isa();
bool set_cpu_isa(const char *name);

// Floats on a cache line, freed with the object. Throws std::bad_alloc.
class Scratch {
  public:
    explicit Scratch(int64_t floats);
    ~Scratch();
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    float *data() const { return data_; }

  private:
    float *data_;
};

} // namespace sparsekit::cpu
