#include "cuda/kernels/rows.h"

#include "row_order.h"
#include "support.h"

namespace {

using namespace edl_tests;

} // namespace

CATCH_TEST_CASE("invert: the row of every slot that is named, and which rows have no expert") {
  for (const int64_t num_tokens : {1, 100, 128, 300}) {
    for (const int64_t used : {int64_t(-1), int64_t(0), num_tokens / 2 + 1}) { // -1: all, without the number
      const RowOrder order(num_tokens, 2, num_tokens > 1);
      const Buffer row_order = Buffer::input("row_order", Element::int32, order.slots);
      const Buffer num_used = Buffer::input("num_used", Element::int32, {static_cast<double>(used)});
      Buffer rows = Buffer::changed("row_of_slot", Element::int32, Values(order.size(), edl::cuda::kUnknown));
      run({&rows}, {}, [&] {
        edl::cuda::launch_invert(
            row_order.as<int32_t>(), order.size(), used < 0 ? nullptr : num_used.as<int32_t>(), rows.as<int32_t>(),
            nullptr);
      });
      Values expected(order.size(), edl::cuda::kUnknown);
      for (int64_t i = 0; i < order.size(); ++i) {
        if (order.is_known(i)) {
          expected[order.slot(i)] = used < 0 || i < used ? static_cast<double>(i) : edl::cuda::kNoExpert;
        }
      }
      CATCH_CHECK(rows.values() == expected);
    }
  }
}

CATCH_TEST_CASE("gather: the tokens of every row, zeros without an expert, NaN without a slot") {
  for (const StorageType storage : kStorages) {
    for (const Shape& shape : kShapes) {
      for (const int64_t used : {-1, 0, 19}) {
        const int64_t num_tokens = 11, stride = shape.width + shape.padding;
        const RowOrder order(num_tokens, 3, true);
        const Buffer tokens = Buffer::input("tokens", element_of(storage), padded(num_tokens, shape, 1), shape.offset);
        const Buffer row_order = Buffer::input("row_order", Element::int32, order.slots);
        const Buffer num_used = Buffer::input("num_used", Element::int32, {static_cast<double>(used)});
        Values weight(order.size(), 1);
        weight[5] = weight[9] = 0;
        const Buffer weights = Buffer::input("weights", accumulation_of(storage), weight);
        const bool weighted = used == 19;
        Buffer rows = Buffer::output("rows", element_of(storage), order.size() * shape.width);
        run({&rows}, {}, [&] {
          edl::cuda::launch_gather(
              {.tokens = tokens.data(),
               .storage = storage,
               .tokens_stride = stride,
               .row_order = row_order.as<int32_t>(),
               .num_rows = order.size(),
               .num_used = used < 0 ? nullptr : num_used.as<int32_t>(),
               .top_k = order.top_k,
               .width = shape.width,
               .rows = rows.data(),
               .weights = weighted ? weights.data() : nullptr},
              nullptr);
        });
        const Values from = tokens.values();
        Values expected(order.size() * shape.width);
        for (int64_t i = 0; i < order.size(); ++i) {
          for (int64_t c = 0; c < shape.width; ++c) {
            const bool weighs = !weighted || !order.is_known(i) || weight[order.slot(i)] != 0;
            const bool is_used = (used < 0 || i < used) && weighs;
            expected[i * shape.width + c] = !is_used ? 0 : order.is_known(i) ? from[order.token(i) * stride + c] : kNan;
          }
        }
        check_close(rows.values(), expected, 0);
      }
    }
  }
}

CATCH_TEST_CASE(
    "combine: the weighted sum of a token's rows; rows of weight 0 and slots without an expert count nothing") {
  for (const StorageType storage : kStorages) {
    for (const Shape& shape : kShapes) {
      for (const int64_t top_k : {1, 2, 5, 8}) {
        const bool weighted = top_k != 2, already_weighted = top_k == 5;
        const int64_t num_tokens = 9, stride = shape.width + shape.padding, num_rows = num_tokens * top_k;
        const RowOrder order(num_tokens, top_k, false);
        Values row_of_slot(num_rows), weight = random_values(num_rows, 1, 2), values = padded(num_rows, shape, 1);
        for (int64_t i = 0; i < num_rows; ++i) {
          row_of_slot[order.slot(i)] = static_cast<double>(i);
        }
        row_of_slot[0] = edl::cuda::kNoExpert;
        row_of_slot[num_rows - 1] = edl::cuda::kUnknown;
        if (weighted) { // the row of a weight of 0 was never written
          weight[num_rows / 2] = 0;
          const auto row = static_cast<int64_t>(row_of_slot[num_rows / 2]);
          std::fill_n(values.begin() + row * stride, shape.width, kNan);
        }
        const Buffer rows = Buffer::input("rows", element_of(storage), values, shape.offset);
        const Buffer weights = Buffer::input("weights", accumulation_of(storage), weight);
        const Buffer index = Buffer::input("row_of_slot", Element::int32, row_of_slot);
        Buffer output = Buffer::output("output", element_of(storage), num_tokens * shape.width);
        run({&output}, {}, [&] {
          edl::cuda::launch_combine(
              {.rows = rows.data(),
               .storage = storage,
               .rows_stride = stride,
               .row_of_slot = index.as<int32_t>(),
               .weights = weighted ? weights.data() : nullptr,
               .num_tokens = num_tokens,
               .top_k = top_k,
               .width = shape.width,
               .output = output.data(),
               .already_weighted = already_weighted},
              nullptr);
        });
        const Values x = rows.values(), w = weights.values();
        Values expected(num_tokens * shape.width);
        for (int64_t slot = 0; slot < num_rows; ++slot) {
          if (row_of_slot[slot] == edl::cuda::kNoExpert || (weighted && w[slot] == 0)) {
            continue;
          }
          const double factor = weighted && !already_weighted ? w[slot] : 1;
          for (int64_t c = 0; c < shape.width; ++c) {
            const auto row = static_cast<int64_t>(row_of_slot[slot]);
            expected[slot / top_k * shape.width + c] +=
                row == edl::cuda::kUnknown ? kNan : factor * x[row * stride + c];
          }
        }
        check_close(output.values(), expected, tolerance(element_of(storage), accumulation_of(storage), top_k), 1);
      }
    }
  }
}

CATCH_TEST_CASE("combine_backward: the gradients of rows and of weights, together and alone") {
  for (const StorageType storage : kStorages) {
    for (const Shape& shape : kShapes) {
      for (const int wanted : {1, 2, 3, 7}) { // of the rows, of the weights; 4: no weights are given
        const bool weighted = (wanted & 4) == 0;
        const int64_t num_tokens = 7, top_k = 2, stride = shape.width + shape.padding;
        const RowOrder order(num_tokens, top_k, true);
        const Element element = element_of(storage), wide = accumulation_of(storage);
        const Buffer grad = Buffer::input("grad_output", element, padded(num_tokens, shape, 1), shape.offset);
        const Buffer rows = Buffer::input("rows", element, padded(order.size(), shape, 2), shape.offset);
        const Buffer weights = Buffer::input("weights", wide, random_values(order.size(), 1, 3));
        const Buffer row_order = Buffer::input("row_order", Element::int32, order.slots);
        Buffer grad_rows = (wanted & 1) != 0
            ? Buffer::output("grad_rows", element, order.size() * shape.width)
            : Buffer::changed("grad_rows", element, Values(order.size() * shape.width, 0));
        Buffer grad_weights = Buffer::changed("grad_weights", wide, Values(order.size(), 0));
        run({&grad_rows, &grad_weights}, {}, [&] {
          edl::cuda::launch_combine_backward(
              {.grad_output = grad.data(),
               .storage = storage,
               .grad_output_stride = stride,
               .rows = rows.data(),
               .rows_stride = stride,
               .row_order = row_order.as<int32_t>(),
               .weights = weighted ? weights.data() : nullptr,
               .num_rows = order.size(),
               .top_k = top_k,
               .width = shape.width,
               .grad_rows = (wanted & 1) != 0 ? grad_rows.data() : nullptr,
               .grad_weights = (wanted & 2) != 0 ? grad_weights.data() : nullptr},
              nullptr);
        });
        const Values g = grad.values(), x = rows.values(), w = weights.values();
        Values expected_rows(order.size() * shape.width), expected_weights(order.size());
        for (int64_t i = 0; i < order.size(); ++i) {
          for (int64_t c = 0; c < shape.width; ++c) {
            const double slope = order.is_known(i) ? g[order.token(i) * stride + c] : kNan;
            if ((wanted & 1) != 0) {
              expected_rows[i * shape.width + c] = weighted && order.is_known(i) ? w[order.slot(i)] * slope : slope;
            }
            if ((wanted & 2) != 0 && order.is_known(i)) {
              expected_weights[order.slot(i)] += slope * x[i * stride + c];
            }
          }
        }
        check_close(grad_rows.values(), expected_rows, tolerance(element, wide, 1));
        check_close(
            grad_weights.values(), expected_weights, tolerance(wide, wide, shape.width),
            std::sqrt(static_cast<double>(shape.width)));
      }
    }
  }
}
