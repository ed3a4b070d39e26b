#include "cuda/kernels/aggregate_routing.h"

#include "routing_cases.h"
#include "support.h"

namespace {

using namespace edl_tests;

void check_backward(const Case& size, StorageType storage, Scores scores) {
  const Element element = element_of(storage), wide = accumulation_of(storage);
  Values id_values = ids_of(size);
  if (size.num_tokens > 4) {
    id_values[3] = -2;
    id_values[size.num_tokens - 1] = static_cast<double>(size.num_segments);
  }
  const Buffer ids = Buffer::input("segment_ids", ids_of(size.ids_are_64_bit), id_values);
  const Buffer routing = Buffer::input("routing", element, routing_of(size, id_values, scores), size.offset);
  const Buffer grad = Buffer::input("grad_sums", wide, random_values(size.num_segments * size.num_experts, 1, 3));
  Buffer grad_routing = Buffer::output("grad_routing", element, size.num_tokens * size.num_experts);
  const edl::cuda::RoutingLayer layer = {
      scores == Scores::none ? nullptr : routing.data(), size.num_experts + size.padding, grad_routing.data()};
  run({&grad_routing}, {}, [&] {
    edl::cuda::launch_aggregate_routing_backward(
        {.grad_sums = grad.data(),
         .layers = &layer,
         .num_layers = 1,
         .segment_ids = ids.data(),
         .ids_are_64_bit = size.ids_are_64_bit,
         .storage = storage,
         .num_tokens = size.num_tokens,
         .num_experts = size.num_experts,
         .num_segments = size.num_segments,
         .scores = scores},
        nullptr);
  });
  const Values rows = routing.values(), slopes = grad.values();
  Values expected(size.num_tokens * size.num_experts);
  double largest = 0; // of the terms, which may cancel
  for (int64_t t = 0; t < size.num_tokens; ++t) {
    if (id_values[t] < 0 || id_values[t] >= static_cast<double>(size.num_segments)) {
      std::fill_n(expected.begin() + t * size.num_experts, size.num_experts, id_values[t] == -1 ? 0 : kNan);
      continue;
    }
    const Values z = row_of(rows, t, size.num_experts + size.padding, size.num_experts);
    const Values g = row_of(slopes, static_cast<int64_t>(id_values[t]), size.num_experts, size.num_experts);
    const Values q = score(z, scores);
    double dot = 0;
    for (int64_t e = 0; e < size.num_experts; ++e) {
      dot += g[e] * q[e];
    }
    for (int64_t e = 0; e < size.num_experts; ++e) {
      const double own = scores == Scores::softmax ? q[e] : q[e] / (1 + std::exp(z[e])); // q (1 - sigmoid(z))
      expected[t * size.num_experts + e] = scores == Scores::none ? g[e] : own * (g[e] - dot);
      largest = std::max(largest, scores == Scores::none ? 0 : own * (std::abs(g[e]) + std::abs(dot)));
    }
  }
  CATCH_CAPTURE(size.num_tokens, size.num_experts, static_cast<int>(storage), static_cast<int>(scores));
  check_close(grad_routing.values(), expected, tolerance(element, wide, size.num_experts), largest);
}

} // namespace

CATCH_TEST_CASE(
    "aggregate_routing_backward: the gradient of routing; NaN for ids outside, zeros for uncounted tokens") {
  check_all(check_backward);
}
