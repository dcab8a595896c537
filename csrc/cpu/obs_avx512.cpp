// The OBS step in AVX-512.
#include "obs_body.h"

namespace sparsekit::cpu {

void obs_block_avx512(const ObsBlock &problem, int threads) { obs_block<16>(problem, threads); }

} // namespace sparsekit::cpu
