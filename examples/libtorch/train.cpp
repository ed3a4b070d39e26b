// Trains a router in C++ alone, through edl.h: the Expert Divergence loss of logits, its gradient,
// and plain gradient steps; then one pass through the experts with the trained router.
#include <edl/edl.h>
#include <torch/types.h>

#include <iostream>

namespace {

constexpr int64_t kSequences = 12; // S
constexpr int64_t kLength = 64;
constexpr int64_t kExperts = 8; // E
constexpr int64_t kHidden = 32; // H
constexpr int64_t kInner = 16; // I
constexpr int64_t kDomains = 3; // D

// The loss of logits [T, E] whose sequences have the labels [S].
torch::Tensor divergence_loss(const torch::Tensor& logits, const torch::Tensor& labels) {
  const torch::Tensor segment_ids = edl::sequence_segment_ids(labels, kSequences * kLength);
  return edl::expert_divergence_loss({logits}, segment_ids, kSequences, labels, kDomains);
}

} // namespace

int main() {
  torch::manual_seed(0);
  const torch::Tensor labels = torch::arange(kSequences) % kDomains;
  const torch::Tensor centres = torch::randn({kDomains, kHidden}); // what tokens of a domain have in common
  const torch::Tensor tokens =
      torch::randn({kSequences * kLength, kHidden}) + 0.5 * centres.index({labels.repeat_interleave(kLength)});
  const torch::Tensor router = (0.1 * torch::randn({kExperts, kHidden})).requires_grad_(true);

  for (int step = 0; step <= 40; ++step) {
    const torch::Tensor loss = divergence_loss(tokens.mm(router.t()), labels);
    loss.backward();
    torch::NoGradGuard no_grad;
    router.sub_(router.grad(), /*alpha=*/0.1);
    router.mutable_grad().zero_();
    if (step % 10 == 0) {
      std::cout << "step " << step << ": loss " << loss.item<double>() << "\n";
    }
  }

  torch::NoGradGuard no_grad;
  const auto [weights, experts] = edl::route_tokens(tokens.mm(router.t()), /*top_k=*/2, "softmax", {}, true, 1.0);
  const auto [row_order, offsets] = edl::sort_by_expert(experts, kExperts);
  const torch::Tensor gate_up = 0.1 * torch::randn({kExperts, 2 * kInner, kHidden});
  const torch::Tensor down = 0.1 * torch::randn({kExperts, kHidden, kInner});
  const torch::Tensor output = edl::expert_mlp(tokens, weights, row_order, offsets, gate_up, down);
  std::cout << "experts gave " << output.size(0) << " x " << output.size(1) << "\n";
}
