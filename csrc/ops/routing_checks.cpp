#include "ops/routing_checks.h"

#include "common/dtypes.h"
#include "common/errors.h"
#include "ops/tensor_checks.h"

namespace edl {

void check_routing_weights(
    std::string_view op, const at::Tensor& weights, const at::Tensor& values, const char* values_name) {
  check_dimensions(op, weights, "weights", 2, "[T, K]");
  EDL_ENSURE(
      weights.scalar_type() == values.scalar_type() || weights.scalar_type() == accumulation_type(values.scalar_type()),
      op, ": weights must have the type of ", values_name, ", or be float32 beside 16-bit ", values_name, " (got ",
      weights.scalar_type(), " beside ", values.scalar_type(), ")");
  check_device(op, weights, "weights", values, values_name);
}

void check_sorted_indices(
    std::string_view op,
    const at::Tensor& indices,
    const char* name,
    const at::Tensor& values,
    const char* values_name) {
  EDL_ENSURE(
      indices.dim() == 1 && indices.scalar_type() == at::kInt, op, ": ", name,
      " must be an int32 vector, as sort_by_expert gives it (got ", indices.dim(), " dimensions of ",
      indices.scalar_type(), ")");
  check_device(op, indices, name, values, values_name);
}

void check_rows_of_tokens(
    std::string_view op,
    const at::Tensor& rows,
    const std::optional<at::Tensor>& weights,
    const at::Tensor& row_order,
    int64_t top_k) {
  check_dimensions(op, rows, "rows", 2, "[N, H]");
  check_storage_type(op, rows, "rows");
  check_sorted_indices(op, row_order, "row_order", rows, "rows");
  EDL_ENSURE(
      row_order.sym_size(0).sym_eq(rows.sym_size(0)), op, ": row_order must have one entry per row (got ",
      row_order.sym_size(0), " for ", rows.sym_size(0), " rows)");
  EDL_ENSURE(top_k >= 1, op, ": top_k must be at least 1 (got ", top_k, ")");
  EDL_ENSURE(
      (rows.sym_size(0) % top_k).sym_eq(0), op, ": rows must be top_k per token (got ", rows.sym_size(0),
      " rows and top_k ", top_k, ")");
  if (weights.has_value()) {
    check_routing_weights(op, *weights, rows, "rows");
    EDL_ENSURE(
        weights->sym_size(1).sym_eq(top_k), op, ": weights must have top_k columns (got ", weights->sym_size(1),
        " and top_k ", top_k, ")");
    EDL_ENSURE(
        (weights->sym_size(0) * top_k).sym_eq(rows.sym_size(0)), op, ": weights must have one entry per row (got ",
        weights->sym_size(0), " by ", top_k, " for ", rows.sym_size(0), " rows)");
  }
}

c10::SymInt num_tokens_of(const at::Tensor& rows, const std::optional<at::Tensor>& weights, int64_t top_k) {
  return weights.has_value() ? weights->sym_size(0) : rows.sym_size(0) / top_k;
}

} // namespace edl
