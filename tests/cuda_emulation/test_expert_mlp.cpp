#include "cuda/kernels/expert_mlp.h"

#include "support.h"

namespace {

using namespace edl_tests;

// Columns I, and how far from a multiple of 16 bytes the rows begin.
struct Shape {
  int64_t width, offset;
};
const Shape kShapes[] = {{1, 0}, {7, 0}, {40, 0}, {40, 1}, {45, 0}, {264, 0}, {600, 0}};

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// Rows from num_used on hold what no product ever wrote.
Values with_unused_rows(Values rows, int64_t width, int64_t num_used) {
  std::fill(rows.begin() + num_used * width, rows.end(), kNan);
  return rows;
}

} // namespace

CATCH_TEST_CASE("check_rows: offsets that do not rise from 0 to at most N are clamped, and then no row has a slot") {
  struct Offsets {
    Values given, clamped;
  };
  for (const int64_t num_rows : {8, 4095, 4096, 9000}) {
    const auto n = static_cast<double>(num_rows);
    const Offsets cases[] = {
        {{0, 0}, {0, 0}},
        {{0, n}, {0, n}},
        {{0, 2, 2, 5}, {0, 2, 2, 5}},
        {{0, n + 1}, {0, n}},
        {{0, 2147483647}, {0, n}},
        {{0, 5, 3, 8}, {0, 5, 5, 8}},
        {{0, -1, 8}, {0, 0, 8}},
        {{3, 5}, {0, 5}},
        {{-1, 5}, {0, 5}},
        {{0, -2147483648.0}, {0, 0}}};
    for (const Offsets& offsets : cases) {
      for (const int64_t leading : {0, 300}) { // experts without rows before, so that a block's threads take several
        if (leading > 0 && offsets.given[0] > 0) {
          continue; // which is right behind others
        }
        Values given(leading, 0), clamped(leading, 0);
        given.insert(given.end(), offsets.given.begin(), offsets.given.end());
        clamped.insert(clamped.end(), offsets.clamped.begin(), offsets.clamped.end());
        const Values slots = random_ids(num_rows, -1, num_rows, 1);
        const Buffer begins = Buffer::input("offsets", Element::int32, given);
        const Buffer row_order = Buffer::input("row_order", Element::int32, slots);
        Buffer checked_offsets = Buffer::output("checked_offsets", Element::int32, given.size());
        Buffer checked_order = Buffer::output("checked_order", Element::int32, num_rows);
        run({&checked_offsets, &checked_order}, {}, [&] {
          edl::cuda::launch_check_rows(
              {.offsets = begins.as<int32_t>(),
               .row_order = row_order.as<int32_t>(),
               .num_experts = static_cast<int32_t>(given.size()) - 1,
               .num_rows = static_cast<int32_t>(num_rows),
               .checked_offsets = checked_offsets.as<int32_t>(),
               .checked_order = checked_order.as<int32_t>()},
              nullptr);
        });
        CATCH_CHECK(checked_offsets.values() == clamped);
        CATCH_CHECK(checked_order.values() == (given == clamped ? slots : Values(num_rows, -1)));
      }
    }
  }
}

CATCH_TEST_CASE("swiglu: silu(gate) * up, and zeros for rows without an expert") {
  for (const StorageType storage : kStorages) {
    for (const Shape& shape : kShapes) {
      for (const int64_t used : {0, 13, 21}) {
        const Element element = element_of(storage);
        const int64_t num_rows = 21, width = shape.width;
        const Values values = with_unused_rows(random_values(num_rows * 2 * width, 2, 1), 2 * width, used);
        Buffer pre = Buffer::changed("pre_activation", element, values, shape.offset);
        const Buffer num_used = Buffer::input("num_used", Element::int32, {static_cast<double>(used)});
        Buffer activation = Buffer::output("activation", element, num_rows * width);
        const Values x = pre.values();
        run({&pre, &activation}, {}, [&] {
          edl::cuda::launch_swiglu(
              {.pre_activation = pre.data(),
               .storage = storage,
               .num_rows = num_rows,
               .num_used = num_used.as<int32_t>(),
               .width = width,
               .activation = activation.data()},
              nullptr);
        });
        Values expected(num_rows * width), kept(x.size());
        for (int64_t i = 0; i < used; ++i) {
          for (int64_t c = 0; c < width; ++c) {
            const double gate = x[i * 2 * width + c], up = x[i * 2 * width + width + c];
            expected[i * width + c] = gate * sigmoid(gate) * up;
          }
        }
        std::copy_n(x.begin(), used * 2 * width, kept.begin());
        check_close(activation.values(), expected, tolerance(element, accumulation_of(storage), 1), 1);
        CATCH_CHECK(pre.values() == kept);
      }
    }
  }
}

CATCH_TEST_CASE("swiglu_backward: gradients of both halves and of the weights; nothing is read without an expert") {
  for (const StorageType storage : kStorages) {
    for (const Shape& shape : kShapes) {
      for (const int64_t used : {0, 13, 18}) {
        const Element element = element_of(storage), wide = accumulation_of(storage);
        const int64_t num_rows = 18, width = shape.width;
        const bool with_more = used != 18;
        Values pre_values = with_unused_rows(random_values(num_rows * 2 * width, 2, 1), 2 * width, used);
        std::fill_n(pre_values.begin() + 7 * 2 * width, 2 * width, kNan); // of weight 0
        const Values grad_values = with_unused_rows(random_values(num_rows * width, 1, 2), width, used);
        Values slots(num_rows);
        for (int64_t i = 0; i < num_rows; ++i) {
          slots[i] = static_cast<double>((i * 5 + 3) % num_rows);
        }
        slots[2] = -1;
        slots[4] = static_cast<double>(num_rows);
        const Buffer pre = Buffer::input("pre_activation", element, pre_values, shape.offset);
        const Buffer grad = Buffer::input("grad_activation", element, grad_values, shape.offset);
        const Buffer more = Buffer::input(
            "more", element, with_unused_rows(random_values(num_rows * width, 1, 4), width, used), shape.offset);
        const Buffer row_order = Buffer::input("row_order", Element::int32, slots);
        Values weight_values = random_values(num_rows, 1, 3);
        weight_values[static_cast<size_t>(slots[7])] = 0;
        const Buffer weights = Buffer::input("weights", wide, weight_values);
        const Buffer num_used = Buffer::input("num_used", Element::int32, {static_cast<double>(used)});
        Buffer activation = Buffer::output("activation", element, num_rows * width);
        Buffer grad_pre = Buffer::output("grad_pre_activation", element, num_rows * 2 * width);
        Buffer grad_weights = Buffer::changed("grad_weights", wide, Values(num_rows, kNan));
        run({&activation, &grad_pre, &grad_weights}, {}, [&] {
          edl::cuda::launch_swiglu_backward(
              {.pre_activation = pre.data(),
               .grad_activation = grad.data(),
               .storage = storage,
               .row_order = row_order.as<int32_t>(),
               .weights = weights.data(),
               .num_rows = num_rows,
               .num_used = num_used.as<int32_t>(),
               .width = width,
               .activation = activation.data(),
               .grad_pre_activation = grad_pre.data(),
               .grad_weights = grad_weights.data(),
               .more = with_more ? more.data() : nullptr},
              nullptr);
        });
        const Values x = pre.values(), d = grad.values(), w = weights.values(), m = more.values();
        Values expected(num_rows * width), expected_pre(num_rows * 2 * width), expected_weights(num_rows, kNan);
        for (int64_t i = 0; i < num_rows; ++i) {
          if (slots[i] < 0 || slots[i] >= static_cast<double>(num_rows)) {
            continue;
          }
          const auto slot = static_cast<int64_t>(slots[i]);
          expected_weights[slot] = 0;
          if (i >= used) {
            continue;
          }
          for (int64_t c = 0; c < width; ++c) {
            const double gate = x[i * 2 * width + c], up = x[i * 2 * width + width + c], slope = d[i * width + c];
            const double s = sigmoid(gate), silu = gate * s;
            expected_weights[slot] += slope * silu * up;
            if (w[slot] == 0) {
              continue;
            }
            expected[i * width + c] = w[slot] * silu * up;
            const double total = w[slot] * slope + (with_more ? m[i * width + c] : 0);
            expected_pre[i * 2 * width + c] = total * up * (s + silu * (1 - s));
            expected_pre[i * 2 * width + width + c] = total * silu;
          }
        }
        check_close(activation.values(), expected, tolerance(element, wide, 1), 1);
        check_close(grad_pre.values(), expected_pre, tolerance(element, wide, 2), 1);
        check_close(
            grad_weights.values(), expected_weights, tolerance(wide, wide, width),
            std::sqrt(static_cast<double>(width)));
      }
    }
  }
}

CATCH_TEST_CASE("zero_unused: the matrices of experts without rows alone") {
  const Values offsets = {0, 0, 3, 3, 7, 7};
  for (const int64_t matrix_bytes : {16, 4096, 4112, 300000}) {
    const Buffer begins = Buffer::input("offsets", Element::int32, offsets);
    Buffer matrices = Buffer::changed("matrices", Element::byte, Values(5 * matrix_bytes, 7));
    run({&matrices}, {},
        [&] { edl::cuda::launch_zero_unused(matrices.data(), 5, matrix_bytes, begins.as<int32_t>(), nullptr); });
    Values expected(5 * matrix_bytes, 7);
    for (const int64_t expert : {0, 2, 4}) {
      std::fill_n(expected.begin() + expert * matrix_bytes, matrix_bytes, 0);
    }
    CATCH_CHECK(matrices.values() == expected);
  }
}
