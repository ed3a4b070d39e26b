#include "ops/routing_checks.h"

#include "common/dtypes.h"
#include "common/errors.h"

namespace edl {

void check_routing_weights(
    const char* op, const at::Tensor& weights, const at::Tensor& values, const char* values_name) {
  EDL_ENSURE(weights.dim() == 2, op, ": weights must have the shape [T, K] (got ", weights.dim(), " dimensions)");
  EDL_ENSURE(
      weights.scalar_type() == values.scalar_type() || weights.scalar_type() == accumulation_type(values.scalar_type()),
      op, ": weights must have the type of ", values_name, ", or be float32 beside 16-bit ", values_name, " (got ",
      weights.scalar_type(), " beside ", values.scalar_type(), ")");
  EDL_ENSURE(
      weights.device() == values.device(), op, ": weights must be on the device of ", values_name, " (got ",
      weights.device(), " and ", values.device(), ")");
}

void check_sorted_indices(
    const char* op, const at::Tensor& indices, const char* name, const at::Tensor& values, const char* values_name) {
  EDL_ENSURE(
      indices.dim() == 1 && indices.scalar_type() == at::kInt, op, ": ", name,
      " must be an int32 vector, as sort_by_expert gives it (got ", indices.dim(), " dimensions of ",
      indices.scalar_type(), ")");
  EDL_ENSURE(
      indices.device() == values.device(), op, ": ", name, " must be on the device of ", values_name, " (got ",
      indices.device(), " and ", values.device(), ")");
}

} // namespace edl
