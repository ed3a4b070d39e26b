// Moving rows between tokens and experts, host side: what dispatch_tokens, combine_tokens and expert_mlp share.
#include "cuda/rows.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include "cuda/device.h"
#include "cuda/kernels/rows.h"

namespace edl::cuda {

at::Tensor gather_rows(
    const at::Tensor& tokens,
    const at::Tensor& row_order,
    int64_t top_k,
    const int32_t* num_used,
    const at::Tensor& weights) {
  const at::Tensor source = with_dense_rows(tokens);
  at::Tensor rows = at::empty({row_order.size(0), tokens.size(1)}, tokens.options());
  if (rows.numel() == 0) {
    return rows;
  }
  launch_gather(
      {.tokens = source.const_data_ptr(),
       .storage = storage_of(source),
       .tokens_stride = source.stride(0),
       .row_order = row_order.const_data_ptr<int32_t>(),
       .num_rows = rows.size(0),
       .num_used = num_used,
       .top_k = top_k,
       .width = rows.size(1),
       .rows = rows.mutable_data_ptr(),
       .weights = data_if(weights)},
      stream_of(rows));
  return rows;
}

at::Tensor rows_of_slots(const at::Tensor& row_order, const int32_t* num_used) {
  at::Tensor row_of_slot = at::full(row_order.sizes(), kUnknown, row_order.options());
  if (row_order.numel() > 0) {
    launch_invert(
        row_order.const_data_ptr<int32_t>(), row_order.size(0), num_used, row_of_slot.mutable_data_ptr<int32_t>(),
        stream_of(row_order));
  }
  return row_of_slot;
}

at::Tensor combine_rows(
    const at::Tensor& rows,
    const at::Tensor& row_of_slot,
    const at::Tensor& weights,
    int64_t top_k,
    bool already_weighted) {
  const at::Tensor source = with_dense_rows(rows);
  at::Tensor output = at::empty({rows.size(0) / top_k, rows.size(1)}, rows.options());
  if (output.numel() == 0) {
    return output;
  }
  launch_combine(
      {.rows = source.const_data_ptr(),
       .storage = storage_of(source),
       .rows_stride = source.stride(0),
       .row_of_slot = row_of_slot.const_data_ptr<int32_t>(),
       .weights = data_if(weights),
       .num_tokens = output.size(0),
       .top_k = top_k,
       .width = output.size(1),
       .output = output.mutable_data_ptr(),
       .already_weighted = already_weighted},
      stream_of(output));
  return output;
}

} // namespace edl::cuda
