// token → logits: the router's linear layer in a type of its own, which autocast leaves alone. (A context that switches
// autocast off does not exist in TorchScript, and leaves a trace in exported programs.)
#include <ATen/ops/linear.h>
#include <torch/library.h>

namespace edl {
namespace {

// tokens [T, H], weight [E, H] → [T, E] in `type`, float64 for float64 tokens.
at::Tensor router_logits(const at::Tensor& tokens, const at::Tensor& weight, at::ScalarType type) {
  const at::ScalarType own = tokens.scalar_type() == at::kDouble ? at::kDouble : type;
  return at::linear(tokens.to(own), weight.to(own));
}

template <c10::DispatchKey key>
at::Tensor router_logits_autocast(const at::Tensor& tokens, const at::Tensor& weight, at::ScalarType type) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  return router_logits(tokens, weight, type);
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def("_router_logits(Tensor tokens, Tensor weight, ScalarType dtype) -> Tensor");
}

// Two ATen ops: no kernel of our own on any device.
TORCH_LIBRARY_IMPL(edl, CompositeImplicitAutograd, m) {
  m.impl("_router_logits", edl::router_logits);
}

TORCH_LIBRARY_IMPL(edl, AutocastCPU, m) {
  m.impl("_router_logits", edl::router_logits_autocast<c10::DispatchKey::AutocastCPU>);
}

TORCH_LIBRARY_IMPL(edl, Autocast, m) { // CUDA
  m.impl("_router_logits", edl::router_logits_autocast<c10::DispatchKey::AutocastCUDA>);
}
