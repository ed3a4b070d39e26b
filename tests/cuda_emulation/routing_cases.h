#pragma once

// Tokens of many sizes and orders of segments, for aggregate_routing and its backward pass.

#include "support.h"

namespace edl_tests {

// In which order the segments of the tokens stand.
enum class Ids { runs, random, one, all_but_the_last, alternating, seldom, none };

struct Case {
  int64_t num_tokens, num_experts, num_segments;
  Ids ids = Ids::random;
  int64_t padding = 0; // elements between the rows of routing
  int64_t offset = 0; //  of its first, from a multiple of 16 bytes
  bool ids_are_64_bit = true;
};

// Chunks that are not full and several; teams from one lane to a warp; packs and single elements, and rows that neither
// holds at once; short and long groups side by side; more segments than tokens.
inline const Case kCases[] = {
    {1, 1, 1},
    {63, 3, 2, Ids::runs},
    {64, 8, 2, Ids::all_but_the_last},
    {64, 16, 1, Ids::one, 0, 0, false},
    {65, 7, 70, Ids::random, 2, 1},
    {150, 128, 5, Ids::runs, 8},
    {100, 128, 5, Ids::random, 0, 1, false},
    {170, 136, 7, Ids::runs},
    {100, 131, 4, Ids::random, 1},
    {90, 520, 3, Ids::alternating},
    {70, 520, 2, Ids::runs, 8},
    {90, 24, 3, Ids::none},
    {200, 2, 12, Ids::random, 0, 0, false},
    {100, 64, 9, Ids::alternating},
};

inline double id_of(const Case& size, int64_t t, double random_id) {
  switch (size.ids) {
    case Ids::runs:
      return t == size.num_tokens / 2 ? -1.0 : static_cast<double>(t * size.num_segments / size.num_tokens);
    case Ids::random:
      return random_id;
    case Ids::one:
      return static_cast<double>(size.num_segments - 1);
    case Ids::all_but_the_last:
      return t + 1 < size.num_tokens ? 0 : 1;
    case Ids::alternating:
      return static_cast<double>(t % size.num_segments);
    case Ids::seldom:
      return t % 16 == 0 ? static_cast<double>(t / 16 % size.num_segments) : -1;
    case Ids::none:
      break;
  }
  return -1;
}

inline Values ids_of(const Case& size) {
  Values ids = random_ids(size.num_tokens, size.num_tokens > 1 ? -1 : 0, size.num_segments - 1, 1);
  for (int64_t t = 0; t < size.num_tokens; ++t) {
    ids[t] = id_of(size, t, ids[t]);
  }
  return ids;
}

inline Values routing_of(const Case& size, const Values& ids, Scores scores) {
  const int64_t stride = size.num_experts + size.padding;
  Values routing = random_values(size.num_tokens * stride, 2, 2);
  for (int64_t t = 0; t < size.num_tokens; ++t) {
    for (int64_t e = 0; e < size.num_experts; ++e) {
      double& value = routing[t * stride + e];
      value = ids[t] < 0 ? kNan : scores == Scores::none ? std::abs(value) : value; // of such tokens nothing may show
    }
  }
  return routing;
}

// Every score for the types that differ most; float16 and float64 differ from these in conversions alone.
template <typename Check>
void check_all(const Check& check) {
  for (const StorageType storage : kStorages) {
    for (int i = 0; i < edl::kAllScores; ++i) {
      const auto scores = static_cast<Scores>(i);
      const bool converts_alone = storage == StorageType::float16 || storage == StorageType::float64;
      for (const Case& size : kCases) {
        if (!converts_alone || scores == Scores::softmax) {
          check(size, storage, scores);
        }
      }
    }
  }
}

} // namespace edl_tests
