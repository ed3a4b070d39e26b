#pragma once

#include <ATen/core/Tensor.h>

#include "edl/expert_mlp.h"

namespace edl {

void check_expert_mlp(
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down);

void check_expert_mlp_backward(
    const at::Tensor& grad_output, //    [T, H]
    const at::Tensor& tokens,
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    const at::Tensor& pre_activation); // [N, 2I], rows in sorted order

// Whether the products of CUDA tensors wait for the device, by types and sizes alone, which may be symbolic. Without a
// CUDA build nobody tells, and they count as waiting.
using ProductsWait = bool (*)(const at::Tensor& gate_up, const at::Tensor& down);
void tell_whether_products_wait(ProductsWait products_wait);

} // namespace edl
