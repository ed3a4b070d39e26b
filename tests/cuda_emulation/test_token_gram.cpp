#include "cuda/kernels/token_gram.h"

#include "cuda/kernels/rows.h"
#include "row_order.h"
#include "support.h"

namespace {

using namespace edl_tests;

// Tokens whose rows are not all there: one without an expert, one unknown, and one of weight 0 that holds NaN.
struct Tokens {
  Tokens(StorageType storage, const Shape& shape, int64_t num_tokens, int64_t top_k, bool weighted, bool unknown)
      : order(num_tokens, top_k, false),
        top_k(top_k),
        stride(shape.width + shape.padding),
        width(shape.width),
        row_of_slot(order.size()),
        weight(random_values(order.size(), 1, 2)),
        values(padded(order.size(), shape, 1)) {
    for (int64_t i = 0; i < order.size(); ++i) {
      row_of_slot[order.slot(i)] = static_cast<double>(i);
    }
    if (weighted) {
      weight[order.size() / 2] = 0;
      const auto row = static_cast<int64_t>(row_of_slot[order.size() / 2]);
      std::fill_n(values.begin() + row * stride, shape.width, kNan);
    }
    row_of_slot[0] = edl::cuda::kNoExpert;
    if (unknown) {
      row_of_slot[order.size() - 1] = edl::cuda::kUnknown;
    }
    rows.reset(new Buffer(Buffer::input("rows", element_of(storage), values, shape.offset)));
    weights.reset(new Buffer(Buffer::input("weights", accumulation_of(storage), weight)));
    index.reset(new Buffer(Buffer::input("row_of_slot", Element::int32, row_of_slot)));
    task = {
        .rows = rows->data(),
        .storage = storage,
        .rows_stride = stride,
        .row_of_slot = index->as<int32_t>(),
        .weights = weighted ? weights->data() : nullptr,
        .num_tokens = num_tokens,
        .top_k = top_k,
        .width = shape.width};
    values = rows->values();
    weight = weights->values();
    if (!weighted) {
      std::fill(weight.begin(), weight.end(), 1);
    }
  }

  bool takes_part(int64_t slot) const {
    return row_of_slot[slot] != edl::cuda::kNoExpert && weight[slot] != 0;
  }
  double at(int64_t slot, int64_t column) const {
    if (!takes_part(slot)) {
      return 0;
    }
    const auto row = static_cast<int64_t>(row_of_slot[slot]);
    return row == edl::cuda::kUnknown ? kNan : values[row * stride + column];
  }
  double product(int64_t one, int64_t other) const {
    if (!takes_part(one) || !takes_part(other)) {
      return 0;
    }
    double sum = 0;
    for (int64_t c = 0; c < width; ++c) {
      sum += at(one, c) * at(other, c);
    }
    return sum;
  }

  RowOrder order;
  int64_t top_k;
  int64_t stride;
  int64_t width;
  Values row_of_slot, weight, values;
  std::unique_ptr<Buffer> rows, weights, index;
  edl::cuda::TokenRows task;
};

} // namespace

CATCH_TEST_CASE("token_gram: inner products of all pairs; rows of weight 0 and slots without an expert count nothing") {
  for (const StorageType storage : kStorages) {
    for (const Shape& shape : kShapes) {
      for (const int64_t top_k : {1, 2, 5, 8}) {
        const int64_t num_tokens = 9;
        const Tokens tokens(storage, shape, num_tokens, top_k, /*weighted=*/top_k != 2, /*unknown=*/true);
        const Element wide = accumulation_of(storage);
        Buffer gram = Buffer::output("gram", wide, num_tokens * top_k * top_k);
        run({&gram}, {}, [&] { edl::cuda::launch_token_gram({.tokens = tokens.task, .gram = gram.data()}, nullptr); });
        Values expected(num_tokens * top_k * top_k);
        for (int64_t slot = 0; slot < num_tokens * top_k; ++slot) {
          for (int64_t k = 0; k < top_k; ++k) {
            expected[slot * top_k + k] = tokens.product(slot, slot / top_k * top_k + k);
          }
        }
        check_close(gram.values(), expected, tolerance(wide, wide, shape.width), static_cast<double>(shape.width));
      }
    }
  }
}

CATCH_TEST_CASE(
    "token_gram_backward: every row gets what its products with the others have, and its token's gradient") {
  for (const StorageType storage : kStorages) {
    for (const Shape& shape : kShapes) {
      for (const int64_t top_k : {1, 2, 5}) {
        for (const bool with_output : {false, true}) {
          const int64_t num_tokens = 7, used = with_output ? num_tokens * top_k - 2 : -1;
          const Element element = element_of(storage), wide = accumulation_of(storage);
          const Tokens tokens(storage, shape, num_tokens, top_k, /*weighted=*/top_k != 2, /*unknown=*/!with_output);
          Values slots = tokens.order.slots;
          slots[1] = -1; // names no slot
          const Buffer row_order = Buffer::input("row_order", Element::int32, slots);
          const Buffer num_used = Buffer::input("num_used", Element::int32, {static_cast<double>(used)});
          const Buffer grad = Buffer::input("grad_gram", wide, random_values(tokens.order.size() * top_k, 1, 5));
          const Buffer grad_output = Buffer::input("grad_output", element, padded(num_tokens, shape, 6), shape.offset);
          Buffer grad_rows = Buffer::output("grad_rows", element, tokens.order.size() * shape.width);
          Buffer grad_weights = Buffer::changed("grad_weights", wide, Values(tokens.order.size(), 0));
          run({&grad_rows, &grad_weights}, {}, [&] {
            edl::cuda::launch_token_gram_backward(
                {.tokens = tokens.task,
                 .grad_gram = grad.data(),
                 .row_order = row_order.as<int32_t>(),
                 .num_used = used < 0 ? nullptr : num_used.as<int32_t>(),
                 .grad_output = with_output ? grad_output.data() : nullptr,
                 .grad_output_stride = tokens.stride,
                 .grad_weights = with_output ? grad_weights.data() : nullptr,
                 .grad_rows = grad_rows.data()},
                nullptr);
          });
          const Values of_gram = grad.values(), of_output = grad_output.values();
          Values expected(tokens.order.size() * shape.width), expected_weights(tokens.order.size());
          for (int64_t i = 0; i < tokens.order.size(); ++i) {
            const bool is_used = used < 0 || i < used;
            const auto slot = static_cast<int64_t>(slots[i]);
            for (int64_t c = 0; c < shape.width; ++c) {
              double& sum = expected[i * shape.width + c];
              if (slot < 0 || !is_used) {
                sum = is_used ? kNan : 0;
                continue;
              }
              const int64_t t = slot / top_k, k = slot % top_k;
              const double slope = with_output ? of_output[t * tokens.stride + c] : 0;
              if (with_output) {
                expected_weights[slot] += slope * tokens.values[i * tokens.stride + c];
              }
              if (tokens.weight[slot] == 0) {
                continue;
              }
              sum = tokens.weight[slot] * slope;
              for (int64_t j = 0; j < top_k; ++j) {
                const double factor = of_gram[(t * top_k + k) * top_k + j] + of_gram[(t * top_k + j) * top_k + k];
                sum += tokens.takes_part(t * top_k + j) ? factor * tokens.at(t * top_k + j, c) : 0;
              }
            }
          }
          check_close(grad_rows.values(), expected, tolerance(element, wide, top_k + 1), 4);
          check_close(
              grad_weights.values(), expected_weights, tolerance(wide, wide, shape.width),
              std::sqrt(static_cast<double>(shape.width)));
        }
      }
    }
  }
}
