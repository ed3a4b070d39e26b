// Every buffer is exactly as large as the contract says, so that the sanitizer sees each access outside.
#include <cmath>
#include <cstring>
#include <functional>
#include <new>
#include <random>
#include <vector>

#include "catch.h"
#include "cpu/expert_mlp_plan.h"
#include "tile_product.h"

namespace edl::cpu {
namespace tile_stand_in {
extern const ExpertMlpLoops expert_mlp_tiles;
}
InstructionSet instruction_set() { // the tests name the tables themselves
  return InstructionSet::baseline;
}
} // namespace edl::cpu

namespace {

using namespace edl::cpu;
using edl::StorageType;
using Values = std::vector<double>;

constexpr int64_t kTokens = 150, kHidden = 301, kInner = 147, kTopK = 2, kExperts = 6, kPadding = 3;

bool has_avx2() {
#if defined(EDL_WITH_X86)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}
bool has_avx512() {
#if defined(EDL_WITH_X86)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

std::vector<const ExpertMlpTable*> tables() {
  std::vector<const ExpertMlpTable*> found{&baseline::expert_mlp_loops};
#if defined(EDL_WITH_X86)
  if (has_avx2()) {
    found.push_back(&avx2::expert_mlp_loops);
  }
  if (has_avx512()) {
    found.push_back(&avx512::expert_mlp_loops);
  }
#endif
  return found;
}

// Storage as the loops see it: float, double, or the upper half of a float.
struct BFloat16 {
  uint16_t bits;
  BFloat16(double value = 0) {
    const float rounded = static_cast<float>(value);
    uint32_t all;
    std::memcpy(&all, &rounded, sizeof(all));
    bits = static_cast<uint16_t>((all + 0x8000) >> 16);
  }
  operator double() const {
    const uint32_t all = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &all, sizeof(value));
    return value;
  }
};

template <typename Storage>
std::vector<Storage> random_values(int64_t count, double scale, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal(0, scale);
  std::vector<Storage> values(count);
  for (Storage& value : values) {
    value = static_cast<Storage>(normal(generator));
  }
  return values;
}

template <typename Storage>
Values wide(const std::vector<Storage>& values) {
  return Values(values.begin(), values.end());
}

// Two slots per token: experts with 0, 1, 5, 11, 200 and 73 rows, and ten sentinels.
struct Routing {
  std::vector<int32_t> offsets{0, 0, 1, 6, 17, 217, 290};
  std::vector<int32_t> slots;
  Routing() {
    for (int64_t i = 0; i < kTokens * kTopK; ++i) {
      slots.push_back(static_cast<int32_t>(i * 7 % (kTokens * kTopK)));
    }
  }
};

struct Results {
  Values output, tokens, factors, gate_up, down;
};

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

// The definition, one row after the other.
Results expected(
    const Routing& routing, const Values& x, const Values& w, const Values& gu, const Values& dn, const Values& go) {
  Results r{Values(x.size()), Values(x.size()), Values(w.size()), Values(gu.size()), Values(dn.size())};
  for (int64_t e = 0; e < kExperts; ++e) {
    const double *g = &gu[e * 2 * kInner * kHidden], *d = &dn[e * kHidden * kInner];
    double *grad_g = &r.gate_up[e * 2 * kInner * kHidden], *grad_d = &r.down[e * kHidden * kInner];
    for (int64_t row = routing.offsets[e]; row < routing.offsets[e + 1]; ++row) {
      const int64_t slot = routing.slots[row], token = slot / kTopK;
      const double *in = &x[token * kHidden], *grad = &go[token * kHidden];
      for (int64_t i = 0; i < kInner; ++i) {
        double gate = 0, up = 0, grad_a = 0;
        for (int64_t h = 0; h < kHidden; ++h) {
          gate += g[i * kHidden + h] * in[h];
          up += g[(kInner + i) * kHidden + h] * in[h];
          grad_a += d[h * kInner + i] * grad[h];
        }
        const double s = sigmoid(gate), a = gate * s * up, grad_up = w[slot] * grad_a * gate * s;
        const double grad_gate = w[slot] * grad_a * up * s * (1 + gate * (1 - s));
        r.factors[slot] += grad_a * a;
        for (int64_t h = 0; h < kHidden; ++h) {
          r.output[token * kHidden + h] += w[slot] * a * d[h * kInner + i];
          r.tokens[token * kHidden + h] += grad_gate * g[i * kHidden + h] + grad_up * g[(kInner + i) * kHidden + h];
          grad_g[i * kHidden + h] += grad_gate * in[h];
          grad_g[(kInner + i) * kHidden + h] += grad_up * in[h];
          grad_d[h * kInner + i] += w[slot] * a * grad[h];
        }
      }
    }
  }
  return r;
}

void over_columns(int64_t columns, int64_t width, const std::function<void(Columns)>& each) {
  for (int64_t begin = 0; begin < columns; begin += width) {
    each({begin, std::min(columns, begin + width)});
  }
}

std::vector<GradBlock> grad_blocks(
    const Window& window, const Routing& routing, const ExpertMlpCut& cut, int64_t rows, int64_t columns) {
  std::vector<GradBlock> blocks;
  for (const ExpertRows& e : window.experts) {
    for (int64_t row = 0; row < rows; row += cut.grad_rows) {
      over_columns(columns, cut.grad_columns, [&](Columns part) {
        blocks.push_back(
            {e, e.begin > routing.offsets[e.expert], e.end == routing.offsets[e.expert + 1], row, part.begin});
      });
    }
  }
  return blocks;
}

// Memory of exactly so many bytes, aligned to 64, full of NaN.
class Memory {
 public:
  explicit Memory(size_t bytes) : data_(static_cast<char*>(::operator new(bytes, std::align_val_t(64)))) {
    std::memset(data_, 0xff, bytes);
  }
  ~Memory() {
    ::operator delete(data_, std::align_val_t(64));
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  char* data() const {
    return data_;
  }

 private:
  char* data_;
};

void check_that_tiles_are_left_as_found(const ExpertMlpLoops& loops) {
  char before[64], own[64], found[64];
  loops.enter(before);
  loops.enter(own);
  CATCH_CHECK(std::memcmp(before, own, 64) != 0);
  loops.leave(own);
  loops.enter(found);
  CATCH_CHECK(std::memcmp(found, own, 64) == 0);
  loops.leave(before);
  loops.enter(found);
  CATCH_CHECK(std::memcmp(found, before, 64) == 0);
  loops.leave(before);
}

// Forward and backward over windows of at most `window_rows` rows.
template <typename Storage, typename Acc>
void check(const ExpertMlpLoops& loops, int64_t window_rows, double tolerance) {
  const Routing routing;
  const auto x = random_values<Storage>(kTokens * kHidden, 1, 1), go = random_values<Storage>(kTokens * kHidden, 1, 2);
  const auto gu = random_values<Storage>(kExperts * 2 * kInner * kHidden, std::pow(kHidden, -0.5), 3);
  const auto dn = random_values<Storage>(kExperts * kHidden * kInner, std::pow(kInner, -0.5), 4);
  const auto w = random_values<Acc>(kTokens * kTopK, 1, 5);
  const ExpertMlpCut cut = loops.cut(kHidden, kInner);
  const auto windows = cut_windows(routing.offsets.data(), kExperts, window_rows, 64, cut.row_unit);

  std::vector<Storage> pre(kTokens * kTopK * 2 * kInner), grad_gu(gu.size()), grad_dn(dn.size());
  std::vector<Acc> output(x.size()), tokens(x.size()), factors(w.size()), carried(3 * kInner * kHidden);
  const std::vector<Storage> zeros(kHidden);

  ExpertMlpTask task{};
  task.hidden_size = kHidden, task.intermediate_size = kInner, task.top_k = kTopK, task.slots = routing.slots.data();
  task.factors = w.data(), task.tokens = x.data(), task.tokens_stride = kHidden;
  task.gate_up = gu.data(), task.gate_up_strides[0] = 2 * kInner * kHidden, task.gate_up_strides[1] = kHidden;
  task.down = dn.data(), task.down_strides[0] = kHidden * kInner, task.down_strides[1] = kInner;
  task.pre_activation = pre.data(), task.zeros = zeros.data();
  task.grad_output = go.data(), task.grad_output_stride = kHidden;
  task.grad_slots = routing.slots.data(), task.grad_top_k = kTopK;
  task.grad_factors = factors.data(), task.grad_gate_up = grad_gu.data(), task.grad_down = grad_dn.data();
  task.carried_gate_up = carried.data(), task.carried_down = carried.data() + 2 * kInner * kHidden;
  const Memory memory(cut.thread_bytes);
  char* own = memory.data();
  char found[64];
  if (loops.enter != nullptr) {
    loops.enter(found);
  }
  const auto over_blocks = [&](const Window& window, auto* loop) {
    for (const ExpertRows& rows : window.blocks) {
      if (loop != nullptr) {
        loop(task, rows, own);
      }
    }
  };
  {
    constexpr ExpertMlpPasses passes{.forward = true, .backward = false};
    const Memory scratch(loops.lay_out(task, window_rows, passes, nullptr));
    loops.lay_out(task, window_rows, passes, scratch.data());
    task.sums = output.data();
    for (const Window& window : windows) {
      task.window_begin = window.begin();
      over_blocks(window, loops.gather_tokens);
      for (const ExpertRows& rows : window.blocks) {
        over_columns(kInner, cut.activation_columns, [&](Columns part) { loops.activations(task, rows, part, own); });
      }
      for (const Columns& part : cut_columns(kHidden, 3)) {
        loops.output(task, window.experts.data(), window.experts.size(), part, own);
      }
    }
  }
  {
    constexpr ExpertMlpPasses passes{.forward = false, .backward = true};
    const Memory scratch(loops.lay_out(task, window_rows, passes, nullptr));
    loops.lay_out(task, window_rows, passes, scratch.data());
    task.sums = tokens.data();
    for (const Window& window : windows) {
      task.window_begin = window.begin();
      over_blocks(window, loops.gather_gradients);
      for (const ExpertRows& rows : window.blocks) {
        over_columns(kInner, kWideColumns, [&](Columns part) { loops.grad_activations(task, rows, part, own); });
      }
      for (const Columns& part : cut_columns(kHidden, 2)) {
        loops.grad_tokens(task, window.experts.data(), window.experts.size(), part, own);
      }
      for (const GradBlock& block : grad_blocks(window, routing, cut, 2 * kInner, kHidden)) {
        loops.grad_gate_up(task, block, own);
      }
      for (const GradBlock& block : grad_blocks(window, routing, cut, kHidden, kInner)) {
        loops.grad_down(task, block, own);
      }
      loops.grad_factors(task, window.begin(), window.end());
    }
  }
  if (loops.leave != nullptr) {
    loops.leave(found);
  }

  const Results wanted = expected(routing, wide(x), wide(w), wide(gu), wide(dn), wide(go));
  const auto near = [&](const Values& actual, const Values& right) {
    double error = 0, largest = 0;
    for (size_t i = 0; i < right.size(); ++i) {
      error = std::max(error, std::abs(actual[i] - right[i]));
      largest = std::max(largest, std::abs(right[i]));
    }
    CATCH_CHECK(error <= tolerance * largest);
  };
  near(wide(output), wanted.output);
  near(wide(tokens), wanted.tokens);
  near(wide(factors), wanted.factors);
  near(wide(grad_gu), wanted.gate_up);
  near(wide(grad_dn), wanted.down);
}

} // namespace

CATCH_TEST_CASE("the loops of expert_mlp are right and stay inside their buffers") {
  for (const ExpertMlpTable* table : tables()) {
    const auto loops = [&](StorageType type) { return table->of[static_cast<int>(type)]; };
    for (const int64_t window_rows : {96, 416}) { // several windows for one expert, one window for all
      check<float, float>(loops(StorageType::float32), window_rows, 3e-6);
      check<double, double>(loops(StorageType::float64), window_rows, 1e-13);
      check<BFloat16, float>(loops(StorageType::bfloat16), window_rows, 2e-2);
    }
  }
}

CATCH_TEST_CASE("tiles are left as they were found") {
  check_that_tiles_are_left_as_found(tile_stand_in::expert_mlp_tiles);
#if defined(EDL_WITH_AMX)
  if (may_use_tiles()) {
    check_that_tiles_are_left_as_found(avx512_amx::expert_mlp_tiles);
  }
#endif
}

CATCH_TEST_CASE("the loops of expert_mlp on tiles are right and stay inside their buffers") {
  for (const int64_t window_rows : {96, 416}) {
    check<BFloat16, float>(tile_stand_in::expert_mlp_tiles, window_rows, 2e-2);
#if defined(EDL_WITH_AMX)
    if (may_use_tiles()) {
      check<BFloat16, float>(avx512_amx::expert_mlp_tiles, window_rows, 2e-2);
    }
#endif
  }
}
