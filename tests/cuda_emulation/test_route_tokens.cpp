#include "cuda/kernels/route_tokens.h"

#include <numeric>

#include "support.h"

namespace {

using namespace edl_tests;

struct Case {
  int64_t num_tokens, num_experts, top_k;
  int64_t padding = 0; // elements between the rows of logits
};
// Fewer experts than lanes, more, no multiple of them; all chosen; several blocks and a block that is not full.
const Case kCases[] = {{1, 1, 1}, {5, 3, 3}, {19, 8, 2, 1}, {9, 33, 4, 3}, {17, 64, 8}, {3, 300, 40}};

struct Rule {
  Scores scores;
  bool normalize;
  double scale;
};
const Rule kRules[] = {
    {Scores::softmax, false, 1}, {Scores::softmax, true, 2.5}, {Scores::sigmoid, false, 1}, {Scores::sigmoid, true, 2}};

// Experts from the highest value to the lowest, NaN before all, the lower expert among equals.
Values experts_in_order(const Values& values, int64_t top_k) {
  std::vector<int64_t> experts(values.size());
  std::iota(experts.begin(), experts.end(), 0);
  const auto key = [&](int64_t e) {
    return std::isnan(values[e]) ? std::numeric_limits<double>::infinity() : std::max(values[e], -1e300);
  };
  std::stable_sort(experts.begin(), experts.end(), [&](int64_t a, int64_t b) { return key(a) > key(b); });
  return {experts.begin(), experts.begin() + top_k};
}

Values sigmoids(Values logits) {
  for (double& z : logits) {
    z = 1 / (1 + std::exp(-z));
  }
  return logits;
}

// Scores of the chosen experts, as far as they depend on the logits alone, and what they are divided by.
struct ChosenScores {
  Values values; // [K]
  double sum;
};
ChosenScores chosen_scores(const Values& logits, const Values& experts, const Rule& rule) {
  const Values all = rule.scores == Scores::softmax ? score(logits, Scores::softmax) : sigmoids(logits);
  ChosenScores chosen = {{}, 0};
  for (const double expert : experts) {
    chosen.values.push_back(all[static_cast<int64_t>(expert)]);
    chosen.sum += chosen.values.back();
  }
  chosen.sum += rule.scores == Scores::softmax ? 0 : 1e-20;
  return chosen;
}

Values weights_of(const Values& logits, const Values& experts, const Rule& rule) {
  ChosenScores chosen = chosen_scores(logits, experts, rule);
  for (double& weight : chosen.values) {
    weight *= rule.scale / (rule.normalize ? chosen.sum : 1);
  }
  return chosen.values;
}

struct Routed {
  Values logits, weights, experts;
};

Routed route(
    const Case& size,
    StorageType storage,
    const Rule& rule,
    const Values& logit_values,
    const Values* bias_values,
    const std::vector<Order>& orders = every_order()) {
  const Element wide = accumulation_of(storage);
  const int64_t stride = size.num_experts + size.padding, chosen = size.num_tokens * size.top_k;
  const Buffer logits = Buffer::input("logits", element_of(storage), logit_values);
  const Buffer bias = Buffer::input("bias", wide, bias_values != nullptr ? *bias_values : Values(1));
  Buffer weights = Buffer::output("weights", wide, chosen);
  Buffer experts = Buffer::output("experts", Element::int64, chosen);
  run(
      {&weights, &experts}, {},
      [&] {
        edl::cuda::launch_route_tokens(
            {.logits = logits.data(),
             .storage = storage,
             .row_stride = stride,
             .num_tokens = size.num_tokens,
             .num_experts = size.num_experts,
             .top_k = size.top_k,
             .scores = rule.scores,
             .bias = bias_values != nullptr ? bias.data() : nullptr,
             .normalize = rule.normalize,
             .scale = rule.scale,
             .weights = weights.data(),
             .experts = experts.as<int64_t>()},
            nullptr);
      },
      orders);
  return {logits.values(), weights.values(), experts.values()};
}

void check_weights(const Case& size, StorageType storage, const Rule& rule, const Routed& routed) {
  Values expected;
  for (int64_t t = 0; t < size.num_tokens; ++t) {
    const Values row = row_of(routed.logits, t, size.num_experts + size.padding, size.num_experts);
    const Values weights = weights_of(row, row_of(routed.experts, t, size.top_k, size.top_k), rule);
    expected.insert(expected.end(), weights.begin(), weights.end());
  }
  const Element wide = accumulation_of(storage);
  check_close(routed.weights, expected, tolerance(wide, wide, size.num_experts));
}

} // namespace

CATCH_TEST_CASE("route_tokens: the experts of the highest logits, and their weights") {
  for (const StorageType storage : kStorages) { // 16-bit logits have equals
    for (const Rule& rule : kRules) {
      for (const Case& size : kCases) {
        const int64_t stride = size.num_experts + size.padding;
        const Routed routed = route(size, storage, rule, random_values(size.num_tokens * stride, 2, 1), nullptr);
        Values expected;
        for (int64_t t = 0; t < size.num_tokens; ++t) {
          const Values experts = experts_in_order(row_of(routed.logits, t, stride, size.num_experts), size.top_k);
          expected.insert(expected.end(), experts.begin(), experts.end());
        }
        CATCH_CHECK(routed.experts == expected);
        check_weights(size, storage, rule, routed);
      }
    }
  }
}

CATCH_TEST_CASE("route_tokens: the lowest expert comes first among equals") {
  for (const StorageType storage : {StorageType::float32, StorageType::float64}) {
    const Case size = {9, 100, 70};
    const Routed routed = route(size, storage, kRules[3], random_ids(900, 0, 3, 1), nullptr);
    for (int64_t t = 0; t < size.num_tokens; ++t) {
      CATCH_CHECK(row_of(routed.experts, t, 70, 70) == experts_in_order(row_of(routed.logits, t, 100, 100), 70));
    }
  }
}

CATCH_TEST_CASE("route_tokens: a bias moves the choice and not the weights") {
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      for (const Case& size : kCases) {
        const int64_t stride = size.num_experts + size.padding;
        const Values bias = random_values(size.num_experts, 0.2, 2);
        const Routed routed = route(size, storage, rule, random_values(size.num_tokens * stride, 2, 1), &bias);
        Values actual, expected; // what the choice is ordered by, so that rounding may swap near equals
        for (int64_t t = 0; t < size.num_tokens; ++t) {
          const Values row = row_of(routed.logits, t, stride, size.num_experts);
          Values order = rule.scores == Scores::softmax ? score(row, Scores::softmax) : sigmoids(row);
          for (int64_t e = 0; e < size.num_experts; ++e) {
            order[e] += bias[e];
          }
          const Values experts = experts_in_order(order, size.top_k);
          for (int64_t k = 0; k < size.top_k; ++k) {
            expected.push_back(order[static_cast<int64_t>(experts[k])]);
            actual.push_back(order.at(static_cast<size_t>(routed.experts[t * size.top_k + k])));
          }
        }
        const Element wide = accumulation_of(storage);
        check_close(actual, expected, tolerance(wide, wide, size.num_experts));
        check_weights(size, storage, rule, routed);
      }
    }
  }
}

CATCH_TEST_CASE(
    "route_tokens: NaN comes first and shows in the weights, infinities and zeros of both signs keep order") {
  const double infinity = std::numeric_limits<double>::infinity();
  const Values rows = {1,   kNan, 0, -infinity, 7, kNan, 2,  3, //
                       -0., 0,    0, -0.,       1, 1,    -1, -infinity};
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      const Routed routed = route({2, 8, 8}, storage, rule, rows, nullptr);
      const Values expected = {1, 5, 4, 7, 6, 0, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7};
      CATCH_CHECK(routed.experts == expected);
      CATCH_CHECK(std::isnan(routed.weights[0]));
      CATCH_CHECK(std::isfinite(routed.weights[8]));
      const Values bias = {0, -infinity, 0, 0, 0, -infinity, 0, 0}; // NaN stays highest
      CATCH_CHECK(std::isnan(route({2, 8, 2}, storage, rule, rows, &bias).weights[0]));
    }
  }
}

CATCH_TEST_CASE("route_tokens: masked experts come last whatever the bias, and a row without an open one is NaN") {
  const double masked = -std::numeric_limits<double>::infinity();
  const Values rows = {0,      0.5,    masked, masked, //
                       masked, masked, -3,     masked, //
                       masked, masked, masked, masked};
  const Values bias = {0, masked, 9, 8};
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      const Routed routed = route({3, 4, 3}, storage, rule, rows, &bias);
      CATCH_CHECK(routed.experts == Values{0, 1, 2, 2, 0, 1, 0, 1, 2});
      for (const int64_t extra : {2, 4, 5}) {
        CATCH_CHECK(routed.weights[extra] == 0);
      }
      for (int64_t slot = 0; slot < 9; ++slot) {
        CATCH_CHECK(std::isnan(routed.weights[slot]) == (slot >= 6));
      }
    }
  }
}

CATCH_TEST_CASE("route_tokens: as many experts as shared memory holds") {
  for (const StorageType storage : {StorageType::float32, StorageType::float64}) {
    const Case size = {3, edl::cuda::most_experts_to_route(storage), 3};
    const Routed routed =
        route(size, storage, kRules[0], random_values(3 * size.num_experts, 2, 1), nullptr, {Order::random});
    for (int64_t t = 0; t < 3; ++t) {
      const Values row = row_of(routed.logits, t, size.num_experts, size.num_experts);
      CATCH_CHECK(row_of(routed.experts, t, 3, 3) == experts_in_order(row, 3));
    }
    check_weights(size, storage, kRules[0], routed);
  }
}

CATCH_TEST_CASE("route_tokens_backward: the gradient of the logits") {
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      for (const Case& size : kCases) {
        const Element element = element_of(storage), wide = accumulation_of(storage);
        const int64_t num_experts = size.num_experts, top_k = size.top_k, stride = num_experts + size.padding;
        const Buffer logits = Buffer::input("logits", element, random_values(size.num_tokens * stride, 2, 1));
        const Buffer grad = Buffer::input("grad_weights", wide, random_values(size.num_tokens * top_k, 1, 2));
        const Values z = logits.values(), g = grad.values();
        Values choice;
        for (int64_t t = 0; t < size.num_tokens; ++t) {
          const Values experts = experts_in_order(row_of(z, t, stride, num_experts), top_k);
          choice.insert(choice.end(), experts.begin(), experts.end());
        }
        const Buffer experts = Buffer::input("experts", Element::int64, choice);
        Buffer grad_logits = Buffer::output("grad_logits", element, size.num_tokens * num_experts);
        run({&grad_logits}, {}, [&] {
          edl::cuda::launch_route_tokens_backward(
              {.grad_weights = grad.data(),
               .logits = logits.data(),
               .storage = storage,
               .row_stride = stride,
               .num_tokens = size.num_tokens,
               .num_experts = num_experts,
               .top_k = top_k,
               .experts = experts.as<int64_t>(),
               .scores = rule.scores,
               .normalize = rule.normalize,
               .scale = rule.scale,
               .grad_logits = grad_logits.data()},
              nullptr);
        });
        // dw_k/dz_e = w_k (d_ke a_k - b_e): a_k is 1, or 1 - s_k for a sigmoid; b_e is what e adds to the sum.
        Values expected(size.num_tokens * num_experts);
        double largest = 0; // of the terms, which may cancel
        for (int64_t t = 0; t < size.num_tokens; ++t) {
          const Values row = row_of(z, t, stride, num_experts), own = row_of(choice, t, top_k, top_k);
          const Values weights = weights_of(row, own, rule), softmax = score(row, Scores::softmax);
          const ChosenScores chosen = chosen_scores(row, own, rule);
          double dot = 0;
          for (int64_t k = 0; k < top_k; ++k) {
            dot += g[t * top_k + k] * weights[k];
          }
          for (int64_t k = 0; k < top_k; ++k) {
            const double slope = rule.scores == Scores::sigmoid ? 1 - chosen.values[k] : 1;
            const auto e = static_cast<int64_t>(own[k]);
            const double share = !rule.normalize ? 0 : slope * chosen.values[k] / chosen.sum;
            const double term = g[t * top_k + k] * weights[k] * slope;
            expected[t * num_experts + e] = term - dot * share;
            largest = std::max({largest, std::abs(term), std::abs(dot * share)});
          }
          for (int64_t e = 0; e < num_experts && rule.scores == Scores::softmax && !rule.normalize; ++e) {
            expected[t * num_experts + e] -= dot * softmax[e];
          }
        }
        check_close(grad_logits.values(), expected, tolerance(element, wide, num_experts), largest);
      }
    }
  }
}
