#include "support.h"

using namespace edl_tests;

namespace {

const at::Tensor& segments() {
  static const at::Tensor result = ids({0, 0, 1, 1, 2, 2, 3, 3});
  return result;
}

const at::Tensor& labels() {
  static const at::Tensor result = ids({0, 1, 0, 1});
  return result;
}

} // namespace

CATCH_TEST_CASE("expert_divergence_loss is its three operators in one call") {
  for (const bool bias_correction : {false, true}) {
    const auto function = [&](const at::Tensor& logits) {
      const auto [sums, tokens] = edl::aggregate_routing(logits, segments(), 4, "softmax");
      const auto [moments, squares, counts] = edl::domain_moments(sums, tokens, labels(), 2, bias_correction);
      return bias_correction ? edl::expert_divergence(moments, counts, 1e-6, "mean_of_logs", squares)
                             : edl::expert_divergence(moments, counts);
    };
    const auto at_once = [&](const at::Tensor& logits) {
      return edl::expert_divergence_loss(
          {logits}, segments(), 4, labels(), 2, 1e-6, "softmax", "sequence", "mean_of_logs", "mean", bias_correction);
    };
    const at::Tensor logits = at::randn({8, 6}, at::kDouble);
    const at::Tensor one = at::ones({}, at::kDouble);
    CATCH_REQUIRE(at_once(logits).equal(function(logits)));
    CATCH_REQUIRE(distance(gradient(logits, one, at_once), gradient(logits, one, function)) < 1e-12);
  }
}

CATCH_TEST_CASE("expert_divergence_loss puts the losses of layers together") {
  const std::vector<at::Tensor> layers = {
      at::randn({8, 6}, at::kDouble), at::randn({4, 2, 6}, at::kDouble), at::randn({8, 6}, at::kDouble)};
  const auto loss = [&](at::TensorList of, const char* layer_reduction) {
    return edl::expert_divergence_loss(
        of, segments(), 4, labels(), 2, 1e-6, "softmax", "sequence", "mean_of_logs", layer_reduction);
  };
  std::vector<at::Tensor> alone;
  for (const at::Tensor& layer : layers) {
    alone.push_back(loss({layer}, "mean"));
  }
  const at::Tensor each = at::stack(alone);
  CATCH_REQUIRE(loss(layers, "none").equal(each));
  CATCH_REQUIRE(distance(loss(layers, "sum"), each.sum()) < 1e-12);
  CATCH_REQUIRE(distance(loss(layers, "mean"), each.mean()) < 1e-12);
}

CATCH_TEST_CASE("expert_divergence_loss by token takes the domains for segments") {
  const at::Tensor logits = at::randn({8, 6}, at::kDouble);
  const at::Tensor domains = ids({0, 1, 2, 0, 1, 2, -1, 0});
  const auto [sums, counts] = edl::aggregate_routing(logits, domains, 3, "softmax");
  const at::Tensor loss =
      edl::expert_divergence_loss({logits}, domains, 3, ids({0, 1, 2}), 3, 1e-6, "softmax", "token");
  CATCH_REQUIRE(loss.equal(edl::expert_divergence(sums, counts)));
}

CATCH_TEST_CASE("expert_divergence_loss refuses wrong arguments in one sentence") {
  const at::Tensor logits = at::randn({8, 6});
  CATCH_REQUIRE(error_of([&] {
                  edl::expert_divergence_loss({}, segments(), 4, labels(), 2);
                }) == "edl::expert_divergence_loss: layers must hold at least one tensor (got an empty list)");
  CATCH_REQUIRE(
      error_of([&] { edl::expert_divergence_loss({logits[0]}, segments(), 4, labels(), 2); }) ==
      "edl::expert_divergence_loss: layers must have the shape [T, E] or [B, S_len, E] (got 1 dimensions)");
}
