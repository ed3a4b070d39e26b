// carrier + 0 · loss, where the backward pass hands `scale` to the loss. A copy needs no kernel of its own.
#include "ops/inject.h"

#include <ATen/ops/clone.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/errors.h"
#include "common/operators.h"
#include "common/tensors.h"
#include "ops/tensor_checks.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::inject";

void check_scalar(const at::Tensor& value, const char* name) {
  EDL_ENSURE(value.dim() == 0, kOp, ": ", name, " must be a scalar tensor (got ", value.dim(), " dimensions)");
  check_storage_type(kOp, value, name);
}

} // namespace

void check_inject(const at::Tensor& carrier, const at::Tensor& loss, const at::Tensor& scale) {
  check_storage_type(kOp, carrier, "carrier");
  check_scalar(loss, "loss");
  check_scalar(scale, "scale");
}

at::Tensor inject(const at::Tensor& carrier, const at::Tensor& loss, const at::Tensor& scale) {
  static const auto op = find_operator<decltype(inject)>("edl::inject");
  return op.call(carrier, loss, scale);
}

namespace {

at::Tensor inject_copy(const at::Tensor& carrier, const at::Tensor& loss, const at::Tensor& scale) {
  check_inject(carrier, loss, scale);
  return at::clone(carrier);
}

// A scalar of the CPU is an argument of the kernel that multiplies by it: a copy would wait for the device.
at::Tensor on_device_of(const at::Tensor& loss, const at::Tensor& factor) {
  if (factor.device() == loss.device()) {
    return factor;
  }
  return factor.is_cpu() ? at::mul(at::ones({}, loss.options()), factor) : factor.to(loss.device());
}

struct InjectFunction : torch::autograd::Function<InjectFunction> {
  static constexpr bool is_traceable = true;

  static at::Tensor forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& carrier,
      const at::Tensor& loss,
      const at::Tensor& scale) {
    context->save_for_backward({on_device_of(loss, scale.to(loss.scalar_type()))});
    at::AutoDispatchBelowADInplaceOrView guard;
    return inject(carrier, loss, scale);
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    if (saved[0].is_cpu()) {
      check_memory(kOp, saved[0]);
    }
    // A copy: autograd may add to a gradient in place.
    return {grads[0], at::clone(saved[0]), {}};
  }
};

at::Tensor inject_autograd(const at::Tensor& carrier, const at::Tensor& loss, const at::Tensor& scale) {
  check_inject(carrier, loss, scale);
  return InjectFunction::apply(carrier, loss, scale.detach());
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("inject(Tensor carrier, Tensor loss, Tensor scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(edl, CompositeExplicitAutograd, m) {
  m.impl("inject", edl::inject_copy);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("inject", edl::inject_autograd);
}
