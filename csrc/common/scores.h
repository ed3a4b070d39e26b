#pragma once

#include <c10/util/Exception.h>

#include <string_view>

namespace edl {

// How a router turns logits into a distribution over experts.
enum class Scores {
  softmax, // exp(z_i) / sum_j exp(z_j)
  sigmoid, // sigmoid(z_i) / (sum_j sigmoid(z_j) + 1e-20)
  none, //    the input is a distribution already
};

inline constexpr double kSigmoidSumEpsilon = 1e-20;

inline Scores parse_scores(const char* op, std::string_view name) {
  if (name == "softmax") {
    return Scores::softmax;
  }
  if (name == "sigmoid") {
    return Scores::sigmoid;
  }
  TORCH_CHECK_VALUE(name == "none", op, ": scores must be 'softmax', 'sigmoid' or 'none' (got '", name, "')");
  return Scores::none;
}

} // namespace edl
