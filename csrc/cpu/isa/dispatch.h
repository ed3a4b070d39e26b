#pragma once

// Run-time choice among the builds of one source. setup.py compiles every `cpu/isa/*.cpp` once for each instruction
// set, with EDL_ISA naming the namespace and EDL_VECTOR_BYTES the register width; on other processors only `baseline`
// exists. `avx512_amx` is AVX-512 with other loops for what multiplies on matrix units (`cpu/isa/tiles/*.cpp`). These
// sources include no torch header, and everything inline in them lives in anonymous namespaces, so that the linker can
// never merge AVX-512 code into a function that a weaker processor runs (tools/check_symbols.py).

namespace edl::cpu {

enum class InstructionSet { baseline, avx2, avx512, avx512_amx };

// The widest set that this processor and this build have, or the one that EDL_CPU_CAPABILITY names. Chosen once.
InstructionSet instruction_set();
const char* instruction_set_name();
bool is_amx_refused(); // the processor has matrix units, and the system keeps this process from them

} // namespace edl::cpu

#if defined(EDL_WITH_X86)
#define EDL_ISA_LOOPS(Table, name)     \
  namespace baseline {                 \
  extern const Table name;             \
  }                                    \
  namespace avx2 {                     \
  extern const Table name;             \
  }                                    \
  namespace avx512 {                   \
  extern const Table name;             \
  }                                    \
  inline const Table& name() {         \
    switch (instruction_set()) {       \
      case InstructionSet::avx512_amx: \
      case InstructionSet::avx512:     \
        return avx512::name;           \
      case InstructionSet::avx2:       \
        return avx2::name;             \
      default:                         \
        return baseline::name;         \
    }                                  \
  }
#else
#define EDL_ISA_LOOPS(Table, name) \
  namespace baseline {             \
  extern const Table name;         \
  }                                \
  inline const Table& name() {     \
    return baseline::name;         \
  }
#endif
