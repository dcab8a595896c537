// The OBS step in AVX2.
#include "obs_body.h"

namespace sparsekit::cpu {

void obs_block_avx2(const ObsBlock &problem, int threads) { obs_block<8>(problem, threads); }

} // namespace sparsekit::cpu
