#include "support.h"

using namespace edl_tests;

CATCH_TEST_CASE("dispatch_tokens copies tokens into the order of the experts, and combine_tokens brings them back") {
  const at::Tensor tokens = at::randn({3, 5}, at::kDouble);
  const auto [row_order, offsets] = edl::sort_by_expert(ids({1, 0, 0, 2, 2, 1}).reshape({3, 2}), 3);
  const at::Tensor rows = edl::dispatch_tokens(tokens, row_order, 2);
  CATCH_REQUIRE(rows.equal(tokens.index_select(0, ids({0, 1, 0, 2, 1, 2}))));
  CATCH_REQUIRE(distance(edl::combine_tokens(rows, {}, row_order, 2), tokens * 2) == 0);
  const at::Tensor weights = at::rand({3, 2}, at::kDouble);
  CATCH_REQUIRE(distance(edl::combine_tokens(rows, weights, row_order, 2), tokens * weights.sum(1, true)) < 1e-15);
}

CATCH_TEST_CASE("dispatch_tokens and combine_tokens have the gradients of their definitions") {
  const auto [row_order, offsets] = edl::sort_by_expert(ids({1, 0, 0, 2, 2, 1}).reshape({3, 2}), 3);
  const at::Tensor order = row_order;
  const at::Tensor tokens = at::randn({3, 5}, at::kDouble);
  const at::Tensor rows = at::randn({6, 5}, at::kDouble);
  const at::Tensor weights = at::rand({3, 2}, at::kDouble);
  const auto dispatch = [&](const at::Tensor& at_point) { return edl::dispatch_tokens(at_point, order, 2); };
  const auto combine = [&](const at::Tensor& at_point) { return edl::combine_tokens(at_point, weights, order, 2); };
  const auto weigh = [&](const at::Tensor& at_point) { return edl::combine_tokens(rows, at_point, order, 2); };
  CATCH_REQUIRE(distance(gradient(tokens, rows, dispatch), numeric_gradient(tokens, rows, dispatch)) < 1e-8);
  CATCH_REQUIRE(distance(gradient(rows, tokens, combine), numeric_gradient(rows, tokens, combine)) < 1e-8);
  CATCH_REQUIRE(distance(gradient(weights, tokens, weigh), numeric_gradient(weights, tokens, weigh)) < 1e-8);
}

CATCH_TEST_CASE("dispatch_tokens and combine_tokens refuse wrong arguments in one sentence") {
  const at::Tensor order = at::arange(6, at::kInt);
  CATCH_REQUIRE(
      error_of([&] { edl::dispatch_tokens(at::randn({4, 5}), order, 2); }) ==
      "edl::dispatch_tokens: row_order must have top_k entries per token (got 6 for 4 tokens and top_k 2)");
  CATCH_REQUIRE(error_of([&] {
                  edl::combine_tokens(at::randn({6, 5}), at::randn({2, 3}), order, 2);
                }) == "edl::combine_tokens: weights must have top_k columns (got 3 and top_k 2)");
  CATCH_REQUIRE(error_of<c10::IndexError>([&] {
                  edl::combine_tokens(at::randn({6, 5}), {}, at::zeros_like(order), 2);
                }) == "edl::combine_tokens: row_order must name each of the 6 slots once (got 0 at row 1)");
}

CATCH_TEST_CASE("inject passes the carrier and its gradient, and gives the loss the gradient of the scale") {
  const at::Tensor carrier = with_gradient(at::randn({3, 2}, at::kDouble));
  const at::Tensor loss = with_gradient(doubles({7}, {}));
  const at::Tensor output = edl::inject(carrier, loss, doubles({0.25}, {}));
  CATCH_REQUIRE(output.equal(carrier));
  (output * 3).sum().backward();
  CATCH_REQUIRE(distance(carrier.grad(), at::full({3, 2}, 3.0, at::kDouble)) == 0);
  CATCH_REQUIRE(loss.grad().item<double>() == 0.25);
  CATCH_REQUIRE(error_of([&] {
                  edl::inject(carrier, at::zeros({2}), doubles({1}, {}));
                }) == "edl::inject: loss must be a scalar tensor (got 1 dimensions)");
}
