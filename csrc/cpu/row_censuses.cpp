#include "cpu/row_censuses.h"

#include "common/errors.h"
#include "common/scores.h"

namespace edl::cpu {

double distribution_tolerance(StorageType storage) {
  const bool is_16_bit = storage == StorageType::bfloat16 || storage == StorageType::float16;
  return is_16_bit ? 1e-2 : 1e-3;
}

void check_censuses(std::string_view op, const std::vector<RowCensus>& censuses, Scores scores, int64_t num_experts) {
  RowCensus all;
  for (const RowCensus& census : censuses) {
    all.finite += census.finite;
    all.distributions += census.distributions;
    if (all.first_other < 0) {
      all.first_other = census.first_other;
    }
  }
  if (scores == Scores::none) {
    TORCH_CHECK_VALUE(
        all.first_other < 0, op,
        ": with scores = 'none' every row of routing must be a distribution, entries of "
        "at least 0 that sum to 1 (got something else at row ",
        all.first_other, "; for logits pass scores = ", score_names(kRouterScores),
        ", or to ExpertDivergenceLoss input = 'logits')");
  } else {
    TORCH_CHECK_VALUE(
        num_experts == 1 || all.finite < 2 || all.distributions < all.finite, op,
        ": with scores = ", score_names(kRouterScores), " routing must be logits (got ", all.finite,
        " rows that all sum to 1 with entries of at least 0; for probabilities pass scores = 'none', or to "
        "ExpertDivergenceLoss input = 'probs')");
  }
}

} // namespace edl::cpu
