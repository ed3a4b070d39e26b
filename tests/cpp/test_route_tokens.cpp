#include "support.h"

using namespace edl_tests;

CATCH_TEST_CASE("route_tokens gives the chosen experts their share of the softmax") {
  const at::Tensor logits = at::randn({9, 6}, at::kDouble);
  const auto [weights, experts] = edl::route_tokens(logits, 2, "softmax");
  const auto [values, indices] = logits.softmax(-1).topk(2);
  CATCH_REQUIRE(experts.equal(indices));
  CATCH_REQUIRE(distance(weights, values / values.sum(-1, true)) < 1e-14);
}

CATCH_TEST_CASE("route_tokens breaks ties for the lowest expert, and a bias moves the choice but no weight") {
  const at::Tensor logits = at::zeros({1, 4}, at::kDouble);
  const auto [tied_weights, tied] = edl::route_tokens(logits, 3, "sigmoid", {}, /*normalize=*/false, /*scale=*/2.0);
  CATCH_REQUIRE(tied.equal(ids({0, 1, 2}).unsqueeze(0)));
  CATCH_REQUIRE(distance(tied_weights, at::ones({1, 3}, at::kDouble)) < 1e-15);
  const auto [weights, experts] =
      edl::route_tokens(logits, 1, "sigmoid", doubles({0, 0, 0.5, 0}, {4}), /*normalize=*/false);
  CATCH_REQUIRE(experts.item<int64_t>() == 2);
  CATCH_REQUIRE(weights.item<double>() == 0.5);
}

CATCH_TEST_CASE("route_tokens has the gradient of its definition") {
  const at::Tensor logits = at::randn({5, 6}, at::kDouble);
  const at::Tensor weights = at::randn({5, 2}, at::kDouble);
  for (const char* scores : {"softmax", "sigmoid"}) {
    for (const bool normalize : {true, false}) {
      const auto function = [&](const at::Tensor& at_point) {
        return std::get<0>(edl::route_tokens(at_point, 2, scores, {}, normalize, 1.5));
      };
      CATCH_REQUIRE(distance(gradient(logits, weights, function), numeric_gradient(logits, weights, function)) < 1e-7);
    }
  }
}

CATCH_TEST_CASE("route_tokens chooses and weighs allowed experts alone") {
  const at::Tensor logits = at::randn({9, 6}, at::kDouble);
  const at::Tensor allowed = at::ones({9, 6}, at::kBool);
  allowed.select(1, 2).fill_(false);
  const at::Tensor bias = doubles({0, 0, 9, 0, 0, 0}, {6});
  const at::Tensor masked = logits.masked_fill(allowed.logical_not(), -std::numeric_limits<double>::infinity());
  const auto [values, indices] = masked.softmax(-1).topk(2);
  for (const auto& shift : {std::optional<at::Tensor>(), std::optional(bias)}) {
    const auto [weights, experts] = edl::route_tokens(logits, 2, "softmax", shift, /*normalize=*/false, 1.0, allowed);
    CATCH_REQUIRE(experts.equal(indices));
    CATCH_REQUIRE(distance(weights, values) < 1e-14);
  }
  const at::Tensor upstream = at::randn({9, 2}, at::kDouble);
  const auto function = [&](const at::Tensor& at_point) {
    return std::get<0>(edl::route_tokens(at_point, 2, "softmax", {}, /*normalize=*/false, 1.0, allowed));
  };
  const at::Tensor found = gradient(logits, upstream, function);
  CATCH_REQUIRE(distance(found, numeric_gradient(logits, upstream, function)) < 1e-7);
  CATCH_REQUIRE(found.select(1, 2).eq(0).all().item<bool>());
}

CATCH_TEST_CASE("route_tokens weighs experts that are given, and none as nothing") {
  const at::Tensor logits = doubles({1, 2, 3, 4, 4, 3, 2, 1}, {2, 4});
  const at::Tensor given = ids({1, -1, 3, 0}).view({2, 2});
  const at::Tensor scores = logits.softmax(-1);
  for (const auto kind : {at::kInt, at::kLong}) {
    const auto [weights, experts] =
        edl::route_tokens(logits, 2, "softmax", {}, /*normalize=*/false, 2.0, {}, given.to(kind));
    CATCH_REQUIRE(experts.equal(ids({1, 4, 3, 0}).view({2, 2})));
    const at::Tensor expected = 2 * scores.gather(1, given.clamp_min(0)) * given.ge(0);
    CATCH_REQUIRE(distance(weights, expected) < 1e-14);
  }
}

CATCH_TEST_CASE("route_tokens refuses wrong arguments in one sentence") {
  const at::Tensor logits = at::randn({5, 6});
  CATCH_REQUIRE(error_of([&] {
                  edl::route_tokens(logits, 7, "softmax");
                }) == "edl::route_tokens: top_k must not exceed the number of experts (got 7 of 6)");
  CATCH_REQUIRE(error_of([&] {
                  edl::route_tokens(logits, 2, "none");
                }) == "edl::route_tokens: scores must be 'softmax' or 'sigmoid' (got 'none')");
  CATCH_REQUIRE(error_of([&] {
                  edl::route_tokens(logits, 2, "softmax", at::zeros({5}));
                }) == "edl::route_tokens: bias must have one entry per expert (got 5 for 6 experts)");
  CATCH_REQUIRE(
      error_of<c10::IndexError>([&] {
        edl::route_tokens(logits, 2, "softmax", {}, true, 1.0, at::eye(5, 6).to(at::kBool));
      }) == "edl::route_tokens: allowed must leave each token at least top_k experts (got 1 for token 0 and top_k 2)");
  CATCH_REQUIRE(error_of<c10::IndexError>([&] {
                  edl::route_tokens(logits, 2, "softmax", {}, true, 1.0, {}, at::ones({5, 2}, at::kLong));
                }) == "edl::route_tokens: experts of a token must differ (got 1 twice for token 0)");
}
