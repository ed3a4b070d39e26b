// route_tokens on CUDA: logits [T, E] → weights, experts [T, K]. A warp per token; everything in float32 (float64 for
// float64).
//
// What orders the experts (the logit, or score + bias) becomes an integer of the same order, NaN highest and -0 equal
// to 0, in shared memory; then K times the highest is taken, the lowest expert among equals. The weights need only the
// chosen logits, and the sum over the row for a plain softmax. Cost: one read of the logits, K scans of a row in shared
// memory.
//
// Backward: one write of grad_logits; the logits are read whole only for a plain softmax.
//
// `ruled` kernels serve calls with `allowed` or given experts: they read a forbidden logit as -inf, and look for values
// that the CPU refuses, which become NaN; a row with given experts is scanned once more. The others know nothing of it.
#include "cuda/kernels/route_tokens.h"

#include <cstring>

#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/score_rows.cuh"
#include "cuda/kernels/warps.cuh"

namespace edl::cuda {
namespace {

constexpr int kMostWarps = 8; //               of a block
constexpr int64_t kSharedBytes = 48 * 1024; // that every device has without asking

template <typename Acc>
struct KeyOf {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
};
template <typename Acc>
using Key = typename KeyOf<Acc>::type;

template <typename Acc>
inline constexpr Key<Acc> kTaken = std::numeric_limits<Key<Acc>>::min(); // below every value
template <typename Acc>
inline constexpr Key<Acc> kForbidden = kTaken<Acc> + 1; // of an expert that is not allowed; below every value too
template <typename Acc>
inline constexpr Key<Acc> kClosed = kForbidden<Acc> + 1; // of one that is masked with -inf

template <typename Acc>
__device__ inline Key<Acc> key_of(Acc x) {
  using Integer = Key<Acc>;
  constexpr Integer highest = std::numeric_limits<Integer>::max();
  const Acc positive_zero = x + Acc(0);
  Integer bits;
  memcpy(&bits, &positive_zero, sizeof(bits));
  bits ^= (bits >> (8 * sizeof(Integer) - 1)) & highest;
  return x != x ? highest : bits;
}

template <typename Integer>
__device__ inline Integer warp_max(Integer x) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const Integer other = __shfl_xor_sync(kAllLanes, x, step);
    x = other > x ? other : x;
  }
  return x;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
template <>
__device__ inline int32_t warp_max<int32_t>(int32_t x) {
  return __reduce_max_sync(kAllLanes, x);
}
#endif

// One token: its logits, of which a forbidden one reads as -inf, and its experts: E is none, -1 one that is out of
// range.
template <typename Storage, bool ruled>
struct Token {
  using Acc = Accumulation<Storage>;

  __device__ bool forbids(int64_t e) const {
    return ruled && allowed != nullptr && allowed[e] == 0;
  }
  __device__ Acc operator[](int64_t e) const {
    return forbids(e) ? -kInfinity<Acc> : widen(logits[e]);
  }
  __device__ int64_t expert(int64_t k) const {
    const int64_t id = id_at(experts, k);
    if constexpr (ruled) {
      return id == -1 && given ? num_experts : id >= 0 && id < num_experts ? id : -1;
    } else {
      return id;
    }
  }
  __device__ bool is_none(int64_t k) const {
    return ruled && expert(k) == num_experts;
  }
  __device__ Acc chosen_logit(int64_t k) const {
    const int64_t e = expert(k);
    return ruled && (e < 0 || e == num_experts) ? -kInfinity<Acc> : (*this)[e];
  }

  const Storage* logits; //  [E]
  int64_t num_experts;
  const uint8_t* allowed; // [E], or null: all are
  Ids experts; //            [K]
  bool given;
};

// Token t of a problem, forward or backward.
template <typename Storage, bool ruled, typename AnyProblem>
__device__ Token<Storage, ruled> token_of(const AnyProblem& problem, int64_t t, const Ids& experts, bool given) {
  const bool has_allowed = ruled && problem.allowed != nullptr;
  return {
      problem.logits + t * problem.row_stride, problem.num_experts,
      has_allowed ? problem.allowed + t * problem.allowed_stride : nullptr, experts, given};
}

__device__ inline Ids ids_from(const Ids& ids, int64_t first) {
  const char* data = static_cast<const char*>(ids.data);
  return {data + first * (ids.are_64_bit ? sizeof(int64_t) : sizeof(int32_t)), ids.are_64_bit};
}

__device__ inline bool any_lane(bool x) {
  return warp_max<int32_t>(x ? 1 : 0) != 0;
}

// Whether a token has experts that the CPU refuses: outside the range, forbidden, or twice the same. Where none were
// given, forbidden ones are chosen where too few are allowed.
template <typename Storage>
__device__ bool is_refused(const Token<Storage, true>& token, int64_t top_k, int lane) {
  bool is_wrong = false;
  for (int64_t k = lane; k < top_k; k += kWarp) {
    const int64_t e = token.expert(k);
    if (e == token.num_experts) {
      continue;
    }
    is_wrong |= e < 0 || token.forbids(e);
    for (int64_t before = 0; before < k; ++before) {
      is_wrong |= token.expert(before) == e;
    }
  }
  return any_lane(is_wrong);
}

// Whether the row has no distribution: no expert is open, or given experts are to have a share of a softmax that meets
// NaN or infinity. Chosen experts show both themselves, as they are the highest.
template <typename Storage, bool ruled>
__device__ bool is_undefined(const Token<Storage, ruled>& token, Scores scores, int lane) {
  using Acc = Accumulation<Storage>;
  if (!ruled || !token.given) {
    return token[token.expert(0)] == -kInfinity<Acc>;
  }
  bool is_open = false, is_finite = true;
  for (int64_t e = lane; e < token.num_experts; e += kWarp) {
    const Acc z = token[e];
    is_open |= z != -kInfinity<Acc>;
    is_finite &= z < kInfinity<Acc>;
  }
  return !any_lane(is_open) || (is_share_of_row(scores) && any_lane(!is_finite));
}

// Whether all given experts are none.
template <typename Storage>
__device__ bool has_no_choice(const Token<Storage, true>& token, int64_t top_k, int lane) {
  bool has_one = false;
  for (int64_t k = lane; k < top_k; k += kWarp) {
    has_one |= !token.is_none(k);
  }
  return !any_lane(has_one);
}

template <typename Storage>
struct Problem {
  const Storage* logits;
  int64_t row_stride;
  int64_t num_tokens;
  int num_experts;
  int64_t top_k;
  Scores scores;
  const Accumulation<Storage>* bias;
  const uint8_t* allowed;
  int64_t allowed_stride;
  Ids given;
  bool normalize;
  Accumulation<Storage> scale;
  Accumulation<Storage>* weights;
  int64_t* experts;
};

// The position of the first of the highest keys. Lane l looks at l, l + 32, ….
template <typename Acc>
__device__ inline int first_highest(const Key<Acc>* keys, int num_experts, int lane) {
  Key<Acc> best = kTaken<Acc>;
  int at = num_experts;
  for (int e = lane; e < num_experts; e += kWarp) {
    if (keys[e] > best) {
      best = keys[e];
      at = e;
    }
  }
  const Key<Acc> highest = warp_max(best);
  return num_experts - warp_max(best == highest ? num_experts - at : 0);
}

// Fills keys [E] with what orders the experts of one token.
template <typename Storage, bool ruled, typename Acc = Accumulation<Storage>>
__device__ void fill_keys(
    const Problem<Storage>& problem,
    const Token<Storage, ruled>& token,
    const RowStatistics<Acc>& of_row,
    int lane,
    Key<Acc>* keys) {
  for (int e = lane; e < problem.num_experts; e += kWarp) {
    Acc value = token[e];
    const bool closed = value == -kInfinity<Acc>;
    if (problem.bias != nullptr) {
      value = unnormalised(value, problem.scores, of_row.highest);
      value = (is_share_of_row(problem.scores) ? value * of_row.factor : value) + problem.bias[e];
    }
    keys[e] = token.forbids(e) ? kForbidden<Acc> : closed ? kClosed<Acc> : key_of(value);
  }
}

// Unnormalised scores of the chosen experts of one token, against their own highest logit.
template <typename Storage, bool ruled, typename Acc = Accumulation<Storage>>
struct Chosen {
  __device__ Chosen(const Token<Storage, ruled>& token, int64_t top_k, Scores scores, int lane)
      : token(token), scores(scores), highest(0) {
    if (is_share_of_row(scores)) {
      Acc own = -kInfinity<Acc>;
      for (int64_t k = lane; k < top_k; k += kWarp) {
        const Acc z = token.chosen_logit(k);
        own = z > own ? z : own;
      }
      highest = team_max(own, kWarp);
    }
    Acc own = 0;
    for (int64_t k = lane; k < top_k; k += kWarp) {
      own += score(k);
    }
    sum = team_sum(own, kWarp);
  }
  __device__ Acc score(int64_t k) const {
    return unnormalised(token.chosen_logit(k), scores, highest);
  }

  const Token<Storage, ruled>& token;
  Scores scores;
  Acc highest;
  Acc sum;
};

template <typename Storage, bool ruled, typename Acc = Accumulation<Storage>>
__device__ void write_weights(
    const Problem<Storage>& problem,
    const Token<Storage, ruled>& token,
    const RowStatistics<Acc>& of_row,
    int lane,
    Acc* weights) {
  if constexpr (ruled) {
    if (is_refused(token, problem.top_k, lane)) {
      for (int64_t k = lane; k < problem.top_k; k += kWarp) {
        weights[k] = kNan<Acc>;
      }
      return;
    }
  }
  if (is_share_of_row(problem.scores) && !problem.normalize) {
    for (int64_t k = lane; k < problem.top_k; k += kWarp) {
      const Acc score = unnormalised(token.chosen_logit(k), problem.scores, of_row.highest);
      weights[k] = token.is_none(k) ? Acc(0) : score * (of_row.factor * problem.scale);
    }
    return;
  }
  const Chosen<Storage, ruled> chosen(token, problem.top_k, problem.scores, lane);
  Acc factor = problem.normalize ? problem.scale * factor_of(chosen.sum, problem.scores) : problem.scale;
  if (of_row.factor != of_row.factor) { // a NaN that a bias kept out of the choice
    factor = of_row.factor;
  }
  if (is_undefined(token, problem.scores, lane)) {
    factor = kNan<Acc>;
  }
  for (int64_t k = lane; k < problem.top_k; k += kWarp) {
    weights[k] = token.is_none(k) ? Acc(0) : chosen.score(k) * factor;
  }
}

template <typename Storage, bool ruled>
__global__ void __launch_bounds__(kMostWarps* kWarp, 4) route_rows(Problem<Storage> problem) {
  using Acc = Accumulation<Storage>;
  EDL_DYNAMIC_SHARED(Key<Acc>, shared_keys);
  const int lane = threadIdx.x % kWarp;
  const int warp = threadIdx.x / kWarp;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + warp;
  if (t >= problem.num_tokens) {
    return; // the whole warp; no barrier of the block follows
  }
  Key<Acc>* keys = shared_keys + static_cast<int64_t>(warp) * problem.num_experts;
  int64_t* experts = problem.experts + t * problem.top_k;
  const bool given = ruled && problem.given.data != nullptr;
  const Ids ids = given ? ids_from(problem.given, t * problem.top_k) : Ids{experts, true};
  const Token<Storage, ruled> token = token_of<Storage, ruled>(problem, t, ids, given);
  RowStatistics<Acc> of_row = {0, 1};
  if (problem.bias != nullptr || (is_share_of_row(problem.scores) && !problem.normalize)) {
    of_row = statistics_of_row(token, problem.num_experts, problem.scores);
  }
  if constexpr (ruled) {
    if (given) {
      for (int64_t k = lane; k < problem.top_k; k += kWarp) {
        experts[k] = token.expert(k);
      }
      return write_weights(problem, token, of_row, lane, problem.weights + t * problem.top_k);
    }
  }
  fill_keys(problem, token, of_row, lane, keys);
  for (int64_t k = 0; k < problem.top_k; ++k) {
    const int expert = first_highest<Acc>(keys, problem.num_experts, lane); // a lane reads only keys that it wrote
    if (expert % kWarp == lane) {
      keys[expert] = kTaken<Acc>;
    }
    if (lane == 0) {
      experts[k] = expert;
    }
  }
  __syncwarp(); // experts are read by all lanes
  write_weights(problem, token, of_row, lane, problem.weights + t * problem.top_k);
}

// ---- backward ----

template <typename Storage>
struct GradientProblem {
  const Accumulation<Storage>* grad_weights;
  const Storage* logits;
  int64_t row_stride;
  int64_t num_tokens;
  int64_t num_experts;
  int64_t top_k;
  Ids experts;
  bool given;
  const uint8_t* allowed;
  int64_t allowed_stride;
  Scores scores;
  bool normalize;
  Accumulation<Storage> scale;
  Storage* grad_logits;
};

// A slot of weight 0 hands nothing on, even where its expert's output, and so the gradient of its weight, is NaN.
template <typename Acc>
__device__ inline Acc times(Acc score, Acc grad) {
  return score == 0 ? Acc(0) : score * grad;
}

// Plain softmax: p_e (g_e - <g, p>), g_e = 0 for an expert that was not chosen.
template <typename Storage, bool ruled, typename Acc = Accumulation<Storage>>
__device__ void spread_over_row(
    const GradientProblem<Storage>& problem,
    const Token<Storage, ruled>& token,
    const Acc* grad,
    int lane,
    Storage* out) {
  const RowStatistics<Acc> of_row = statistics_of_row(token, problem.num_experts, problem.scores);
  const auto probability = [&](Acc z) { return unnormalised(z, problem.scores, of_row.highest) * of_row.factor; };
  Acc dot = 0;
  for (int64_t k = lane; k < problem.top_k; k += kWarp) {
    dot += times(probability(token.chosen_logit(k)), grad[k] * problem.scale);
  }
  dot = team_sum(dot, kWarp);
  for (int64_t e = lane; e < problem.num_experts; e += kWarp) {
    out[e] = narrow<Storage>(token.forbids(e) ? Acc(0) : probability(token[e]) * -dot);
  }
  __syncwarp(); // the chosen are written over
  for (int64_t k = lane; k < problem.top_k; k += kWarp) {
    if (!token.is_none(k)) {
      out[token.expert(k)] = narrow<Storage>(times(probability(token.chosen_logit(k)), grad[k] * problem.scale - dot));
    }
  }
}

// All other weights depend on the chosen logits alone. Normalised softmax: w_k (g_k - <g, w>); sigmoid: s_k (1 - s_k)
// (g_k - <g, s> / sum) / sum, or s_k (1 - s_k) g_k.
template <typename Storage, bool ruled, typename Acc = Accumulation<Storage>>
__device__ void spread_over_chosen(
    const GradientProblem<Storage>& problem,
    const Token<Storage, ruled>& token,
    const Acc* grad,
    int lane,
    Storage* out) {
  const Chosen<Storage, ruled> chosen(token, problem.top_k, problem.scores, lane);
  const Acc inverse = problem.normalize ? factor_of(chosen.sum, problem.scores) : Acc(1);
  const Acc scale = is_undefined(token, problem.scores, lane) ? kNan<Acc> : problem.scale;
  Acc dot = 0;
  if (problem.normalize) {
    for (int64_t k = lane; k < problem.top_k; k += kWarp) {
      dot += times(chosen.score(k), grad[k]) * inverse;
    }
    dot = team_sum(dot, kWarp);
  }
  for (int64_t e = lane; e < problem.num_experts; e += kWarp) {
    out[e] = narrow<Storage>(Acc(0));
  }
  __syncwarp(); // the chosen are written over
  for (int64_t k = lane; k < problem.top_k; k += kWarp) {
    const Acc s = chosen.score(k);
    const Acc slope = s * log_slope(s, problem.scores);
    if (!token.is_none(k)) {
      out[token.expert(k)] = narrow<Storage>(times(slope * inverse, grad[k] - dot) * scale);
    }
  }
}

template <typename Storage>
__device__ void fill_row(Accumulation<Storage> value, int64_t num_experts, int lane, Storage* out) {
  for (int64_t e = lane; e < num_experts; e += kWarp) {
    out[e] = narrow<Storage>(value);
  }
}

template <typename Storage, bool ruled>
__global__ void __launch_bounds__(kMostWarps* kWarp, 3) spread_rows(GradientProblem<Storage> problem) {
  const int lane = threadIdx.x % kWarp;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kMostWarps + threadIdx.x / kWarp;
  if (t >= problem.num_tokens) {
    return; // the whole warp; no barrier of the block follows
  }
  using Acc = Accumulation<Storage>;
  const Acc* grad = problem.grad_weights + t * problem.top_k;
  Storage* out = problem.grad_logits + t * problem.num_experts;
  const Ids experts = {problem.experts.data, ruled ? problem.experts.are_64_bit : true};
  const Ids ids = ids_from(experts, t * problem.top_k);
  const Token<Storage, ruled> token = token_of<Storage, ruled>(problem, t, ids, problem.given);
  if constexpr (ruled) {
    if (is_refused(token, problem.top_k, lane)) {
      return fill_row(kNan<Acc>, problem.num_experts, lane, out);
    }
    if (has_no_choice(token, problem.top_k, lane)) {
      return fill_row(Acc(0), problem.num_experts, lane, out);
    }
  }
  if (is_share_of_row(problem.scores) && !problem.normalize) {
    spread_over_row(problem, token, grad, lane, out);
  } else {
    spread_over_chosen(problem, token, grad, lane, out);
  }
}

} // namespace

int64_t most_experts_to_route(StorageType storage) {
  return kSharedBytes / accumulation_size_of(storage);
}

void launch_route_tokens(const RouteTask& task, cudaStream_t stream) {
  with_storage(task.storage, [&]<typename Storage>() {
    using Acc = Accumulation<Storage>;
    const Problem<Storage> problem = {
        static_cast<const Storage*>(task.logits), task.row_stride, task.num_tokens,
        static_cast<int>(task.num_experts),       task.top_k,      task.scores,
        static_cast<const Acc*>(task.bias),       task.allowed,    task.allowed_stride,
        {task.given, task.given_are_64_bit},      task.normalize,  static_cast<Acc>(task.scale),
        static_cast<Acc*>(task.weights),          task.experts};
    const int64_t row_bytes = task.num_experts * static_cast<int64_t>(sizeof(Key<Acc>));
    const int64_t fitting = kSharedBytes / row_bytes;
    const int64_t warps = fitting < kMostWarps ? fitting : kMostWarps;
    const auto blocks = static_cast<unsigned>(divide_up(task.num_tokens, warps));
    const auto threads = static_cast<unsigned>(warps * kWarp);
    const auto shared = static_cast<size_t>(warps * row_bytes);
    if (task.allowed != nullptr || task.given != nullptr) {
      EDL_LAUNCH((route_rows<Storage, true>), blocks, threads, shared, stream, problem);
    } else {
      EDL_LAUNCH((route_rows<Storage, false>), blocks, threads, shared, stream, problem);
    }
  });
}

void launch_route_tokens_backward(const RouteGradient& gradient, cudaStream_t stream) {
  with_storage(gradient.storage, [&]<typename Storage>() {
    using Acc = Accumulation<Storage>;
    const GradientProblem<Storage> problem = {
        static_cast<const Acc*>(gradient.grad_weights),
        static_cast<const Storage*>(gradient.logits),
        gradient.row_stride,
        gradient.num_tokens,
        gradient.num_experts,
        gradient.top_k,
        {gradient.experts, gradient.experts_are_64_bit},
        gradient.given,
        gradient.allowed,
        gradient.allowed_stride,
        gradient.scores,
        gradient.normalize,
        static_cast<Acc>(gradient.scale),
        static_cast<Storage*>(gradient.grad_logits)};
    const auto blocks = static_cast<unsigned>(divide_up(gradient.num_tokens, kMostWarps));
    if (gradient.allowed != nullptr || gradient.given) {
      EDL_LAUNCH((spread_rows<Storage, true>), blocks, kMostWarps * kWarp, 0, stream, problem);
    } else {
      EDL_LAUNCH((spread_rows<Storage, false>), blocks, kMostWarps * kWarp, 0, stream, problem);
    }
  });
}

} // namespace edl::cuda
