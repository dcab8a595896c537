// What tests/avx512_emulated.py calls through ctypes: the CPU's launchers by name, as an extension built for AVX-512
// alone has them, and the faults of avx512_host.h.
#include "../../csrc/cpu/format24.h"
#include "../../csrc/cpu/linear24.h"
#include "../../csrc/cpu/obs.h"
#include "avx512_host.h"

#include <cstdlib>

namespace sparsekit::cpu {

// The paths that are not built.
void linear24_portable(const Linear24 &, int) { std::abort(); }
void linear24_avx2(const Linear24 &, int) { std::abort(); }
void obs_block_avx2(const ObsBlock &, int) { std::abort(); }
extern const Format24Path kFormat24Portable{}, kFormat24Avx2{};

} // namespace sparsekit::cpu

extern "C" {

#define EXPORTED(name) extern const auto emulated_##name = &sparsekit::name;
EXPORTED(linear24_cpu)
EXPORTED(compress24_cpu)
EXPORTED(prune_compress24_cpu)
EXPORTED(prune24_cpu)
EXPORTED(expand24_cpu)
EXPORTED(mask_nm_cpu)
EXPORTED(mask_rows_cpu)
EXPORTED(validate24_cpu)
EXPORTED(obs_block_cpu)

long emulated_misaligned() { return emulator::misaligned; }
long emulated_unfenced_threads() { return emulator::unfenced_threads; }

} // extern "C"
