#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace edl::cuda {

// rows[i] = tokens[row_order[i] / K], [N, H]. Rows from *num_used on become zeros (null: all are copied), and those of
// weight 0.
at::Tensor gather_rows(
    const at::Tensor& tokens, //    [T, H]
    const at::Tensor& row_order, // [N] int32, dense
    int64_t top_k,
    const int32_t* num_used, //     on the device
    const at::Tensor& weights = at::Tensor()); // [T, K] dense, accumulation type

// The row of each slot, [N] int32; negative where it contributes nothing that is known (kernels/rows.h).
at::Tensor rows_of_slots(const at::Tensor& row_order, const int32_t* num_used);

// output[t] = Σ_k weights[t, k] · rows[row_of_slot[t K + k]], [T, H]; `weights` undefined: ones. Rows of weight 0 are
// left out, which is all that the weights say of rows that are weighted already.
at::Tensor combine_rows(
    const at::Tensor& rows, //        [N, H]
    const at::Tensor& row_of_slot, // [N] int32
    const at::Tensor& weights, //     [T, K] dense, accumulation type
    int64_t top_k,
    bool already_weighted = false);

} // namespace edl::cuda
