#pragma once

// Without torch headers: kernels include this too.

namespace edl {

// How a router turns logits into a distribution over experts.
enum class Scores {
  softmax, // exp(z_i) / sum_j exp(z_j)
  sigmoid, // sigmoid(z_i) / (sum_j sigmoid(z_j) + 1e-20)
  none, //    the input is a distribution already
};

inline constexpr double kSigmoidSumEpsilon = 1e-20;

} // namespace edl
