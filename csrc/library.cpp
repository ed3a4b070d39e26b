// Facts about the library itself. Every operator registers in its own file.
#include "edl/edl.h"

#include <torch/library.h>

#include "cpu/isa/dispatch.h"

namespace edl {

const char* version() {
  return EDL_VERSION;
}

const char* cpu_instruction_set() {
  return cpu::instruction_set_name();
}

} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("_cpu_instruction_set() -> str", []() { return std::string(edl::cpu_instruction_set()); });
  m.def("_is_amx_refused() -> bool", []() { return edl::cpu::is_amx_refused(); });
}
