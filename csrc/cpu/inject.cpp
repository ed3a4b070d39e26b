// inject on the CPU: the copy of ops/inject.cpp, of memory that is there.
#include "ops/inject.h"

#include <ATen/ops/clone.h>
#include <torch/library.h>

#include "common/tensors.h"

namespace edl::cpu {
namespace {

at::Tensor inject_cpu(const at::Tensor& carrier, const at::Tensor& loss, const at::Tensor& scale) {
  check_inject(carrier, loss, scale);
  check_memory("edl::inject", carrier, loss, scale);
  return at::clone(carrier);
}

} // namespace
} // namespace edl::cpu

TORCH_LIBRARY_IMPL(edl, CPU, m) {
  m.impl("inject", edl::cpu::inject_cpu);
}
