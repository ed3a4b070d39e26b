#include "support.h"

using namespace edl_tests;

CATCH_TEST_CASE("domain_moments sums the segments' means and their squares per domain") {
  const at::Tensor sums = at::rand({4, 5}, at::kDouble);
  const at::Tensor counts = doubles({2, 3, 0, 5}, {4});
  const auto [moments, squares, weights] = edl::domain_moments(sums, counts, ids({1, 1, 0, -1}), 2, true);
  const at::Tensor first = sums[0] / 2;
  const at::Tensor second = sums[1] / 3;
  const at::Tensor zeros = at::zeros_like(first);
  CATCH_REQUIRE(distance(moments, at::stack({zeros, first + second})) < 1e-14);
  CATCH_REQUIRE(distance(squares, at::stack({zeros, first.square() + second.square()})) < 1e-14);
  CATCH_REQUIRE(weights.equal(doubles({0, 2}, {2})));
}

CATCH_TEST_CASE("domain_moments takes soft labels, and a weight of zero keeps NaN out") {
  at::Tensor sums = at::rand({2, 3}, at::kDouble);
  sums[1].fill_(std::numeric_limits<double>::quiet_NaN());
  const auto [moments, squares, weights] =
      edl::domain_moments(sums, at::ones({2}, at::kDouble), doubles({0.25, 0.75, 0, 0}, {2, 2}), 2, false);
  CATCH_REQUIRE(distance(moments, at::stack({sums[0] * 0.25, sums[0] * 0.75})) < 1e-15);
  CATCH_REQUIRE(squares.numel() == 0);
  CATCH_REQUIRE(weights.equal(doubles({0.25, 0.75}, {2})));
}

CATCH_TEST_CASE("domain_moments has the gradient of its definition, for all layers at once") {
  const at::Tensor sums = at::rand({2, 3, 4}, at::kDouble);
  const at::Tensor counts = doubles({2, 1, 4}, {3});
  for (const bool squares : {false, true}) {
    const auto function = [&](const at::Tensor& at_point) {
      const auto [moments, squared, weights] = edl::domain_moments(at_point, counts, ids({1, 0, 1}), 2, squares);
      return squares ? moments + squared : moments;
    };
    const at::Tensor weights = at::randn({2, 2, 4}, at::kDouble);
    CATCH_REQUIRE(distance(gradient(sums, weights, function), numeric_gradient(sums, weights, function)) < 1e-8);
  }
}

CATCH_TEST_CASE("domain_moments refuses wrong arguments in one sentence") {
  const at::Tensor sums = at::rand({4, 5});
  const at::Tensor counts = at::ones({4});
  CATCH_REQUIRE(error_of([&] {
                  edl::domain_moments(sums, counts, ids({0, 0, 0}), 2, false);
                }) == "edl::domain_moments: labels must have one row per segment (got 3 for 4 segments)");
  CATCH_REQUIRE(error_of([&] {
                  edl::domain_moments(sums, counts, ids({0, 0, 0, 0}), 0, false);
                }) == "edl::domain_moments: num_domains must be at least 1 (got 0)");
  CATCH_REQUIRE(
      error_of<c10::IndexError>([&] { edl::domain_moments(sums, counts, ids({0, 1, 2, 0}), 2, false); }) ==
      "edl::domain_moments: labels must be at least -1 and below num_domains = 2 (got 2 for segment 2)");
}
