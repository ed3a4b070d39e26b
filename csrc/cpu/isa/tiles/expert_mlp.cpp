// The tasks of expert_mlp for bfloat16 on matrix units. Products multiply bfloat16 and add up float32; activations and
// gradients of pre-activations are rounded to bfloat16 once, before they are multiplied.
//
//   product                       C                A, 16 rows of k                 B, panels of 16 columns
//   activations   P^T = W X^T     [I, rows]        gate_up, where it stands        tokens, gathered and transposed
//   output        O^T = D A^T     [H, rows]        down, where it stands           activation, as its task leaves it
//   grad_activations  dA = dO D   [rows, I]        dO, gathered                    down, interleaved by its task
//   grad_tokens   dX = dP W       [rows, H]        dP                              gate_up, interleaved by its task
//   grad_gate_up  dP^T X          [2I, H]          dP^T                            tokens, gathered and interleaved
//   grad_down     dO^T (f A)      [H, I]           dO^T                            f A
//
// A tile of A holds 16 rows of 32 k as they stand in a matrix whose rows are contiguous in k: of a parameter, forward,
// that is where it lies, so that nothing of it is packed. A panel of B holds 16 columns, two k side by side:
//
//   [k / 2][16 columns][2]        one step of 32 k is 1 KiB in a row
//
// Two rows of a matrix, interleaved, are a row of such a panel where k goes down the matrix ("pairs"); where k goes along
// its rows, 16 x 16 pairs are transposed in registers. Everything is padded with zeros, to 32 k and to 16 columns, as
// 0 · NaN is no zero: tiles read no number behind a row's end, and no row of another expert.
//
// C is 32 x 32, four tiles, over all k of a task; it goes through a block of 4 KiB, from which vectors take it.
//
// A row whose factor is 0 takes no part, as in the loops on vectors.
#include "cpu/isa/expert_mlp.h"

#include "cpu/isa/expert_mlp_rows.h"
#include "cpu/isa/simd.h"
#include "cpu/isa/tiles/tiles.h"

namespace edl::cpu::EDL_ISA {
namespace {

using Pairs = Vector<uint32_t>; // of bfloat16: the lower half comes first

constexpr int64_t kBlock = 2 * kTileRows; //       rows and columns of C
constexpr int64_t kGradRows = 128; //              of a task over a parameter's gradient
constexpr int64_t kGradColumns = 256;
constexpr int64_t kPackedElements = 256 << 10; //  of the tokens of a task: they stay in the second cache
constexpr int64_t kFewestTaskRows = 128, kMostTaskRows = 512;
constexpr int64_t kRowPadding = 32; //             rows a page apart would share cache sets

static_assert(kLanes<float> == kTileRows, "a vector is a row of a tile");

int64_t padded(int64_t depth) {
  return round_up(depth, kTileDepth);
}

// ---- pairs ----

EDL_INLINE Pairs bits_of(Floats x) {
  Pairs bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// As `narrow` rounds, in the upper halves.
EDL_INLINE Pairs rounded_bits(Floats x) {
  const Pairs bits = bits_of(x);
  const Pairs nan = reinterpret_cast<Pairs>(x != x);
  return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~nan) | (nan & 0x7fc00000u);
}

EDL_INLINE Pairs pairs_of(Floats first, Floats second) {
  return (rounded_bits(first) >> 16) | (rounded_bits(second) & 0xffff0000u);
}

// 16 numbers of each row; those behind `count` are zeros, and so is a row without memory.
EDL_INLINE Pairs load_16(const BFloat16* row, int64_t count) {
  typedef uint16_t Half __attribute__((vector_size(32)));
  Half half{};
  if (row != nullptr && count > 0) {
    if (count >= kTileRows) {
      std::memcpy(&half, row, sizeof(half));
    } else {
      std::memcpy(&half, row, static_cast<size_t>(count) * sizeof(BFloat16));
    }
  }
  return __builtin_convertvector(half, Pairs);
}
EDL_INLINE Pairs pairs_of_rows(const BFloat16* first, const BFloat16* second, int64_t count) {
  return load_16(first, count) | (load_16(second, count) << 16);
}

// 32 numbers of a row.
EDL_INLINE Pairs load_32(const BFloat16* row, int64_t count) {
  Pairs pairs{};
  if (row != nullptr && count > 0) {
    if (count >= kTileDepth) {
      std::memcpy(&pairs, row, sizeof(pairs));
    } else {
      std::memcpy(&pairs, row, static_cast<size_t>(count) * sizeof(BFloat16));
    }
  }
  return pairs;
}

EDL_INLINE void store_pairs(Pairs pairs, BFloat16* to) {
  std::memcpy(to, &pairs, sizeof(pairs));
}

// Zeros in the lanes from `count` on, whatever x is.
EDL_INLINE Floats first_lanes(Floats x, int64_t count) {
  constexpr Int32s lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return lanes < static_cast<int32_t>(std::min(count, kTileRows)) ? x : Floats{};
}

EDL_INLINE void transpose_pairs(Pairs* square) {
  transpose<1, uint32_t>(square);
}

// ---- scratch ----

// Of a window of R rows, H and I rounded up to H' and I', multiples of 32:
BFloat16* packed_tokens_of(const ExpertMlpTask& task, int64_t place) { //    panels [R / 16][H' / 2][16][2], k along H
  return static_cast<BFloat16*>(task.packed_tokens) + place * padded(task.hidden_size);
}
BFloat16* activation_of(const ExpertMlpTask& task, int64_t place) { //       panels [R / 16][I' / 2][16][2], k along I
  return static_cast<BFloat16*>(task.activation) + place * padded(task.intermediate_size);
}
BFloat16* grad_output_rows_of(const ExpertMlpTask& task, int64_t place) { //  [R, H' + 32]
  return static_cast<BFloat16*>(task.grad_output_rows) + place * (padded(task.hidden_size) + kRowPadding);
}
// dP: [R, gate's I' and up's I', 32]
BFloat16* grad_pre_activation_of(const ExpertMlpTask& task, int64_t place) {
  return static_cast<BFloat16*>(task.grad_pre_activation) + place * task.pre_activation_stride;
}
// Transposed, [H' or 2I'][R + 32]: what stands in the rows from H or 2I on is of no column, and not looked at.
int64_t column_stride(const ExpertMlpTask& task) {
  return task.window_rows + kRowPadding;
}
BFloat16* grad_output_column_of(const ExpertMlpTask& task, int64_t column, int64_t place) {
  return static_cast<BFloat16*>(task.grad_output_columns) + column * column_stride(task) + place;
}
BFloat16* grad_pre_activation_column_of(const ExpertMlpTask& task, int64_t column, int64_t place) {
  return static_cast<BFloat16*>(task.grad_pre_activation_columns) + column * column_stride(task) + place;
}
// Panels [H' / 16 or I' / 16][R / 2][16][2], k along rows.
BFloat16* panel_of(const ExpertMlpTask& task, void* panels, int64_t column, int64_t place) {
  return static_cast<BFloat16*>(panels) + column * task.window_rows + place * kTileRows;
}

size_t lay_out(ExpertMlpTask& task, int64_t window_rows, ExpertMlpPasses passes, char* memory) {
  const int64_t hidden = padded(task.hidden_size), intermediate = padded(task.intermediate_size);
  Scratch scratch(memory);
  task.window_rows = window_rows;
  if (passes.forward) {
    task.packed_tokens = scratch.take<BFloat16>(window_rows * hidden);
    task.activation = scratch.take<BFloat16>(window_rows * intermediate);
  }
  if (passes.backward) {
    task.pre_activation_stride = 2 * intermediate + kRowPadding;
    task.grad_output_rows = scratch.take<BFloat16>(window_rows * (hidden + kRowPadding));
    task.grad_output_columns = scratch.take<BFloat16>(hidden * column_stride(task));
    task.grad_pre_activation = scratch.take<BFloat16>(window_rows * task.pre_activation_stride);
    task.grad_pre_activation_columns = scratch.take<BFloat16>(2 * intermediate * column_stride(task));
    task.token_pairs = scratch.take<BFloat16>(window_rows * hidden);
    task.activation_pairs = scratch.take<BFloat16>(window_rows * intermediate);
    task.dots = scratch.take<float>(round_up(task.intermediate_size, kWideColumns) / kWideColumns * task.window_rows);
  }
  return scratch.bytes();
}

// The scratch of a thread.
struct Own {
  Own(void* memory, int64_t hidden_size, int64_t intermediate_size) {
    Scratch scratch(static_cast<char*>(memory));
    const int64_t hidden = padded(hidden_size), intermediate = padded(intermediate_size);
    c = scratch.take<float>(kBlock * kBlock);
    transposed = scratch.take<float>(kBlock * kBlock);
    dots = scratch.take<float>(kBlock * kTileRows);
    strips[0] = scratch.take<BFloat16>(kTileRows * std::max(hidden, intermediate));
    strips[1] = scratch.take<BFloat16>(kTileRows * std::max(hidden, intermediate));
    panels = scratch.take<BFloat16>(std::max(hidden * kWideColumns, 2 * intermediate * kTokenColumns));
    bytes = scratch.bytes();
  }
  Own(void* memory, const ExpertMlpTask& task) : Own(memory, task.hidden_size, task.intermediate_size) {}

  float* c; //            [32, 32]
  float* transposed; //   [32, 32]
  float* dots; //         [32, 16]
  BFloat16* strips[2]; // copies of rows of A
  BFloat16* panels; //    of a parameter
  size_t bytes;
};

ExpertMlpCut cut(int64_t hidden_size, int64_t intermediate_size) {
  const int64_t fitting = kPackedElements / std::max<int64_t>(1, hidden_size) / kTileDepth * kTileDepth;
  return {
      .row_unit = kTileDepth,
      .task_rows = std::clamp(fitting, kFewestTaskRows, kMostTaskRows),
      .activation_columns = kWideColumns,
      .grad_rows = kGradRows,
      .grad_columns = kGradColumns,
      .thread_bytes = static_cast<int64_t>(Own(nullptr, hidden_size, intermediate_size).bytes)};
}

void enter(void* found) {
  const TileConfiguration before = configuration_of_tiles();
  std::memcpy(found, &before, sizeof(before));
  configure_tiles(TileConfiguration());
}

void leave(const void* found) {
  TileConfiguration before;
  std::memcpy(&before, found, sizeof(before));
  if (before.palette == 0) {
    release_tiles();
  } else {
    configure_tiles(before);
  }
}

// ---- products ----

// 16 rows of A: whole steps of 32 k from one place, what is left of k from another.
struct Strip {
  const BFloat16* data;
  int64_t stride;
  const BFloat16* tail; // zeros behind
  int64_t tail_stride;
};

// Rows of a parameter, where they stand; an incomplete step of k from a copy, and all where rows are missing.
Strip strip_of(const BFloat16* from, int64_t stride, int64_t rows, int64_t depth, BFloat16* own) {
  const int64_t whole = depth / kTileDepth * kTileDepth;
  if (rows >= kTileRows) {
    for (int64_t i = 0; i < kTileRows && whole < depth; ++i) {
      store_pairs(load_32(from + i * stride + whole, depth - whole), own + i * kTileDepth);
    }
    return {from, stride, own, kTileDepth};
  }
  for (int64_t i = 0; i < kTileRows; ++i) {
    for (int64_t k = 0; k < depth; k += kTileDepth) {
      store_pairs(i < rows ? load_32(from + i * stride + k, depth - k) : Pairs{}, own + i * padded(depth) + k);
    }
  }
  return {own, padded(depth), own + whole, padded(depth)};
}

// Rows of scratch, padded.
Strip strip_of_scratch(const BFloat16* from, int64_t stride) {
  return {from, stride, nullptr, 0};
}

template <int strips, int panels>
EDL_INLINE void step(
    const BFloat16* const (&a)[2], const int64_t (&strides)[2], const BFloat16* const (&b)[2], int64_t k) {
  load_tile<4>(a[0], strides[0] * 2);
  load_tile<6>(b[0] + k * kTileRows, 64);
  multiply_tiles<0, 4, 6>();
  if constexpr (panels == 2) {
    load_tile<7>(b[1] + k * kTileRows, 64);
    multiply_tiles<1, 4, 7>();
  }
  if constexpr (strips == 2) {
    load_tile<5>(a[1], strides[1] * 2);
    multiply_tiles<2, 5, 6>();
    if constexpr (panels == 2) {
      multiply_tiles<3, 5, 7>();
    }
  }
}

template <int strips, int panels, typename Each>
EDL_INLINE void each_tile_of_c(Each visit) {
  visit.template operator()<0>(0, 0);
  if constexpr (panels == 2) {
    visit.template operator()<1>(0, kTileRows);
  }
  if constexpr (strips == 2) {
    visit.template operator()<2>(kTileRows, 0);
    if constexpr (panels == 2) {
      visit.template operator()<3>(kTileRows, kTileRows);
    }
  }
}

// c [32, 32] = or += A B, as many of its tiles as there are strips and panels.
template <int strips, int panels>
void multiply_block(const Strip (&a)[2], const BFloat16* const (&b)[2], int64_t depth, float* c, bool accumulate) {
  each_tile_of_c<strips, panels>([&]<int tile>(int64_t row, int64_t column) {
    if (accumulate) {
      load_tile<tile>(c + row * kBlock + column, kBlock * 4);
    } else {
      zero_tile<tile>();
    }
  });
  // Copies, as instructions that write memory would have the arguments read again.
  const Strip first = a[0], second = a[strips - 1];
  const int64_t strides[2] = {first.stride, second.stride}, tail_strides[2] = {first.tail_stride, second.tail_stride};
  const BFloat16* const columns[2] = {b[0], b[panels - 1]};
  int64_t k = 0;
  for (; k + kTileDepth <= depth; k += kTileDepth) {
    const BFloat16* const rows[2] = {first.data + k, second.data + k};
    step<strips, panels>(rows, strides, columns, k);
  }
  if (k < depth) {
    const BFloat16* const rows[2] = {first.tail, second.tail};
    step<strips, panels>(rows, tail_strides, columns, k);
  }
  each_tile_of_c<strips, panels>(
      [&]<int tile>(int64_t row, int64_t column) { store_tile<tile>(c + row * kBlock + column, kBlock * 4); });
}

void multiply(
    const Strip (&a)[2],
    bool both_strips,
    const BFloat16* const (&b)[2],
    bool both_panels,
    int64_t depth,
    float* c,
    bool accumulate = false) {
  if (both_strips) {
    both_panels ? multiply_block<2, 2>(a, b, depth, c, accumulate) : multiply_block<2, 1>(a, b, depth, c, accumulate);
  } else {
    both_panels ? multiply_block<1, 2>(a, b, depth, c, accumulate) : multiply_block<1, 1>(a, b, depth, c, accumulate);
  }
}

// ---- packing ----

// Panels of B, `panel` numbers apart: row k of `depth` begins at row(k), k goes down; zeros behind both.
template <typename Row>
void pack_pairs(Row row, int64_t depth, int64_t columns, BFloat16* to, int64_t panel) {
  for (int64_t k = 0; k < padded(depth); k += 2) {
    const BFloat16* first = k < depth ? row(k) : nullptr;
    const BFloat16* second = k + 1 < depth ? row(k + 1) : nullptr;
    for (int64_t n = 0; n < round_up(columns, kBlock); n += kTileRows) {
      const auto at = [n](const BFloat16* from) { return from == nullptr ? nullptr : from + n; };
      store_pairs(pairs_of_rows(at(first), at(second), columns - n), to + n / kTileRows * panel + k * kTileRows);
    }
  }
}

void gather_tokens(const ExpertMlpTask& task, ExpertRows rows, void*) {
  const auto tokens = tokens_of<BFloat16>(task);
  const int64_t count = rows.end - rows.begin, hidden = task.hidden_size;
  for (int64_t i = 0; i < count; i += kTileRows) {
    BFloat16* panel = packed_tokens_of(task, rows.place + i);
    const BFloat16* sources[kTileRows] = {};
    for (int64_t r = 0; r < std::min(kTileRows, count - i); ++r) {
      sources[r] = tokens(rows.begin + i + r);
    }
    for (int64_t k = 0; k < hidden; k += kTileDepth) {
      Pairs square[kTileRows];
      for (int64_t r = 0; r < kTileRows; ++r) {
        square[r] = sources[r] == nullptr ? Pairs{} : load_32(sources[r] + k, hidden - k);
      }
      transpose_pairs(square);
      for (int64_t r = 0; r < kTileRows; ++r) {
        store_pairs(square[r], panel + k * kTileRows + r * kTileDepth);
      }
    }
  }
}

// 32 rows of pairs, [16][16 columns], as 16 columns of 32 rows; only `columns` of them.
EDL_INLINE void store_columns(Pairs* square, int64_t columns, BFloat16* to, int64_t stride) {
  transpose_pairs(square);
  for (int64_t c = 0; c < std::min(kTileRows, columns); ++c) {
    store_pairs(square[c], to + c * stride);
  }
}

void gather_gradients(const ExpertMlpTask& task, ExpertRows rows, void*) {
  const auto tokens = tokens_of<BFloat16>(task), grad_output = grad_output_of<BFloat16>(task);
  const int64_t count = rows.end - rows.begin, hidden = task.hidden_size;
  for (int64_t i = 0; i < count; i += kTileDepth) {
    const int64_t place = rows.place + i;
    const BFloat16 *grads[kTileDepth] = {}, *inputs[kTileDepth] = {};
    for (int64_t r = 0; r < std::min(kTileDepth, count - i); ++r) {
      const int64_t row = rows.begin + i + r;
      grads[r] = grad_output(row);
      inputs[r] = factor_of<BFloat16>(task, row) == 0 ? nullptr : tokens(row); // zeros beside its dP
    }
    for (int64_t r = 0; r < kTileDepth; ++r) {
      BFloat16* to = grad_output_rows_of(task, place + r);
      for (int64_t k = 0; k < hidden; k += kTileDepth) {
        store_pairs(grads[r] == nullptr ? Pairs{} : load_32(grads[r] + k, hidden - k), to + k);
      }
    }
    for (int64_t h = 0; h < hidden; h += kTileRows) {
      const auto at = [h](const BFloat16* row) { return row == nullptr ? nullptr : row + h; };
      BFloat16* panel = panel_of(task, task.token_pairs, h, place);
      Pairs square[kTileRows];
      for (int64_t r = 0; r < kTileDepth; r += 2) {
        square[r / 2] = pairs_of_rows(at(grads[r]), at(grads[r + 1]), hidden - h);
        store_pairs(pairs_of_rows(at(inputs[r]), at(inputs[r + 1]), hidden - h), panel + r * kTileRows);
      }
      store_columns(square, hidden - h, grad_output_column_of(task, h, place), column_stride(task));
    }
  }
}

// ---- forward ----

// From c, gate's 16 columns of I above those of up: the activation of 16 rows, and what is kept of them.
void activate(
    const ExpertMlpTask& task, int64_t begin, int64_t count, int64_t column, const float* c, BFloat16* activation) {
  const int64_t intermediate = task.intermediate_size;
  Pairs kept[kTileRows]; // 8 pairs of gate, 8 of up
  for (int64_t j = 0; j < kTileRows; j += 2, c += 2 * kBlock) {
    const Floats gate[2] = {load(c), load(c + kBlock)};
    const Floats up[2] = {load(c + kTileRows * kBlock), load(c + (kTileRows + 1) * kBlock)};
    Floats s[2] = {gate[0], gate[1]};
    sigmoid_each<2, float>(s);
    // Behind I stand zeros also where infinity has met those of the parameter.
    const Floats first = column + j < intermediate ? gate[0] * s[0] * up[0] : Floats{};
    const Floats second = column + j + 1 < intermediate ? gate[1] * s[1] * up[1] : Floats{};
    store_pairs(pairs_of(first, second), activation + j * kTileRows);
    kept[j / 2] = pairs_of(gate[0], gate[1]);
    kept[(kTileRows + j) / 2] = pairs_of(up[0], up[1]);
  }
  if (task.pre_activation == nullptr) {
    return;
  }
  transpose_pairs(kept);
  const auto width = static_cast<size_t>(std::clamp<int64_t>(intermediate - column, 0, kTileRows));
  for (int64_t r = 0; r < count; ++r) {
    BFloat16* to = static_cast<BFloat16*>(task.pre_activation) + (begin + r) * 2 * intermediate + column;
    BFloat16 both[2 * kTileRows];
    store_pairs(kept[r], both);
    std::memcpy(to, both, width * sizeof(BFloat16));
    std::memcpy(to + intermediate, both + kTileRows, width * sizeof(BFloat16));
  }
}

// The columns of a task, the last up to the zeros that `output` reads behind I.
int64_t padded_end(const ExpertMlpTask& task, Columns columns) {
  return columns.end == task.intermediate_size ? padded(columns.end) : columns.end;
}

void activations(const ExpertMlpTask& task, ExpertRows rows, Columns columns, void* memory) {
  const Own own(memory, task);
  const int64_t hidden = task.hidden_size, intermediate = task.intermediate_size, stride = task.gate_up_strides[1];
  const int64_t count = rows.end - rows.begin;
  for (int64_t j = columns.begin; j < padded_end(task, columns); j += kTileRows) {
    const auto strip = [&](int64_t first, BFloat16* copy) {
      const int64_t present = intermediate - j;
      const BFloat16* from = present > 0 ? gate_up_of<BFloat16>(task, rows.expert, first + j) : nullptr;
      return strip_of(from, stride, present, hidden, copy);
    };
    const Strip strips[2] = {strip(0, own.strips[0]), strip(intermediate, own.strips[1])};
    for (int64_t i = 0; i < count; i += kBlock) {
      const bool both = count - i > kTileRows;
      const BFloat16* const panels[2] = {
          packed_tokens_of(task, rows.place + i), packed_tokens_of(task, rows.place + i + kTileRows)};
      multiply(strips, true, panels, both, hidden, own.c);
      for (int64_t p = 0; p < (both ? kBlock : kTileRows); p += kTileRows) {
        activate(
            task, rows.begin + i + p, std::min(kTileRows, count - i - p), j, own.c + p,
            activation_of(task, rows.place + i + p) + j * kTileRows);
      }
    }
  }
}

void transpose_block(const float* from, float* to) {
  for (int64_t row = 0; row < kBlock; row += kTileRows) {
    for (int64_t column = 0; column < kBlock; column += kTileRows) {
      Floats square[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) {
        square[i] = load(from + (row + i) * kBlock + column);
      }
      transpose<1, float>(square);
      for (int64_t i = 0; i < kTileRows; ++i) {
        store(square[i], to + (column + i) * kBlock + row);
      }
    }
  }
}

void output(const ExpertMlpTask& task, const ExpertRows* experts, int64_t num_experts, Columns columns, void* memory) {
  const Own own(memory, task);
  const int64_t depth = task.intermediate_size, stride = task.down_strides[1];
  for (const ExpertRows* rows = experts; rows != experts + num_experts; ++rows) {
    const int64_t count = rows->end - rows->begin;
    for (int64_t h = columns.begin; h < columns.end && count > 0; h += kBlock) {
      const int64_t width = std::min(kBlock, columns.end - h);
      const BFloat16* from = down_of<BFloat16>(task, rows->expert, h);
      const bool both_strips = width > kTileRows;
      const Strip first = strip_of(from, stride, width, depth, own.strips[0]);
      const Strip strips[2] = {
          first,
          both_strips ? strip_of(from + kTileRows * stride, stride, width - kTileRows, depth, own.strips[1]) : first};
      for (int64_t i = 0; i < count; i += kBlock) {
        const int64_t part = std::min(kBlock, count - i), begin = rows->begin + i;
        const BFloat16* const panels[2] = {
            activation_of(task, rows->place + i), activation_of(task, rows->place + i + kTileRows)};
        multiply(strips, both_strips, panels, part > kTileRows, depth, own.c);
        transpose_block(own.c, own.transposed);
        if (task.rows != nullptr) {
          auto* kept = static_cast<BFloat16*>(task.rows) + begin * task.hidden_size + h;
          copy_block(own.transposed, kBlock, part, width, kept, task.hidden_size);
        }
        add_to_tokens<BFloat16, true>(task, begin, part, {h, h + width}, own.transposed, kBlock);
      }
    }
  }
}

// ---- backward ----

// From c, [32 rows, 16 columns of I]: the gradients of a task's rows, as the products behind it read them.
template <bool with_more>
void activate_backward(
    const ExpertMlpTask& task, ExpertRows rows, int64_t i, int64_t column, const float* c, float* dots) {
  const int64_t intermediate = task.intermediate_size, width = intermediate - column;
  Pairs gates[kTileRows], ups[kTileRows];
  BFloat16* activations = panel_of(task, task.activation_pairs, column, rows.place + i);
  for (int64_t r = 0; r < kTileDepth; r += 2) {
    ActivationGradients<float> grads[2] = {};
    for (int64_t which = 0; which < 2; ++which) {
      const int64_t row = rows.begin + i + r + which;
      BFloat16* grad = grad_pre_activation_of(task, rows.place + i + r + which) + column;
      if (row < rows.end) {
        const auto* gate = static_cast<const BFloat16*>(task.pre_activation) + row * 2 * intermediate + column;
        const float* more =
            with_more ? static_cast<const float*>(task.grad_activation) + row * intermediate + column : nullptr;
        Floats dot = load(dots + (r + which) * kTileRows);
        grads[which] = activation_gradients<with_more, float>(
            load_some<float>(gate, width), load_some<float>(gate + intermediate, width),
            load_some<float>(c + (r + which) * kBlock, width), with_more ? load_some<float>(more, width) : Floats{},
            factor_of<BFloat16>(task, row), dot);
        store(dot, dots + (r + which) * kTileRows);
        grads[which].gate = first_lanes(grads[which].gate, width); // an infinite factor makes NaN of zeros
        grads[which].up = first_lanes(grads[which].up, width);
      }
      store(grads[which].gate, grad);
      store(grads[which].up, grad + padded(intermediate));
    }
    store_pairs(pairs_of(grads[0].activation, grads[1].activation), activations + r * kTileRows);
    gates[r / 2] = pairs_of(grads[0].gate, grads[1].gate);
    ups[r / 2] = pairs_of(grads[0].up, grads[1].up);
  }
  const int64_t stride = column_stride(task), place = rows.place + i;
  store_columns(gates, width, grad_pre_activation_column_of(task, column, place), stride);
  store_columns(ups, width, grad_pre_activation_column_of(task, intermediate + column, place), stride);
}

void grad_activations(const ExpertMlpTask& task, ExpertRows rows, Columns columns, void* memory) {
  const Own own(memory, task);
  const int64_t hidden = task.hidden_size, count = rows.end - rows.begin, end = padded_end(task, columns);
  const int64_t panel = padded(hidden) * kTileRows, stride = padded(hidden) + kRowPadding;
  const auto down = [&](int64_t h) { return down_of<BFloat16>(task, rows.expert, h) + columns.begin; };
  pack_pairs(down, hidden, columns.end - columns.begin, own.panels, panel);
  for (int64_t i = 0; i < count; i += kBlock) {
    const BFloat16* grads = grad_output_rows_of(task, rows.place + i);
    const Strip strips[2] = {strip_of_scratch(grads, stride), strip_of_scratch(grads + kTileRows * stride, stride)};
    std::fill_n(own.dots, kBlock * kTileRows, 0.0f);
    for (int64_t j = columns.begin; j < end; j += kBlock) {
      const BFloat16* first = own.panels + (j - columns.begin) / kTileRows * panel;
      const BFloat16* const panels[2] = {first, first + panel};
      multiply(strips, count - i > kTileRows, panels, true, padded(hidden), own.c);
      for (int64_t p = 0; p < kBlock; p += kTileRows) {
        if (task.grad_activation == nullptr) {
          activate_backward<false>(task, rows, i, j + p, own.c + p, own.dots);
        } else {
          activate_backward<true>(task, rows, i, j + p, own.c + p, own.dots);
        }
      }
    }
    auto* dots = static_cast<float*>(task.dots) + columns.begin / kWideColumns * task.window_rows;
    for (int64_t r = 0; r < std::min(kBlock, count - i); ++r) {
      dots[rows.begin + i + r - task.window_begin] = sum_of<float>(load(own.dots + r * kTileRows));
    }
  }
}

void grad_tokens(
    const ExpertMlpTask& task, const ExpertRows* experts, int64_t num_experts, Columns columns, void* memory) {
  const Own own(memory, task);
  const int64_t intermediate = task.intermediate_size, half = padded(intermediate) * kTileRows, panel = 2 * half;
  const int64_t width = columns.end - columns.begin, stride = task.pre_activation_stride;
  for (const ExpertRows* rows = experts; rows != experts + num_experts; ++rows) {
    const int64_t count = rows->end - rows->begin;
    for (int64_t up = 0; up < 2 && count > 0; ++up) {
      const auto row = [&](int64_t j) {
        return gate_up_of<BFloat16>(task, rows->expert, up * intermediate + j) + columns.begin;
      };
      pack_pairs(row, intermediate, width, own.panels + up * half, panel);
    }
    for (int64_t i = 0; i < count; i += kBlock) {
      const BFloat16* grads = grad_pre_activation_of(task, rows->place + i);
      const Strip strips[2] = {strip_of_scratch(grads, stride), strip_of_scratch(grads + kTileRows * stride, stride)};
      const int64_t part = std::min(kBlock, count - i);
      for (int64_t h = 0; h < width; h += kBlock) {
        const BFloat16* first = own.panels + h / kTileRows * panel;
        const BFloat16* const panels[2] = {first, first + panel};
        multiply(strips, part > kTileRows, panels, width - h > kTileRows, 2 * padded(intermediate), own.c);
        const Columns of_block{columns.begin + h, columns.begin + std::min(width, h + kBlock)};
        add_to_tokens<BFloat16, false>(task, rows->begin + i, part, of_block, own.c, kBlock);
      }
    }
  }
}

// A block of the gradient [M, N] of an expert from `left` [M, rows] and the panels `right`; what other windows have
// added, or will add, stands in `carried`.
void grad_block(
    const ExpertMlpTask& task,
    const GradBlock& block,
    const BFloat16* left,
    int64_t m,
    void* right,
    int64_t n,
    void* grad_of_all,
    void* carried_of_all,
    void* memory) {
  const Own own(memory, task);
  const int64_t depth = padded(block.rows.end - block.rows.begin), stride = column_stride(task);
  const int64_t last_row = std::min(m, block.row + kGradRows), last_column = std::min(n, block.column + kGradColumns);
  for (int64_t row = block.row; row < last_row; row += kBlock) {
    const BFloat16* from = left + row * stride + block.rows.place;
    const Strip strips[2] = {strip_of_scratch(from, stride), strip_of_scratch(from + kTileRows * stride, stride)};
    const int64_t rows = std::min(kBlock, last_row - row);
    for (int64_t column = block.column; column < last_column; column += kBlock) {
      const int64_t columns = std::min(kBlock, last_column - column);
      const BFloat16* const panels[2] = {
          panel_of(task, right, column, block.rows.place), panel_of(task, right, column + kTileRows, block.rows.place)};
      float* carried = static_cast<float*>(carried_of_all) + row * n + column;
      if (block.continues) {
        copy_block(carried, n, rows, columns, own.c, kBlock);
      }
      multiply(strips, rows > kTileRows, panels, columns > kTileRows, depth, own.c, block.continues);
      if (block.ends) {
        BFloat16* grad = static_cast<BFloat16*>(grad_of_all) + block.rows.expert * m * n + row * n + column;
        copy_block(own.c, kBlock, rows, columns, grad, n);
      } else {
        copy_block(own.c, kBlock, rows, columns, carried, n);
      }
    }
  }
}

void grad_gate_up(const ExpertMlpTask& task, const GradBlock& block, void* memory) {
  const auto* grads = static_cast<const BFloat16*>(task.grad_pre_activation_columns);
  grad_block(
      task, block, grads, 2 * task.intermediate_size, task.token_pairs, task.hidden_size, task.grad_gate_up,
      task.carried_gate_up, memory);
}

void grad_down(const ExpertMlpTask& task, const GradBlock& block, void* memory) {
  const auto* grads = static_cast<const BFloat16*>(task.grad_output_columns);
  grad_block(
      task, block, grads, task.hidden_size, task.activation_pairs, task.intermediate_size, task.grad_down,
      task.carried_down, memory);
}

} // namespace

extern const ExpertMlpLoops expert_mlp_tiles = {
    .cut = cut,
    .lay_out = lay_out,
    .enter = enter,
    .leave = leave,
    .gather_tokens = gather_tokens,
    .activations = activations,
    .output = output,
    .gather_gradients = gather_gradients,
    .grad_activations = grad_activations,
    .grad_tokens = grad_tokens,
    .grad_factors = grad_factors<BFloat16>,
    .grad_gate_up = grad_gate_up,
    .grad_down = grad_down};

} // namespace edl::cpu::EDL_ISA
