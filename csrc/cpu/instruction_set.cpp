#include "cpu/isa/dispatch.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace edl::cpu {
namespace {

InstructionSet best_available() {
#if defined(EDL_WITH_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return InstructionSet::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return InstructionSet::avx2;
  }
#endif
  return InstructionSet::baseline;
}

InstructionSet choose() {
  const InstructionSet best = best_available();
  const char* forced = std::getenv("EDL_CPU_CAPABILITY");
  if (forced == nullptr) {
    return best;
  }
  const std::string_view name = forced;
  InstructionSet chosen = InstructionSet::baseline;
  if (name == "avx2") {
    chosen = InstructionSet::avx2;
  } else if (name == "avx512") {
    chosen = InstructionSet::avx512;
  } else {
    TORCH_CHECK_VALUE(
        name == "baseline", "edl: EDL_CPU_CAPABILITY must be 'baseline', 'avx2' or 'avx512' (got '", name, "')");
  }
  TORCH_CHECK_VALUE(
      chosen <= best, "edl: EDL_CPU_CAPABILITY must name an instruction set that this processor and build have (got '",
      name, "')");
  return chosen;
}

} // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return "avx512";
    case InstructionSet::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

} // namespace edl::cpu
