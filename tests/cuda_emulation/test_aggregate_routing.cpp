#include "cuda/kernels/aggregate_routing.h"

#include "routing_cases.h"
#include "support.h"

namespace {

using namespace edl_tests;

struct Sums {
  Values sums, counts;
};

Sums aggregate(
    const Case& size,
    const Buffer& routing,
    const Buffer& ids,
    StorageType storage,
    Scores scores,
    const std::vector<Order>& orders = every_order()) {
  const Element wide = accumulation_of(storage);
  Buffer sums = Buffer::output("sums", wide, size.num_segments * size.num_experts);
  Buffer counts = Buffer::output("counts", wide, size.num_segments);
  Buffer scratch = Buffer::output(
      "scratch", Element::byte,
      edl::cuda::aggregate_routing_scratch_bytes(size.num_tokens, size.num_experts, size.num_segments, 1, storage));
  const edl::cuda::RoutingLayer layer = {routing.data(), size.num_experts + size.padding};
  run(
      {&sums, &counts}, {&scratch},
      [&] {
        edl::cuda::launch_aggregate_routing(
            {.layers = &layer,
             .num_layers = 1,
             .storage = storage,
             .segment_ids = ids.data(),
             .ids_are_64_bit = size.ids_are_64_bit,
             .num_tokens = size.num_tokens,
             .num_experts = size.num_experts,
             .num_segments = size.num_segments,
             .scores = scores,
             .scratch = scratch.data(),
             .sums = sums.data(),
             .counts = counts.data()},
            nullptr);
      },
      orders);
  return {sums.values(), counts.values()};
}

void check_sums(
    const Case& size, StorageType storage, Scores scores, const std::vector<Order>& orders = every_order()) {
  const Values id_values = ids_of(size);
  const Buffer ids = Buffer::input("segment_ids", ids_of(size.ids_are_64_bit), id_values);
  const Buffer routing =
      Buffer::input("routing", element_of(storage), routing_of(size, id_values, scores), size.offset);
  const Sums actual = aggregate(size, routing, ids, storage, scores, orders);
  const Values rows = routing.values();
  Sums expected = {Values(size.num_segments * size.num_experts), Values(size.num_segments)};
  for (int64_t t = 0; t < size.num_tokens; ++t) {
    if (id_values[t] < 0) {
      continue;
    }
    const auto segment = static_cast<int64_t>(id_values[t]);
    expected.counts[segment] += 1;
    const Values distribution = score(row_of(rows, t, size.num_experts + size.padding, size.num_experts), scores);
    for (int64_t e = 0; e < size.num_experts; ++e) {
      expected.sums[segment * size.num_experts + e] += distribution[e];
    }
  }
  const Element wide = accumulation_of(storage);
  CATCH_CAPTURE(size.num_tokens, size.num_experts, static_cast<int>(storage), static_cast<int>(scores));
  check_close(actual.sums, expected.sums, tolerance(wide, wide, std::max(size.num_tokens, size.num_experts)));
  CATCH_CHECK(actual.counts == expected.counts);
}

} // namespace

CATCH_TEST_CASE("aggregate_routing: the sums and counts of every segment") {
  check_all([](const Case& size, StorageType storage, Scores scores) { check_sums(size, storage, scores); });
}

CATCH_TEST_CASE("aggregate_routing: the larger chunks of many tokens, and more chunks than a block has threads") {
  for (const Ids ids : {Ids::runs, Ids::random}) {
    check_sums({16500, 2, 133, ids}, StorageType::float32, Scores::softmax, {Order::random});
    check_sums({65536 + 300, 1, 133, ids}, StorageType::bfloat16, Scores::none, {Order::random});
  }
}

// From 128 chunks on, where segments, tiles and layers are fewer than 133.
CATCH_TEST_CASE("aggregate_routing: blocks share a segment where there are few, and their totals are added in order") {
  check_sums({8192, 3, 1, Ids::one}, StorageType::float32, Scores::softmax);
  check_sums({8250, 2, 49, Ids::random, 1, 1, false}, StorageType::float16, Scores::sigmoid);
  check_sums({8128, 16, 5, Ids::random}, StorageType::bfloat16, Scores::softmax, {Order::random}); // one chunk too few
  check_sums({8129, 16, 5, Ids::random}, StorageType::bfloat16, Scores::softmax, {Order::random});
  check_sums({8250, 1, 132, Ids::runs}, StorageType::float32, Scores::none, {Order::random});
  check_sums({8192, 131, 2, Ids::seldom}, StorageType::bfloat16, Scores::none, {Order::random}); // two tiles
  check_sums({8192, 520, 2, Ids::seldom}, StorageType::bfloat16, Scores::softmax, {Order::random});
  check_sums({8192, 2, 3, Ids::none}, StorageType::float64, Scores::softmax, {Order::random});
  check_sums({16500, 2, 3, Ids::random}, StorageType::float32, Scores::softmax, {Order::random});
  check_sums({65536 + 300, 1, 2, Ids::runs}, StorageType::bfloat16, Scores::none, {Order::random});
}

CATCH_TEST_CASE("aggregate_routing: parts of a segment: layers among others, and an id that is outside in one part") {
  const int64_t num_tokens = 8200, num_experts = 1, num_segments = 3, num_layers = 2;
  for (const int64_t wrong_at : {int64_t{-1}, int64_t{5000}, num_tokens - 1}) {
    Values id_values = random_ids(num_tokens, -1, num_segments - 2, 1); // none in the last segment
    if (wrong_at >= 0) {
      id_values[wrong_at] = num_segments;
    }
    const Buffer ids = Buffer::input("segment_ids", Element::int64, id_values);
    std::vector<std::unique_ptr<Buffer>> routings;
    std::vector<edl::cuda::RoutingLayer> layers;
    Values expected, expected_counts(num_segments);
    for (int64_t l = 0; l < num_layers; ++l) {
      routings.emplace_back(
          new Buffer(Buffer::input("routing", Element::float32, random_values(num_tokens * num_experts, 1, 20 + l))));
      layers.push_back({routings.back()->data(), num_experts});
      const Values rows = routings.back()->values();
      Values sums(num_segments * num_experts);
      for (int64_t t = 0; t < num_tokens; ++t) {
        if (wrong_at >= 0 || id_values[t] < 0) {
          continue;
        }
        const auto segment = static_cast<int64_t>(id_values[t]);
        expected_counts[segment] += l == 0;
        for (int64_t e = 0; e < num_experts; ++e) {
          sums[segment * num_experts + e] += rows[t * num_experts + e];
        }
      }
      expected.insert(expected.end(), sums.begin(), sums.end());
    }
    if (wrong_at >= 0) {
      std::fill(expected.begin(), expected.end(), kNan);
      std::fill(expected_counts.begin(), expected_counts.end(), kNan);
    }
    Buffer sums = Buffer::output("sums", Element::float32, num_layers * num_segments * num_experts);
    Buffer counts = Buffer::output("counts", Element::float32, num_segments);
    Buffer scratch = Buffer::output(
        "scratch", Element::byte,
        edl::cuda::aggregate_routing_scratch_bytes(
            num_tokens, num_experts, num_segments, num_layers, StorageType::float32));
    run({&sums, &counts}, {&scratch}, [&] {
      edl::cuda::launch_aggregate_routing(
          {.layers = layers.data(),
           .num_layers = num_layers,
           .storage = StorageType::float32,
           .segment_ids = ids.data(),
           .ids_are_64_bit = true,
           .num_tokens = num_tokens,
           .num_experts = num_experts,
           .num_segments = num_segments,
           .scores = Scores::none,
           .scratch = scratch.data(),
           .sums = sums.data(),
           .counts = counts.data()},
          nullptr);
    });
    CATCH_CAPTURE(wrong_at);
    check_close(sums.values(), expected, tolerance(Element::float32, Element::float32, num_tokens));
    check_close(counts.values(), expected_counts, 0);
  }
}

CATCH_TEST_CASE("aggregate_routing: layers in one launch have the bits of each alone, sums and gradients") {
  const Case cases[] = {{70, 24, 5}, {150, 3, 4, Ids::runs}, {130, 16, 9, Ids::alternating}, {66, 520, 2, Ids::runs}};
  for (const Case& size : cases) {
    for (const bool alike : {true, false}) { // aligned alike: else all take the way of those that are not
      const int64_t num_layers = alike && size.num_experts < 20 ? 35 : 3; // more than one launch takes, or few
      const StorageType storage = size.num_experts == 24 ? StorageType::bfloat16 : StorageType::float32;
      const Element element = element_of(storage), wide = accumulation_of(storage);
      const Buffer ids = Buffer::input("segment_ids", Element::int64, ids_of(size));
      const int64_t of_layer = size.num_segments * size.num_experts, elements = size.num_tokens * size.num_experts;
      std::vector<std::unique_ptr<Buffer>> routings, gradients;
      std::vector<edl::cuda::RoutingLayer> layers;
      std::vector<Buffer*> results;
      for (int64_t l = 0; l < num_layers; ++l) { // of several strides and alignments
        const int64_t padding = l % 3 == 1 ? 8 : 0, stride = size.num_experts + padding;
        const Values values = random_values(size.num_tokens * stride, 2, 20 + l);
        routings.emplace_back(new Buffer(Buffer::input("routing", element, values, !alike && l == 1 ? 1 : 0)));
        gradients.emplace_back(new Buffer(Buffer::output("grad_routing", element, elements)));
        layers.push_back({routings.back()->data(), stride, gradients.back()->data()});
        results.push_back(gradients.back().get());
      }
      Buffer sums = Buffer::output("sums", wide, num_layers * of_layer);
      Buffer counts = Buffer::output("counts", wide, size.num_segments);
      Buffer scratch = Buffer::output(
          "scratch", Element::byte,
          edl::cuda::aggregate_routing_scratch_bytes(
              size.num_tokens, size.num_experts, size.num_segments, num_layers, storage));
      const auto aggregate_all = [&](const edl::cuda::RoutingLayer* from, int64_t count) {
        edl::cuda::launch_aggregate_routing(
            {.layers = from,
             .num_layers = count,
             .storage = storage,
             .segment_ids = ids.data(),
             .ids_are_64_bit = true,
             .num_tokens = size.num_tokens,
             .num_experts = size.num_experts,
             .num_segments = size.num_segments,
             .scores = Scores::softmax,
             .scratch = scratch.data(),
             .sums = sums.data(),
             .counts = counts.data()},
            nullptr);
      };
      run({&sums, &counts}, {&scratch}, [&] { aggregate_all(layers.data(), num_layers); });
      const Values together = sums.values(), counted = counts.values();
      const Buffer grad = Buffer::input("grad_sums", wide, random_values(num_layers * of_layer, 1, 3));
      const auto spread_all = [&](const edl::cuda::RoutingLayer* from, int64_t count, const void* grad_sums) {
        edl::cuda::launch_aggregate_routing_backward(
            {.grad_sums = grad_sums,
             .layers = from,
             .num_layers = count,
             .segment_ids = ids.data(),
             .ids_are_64_bit = true,
             .storage = storage,
             .num_tokens = size.num_tokens,
             .num_experts = size.num_experts,
             .num_segments = size.num_segments,
             .scores = Scores::softmax},
            nullptr);
      };
      run(results, {}, [&] { spread_all(layers.data(), num_layers, grad.data()); });
      for (const int64_t l : {int64_t{0}, int64_t{1}, num_layers - 1}) {
        CATCH_CAPTURE(size.num_tokens, size.num_experts, num_layers, l);
        run({&sums, &counts}, {&scratch}, [&] { aggregate_all(&layers[l], 1); }, {Order::random});
        const Values alone = row_of(sums.values(), 0, of_layer, of_layer);
        const Values among = row_of(together, l, of_layer, of_layer);
        CATCH_CHECK(counts.values() == counted);
        const Values gradient = gradients[l]->values();
        const char* own = grad.as<char>() + l * of_layer * edl_tests::size_of(wide);
        run({gradients[l].get()}, {}, [&] { spread_all(&layers[l], 1, own); }, {Order::random});
        if (alike) {
          CATCH_CHECK(alone == among);
          CATCH_CHECK(gradients[l]->values() == gradient);
        } else {
          check_close(alone, among, tolerance(wide, wide, size.num_tokens));
          check_close(gradients[l]->values(), gradient, tolerance(element, wide, size.num_experts), 1);
        }
      }
    }
  }
}

CATCH_TEST_CASE("aggregate_routing: an id outside [-1, S) makes every sum and count NaN") {
  const Case size = {150, 8, 3};
  for (const double wrong : {-2.0, 3.0, 4294967296.0}) {
    Values id_values = ids_of(size);
    id_values[100] = wrong;
    const Buffer ids = Buffer::input("segment_ids", Element::int64, id_values);
    const Buffer routing = Buffer::input("routing", Element::float32, random_values(150 * 8, 1, 1));
    const Sums actual = aggregate(size, routing, ids, StorageType::float32, Scores::softmax);
    check_close(actual.sums, Values(3 * 8, kNan), 0);
    check_close(actual.counts, Values(3, kNan), 0);
  }
}

CATCH_TEST_CASE("aggregate_routing: a logit of NaN shows in its segment alone") {
  const Case size = {100, 40, 2, Ids::alternating};
  Values logits = random_values(100 * 40, 1, 1);
  logits[40 * 51 + 7] = kNan;
  const Buffer ids = Buffer::input("segment_ids", Element::int64, ids_of(size));
  const Buffer routing = Buffer::input("routing", Element::bfloat16, logits);
  const Sums actual = aggregate(size, routing, ids, StorageType::bfloat16, Scores::softmax);
  CATCH_CHECK(std::all_of(actual.sums.begin(), actual.sums.begin() + 40, [](double x) { return std::isfinite(x); }));
  CATCH_CHECK(std::all_of(actual.sums.begin() + 40, actual.sums.end(), [](double x) { return std::isnan(x); }));
}
