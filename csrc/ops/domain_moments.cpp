// segment → domain: sums of the segments' mean distributions, and of their squares, per domain.
#include "ops/domain_moments.h"

#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "common/dtypes.h"
#include "common/errors.h"
#include "common/operators.h"

namespace edl {
namespace {

constexpr const char* kOp = "edl::domain_moments";

void check_segments(std::string_view op, const at::Tensor& segment_sums, const at::Tensor& segment_counts) {
  EDL_ENSURE(
      segment_sums.dim() >= 2, op, ": segment_sums must have the shape [..., S, E] (got ", segment_sums.dim(),
      " dimensions)");
  EDL_ENSURE(
      segment_sums.scalar_type() == at::kFloat || segment_sums.scalar_type() == at::kDouble, op,
      ": segment_sums must be float32 or float64 (got ", segment_sums.scalar_type(), ")");
  EDL_ENSURE(
      segment_counts.scalar_type() == segment_sums.scalar_type(), op,
      ": segment_counts must have the dtype of segment_sums (got ", segment_counts.scalar_type(), " and ",
      segment_sums.scalar_type(), ")");
  const int64_t leading = segment_sums.dim() - 1;
  EDL_ENSURE(
      segment_counts.dim() == 1 || segment_counts.dim() == leading, op,
      ": segment_counts must have the shape [S] or [..., S] of segment_sums (got ", segment_counts.dim(),
      " dimensions for ", segment_sums.dim(), ")");
  for (int64_t i = 1; i <= segment_counts.dim(); ++i) {
    EDL_ENSURE(
        segment_counts.sym_size(-i).sym_eq(segment_sums.sym_size(-i - 1)), op,
        ": segment_counts must have one entry per segment of segment_sums (got ", segment_counts.sym_sizes(), " for ",
        segment_sums.sym_sizes(), ")");
  }
}

void check_labels(
    std::string_view op, const at::Tensor& segment_sums, const at::Tensor& labels, const c10::SymInt& num_domains) {
  EDL_ENSURE(num_domains.sym_ge(1), op, ": num_domains must be at least 1 (got ", num_domains, ")");
  const bool ids = labels.dim() == 1 && is_index_type(labels.scalar_type());
  const bool weights = labels.dim() == 2 && is_storage_type(labels.scalar_type());
  EDL_ENSURE(
      ids || weights, op, ": labels must be ids [S] of int32 or int64, or weights [S, D] of a floating type (got ",
      labels.dim(), " dimensions of ", labels.scalar_type(), ")");
  EDL_ENSURE(
      labels.sym_size(0).sym_eq(segment_sums.sym_size(-2)), op, ": labels must have one row per segment (got ",
      labels.sym_size(0), " for ", segment_sums.sym_size(-2), " segments)");
  if (weights) {
    EDL_ENSURE(
        labels.sym_size(1).sym_eq(num_domains), op, ": labels as weights must have one column per domain (got ",
        labels.sym_size(1), " for num_domains = ", num_domains, ")");
  }
}

} // namespace

void check_domain_moments(
    std::string_view op,
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    const c10::SymInt& num_domains) {
  check_segments(op, segment_sums, segment_counts);
  check_labels(op, segment_sums, labels, num_domains);
  EDL_ENSURE(
      segment_counts.device() == segment_sums.device() && labels.device() == segment_sums.device(), op,
      ": all tensors must be on one device (got ", segment_sums.device(), ", ", segment_counts.device(), " and ",
      labels.device(), ")");
}

void check_domain_moments_backward(
    std::string_view op,
    const at::Tensor& grad_sums,
    const at::Tensor& grad_squares,
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels) {
  const bool with_squares = grad_squares.dim() == grad_sums.dim();
  EDL_ENSURE(
      grad_sums.dim() == segment_sums.dim() && grad_sums.scalar_type() == at::kDouble &&
          (grad_squares.scalar_type() == at::kDouble || !with_squares),
      op, ": the gradients of sums and squares must be float64 in their shape (got ", grad_sums.dim(),
      " dimensions of ", grad_sums.scalar_type(), " and ", grad_squares.dim(), " of ", grad_squares.scalar_type(), ")");
  check_domain_moments(op, segment_sums, segment_counts, labels, grad_sums.sym_size(-2));
  for (int64_t i = 0; i < grad_sums.dim(); ++i) {
    const c10::SymInt expected = i == grad_sums.dim() - 2 ? grad_sums.sym_size(i) : segment_sums.sym_size(i);
    EDL_ENSURE(
        grad_sums.sym_size(i).sym_eq(expected).sym_and(
            (with_squares ? grad_squares : grad_sums).sym_size(i).sym_eq(expected)),
        op, ": the gradients of sums and squares must have their shape (got ", grad_sums.sym_sizes(), " and ",
        grad_squares.sym_sizes(), " for segment_sums ", segment_sums.sym_sizes(), ")");
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> domain_moments_for(
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    c10::SymInt num_domains,
    bool squares,
    std::string_view op) {
  static const auto registered = find_operator<decltype(domain_moments_for)>(kOp);
  return registered.call(segment_sums, segment_counts, labels, std::move(num_domains), squares, op);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> domain_moments(
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    c10::SymInt num_domains,
    bool squares) {
  return domain_moments_for(segment_sums, segment_counts, labels, std::move(num_domains), squares, kOp);
}

at::Tensor domain_moments_backward(
    const at::Tensor& grad_sums,
    const at::Tensor& grad_squares,
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    std::string_view op) {
  static const auto registered = find_operator<decltype(domain_moments_backward)>("edl::_domain_moments_backward");
  return registered.call(grad_sums, grad_squares, segment_sums, segment_counts, labels, op);
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> domain_moments_meta(
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    c10::SymInt num_domains,
    bool squares,
    std::string_view op) {
  check_domain_moments(op, segment_sums, segment_counts, labels, num_domains);
  const auto options = segment_sums.options().dtype(at::kDouble);
  c10::SymDimVector shape(segment_sums.sym_sizes().begin(), segment_sums.sym_sizes().end());
  shape[shape.size() - 2] = num_domains;
  const c10::SymDimVector counts_shape(shape.begin(), shape.end() - 1);
  return {
      at::empty_symint(shape, options), squares ? at::empty_symint(shape, options) : at::empty_symint({0}, options),
      at::empty_symint(counts_shape, options)};
}

at::Tensor domain_moments_backward_meta(
    const at::Tensor& grad_sums,
    const at::Tensor& grad_squares,
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    std::string_view op) {
  check_domain_moments_backward(op, grad_sums, grad_squares, segment_sums, segment_counts, labels);
  return at::empty_symint(segment_sums.sym_sizes(), segment_sums.options());
}

// Compiled autograd takes no outputs that are marked as without gradient: they go around it.
struct DomainMomentsFunction : torch::autograd::Function<DomainMomentsFunction> {
  static constexpr bool is_traceable = true;

  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* context,
      const at::Tensor& segment_sums,
      const at::Tensor& segment_counts,
      const at::Tensor& labels,
      c10::SymInt num_domains,
      bool squares,
      std::string_view op,
      at::Tensor* no_squares,
      at::Tensor* counts) {
    at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor sums, squared;
    std::tie(sums, squared, *counts) =
        domain_moments_for(segment_sums, segment_counts, labels, std::move(num_domains), squares, op);
    context->save_for_backward({segment_sums, segment_counts, labels});
    context->saved_data["squares"] = squares;
    context->saved_data["op"] = std::string(op);
    if (squares) {
      return {sums, squared};
    }
    *no_squares = squared;
    return {sums};
  }

  static torch::autograd::variable_list backward(
      torch::autograd::AutogradContext* context, const torch::autograd::variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const bool squares = context->saved_data["squares"].toBool();
    at::Tensor grad_segment_sums;
    if (context->needs_input_grad(0) && grads[0].defined()) {
      const at::Tensor grad_squares = squares ? grads[1] : at::empty({0}, grads[0].options());
      grad_segment_sums = domain_moments_backward(
          grads[0], grad_squares, saved[0], saved[1], saved[2], context->saved_data["op"].toStringRef());
    }
    return {grad_segment_sums, {}, {}, {}, {}, {}, {}, {}};
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> domain_moments_autograd(
    const at::Tensor& segment_sums,
    const at::Tensor& segment_counts,
    const at::Tensor& labels,
    c10::SymInt num_domains,
    bool squares,
    std::string_view op) {
  check_without_gradient(op, "segment_counts", segment_counts);
  check_without_gradient(op, "labels", labels);
  at::Tensor no_squares, counts;
  auto outputs = DomainMomentsFunction::apply(
      segment_sums, segment_counts, labels, std::move(num_domains), squares, op, &no_squares, &counts);
  return {outputs[0], squares ? outputs[1] : no_squares, counts};
}

} // namespace
} // namespace edl

TORCH_LIBRARY_FRAGMENT(edl, m) {
  m.def(
      "domain_moments(Tensor segment_sums, Tensor segment_counts, Tensor labels, SymInt num_domains, bool squares, *, "
      "str caller='edl::domain_moments') -> (Tensor sums, Tensor squares, Tensor counts)");
  m.def(
      "_domain_moments_backward(Tensor grad_sums, Tensor grad_squares, Tensor segment_sums, Tensor segment_counts, "
      "Tensor labels, *, str caller='edl::domain_moments') -> Tensor");
}

TORCH_LIBRARY_IMPL(edl, Meta, m) {
  m.impl("domain_moments", edl::domain_moments_meta);
  m.impl("_domain_moments_backward", edl::domain_moments_backward_meta);
}

TORCH_LIBRARY_IMPL(edl, Autograd, m) {
  m.impl("domain_moments", edl::domain_moments_autograd);
  m.impl("_domain_moments_backward", torch::autograd::autogradNotImplementedFallback());
}
