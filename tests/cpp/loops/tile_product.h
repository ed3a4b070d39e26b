#pragma once

#include <cstdint>

#if defined(EDL_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

// c += A B of one tile each, by a stand-in of the instructions and by the instructions: a [16, 32] and b [16, 16, 2]
// bfloat16, c [16, 16].
namespace edl::cpu::tile_stand_in {
void tile_product(const uint16_t* a, const uint16_t* b, float* c);
}
namespace edl::cpu::avx512_amx {
void tile_product(const uint16_t* a, const uint16_t* b, float* c);
}

// Whether the processor has matrix units, and the system lets this process use them.
inline bool may_use_tiles() {
#if defined(EDL_WITH_AMX)
  unsigned int eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned int bf16 = 1u << 22, tile = 1u << 24;
  constexpr int request_permission = 0x1023, tile_data = 18;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & bf16) != 0 && (edx & tile) != 0 &&
      syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
