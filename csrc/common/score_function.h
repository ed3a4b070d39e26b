#pragma once

// Without torch headers: kernels include this too.

namespace edl {

// How a router turns logits z into scores; names that operators take, in the order of every table of loops. Calls
// `of(name, …)` for each. Their formulas stand in cpu/isa/row_scores.h and cuda/kernels/score_rows.cuh:
//   softmax: exp(z_i) / sum_j exp(z_j)
//   sigmoid: sigmoid(z_i); as a distribution sigmoid(z_i) / (sum_j sigmoid(z_j) + 1e-20)
#define EDL_ROUTER_SCORES(of, ...) of(softmax, __VA_ARGS__) of(sigmoid, __VA_ARGS__)

#define EDL_ENUMERATOR(name, ...) name,
enum class Scores {
  EDL_ROUTER_SCORES(EDL_ENUMERATOR) //
  none, // the input is a distribution already
};
#undef EDL_ENUMERATOR

inline constexpr int kRouterScores = static_cast<int>(Scores::none);
inline constexpr int kAllScores = kRouterScores + 1;

// Whether a score is an expert's share of the row, which all its logits enter; else that of its own logit alone.
inline constexpr bool is_share_of_row(Scores scores) {
  return scores == Scores::softmax;
}

// Beside the sum of those others where it divides them.
inline constexpr double kScoreSumEpsilon = 1e-20;

} // namespace edl
