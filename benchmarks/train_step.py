"""A training step of a small Mixture-of-Experts language model: edl beside transformers' block, and the loss's share.

    python benchmarks/train_step.py [--device cuda] [--threads N] [--quick] [--save FILE]

A step is the forward pass, the backward pass and fused AdamW. The models share the parameters. bfloat16 is autocast.
memory.py says what *kept* and *fresh* memory are.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from measure import Timing, error, interleaved
from report import Run, Section, main, table_of
from router import TransformersBlock
from shapes import Shape
from torch import Tensor, nn
from watch import Watch

import edl

LAYER = Shape(2048, 256, 128, 32, 4)
LAYERS, HEADS, VOCABULARY = 4, 4, 1024
SEQUENCES, DOMAINS = 16, 4
FACTOR = 1e-2  # of the divergence loss


class EdlBlock(nn.Module):
    """edl's layer, with the logits alone beside its output."""

    def __init__(self, layer: edl.MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        output, routing = self.layer(hidden)
        return output, routing.logits


class Model(nn.Module):
    """Decoder layers of causal attention and experts between an embedding and a head."""

    def __init__(self, experts: list[nn.Module], hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2 * len(experts)))
        self.queries_keys_values = nn.ModuleList(nn.Linear(hidden, 3 * hidden, bias=False) for _ in experts)
        self.outputs = nn.ModuleList(nn.Linear(hidden, hidden, bias=False) for _ in experts)
        self.experts = nn.ModuleList(experts)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Tokens [B, S_len] to logits [B, S_len, V], and each layer's router logits [B·S_len, E]."""
        hidden = self.embedding(tokens)
        router_logits = []
        for i, experts in enumerate(self.experts):
            projected = self.queries_keys_values[i](self.norms[2 * i](hidden))
            query, key, value = projected.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            hidden = hidden + self.outputs[i](mixed.transpose(1, 2).flatten(2))
            update, logits = experts(self.norms[2 * i + 1](hidden).flatten(0, 1))
            hidden = hidden + update.view_as(hidden)
            router_logits.append(logits)
        return self.head(hidden), router_logits


def make_models(device: torch.device) -> tuple[Model, Model]:
    """The same model twice: with edl's layers, and with transformers' blocks on the same parameters."""
    _, *sizes = LAYER
    layers = [edl.MoELayer(*sizes, device=device) for _ in range(LAYERS)]
    ours = Model([EdlBlock(layer) for layer in layers], LAYER.hidden).to(device)
    theirs = Model([TransformersBlock(layer) for layer in layers], LAYER.hidden).to(device)
    for name, module in ours.named_children():
        if name != "experts":
            setattr(theirs, name, module)
    return ours, theirs


def make_batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Random tokens [B, S_len] and the domain [B] of each sequence."""
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LAYER.tokens // SEQUENCES), device=device)
    return tokens, torch.arange(SEQUENCES, device=device) % DOMAINS


def check(ours: Model, theirs: Model, tokens: Tensor) -> None:
    """Both models give the logits of edl's model in float64."""
    with torch.no_grad():
        logits, others = ours(tokens)[0], theirs(tokens)[0]
        expected = ours.double()(tokens)[0]
        ours.float()
    for name, result in {"edl": logits, "transformers": others}.items():
        distance = error((result,), (expected,))
        if not distance < 1e-4:
            raise ArithmeticError(f"model with {name}: wrong by {distance:.1e} of the float64 result")


def training_step(model: Model, dtype: torch.dtype, with_loss: bool, device: torch.device) -> Callable[[], None]:
    tokens, domain_ids = make_batch(device)
    divergence = edl.ExpertDivergenceLoss(num_domains=DOMAINS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits, router_logits = model(tokens)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
        if with_loss:
            loss = loss + FACTOR * divergence(router_logits, domain_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_alone(device: torch.device) -> Callable[[], object]:
    """The divergence loss of all layers, forward and backward, on logits of the model's size."""
    _, domain_ids = make_batch(device)
    divergence = edl.ExpertDivergenceLoss(num_domains=DOMAINS)
    logits = [torch.randn(LAYER.tokens, LAYER.experts, device=device).requires_grad_() for _ in range(LAYERS)]
    return lambda: torch.autograd.grad(divergence(logits, domain_ids), logits)


def measure(watch: Watch, dtype: torch.dtype, seconds: float) -> dict[str, Timing]:
    """The steps of one type."""
    device = watch.device
    ours, theirs = make_models(device)
    steps = {
        "edl": training_step(ours, dtype, False, device),
        "edl, loss": training_step(ours, dtype, True, device),
        "transformers": training_step(theirs, dtype, False, device),
        "loss alone": loss_alone(device),
    }
    for step in steps.values():
        step()
    return interleaved(steps, watch, 2 * seconds)


def row(dtype: torch.dtype, memory: str, times: dict[str, Timing]) -> dict[str, str]:
    plain, loss, theirs = times["edl"], times["loss alone"], times["transformers"]
    return {
        "type": str(dtype).removeprefix("torch."),
        "memory": memory,
        "edl ms": str(plain),
        "with the loss ms": str(times["edl, loss"]),
        "difference": f"{times['edl, loss'].median / plain.median - 1:+.1%}",
        "loss alone ms, share": f"{loss} {loss.median / plain.median:.2%}",
        "transformers grouped_mm ms": f"{theirs} {theirs.median / plain.median:.2f}x",
    }


def sections(run: Run) -> Iterator[Section]:
    """float32, and bfloat16 under autocast."""
    check(*make_models(run.device), make_batch(run.device)[0])
    rows = [
        row(dtype, memory, times)
        for dtype in (torch.float32, torch.bfloat16)
        for memory, times in run.in_both_regimes(measure, dtype, run.seconds).items()
    ]
    title = f"Training step of {LAYERS} layers of {LAYER}, {SEQUENCES} sequences, {DOMAINS} domains"
    yield Section(title, table_of(rows), summary=True)


if __name__ == "__main__":
    main(__doc__, sections)
