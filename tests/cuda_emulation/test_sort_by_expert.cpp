#include "cuda/kernels/sort_by_expert.h"

#include "support.h"

namespace {

using namespace edl_tests;

void check_sort(
    const Values& experts, int64_t num_experts, bool ids_are_64_bit, const std::vector<Order>& orders = every_order()) {
  const int64_t num_slots = experts.size();
  const Buffer ids = Buffer::input("experts", ids_of(ids_are_64_bit), experts);
  Buffer scratch = Buffer::output("scratch", Element::int32, edl::cuda::sort_scratch_size(num_slots, num_experts));
  Buffer row_order = Buffer::output("row_order", Element::int32, num_slots);
  Buffer offsets = Buffer::output("offsets", Element::int32, num_experts + 1);
  run(
      {&row_order, &offsets}, {&scratch},
      [&] {
        edl::cuda::launch_sort_by_expert(
            {.experts = ids.data(),
             .experts_are_64_bit = ids_are_64_bit,
             .num_slots = num_slots,
             .num_experts = num_experts,
             .scratch = scratch.as<int32_t>(),
             .row_order = row_order.as<int32_t>(),
             .offsets = offsets.as<int32_t>()},
            nullptr);
      },
      orders);
  Values order, begins;
  for (int64_t expert = 0; expert <= num_experts; ++expert) {
    begins.push_back(static_cast<double>(order.size()));
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      if (experts[slot] == static_cast<double>(expert)) {
        order.push_back(static_cast<double>(slot));
      }
    }
  }
  order.resize(num_slots, -1); // ids outside come last
  CATCH_CHECK(row_order.values() == order);
  CATCH_CHECK(offsets.values() == begins);
}

} // namespace

CATCH_TEST_CASE("sort_by_expert: the stable order, whatever the number of slots and experts") {
  for (const bool ids_are_64_bit : {false, true}) {
    for (const int64_t num_slots : {1, 33, 1000, 1024, 2500}) {
      for (const int64_t num_experts : {1, 5, 70}) {
        check_sort(random_ids(num_slots, 0, num_experts - 1, num_slots), num_experts, ids_are_64_bit);
      }
    }
  }
}

CATCH_TEST_CASE("sort_by_expert: experts without slots, one expert for all, the sentinel, and ids outside") {
  check_sort(Values(1500, 3), 8, true);
  check_sort(Values(70, 8), 8, true);
  Values experts = random_ids(1300, 0, 7, 1);
  for (size_t i = 0; i < experts.size(); i += 5) {
    experts[i] = 8; // the sentinel
  }
  for (double& expert : experts) {
    expert = expert == 2 ? 3 : expert;
  }
  check_sort(experts, 8, false);
  experts[0] = -1;
  experts[40] = 9;
  experts[41] = 2147483647;
  experts[1299] = -2147483648.0;
  check_sort(experts, 8, false);
  experts[42] = 4294967296.0; // 0 in 32 bits
  check_sort(experts, 8, true);
}

CATCH_TEST_CASE("sort_by_expert: more chunks than a block has threads, and as many experts as shared memory holds") {
  check_sort(random_ids(1024 * 260 + 5, 0, 1, 1), 1, false, {Order::random});
  const int64_t most = edl::cuda::most_experts_to_sort();
  check_sort(random_ids(40, most - 20, most - 1, 1), most, false, {Order::forward});
}
