#pragma once

#include <ATen/core/Tensor.h>

#include "edl/export.h"

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

} // namespace edl
