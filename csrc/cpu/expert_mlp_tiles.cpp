#include "cpu/expert_mlp_tiles.h"

#include <atomic>

namespace edl::cpu {
namespace {

const ExpertMlpLoops* of_this_processor() {
#if defined(EDL_WITH_AMX)
  if (instruction_set() == InstructionSet::avx512_amx) {
    return &avx512_amx::expert_mlp_tiles;
  }
#endif
  return nullptr;
}

std::atomic<const ExpertMlpLoops*>& in_use() {
  static std::atomic<const ExpertMlpLoops*> loops{of_this_processor()};
  return loops;
}

} // namespace

const ExpertMlpLoops* expert_mlp_tiles() {
  return in_use();
}

void use_expert_mlp_tiles(const ExpertMlpLoops* loops) {
  in_use() = loops != nullptr ? loops : of_this_processor();
}

} // namespace edl::cpu
