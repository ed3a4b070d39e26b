#pragma once

#include "cpu/isa/expert_mlp.h"
#include "edl/export.h"

namespace edl::cpu {

// The loops of expert_mlp for bfloat16 on matrix units; null where the instruction set in use has none.
const ExpertMlpLoops* expert_mlp_tiles();

// Puts others in their place; null puts back those of this processor. Tests run the same loops where no matrix unit is,
// on a plain C++ stand-in of its instructions.
EDL_API void use_expert_mlp_tiles(const ExpertMlpLoops* loops);

} // namespace edl::cpu
