#include "support.h"

using namespace edl_tests;

namespace {

const double kEps = 1e-8;

at::Tensor means() {
  return doubles({.7, .2, .1, .1, .2, .7, .3, .4, .3}, {3, 3});
}

at::Tensor loss_of(const at::Tensor& sums, const at::Tensor& counts, const char* reduction = "mean_of_logs") {
  return edl::expert_divergence(sums, counts, kEps, reduction);
}

} // namespace

CATCH_TEST_CASE("expert_divergence is the paper's loss") {
  const at::Tensor counts = doubles({1, 2, 4}, {3});
  const at::Tensor sums = means() * counts.unsqueeze(-1);
  CATCH_REQUIRE(std::abs(loss_of(sums, counts).item<double>() - 2.1069530208645078) < 1e-12);
  CATCH_REQUIRE(std::abs(loss_of(sums, counts, "log_of_mean").item<double>() - 1.9620992) < 1e-7);
}

CATCH_TEST_CASE("expert_divergence has the gradient of the paper's loss") {
  const at::Tensor ones = at::ones({3}, at::kDouble);
  const auto function = [&](const at::Tensor& sums) { return loss_of(sums, ones); };
  const at::Tensor expected = doubles(
      {-1.0337824041, 0.8016906343, 2.2833699002, 2.2833699002, 0.8016906343, -1.0337824041, 0.2083201167,
       -1.1376171144, 0.2083201167},
      {3, 3});
  CATCH_REQUIRE(distance(gradient(means(), at::ones({}, at::kDouble), function), expected) < 1e-9);
}

CATCH_TEST_CASE("expert_divergence of fewer than two domains is zero with zero gradient") {
  const at::Tensor counts = doubles({1, 0, 0}, {3});
  const auto function = [&](const at::Tensor& sums) { return loss_of(sums, counts); };
  CATCH_REQUIRE(function(means()).item<double>() == 0);
  CATCH_REQUIRE(gradient(means(), at::ones({}, at::kDouble), function).abs().max().item<double>() == 0);
}

CATCH_TEST_CASE("expert_divergence with bias correction keeps the value and counts pairs of two segments or more") {
  const at::Tensor segments = at::rand({3, 4, 5}, at::kDouble).softmax(-1); // [D, segments, E]
  const at::Tensor counts = doubles({4, 4, 4}, {3});
  const auto corrected = [&](const at::Tensor& sums, const at::Tensor& number) {
    return edl::expert_divergence(sums, number, kEps, "mean_of_logs", segments.square().sum(1));
  };
  const at::Tensor sums = segments.sum(1);
  CATCH_REQUIRE(distance(corrected(sums, counts), loss_of(sums, counts)) < 1e-12);
  CATCH_REQUIRE(corrected(sums, doubles({4, 1, 1}, {3})).item<double>() == 0);
}

CATCH_TEST_CASE("expert_divergence with bias correction has the gradient of the corrected divergence") {
  const at::Tensor segments = doubles({.6, .3, .1, .5, .2, .3, .4, .4, .2, .1, .2, .7, .3, .1, .6}, {5, 3});
  const auto function = [](const at::Tensor& means_of_segments) {
    const auto [sums, squares, counts] =
        edl::domain_moments(means_of_segments, at::ones({5}, at::kDouble), ids({0, 0, 0, 1, 1}), 2, true);
    return edl::expert_divergence(sums, counts, 1e-6, "mean_of_logs", squares);
  };
  CATCH_REQUIRE(std::abs(function(segments).item<double>() - 2.21952746321338) < 1e-12);
  const at::Tensor expected = doubles(
      {-0.4207564741, -0.4253090216, 0.9727410549, -0.5213214779, -0.5817434719, 1.1383775317, -0.6218864816,
       -0.2688745713, 1.0555592933, 0.8514051706, 1.0605214681, -0.7815940292, 1.4547951931, 0.5912181173,
       -1.0300487444},
      {5, 3});
  CATCH_REQUIRE(distance(gradient(segments, at::ones({}, at::kDouble), function), expected) < 1e-9);
}

CATCH_TEST_CASE("expert_divergence refuses wrong arguments in one sentence") {
  const at::Tensor counts = at::ones({3}, at::kDouble);
  CATCH_REQUIRE(error_of([&] {
                  loss_of(means().to(at::kFloat), counts);
                }) == "edl::expert_divergence: sums and counts must be float64 (got Float and Double)");
  CATCH_REQUIRE(error_of([&] {
                  edl::expert_divergence(means(), counts, -1.0);
                }) == "edl::expert_divergence: eps must be finite and not negative (got -1)");
  CATCH_REQUIRE(error_of([&] {
                  loss_of(means(), counts, "sum");
                }) == "edl::expert_divergence: reduction must be 'mean_of_logs' or 'log_of_mean' (got 'sum')");
  CATCH_REQUIRE(
      error_of([&] { edl::expert_divergence(means(), counts, kEps, "log_of_mean", means()); }) ==
      "edl::expert_divergence: squares correct the bias of reduction = 'mean_of_logs' only (got "
      "'log_of_mean')");
  CATCH_REQUIRE(error_of([&] {
                  edl::expert_divergence(means(), counts, kEps, "mean_of_logs", at::empty({0}, at::kDouble));
                }) == "edl::expert_divergence: squares must have the shape of sums (got [0] for [3, 3])");
}

CATCH_TEST_CASE("pairwise_divergence is the symmetric table of Jensen-Shannon divergences") {
  const at::Tensor table = edl::pairwise_divergence(means(), at::ones({3}, at::kDouble));
  const double near = 0.08429375012029298;
  const double far = 0.25310161544280674;
  CATCH_REQUIRE(distance(table, doubles({0, far, near, far, 0, near, near, near, 0}, {3, 3})) < 1e-14);
}

CATCH_TEST_CASE("the loss path chains from logits to the loss and back") {
  const at::Tensor segments = ids({0, 0, 1, 1, 2, 2, 3, 3});
  const auto function = [&](const at::Tensor& logits) {
    const auto [sums, tokens] = edl::aggregate_routing(logits, segments, 4, "softmax");
    const auto [moments, squares, counts] = edl::domain_moments(sums, tokens, ids({0, 1, 0, 1}), 2, false);
    return edl::expert_divergence(moments, counts);
  };
  const at::Tensor logits = at::randn({8, 6}, at::kDouble);
  const at::Tensor one = at::ones({}, at::kDouble);
  CATCH_REQUIRE(distance(gradient(logits, one, function), numeric_gradient(logits, one, function)) < 1e-6);
}
