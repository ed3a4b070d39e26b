"""TorchScript: model and loss in one file that a C++ program trains and runs without Python (see libtorch/main.cpp)."""

import argparse

import torch
from small_model import NUM_DOMAINS, SmallModel, make_batch, next_token_loss
from torch import Tensor, nn

import edl


class Trainable(nn.Module):
    """forward is the objective, predict the model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = SmallModel()
        self.divergence = edl.ExpertDivergenceLoss(NUM_DOMAINS)

    def forward(self, tokens: Tensor, domain_ids: Tensor) -> Tensor:
        """The loss of tokens [B, S] of the domains [B]."""
        logits, router_logits = self.model(tokens)
        return next_token_loss(logits, tokens) + 1e-2 * self.divergence(router_logits, domain_ids)

    @torch.jit.export
    def predict(self, tokens: Tensor) -> Tensor:
        """The most likely successors [B, S] of tokens [B, S]."""
        return self.model(tokens)[0].argmax(-1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="small_model.pt", help="file of the scripted model")
    path = parser.parse_args().output

    torch.manual_seed(0)
    trainable = Trainable()
    torch.jit.script(trainable).save(path)
    loaded = torch.jit.load(path)
    batch = make_batch(12, 64, seed=0)
    assert torch.equal(loaded(*batch), trainable(*batch))
    print(f"saved {path}: loss {loaded(*batch).item():.4f}, as in eager")
