#include "support.h"

using namespace edl_tests;

namespace {

constexpr int64_t kTokens = 6;
constexpr int64_t kHidden = 4;
constexpr int64_t kInner = 3;
constexpr int64_t kExperts = 3;

struct Layer {
  at::Tensor tokens = at::randn({kTokens, kHidden}, at::kDouble);
  at::Tensor weights = at::rand({kTokens, 2}, at::kDouble);
  at::Tensor experts = ids({0, 1, 2, 0, 1, 0, 0, 2, 2, 1, 1, 2}).reshape({kTokens, 2});
  at::Tensor gate_up = at::randn({kExperts, 2 * kInner, kHidden}, at::kDouble);
  at::Tensor down = at::randn({kExperts, kHidden, kInner}, at::kDouble);

  at::Tensor output(bool recompute_activations = false) const {
    const auto [row_order, offsets] = edl::sort_by_expert(experts, kExperts);
    return edl::expert_mlp(tokens, weights, row_order, offsets, gate_up, down, recompute_activations);
  }
};

// One expert on one token: down (silu(gate x) * up x).
at::Tensor expert(const Layer& layer, int64_t e, const at::Tensor& token) {
  const at::Tensor pre_activation = layer.gate_up[e].mv(token);
  return layer.down[e].mv(at::silu(pre_activation.slice(0, 0, kInner)) * pre_activation.slice(0, kInner));
}

} // namespace

CATCH_TEST_CASE("expert_mlp is the weighted sum of the chosen experts") {
  const Layer layer;
  at::Tensor expected = at::zeros_like(layer.tokens);
  for (int64_t t = 0; t < kTokens; ++t) {
    for (int64_t k = 0; k < 2; ++k) {
      expected[t] += layer.weights[t][k] * expert(layer, layer.experts[t][k].item<int64_t>(), layer.tokens[t]);
    }
  }
  CATCH_REQUIRE(distance(layer.output(), expected) < 1e-13);
}

CATCH_TEST_CASE("expert_mlp has the gradients of its definition") {
  const at::Tensor weights = at::randn({kTokens, kHidden}, at::kDouble);
  for (at::Tensor Layer::* argument : {&Layer::tokens, &Layer::weights, &Layer::gate_up, &Layer::down}) {
    Layer layer;
    const at::Tensor point = layer.*argument;
    const auto function = [&](const at::Tensor& at_point) {
      layer.*argument = at_point;
      return layer.output();
    };
    CATCH_REQUIRE(distance(gradient(point, weights, function), numeric_gradient(point, weights, function)) < 1e-6);
  }
}

CATCH_TEST_CASE("expert_mlp has the same gradients where activations are recomputed") {
  Layer layer;
  std::vector<at::Tensor> gradients;
  for (const bool recompute_activations : {false, true}) {
    const at::Tensor gate_up = layer.gate_up.detach().requires_grad_(true);
    Layer own = layer;
    own.gate_up = gate_up;
    own.output(recompute_activations).square().sum().backward();
    gradients.push_back(gate_up.grad());
  }
  CATCH_REQUIRE(gradients[0].equal(gradients[1]));
}

CATCH_TEST_CASE("an expert without tokens gets a gradient of exact zeros") {
  Layer layer;
  layer.experts.masked_fill_(layer.experts == 1, 0);
  layer.gate_up.requires_grad_(true);
  layer.output().sum().backward();
  CATCH_REQUIRE(layer.gate_up.grad()[1].abs().max().item<double>() == 0);
  CATCH_REQUIRE(layer.gate_up.grad()[0].abs().max().item<double>() > 0);
}

CATCH_TEST_CASE("expert_mlp refuses wrong arguments in one sentence") {
  Layer layer;
  layer.down = layer.down.slice(0, 0, 2);
  CATCH_REQUIRE(
      error_of([&] { layer.output(); }) == "edl::expert_mlp: down must have as many experts as gate_up (got 2 and 3)");
  layer = Layer();
  layer.gate_up = layer.gate_up.to(at::kFloat);
  CATCH_REQUIRE(error_of([&] {
                  layer.output();
                }) == "edl::expert_mlp: gate_up must have the type of tokens (got Float beside Double)");
}
