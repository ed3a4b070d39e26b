#include "support.h"

using namespace edl_tests;

namespace {

at::Tensor sums_of(const at::Tensor& routing, const char* scores) {
  return std::get<0>(edl::aggregate_routing(routing, ids({0, 2, -1, 2, 0}), 3, scores));
}

} // namespace

CATCH_TEST_CASE("aggregate_routing sums distributions per segment and leaves out tokens of segment -1") {
  const at::Tensor routing = at::randn({5, 7}, at::kDouble);
  const auto [sums, counts] = edl::aggregate_routing(routing, ids({0, 2, -1, 2, 0}), 3, "softmax");
  const at::Tensor rows = routing.softmax(-1);
  CATCH_REQUIRE(distance(sums, at::stack({rows[0] + rows[4], at::zeros_like(rows[0]), rows[1] + rows[3]})) < 1e-14);
  CATCH_REQUIRE(counts.equal(doubles({2, 0, 2}, {3})));
}

CATCH_TEST_CASE("aggregate_routing takes 16-bit logits and int32 ids, and sums in float32") {
  const at::Tensor routing = at::randn({64, 16}).to(at::kBFloat16);
  const at::Tensor segments = (at::arange(64, at::kLong) % 4).to(at::kInt);
  const auto [sums, counts] = edl::aggregate_routing(routing, segments, 4, "sigmoid");
  const at::Tensor gates = routing.to(at::kDouble).sigmoid();
  const at::Tensor rows = gates / gates.sum(-1, true);
  CATCH_REQUIRE(sums.scalar_type() == at::kFloat);
  CATCH_REQUIRE(distance(sums, rows.reshape({16, 4, 16}).sum(0)) < 1e-5);
}

CATCH_TEST_CASE("aggregate_routing has the gradient of its definition") {
  const at::Tensor weights = at::randn({3, 4}, at::kDouble);
  for (const char* scores : {"softmax", "sigmoid"}) {
    const at::Tensor routing = at::randn({5, 4}, at::kDouble);
    const auto function = [&](const at::Tensor& at_point) { return sums_of(at_point, scores); };
    CATCH_REQUIRE(distance(gradient(routing, weights, function), numeric_gradient(routing, weights, function)) < 1e-8);
  }
}

CATCH_TEST_CASE("aggregate_routing refuses wrong arguments in one sentence") {
  const at::Tensor routing = at::randn({8, 4});
  const at::Tensor zeros = at::zeros({8}, at::kLong);
  CATCH_REQUIRE(
      error_of([&] { edl::aggregate_routing(routing, zeros.slice(0, 1), 1, "softmax"); }) ==
      "edl::aggregate_routing: segment_ids must have one entry per row of routing (got 7 ids for 8 rows)");
  CATCH_REQUIRE(error_of([&] {
                  edl::aggregate_routing(routing, zeros, 1, "tanh");
                }) == "edl::aggregate_routing: scores must be 'softmax', 'sigmoid' or 'none' (got 'tanh')");
  CATCH_REQUIRE(error_of([&] {
                  edl::aggregate_routing(routing[0], zeros, 1, "softmax");
                }) == "edl::aggregate_routing: routing must have the shape [T, E] (got 1 dimensions)");
  const std::string index =
      error_of<c10::IndexError>([&] { edl::aggregate_routing(routing, zeros + 3, 3, "softmax"); });
  CATCH_REQUIRE(index.rfind("edl::aggregate_routing: segment_ids must be at least -1 and below 3", 0) == 0);
}
