// The portable path of the 2:4 linear.
#include "linear24_body.h"

namespace sparsekit::cpu {
namespace {

// Four floats: what a compiler turns into one register of SSE or NEON.
struct Portable {
    struct F {
        float v[4];
    };
    struct Choice {
        int column[4];
    };
    static constexpr int kLanes = 4, kDotBlock = 2, kPanelRows = 4;

    static F zero() { return {}; }
    template <class T> static F load(const T *p) {
        return {to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
    }
    static void store(float *p, F a) { std::memcpy(p, a.v, sizeof a.v); }
    template <class T> static F load_four(const T *p) { return load(p); }
    template <int lane> static F spread(F four) { return {four.v[lane], four.v[lane], four.v[lane], four.v[lane]}; }
    static F add(F a, F b) { return {a.v[0] + b.v[0], a.v[1] + b.v[1], a.v[2] + b.v[2], a.v[3] + b.v[3]}; }
    static F fma(F a, F b, F c) {
        return {a.v[0] * b.v[0] + c.v[0], a.v[1] * b.v[1] + c.v[1], a.v[2] * b.v[2] + c.v[2], a.v[3] * b.v[3] + c.v[3]};
    }
    static float sum(F a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }

    static void arrange(float *) {}
    static Choice decode(uint32_t meta, int part) {
        meta >>= 8 * part;
        return {int(meta & 3), int(meta >> 2 & 3), int(meta >> 4 & 3), int(meta >> 6 & 3)};
    }
    static F pick(const float *word, int part, Choice c) {
        const float *x = word + 8 * part;
        return {x[c.column[0]], x[c.column[1]], x[4 + c.column[2]], x[4 + c.column[3]]};
    }
};

} // namespace

void linear24_portable(const Linear24 &problem, int threads) { linear24<Portable>(problem, threads); }

} // namespace sparsekit::cpu
