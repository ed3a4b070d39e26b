// What this build of edl was made for. Links nothing of torch, so it loads, and can tell, when libedl cannot.
#include <pybind11/pybind11.h>

#include <string>

#if defined(__clang__)
#define EDL_COMPILER __VERSION__ // names itself
#else
#define EDL_COMPILER "GCC " __VERSION__
#endif

PYBIND11_MODULE(_build, module) {
  module.doc() = "Facts about this build of edl.";
  module.attr("version") = EDL_VERSION;
  module.attr("torch_version") = EDL_TORCH_VERSION;
  module.attr("cuda_version") = std::string(EDL_CUDA_VERSION); // empty: built without CUDA
  module.attr("compiler") = EDL_COMPILER;
#if defined(EDL_WITH_AMX)
  module.attr("instruction_sets") = pybind11::make_tuple("baseline", "avx2", "avx512", "avx512_amx");
#elif defined(EDL_WITH_X86)
  module.attr("instruction_sets") = pybind11::make_tuple("baseline", "avx2", "avx512");
#else
  module.attr("instruction_sets") = pybind11::make_tuple("baseline");
#endif
}
