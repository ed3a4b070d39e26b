#include "cpu/isa/dispatch.h"

#include <ATen/cpu/Utils.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string_view>

#if defined(EDL_WITH_AMX)
#include <cpuid.h>
#endif

namespace edl::cpu {
namespace {

constexpr std::array<const char*, 4> kNames = {"baseline", "avx2", "avx512", "avx512_amx"}; // as InstructionSet

bool has_avx512() {
#if defined(EDL_WITH_X86)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

bool has_avx2() {
#if defined(EDL_WITH_X86)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

// AMX-TILE and AMX-BF16 of the processor. Whether a process may use them the system says.
bool has_amx() {
#if defined(EDL_WITH_AMX)
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned int bf16 = 1u << 22, tile = 1u << 24;
  return has_avx512() && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & bf16) != 0 && (edx & tile) != 0;
#else
  return false;
#endif
}

// Asks once, and only where it matters: what the system grants holds for the process, and lets it refuse the small
// stacks for signals that other libraries may bring.
bool may_use_amx() {
  static const bool is_granted = has_amx() && at::cpu::init_amx();
  return is_granted;
}

bool is_available(InstructionSet set) {
  switch (set) {
    case InstructionSet::avx512_amx:
      return may_use_amx();
    case InstructionSet::avx512:
      return has_avx512();
    case InstructionSet::avx2:
      return has_avx2();
    default:
      return true;
  }
}

InstructionSet best_available() {
  for (const auto set : {InstructionSet::avx512_amx, InstructionSet::avx512, InstructionSet::avx2}) {
    if (is_available(set)) {
      return set;
    }
  }
  return InstructionSet::baseline;
}

InstructionSet choose() {
  const char* forced = std::getenv("EDL_CPU_CAPABILITY");
  if (forced == nullptr) {
    return best_available();
  }
  const auto* const name = std::find(kNames.begin(), kNames.end(), std::string_view(forced));
  TORCH_CHECK_VALUE(
      name != kNames.end(), "edl: EDL_CPU_CAPABILITY must be 'baseline', 'avx2', 'avx512' or 'avx512_amx' (got '",
      forced, "')");
  const auto chosen = static_cast<InstructionSet>(name - kNames.begin());
  TORCH_CHECK_VALUE(
      is_available(chosen), "edl: EDL_CPU_CAPABILITY must name an instruction set that this processor and build have",
      chosen == InstructionSet::avx512_amx && is_amx_refused() ? ", and the system grants" : "", " (got '", forced,
      "')");
  return chosen;
}

} // namespace

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* instruction_set_name() {
  return kNames[static_cast<size_t>(instruction_set())];
}

bool is_amx_refused() {
  return has_amx() && !may_use_amx();
}

} // namespace edl::cpu
