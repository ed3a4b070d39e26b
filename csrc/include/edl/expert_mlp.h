#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "edl/export.h"

namespace edl {

// The experts' feed-forward networks on the tokens that chose them:
//
//   output[t] = sum over k of weights[t, k] · y[t, k],   y[t, k] = down[e] z[t, k],   z[t, k] = silu(g) * u,
//   [g; u] = gate_up[e] tokens[t],   e = experts[t, k]
//
// in the index space of sort_by_expert. Slots behind offsets[E] (sentinels) contribute zeros and get zero gradients; an
// expert without tokens gets exact zeros. The result is in the type of tokens; 16-bit types are storage, products and
// sums are float32, on CUDA where torch's switches for reduced precision let them be. Differentiable in tokens, weights,
// gate_up and down; saves these, the indices, and the pre-activation [N, 2I], or computes it again in the backward pass,
// which gives the same bits. Under autocast, tokens, gate_up and down are cast as `linear` casts its arguments.
EDL_API at::Tensor expert_mlp(
    const at::Tensor& tokens, //    [T, H]
    const at::Tensor& weights, //   [T, K] in the type of tokens, or float32 beside 16-bit tokens
    const at::Tensor& row_order, // [T·K] int32
    const at::Tensor& offsets, //   [E + 1] int32
    const at::Tensor& gate_up, //   [E, 2I, H], first the gate's I rows
    const at::Tensor& down, //      [E, H, I]
    bool recompute_activations = false);

// The same, and how alike a token's K experts answer it, without their rows leaving the layer:
//
//   output_gram[t, j, k] = <y[t, j], y[t, k]>,   activation_gram[t, j, k] = <z[t, j], z[t, k]>
//
// before the weights, in float32 (float64 for float64); one that is not asked for has no element. A choice of weight 0
// and a sentinel take no part: their entries are 0. Both are differentiable in tokens, gate_up and down. With
// `output_gram` the rows y [N, H] are saved too, but where activations are computed again.
EDL_API std::tuple<at::Tensor, at::Tensor, at::Tensor> expert_mlp_with_gram(
    const at::Tensor& tokens, //    as expert_mlp takes them
    const at::Tensor& weights,
    const at::Tensor& row_order,
    const at::Tensor& offsets,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    bool output_gram,
    bool activation_gram,
    bool recompute_activations = false);

} // namespace edl
