#pragma once

#include <c10/util/Exception.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "common/score_function.h"

namespace edl {

#define EDL_NAME(name, ...) #name,
inline constexpr std::string_view kScoreNames[kAllScores] = {EDL_ROUTER_SCORES(EDL_NAME) "none"};
#undef EDL_NAME

// The first `count` names as a sentence says them: 'softmax', 'sigmoid' or 'none'.
inline std::string score_names(int count) {
  std::string names;
  for (int i = 0; i < count; ++i) {
    const char* separator = i == 0 ? "'" : i + 1 < count ? ", '" : " or '";
    names.append(separator).append(kScoreNames[i]).append("'");
  }
  return names;
}

inline Scores parse_scores(std::string_view op, std::string_view name, int count = kAllScores) {
  const auto* end = kScoreNames + count;
  const auto* found = std::find(kScoreNames, end, name);
  TORCH_CHECK_VALUE(found != end, op, ": scores must be ", score_names(count), " (got '", name, "')");
  return static_cast<Scores>(found - kScoreNames);
}

// Of an operator that takes no distributions.
inline Scores parse_router_scores(std::string_view op, std::string_view name) {
  return parse_scores(op, name, kRouterScores);
}

} // namespace edl
