// Inner loops of token_gram, in float32 (float64 for float64): some columns of a token's K rows lie side by side in
// the first cache, where each is read K times. Cost: one read of the rows, K² multiply-adds per column.
#include "cpu/isa/token_gram.h"

#include <algorithm>

#include "cpu/isa/simd.h"

namespace edl::cpu::EDL_ISA {
namespace {

constexpr int64_t kAtOnce = 4; // rows that are multiplied with one

template <typename Acc>
EDL_INLINE Acc* aligned(void* memory) {
  return reinterpret_cast<Acc*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}

template <typename Acc>
EDL_INLINE bool takes_part(const TokenRows& tokens, int64_t slot) {
  return tokens.row_of_slot[slot] < tokens.num_used &&
      (tokens.weights == nullptr || static_cast<const Acc*>(tokens.weights)[slot] != 0);
}

// Columns of a token's rows, [K, kGramColumns] in the accumulation type: zeros behind the last column, and for a row
// that takes no part.
template <typename Storage, typename Acc = Accumulation<Storage>>
EDL_INLINE void load_rows(const TokenRows& tokens, int64_t t, int64_t column, int64_t count, Acc* values) {
  for (int64_t k = 0; k < tokens.top_k; ++k, values += kGramColumns) {
    const int64_t slot = t * tokens.top_k + k;
    const bool counts = takes_part<Acc>(tokens, slot);
    const auto* row = static_cast<const Storage*>(tokens.rows) + tokens.row_of_slot[slot] * tokens.rows_stride + column;
    for (int64_t c = 0; c < count; c += kLanes<Acc>) {
      Vector<Acc> x{};
      if (counts) {
        x = load_some<Acc>(row + c, count - c);
        if (tokens.are_gate_and_up) {
          x *= sigmoid_of<Acc>(x) * load_some<Acc>(row + tokens.width + c, count - c);
        }
      }
      store(x, values + c);
    }
  }
}

// gram[j, k] += <row j, row k> for `rows` rows from k on.
template <int64_t rows, typename Acc>
EDL_INLINE void multiply_rows(const Acc* values, int64_t j, int64_t k, int64_t top_k, int64_t count, Acc* gram) {
  Vector<Acc> sums[rows] = {};
  const Acc* row = values + j * kGramColumns;
  const Acc* others = values + k * kGramColumns;
  for (int64_t c = 0; c < count; c += kLanes<Acc>) {
    const Vector<Acc> x = load(row + c);
    for (int64_t i = 0; i < rows; ++i) {
      sums[i] += x * load(others + i * kGramColumns + c);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    gram[j * top_k + k + i] += sum_of<Acc>(sums[i]);
  }
}

template <typename Storage>
void gram(const TokenGramTask& task, int64_t begin, int64_t end, void* own) {
  using Acc = Accumulation<Storage>;
  Acc* values = aligned<Acc>(own);
  const int64_t top_k = task.tokens.top_k, width = task.tokens.width;
  for (int64_t t = begin; t < end; ++t) {
    Acc* of_token = static_cast<Acc*>(task.gram) + t * top_k * top_k;
    for (int64_t i = 0; i < top_k * top_k; ++i) {
      of_token[i] = 0;
    }
    for (int64_t column = 0; column < width; column += kGramColumns) {
      const int64_t count = std::min(kGramColumns, width - column);
      load_rows<Storage>(task.tokens, t, column, count, values);
      for (int64_t j = 0; j < top_k; ++j) {
        int64_t k = j;
        for (; k + kAtOnce <= top_k; k += kAtOnce) {
          multiply_rows<kAtOnce>(values, j, k, top_k, count, of_token);
        }
        for (; k < top_k; ++k) {
          multiply_rows<1>(values, j, k, top_k, count, of_token);
        }
      }
    }
    for (int64_t j = 0; j < top_k; ++j) {
      for (int64_t k = 0; k < j; ++k) {
        of_token[j * top_k + k] = of_token[k * top_k + j];
      }
    }
  }
}

// Σ_j factors[i, j] row j of `rows` rows i, at one vector of columns.
template <int64_t rows, typename Acc>
EDL_INLINE void mix_rows(const Acc* values, const Acc* factors, int64_t top_k, Vector<Acc>* mixed) {
  for (int64_t i = 0; i < rows; ++i) {
    mixed[i] = Vector<Acc>{};
  }
  for (int64_t j = 0; j < top_k; ++j) {
    const Vector<Acc> x = load(values + j * kGramColumns);
    for (int64_t i = 0; i < rows; ++i) {
      mixed[i] += x * factors[i * top_k + j];
    }
  }
}

// Columns of the gradients of `rows` rows from k on. A row that takes no part hands nothing on; the gradient of its
// weight alone is not known here.
template <int64_t rows, typename Storage, typename Out, typename Acc = Accumulation<Storage>>
EDL_INLINE void spread_rows(
    const TokenGramGradient& task,
    int64_t t,
    int64_t k,
    int64_t column,
    int64_t count,
    const Acc* values,
    const Acc* factors) {
  const int64_t top_k = task.tokens.top_k, width = task.tokens.width;
  const auto* weights = static_cast<const Acc*>(task.tokens.weights);
  const auto* grad = static_cast<const Storage*>(task.grad_output);
  for (int64_t c = 0; c < count; c += kLanes<Acc>) {
    Vector<Acc> mixed[rows];
    mix_rows<rows>(values + c, factors + k * top_k, top_k, mixed);
    const Vector<Acc> of_output =
        grad == nullptr ? Vector<Acc>{} : load_some<Acc>(grad + t * task.grad_output_stride + column + c, count - c);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t slot = t * top_k + k + i;
      Vector<Acc> sum{};
      if (takes_part<Acc>(task.tokens, slot)) {
        sum = grad == nullptr ? mixed[i] : mixed[i] + of_output * (weights == nullptr ? Acc(1) : weights[slot]);
      }
      const int64_t row = task.tokens.row_of_slot[slot];
      store_some<Acc>(sum, count - c, static_cast<Out*>(task.grad_rows) + row * width + column + c);
    }
  }
}

template <typename Storage, typename Out>
void spread_token(const TokenGramGradient& task, int64_t t, Accumulation<Storage>* values) {
  using Acc = Accumulation<Storage>;
  const int64_t top_k = task.tokens.top_k, width = task.tokens.width;
  Acc* factors = values + top_k * kGramColumns;
  const Acc* grad = static_cast<const Acc*>(task.grad_gram) + t * top_k * top_k;
  for (int64_t j = 0; j < top_k; ++j) {
    for (int64_t k = 0; k < top_k; ++k) {
      // An entry of a row that takes no part is 0, whatever its gradient.
      const bool both = takes_part<Acc>(task.tokens, t * top_k + j) && takes_part<Acc>(task.tokens, t * top_k + k);
      factors[j * top_k + k] = both ? grad[j * top_k + k] + grad[k * top_k + j] : Acc(0);
    }
  }
  for (int64_t column = 0; column < width; column += kGramColumns) {
    const int64_t count = std::min(kGramColumns, width - column);
    load_rows<Storage>(task.tokens, t, column, count, values);
    int64_t k = 0;
    for (; k + kAtOnce <= top_k; k += kAtOnce) {
      spread_rows<kAtOnce, Storage, Out>(task, t, k, column, count, values, factors);
    }
    for (; k < top_k; ++k) {
      spread_rows<1, Storage, Out>(task, t, k, column, count, values, factors);
    }
  }
}

// <grad_output, row> for each of a token's rows, those of weight 0 too: a weight's gradient is what reads them.
template <typename Storage, typename Acc = Accumulation<Storage>>
void dot_rows(const TokenGramGradient& task, int64_t t) {
  const auto* grad = static_cast<const Storage*>(task.grad_output) + t * task.grad_output_stride;
  for (int64_t slot = t * task.tokens.top_k; slot < (t + 1) * task.tokens.top_k; ++slot) {
    const int64_t place = task.tokens.row_of_slot[slot];
    const int64_t width = place < task.tokens.num_used ? task.tokens.width : 0;
    const auto* row = static_cast<const Storage*>(task.tokens.rows) + place * task.tokens.rows_stride;
    Vector<Acc> sums{};
    for (int64_t c = 0; c < width; c += kLanes<Acc>) {
      const int64_t left = width - c;
      sums += load_some<Acc>(grad + c, left) * load_some<Acc>(row + c, left);
    }
    static_cast<Acc*>(task.grad_weights)[slot] = sum_of<Acc>(sums);
  }
}

template <typename Storage>
void spread(const TokenGramGradient& task, int64_t begin, int64_t end, void* own) {
  using Acc = Accumulation<Storage>;
  Acc* values = aligned<Acc>(own);
  for (int64_t t = begin; t < end; ++t) {
    if (task.is_accumulated) {
      spread_token<Storage, Acc>(task, t, values);
    } else {
      spread_token<Storage, Storage>(task, t, values);
    }
    if (task.grad_weights != nullptr) {
      dot_rows<Storage>(task, t);
    }
  }
}

} // namespace

extern const TokenGramLoops token_gram_loops = {
    {gram<float>, gram<double>, gram<BFloat16>, gram<Float16>},
    {spread<float>, spread<double>, spread<BFloat16>, spread<Float16>},
};

} // namespace edl::cpu::EDL_ISA
