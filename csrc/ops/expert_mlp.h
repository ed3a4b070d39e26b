#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "common/export.h"

namespace edl {

// The experts' feed-forward networks on the tokens that chose them:
//
//   output[t] = sum over k of weights[t, k] · down[e] (silu(g) * u),   [g; u] = gate_up[e] tokens[t],   e = experts[t,
//   k]
//
// in the index space of sort_by_expert. Slots behind offsets[E] (sentinels) contribute zeros and get zero gradients; an
// expert without tokens gets exact zeros. The result is in the type of tokens; 16-bit types are storage, products and
// sums are float32, on CUDA where torch's switches for reduced precision let them be. Differentiable in tokens, weights, gate_up and down; saves these, the pre-activation [N, 2I] and
// the indices. Under autocast, tokens, gate_up and down are cast as `linear` casts its arguments.
EDL_API at::Tensor expert_mlp(
    const at::Tensor& tokens, //    [T, H]
    const at::Tensor& weights, //   [T, K] in the type of tokens, or float32 beside 16-bit tokens
    const at::Tensor& row_order, // [T·K] int32
    const at::Tensor& offsets, //   [E + 1] int32
    const at::Tensor& gate_up, //   [E, 2I, H], first the gate's I rows
    const at::Tensor& down); //     [E, H, I]

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
