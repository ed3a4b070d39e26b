#include "cuda/kernels/route_tokens.h"

#include <numeric>

#include "support.h"

namespace {

using namespace edl_tests;

constexpr double kInfinite = std::numeric_limits<double>::infinity();

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
  Values all = rule.scores == Scores::softmax ? score(logits, Scores::softmax) : sigmoids(logits);
  all.push_back(0); // of none
  ChosenScores chosen = {{}, 0};
  for (const double expert : experts) {
    chosen.values.push_back(all[static_cast<int64_t>(expert)]);
    chosen.sum += chosen.values.back();
  }
  chosen.sum += rule.scores == Scores::sigmoid ? edl::kScoreSumEpsilon : 0;
  return chosen;
}

Values weights_of(const Values& logits, const Values& experts, const Rule& rule) {
  ChosenScores chosen = chosen_scores(logits, experts, rule);
  for (double& weight : chosen.values) {
    weight *= weight == 0 ? 0 : rule.scale / (rule.normalize ? chosen.sum : 1);
  }
  return chosen.values;
}

struct Routed {
  Values logits, weights, experts;
};

// What restricts a choice, or takes its place.
struct Limits {
  Values allowed = {}; // [T, E] of 0 and 1, with the padding of logits; or nothing
  Values given = {}; //   [T, K], or nothing
  bool are_64_bit = true; // the given
};

// top_k experts at least for each token, and up to all. In the padding anything.
Values random_allowed(const Case& size, uint64_t seed) {
  const int64_t stride = size.num_experts + size.padding;
  Values allowed = random_ids(size.num_tokens * stride, 0, 1, seed);
  for (int64_t t = 0; t < size.num_tokens; ++t) {
    for (int64_t k = 0; k < size.top_k; ++k) { // 7 has no factor with the number of experts in a case
      allowed[t * stride + (t + 7 * k) % size.num_experts] = 1;
    }
  }
  return allowed;
}

// Different experts that are allowed for each token, and none now and then: for the last token of several alone.
Values random_given(const Case& size, const Values& allowed, uint64_t seed) {
  const int64_t stride = size.num_experts + size.padding;
  const Values dice = random_ids(size.num_tokens * size.top_k, 0, 3, seed);
  Values given;
  for (int64_t t = 0; t < size.num_tokens; ++t) {
    for (int64_t e = size.num_experts - 1, k = 0; k < size.top_k; --e) {
      if (allowed[t * stride + e] != 0) {
        const bool is_none = dice[t * size.top_k + k] == 0 || (size.num_tokens > 1 && t == size.num_tokens - 1);
        given.push_back(is_none ? -1 : static_cast<double>(e));
        ++k;
      }
    }
  }
  return given;
}

Values with_sentinel(Values given, int64_t num_experts) {
  std::replace(given.begin(), given.end(), -1., static_cast<double>(num_experts));
  return given;
}

// NaN and both infinities in the place of every logit that is not allowed.
Values poisoned(Values logits, const Values& allowed) {
  for (size_t i = 0; i < allowed.size(); ++i) {
    logits[i] = allowed[i] != 0 ? logits[i] : i % 3 == 0 ? kNan : i % 3 == 1 ? kInfinite : -kInfinite;
  }
  return logits;
}

// The logits of token t, -inf where they are not allowed.
Values masked_row(const Values& logits, const Limits& limits, int64_t t, int64_t stride, int64_t num_experts) {
  Values row = row_of(logits, t, stride, num_experts);
  for (int64_t e = 0; e < num_experts && !limits.allowed.empty(); ++e) {
    row[e] = limits.allowed[t * stride + e] != 0 ? row[e] : -kInfinite;
  }
  return row;
}

Routed route(
    const Case& size,
    StorageType storage,
    const Rule& rule,
    const Values& logit_values,
    const Values* bias_values,
    const std::vector<Order>& orders = every_order(),
    const Limits& limits = {}) {
  const Element wide = accumulation_of(storage);
  const int64_t stride = size.num_experts + size.padding, chosen = size.num_tokens * size.top_k;
  const Buffer logits = Buffer::input("logits", element_of(storage), logit_values);
  const Buffer bias = Buffer::input("bias", wide, bias_values != nullptr ? *bias_values : Values(1));
  const Buffer allowed = Buffer::input("allowed", Element::byte, limits.allowed.empty() ? Values(1) : limits.allowed);
  const Buffer given =
      Buffer::input("given", ids_of(limits.are_64_bit), limits.given.empty() ? Values(1) : limits.given);
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
             .allowed = limits.allowed.empty() ? nullptr : allowed.as<uint8_t>(),
             .allowed_stride = stride,
             .given = limits.given.empty() ? nullptr : given.data(),
             .given_are_64_bit = limits.are_64_bit,
             .normalize = rule.normalize,
             .scale = rule.scale,
             .weights = weights.data(),
             .experts = experts.as<int64_t>()},
            nullptr);
      },
      orders);
  return {logits.values(), weights.values(), experts.values()};
}

void check_weights(
    const Case& size, StorageType storage, const Rule& rule, const Routed& routed, const Limits& limits = {}) {
  Values expected;
  for (int64_t t = 0; t < size.num_tokens; ++t) {
    const Values row = masked_row(routed.logits, limits, t, size.num_experts + size.padding, size.num_experts);
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

CATCH_TEST_CASE("route_tokens: allowed experts alone are chosen and weighed, whatever the others hold") {
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      for (const Case& size : kCases) {
        const int64_t stride = size.num_experts + size.padding;
        const Values bias = random_values(size.num_experts, 0.2, 2);
        const Limits limits = {random_allowed(size, 3)};
        const Values logits = poisoned(random_values(size.num_tokens * stride, 2, 1), limits.allowed);
        for (const Values* shift : {static_cast<const Values*>(nullptr), &bias}) {
          const Routed routed = route(size, storage, rule, logits, shift, every_order(), limits);
          Values actual, expected; // what the choice is ordered by, so that rounding may swap near equals
          for (int64_t t = 0; t < size.num_tokens; ++t) {
            const Values row = masked_row(routed.logits, limits, t, stride, size.num_experts);
            Values order = row;
            if (shift != nullptr) {
              order = rule.scores == Scores::softmax ? score(row, Scores::softmax) : sigmoids(row);
              for (int64_t e = 0; e < size.num_experts; ++e) {
                order[e] = limits.allowed[t * stride + e] != 0 ? order[e] + bias[e] : -kInfinite;
              }
            }
            const Values experts = experts_in_order(order, size.top_k);
            for (int64_t k = 0; k < size.top_k; ++k) {
              const auto chosen = static_cast<size_t>(routed.experts[t * size.top_k + k]);
              CATCH_REQUIRE(limits.allowed.at(t * stride + chosen) != 0);
              expected.push_back(order[static_cast<int64_t>(experts[k])]);
              actual.push_back(order.at(chosen));
            }
          }
          const Element wide = accumulation_of(storage);
          check_close(actual, expected, shift == nullptr ? 0 : tolerance(wide, wide, size.num_experts));
          check_weights(size, storage, rule, routed, limits);
        }
      }
    }
  }
}

CATCH_TEST_CASE("route_tokens: allowed experts that are masked come before those that are not allowed") {
  const Values rows = {5, -kInfinite, 4, -kInfinite, 3, //
                       5, -kInfinite, 4, -kInfinite, -kInfinite};
  const Limits limits = {
      {0, 0, 0, 1, 1, //
       0, 1, 0, 1, 1}};
  const Values bias = {9, 9, 9, -9, 0};
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      for (const Values* shift : {static_cast<const Values*>(nullptr), &bias}) {
        const Routed routed = route({2, 5, 2}, storage, rule, rows, shift, every_order(), limits);
        CATCH_CHECK(routed.experts == Values{4, 3, 1, 3});
        CATCH_CHECK(routed.weights[0] > 0);
        CATCH_CHECK(routed.weights[1] == 0);
        CATCH_CHECK(std::isnan(routed.weights[2]));
        CATCH_CHECK(std::isnan(routed.weights[3]));
      }
    }
  }
}

CATCH_TEST_CASE("route_tokens: given experts are weighed as chosen ones are, and none weighs nothing") {
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      for (const Case& size : kCases) {
        for (const bool restricted : {false, true}) {
          const int64_t stride = size.num_experts + size.padding;
          Limits limits = {random_allowed(size, 3), {}, restricted};
          limits.given = random_given(size, limits.allowed, 4);
          Values logits = random_values(size.num_tokens * stride, 2, 1);
          if (restricted) {
            logits = poisoned(logits, limits.allowed);
          } else {
            limits.allowed.clear();
          }
          const Routed routed = route(size, storage, rule, logits, nullptr, every_order(), limits);
          CATCH_CHECK(routed.experts == with_sentinel(limits.given, size.num_experts));
          check_weights(size, storage, rule, routed, limits);
        }
      }
    }
  }
}

CATCH_TEST_CASE(
    "route_tokens: given experts of a row without a distribution are NaN, and a sigmoid reads its own alone") {
  const Limits limits = {{}, {0, 1, -1, 0, 1, -1, 1, 0, -1, 1, 0, -1}};
  for (const int64_t num_experts : {4, 40}) {
    Values rows(4 * num_experts); // what counts stands at the end of a row
    std::fill_n(rows.begin(), num_experts, -kInfinite);
    rows[2 * num_experts - 1] = kNan;
    rows[3 * num_experts - 1] = kInfinite;
    std::fill_n(rows.begin() + 3 * num_experts, num_experts - 1, -kInfinite);
    for (const StorageType storage : kStorages) {
      for (const Rule& rule : kRules) {
        const Routed routed = route({4, num_experts, 3}, storage, rule, rows, nullptr, every_order(), limits);
        const bool is_softmax = rule.scores == Scores::softmax;
        for (int64_t k = 0; k < 2; ++k) {
          CATCH_CHECK(std::isnan(routed.weights[k]));
          CATCH_CHECK(std::isnan(routed.weights[3 + k]) == is_softmax);
          CATCH_CHECK(std::isnan(routed.weights[6 + k]) == is_softmax);
          if (is_softmax && rule.normalize) { // 0 / 0
            CATCH_CHECK(std::isnan(routed.weights[9 + k]));
          } else {
            CATCH_CHECK(routed.weights[9 + k] == 0);
          }
        }
        for (int64_t t = 0; t < 4; ++t) {
          CATCH_CHECK(routed.weights[3 * t + 2] == 0);
        }
      }
    }
  }
}

namespace {

// Values that the CPU refuses, one token each, between two that are right; four experts, two of them a token's.
const Values kWrongAllowed = {1, 1, 1, 1, //
                              0, 0, 1, 0, //
                              0, 0, 0, 0, //
                              0, 1, 1, 0};
const Values kWrongGiven = {3, 0, -2, 1, 4, 1, 1, std::ldexp(1, 31) - 1, 2, 2, -1, -std::ldexp(1, 31), 1, -1};
const Values kForbidding = {0, 1, 1, 1, //
                            1, 1, 1, 0, //
                            1, 1, 0, 1};
const Values kForbidden = {0, 1, 1, 2, -1, 2};

} // namespace

CATCH_TEST_CASE("route_tokens: what the CPU refuses makes the weights of its token NaN") {
  const auto tokens_of = [](const Routed& routed) { // 1: all NaN, 0: none
    Values tokens;
    for (size_t slot = 0; slot < routed.weights.size(); slot += 2) {
      CATCH_CHECK(std::isnan(routed.weights[slot]) == std::isnan(routed.weights[slot + 1]));
      tokens.push_back(std::isnan(routed.weights[slot]) ? 1 : 0);
    }
    return tokens;
  };
  const Values logits = random_values(28, 2, 1);
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      const auto routed = [&](int64_t num_tokens, const Limits& limits) {
        return route({num_tokens, 4, 2}, storage, rule, logits, nullptr, every_order(), limits);
      };
      CATCH_CHECK(tokens_of(routed(4, {kWrongAllowed})) == Values{0, 1, 1, 0});
      for (const bool are_64_bit : {false, true}) {
        const Routed found = routed(7, {{}, kWrongGiven, are_64_bit});
        CATCH_CHECK(tokens_of(found) == Values{0, 1, 1, 1, 1, 1, 0});
        CATCH_CHECK(found.experts == Values{3, 0, -1, 1, -1, 1, 1, -1, 2, 2, 4, -1, 1, 4});
        CATCH_CHECK(tokens_of(routed(3, {kForbidding, kForbidden, are_64_bit})) == Values{1, 0, 1});
      }
      const Values beyond = {std::ldexp(1, 40), 1};
      CATCH_CHECK(tokens_of(routed(1, {{}, beyond})) == Values{1});
    }
  }
}

namespace {

// As the kernel is given them: experts that were chosen, or given where there are some.
Values backward(
    const Case& size,
    StorageType storage,
    const Rule& rule,
    const Values& logit_values,
    const Values& grad_values,
    const Values& chosen,
    const Limits& limits = {}) {
  const Element element = element_of(storage);
  const bool are_64_bit = limits.given.empty() || limits.are_64_bit;
  const Buffer logits = Buffer::input("logits", element, logit_values);
  const Buffer grad = Buffer::input("grad_weights", accumulation_of(storage), grad_values);
  const Buffer allowed = Buffer::input("allowed", Element::byte, limits.allowed.empty() ? Values(1) : limits.allowed);
  const Buffer experts = Buffer::input("experts", ids_of(are_64_bit), limits.given.empty() ? chosen : limits.given);
  Buffer grad_logits = Buffer::output("grad_logits", element, size.num_tokens * size.num_experts);
  run({&grad_logits}, {}, [&] {
    edl::cuda::launch_route_tokens_backward(
        {.grad_weights = grad.data(),
         .logits = logits.data(),
         .storage = storage,
         .row_stride = size.num_experts + size.padding,
         .num_tokens = size.num_tokens,
         .num_experts = size.num_experts,
         .top_k = size.top_k,
         .experts = experts.data(),
         .experts_are_64_bit = are_64_bit,
         .given = !limits.given.empty(),
         .allowed = limits.allowed.empty() ? nullptr : allowed.as<uint8_t>(),
         .allowed_stride = size.num_experts + size.padding,
         .scores = rule.scores,
         .normalize = rule.normalize,
         .scale = rule.scale,
         .grad_logits = grad_logits.data()},
        nullptr);
  });
  return grad_logits.values();
}

// Of the random logits and gradients of weights that the cases share, against the definition.
void check_backward(const Case& size, StorageType storage, const Rule& rule, const Limits& limits) {
  const Element element = element_of(storage), wide = accumulation_of(storage);
  const int64_t num_experts = size.num_experts, top_k = size.top_k, stride = num_experts + size.padding;
  const Values logits =
      Buffer::input("logits", element, random_values(size.num_tokens * stride, 2, 1)).values(); // rounded
  const Values g = Buffer::input("grad_weights", wide, random_values(size.num_tokens * top_k, 1, 2)).values();
  Values choice = with_sentinel(limits.given, num_experts);
  for (int64_t t = 0; t < size.num_tokens && limits.given.empty(); ++t) {
    const Values experts = experts_in_order(masked_row(logits, limits, t, stride, num_experts), top_k);
    choice.insert(choice.end(), experts.begin(), experts.end());
  }
  const Values actual = backward(size, storage, rule, poisoned(logits, limits.allowed), g, choice, limits);
  // dw_k/dz_e = w_k (d_ke a_k - b_e): a_k is 1, or 1 - s_k for a sigmoid; b_e is what e adds to the sum.
  Values expected(size.num_tokens * num_experts);
  double largest = 0; // of the terms, which may cancel
  for (int64_t t = 0; t < size.num_tokens; ++t) {
    const Values row = masked_row(logits, limits, t, stride, num_experts), own = row_of(choice, t, top_k, top_k);
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
      if (e < num_experts) {
        expected[t * num_experts + e] = term - dot * (weights[k] == 0 ? 0 : share);
        largest = std::max({largest, std::abs(term), std::abs(dot * share)});
      }
    }
    for (int64_t e = 0; e < num_experts && rule.scores == Scores::softmax && !rule.normalize; ++e) {
      expected[t * num_experts + e] -= dot * softmax[e];
    }
    for (int64_t e = 0; e < num_experts && !limits.allowed.empty(); ++e) {
      CATCH_REQUIRE((limits.allowed[t * stride + e] != 0 || actual[t * num_experts + e] == 0));
    }
  }
  check_close(actual, expected, tolerance(element, wide, num_experts), largest);
}

} // namespace

CATCH_TEST_CASE("route_tokens_backward: the gradient of the logits") {
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      for (const Case& size : kCases) {
        check_backward(size, storage, rule, {});
      }
    }
  }
}

CATCH_TEST_CASE("route_tokens_backward: of allowed and of given experts") {
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      for (const Case& size : kCases) {
        const Values allowed = random_allowed(size, 3), given = random_given(size, allowed, 4);
        check_backward(size, storage, rule, {allowed});
        check_backward(size, storage, rule, {{}, given, false});
        check_backward(size, storage, rule, {allowed, given, true});
      }
    }
  }
}

CATCH_TEST_CASE(
    "route_tokens_backward: what the CPU refuses is NaN, and a token without a choice has a gradient of 0") {
  const auto tokens_of = [](const Values& gradient) { // 1: all NaN, 0: none
    Values tokens;
    for (size_t first = 0; first < gradient.size(); first += 4) {
      const auto nans = std::count_if(&gradient[first], &gradient[first] + 4, [](double x) { return std::isnan(x); });
      CATCH_CHECK((nans == 0 || nans == 4));
      tokens.push_back(nans == 4 ? 1 : 0);
    }
    return tokens;
  };
  const Values logits = random_values(28, 2, 1), grad = random_values(14, 1, 2);
  for (const StorageType storage : kStorages) {
    for (const Rule& rule : kRules) {
      const auto found = [&](int64_t num_tokens, const Values& chosen, const Limits& limits) {
        return backward({num_tokens, 4, 2}, storage, rule, logits, grad, chosen, limits);
      };
      CATCH_CHECK(tokens_of(found(4, {0, 1, 2, 0, 0, 1, 1, 2}, {kWrongAllowed})) == Values{0, 1, 1, 0});
      for (const bool are_64_bit : {false, true}) {
        CATCH_CHECK(tokens_of(found(7, {}, {{}, kWrongGiven, are_64_bit})) == Values{0, 1, 1, 1, 1, 1, 0});
        CATCH_CHECK(tokens_of(found(3, {}, {kForbidding, kForbidden, are_64_bit})) == Values{1, 0, 1});
      }
      const Values masked(4, -kInfinite), spoiled = {kNan, kNan};
      const Limits none = {{}, {-1, -1}};
      CATCH_CHECK(backward({1, 4, 2}, storage, rule, masked, spoiled, {}, none) == Values(4));
      const Limits one = {{}, {-1, 2}};
      const Values given = backward({1, 4, 2}, storage, rule, masked, {kNan, 1}, {}, one);
      CATCH_CHECK(std::isnan(given[2]));
    }
  }
}
