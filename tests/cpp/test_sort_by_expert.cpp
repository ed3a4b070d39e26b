#include "support.h"

using namespace edl_tests;

CATCH_TEST_CASE("sort_by_expert groups slots stably, and a sentinel comes last") {
  const at::Tensor experts = at::tensor({1, 0, 3, 1, 0, 1}, at::kInt).reshape({3, 2});
  const auto [row_order, offsets] = edl::sort_by_expert(experts, 3);
  CATCH_REQUIRE(row_order.equal(at::tensor({1, 4, 0, 3, 5, 2}, at::kInt)));
  CATCH_REQUIRE(offsets.equal(at::tensor({0, 2, 5, 5}, at::kInt)));
}

CATCH_TEST_CASE("sort_by_expert of no token gives empty experts") {
  const auto [row_order, offsets] = edl::sort_by_expert(at::empty({0, 2}, at::kLong), 4);
  CATCH_REQUIRE(row_order.numel() == 0);
  CATCH_REQUIRE(offsets.equal(at::zeros({5}, at::kInt)));
}

CATCH_TEST_CASE("sort_by_expert refuses wrong arguments in one sentence") {
  CATCH_REQUIRE(error_of([] {
                  edl::sort_by_expert(ids({0, 1}), 2);
                }) == "edl::sort_by_expert: experts must have the shape [T, K] (got 1 dimensions)");
  CATCH_REQUIRE(
      error_of<c10::IndexError>([] { edl::sort_by_expert(ids({0, 3}).unsqueeze(0), 2); }) ==
      "edl::sort_by_expert: experts must be at least 0 and at most 2, the number of experts, which means no expert "
      "(got 3 at "
      "slot 1)");
}
