"""Own kernels against at::mm and brgemm on the CPU: expert_mlp beside the bare products of its definition.

    python benchmarks/expert_mlp.py [--threads 2] [--repeats 15] [--save benchmarks/results/NAME.md]

`at::mm` multiplies rows that stand ready, expert by expert: no gather, no SwiGLU, no sum over a token's experts, no
gradient of the routing weights. `brgemm`, torch's block product, which runs on one thread, multiplies the forward pass
of the same rows, with parameters transposed beforehand, experts in parallel. What they take is a bound on every
implementation that rests on them. Figures are GFLOP/s of 6 (forward) and 18 (forward and backward) T·K·H·I operations,
from the fastest of interleaved runs.
"""

import argparse
import time

import torch
from report import markdown_table, save
from torch import Tensor
from torch.utils.cpp_extension import load_inline

from edl import ops

BRGEMM = """
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <torch/extension.h>

template <typename Storage>
void multiply(const at::Tensor& a, const at::Tensor& b) {
  const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
  const at::Tensor c = at::empty({m, n});
  at::native::cpublas::brgemm(
      m, n, k, k, n, n, false, a.const_data_ptr<Storage>(), b.const_data_ptr<Storage>(), c.mutable_data_ptr<float>(),
      false);
}

void multiply_all(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  at::parallel_for(0, a.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      a[i].scalar_type() == at::kFloat ? multiply<float>(a[i], b[i]) : multiply<at::BFloat16>(a[i], b[i]);
    }
    at::native::cpublas::brgemm_release();
  });
}
"""
SHAPES = [(512, 512, 256, 64, 2), (1024, 512, 256, 64, 2), (512, 512, 256, 16, 2), (1024, 512, 256, 16, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SLOW_AT_MM = 2e9  # operations beyond which 16-bit products of at::mm, which may run at a few GFLOP/s, are left out


def fastest(functions: dict, repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each function, called in turn."""
    times = {name: float("inf") for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def products(rows: list[Tensor], gate_up: Tensor, down: Tensor, backward: bool) -> None:
    """The matrix products of every expert on ready rows [n, H]."""
    for e, x in enumerate(rows):
        pre_activation = torch.mm(x, gate_up[e].t())
        activation = pre_activation[:, : down.shape[2]]
        y = torch.mm(activation, down[e].t())
        if backward:
            torch.mm(y, down[e])
            torch.mm(y.t(), activation)
            torch.mm(pre_activation.t(), x)
            torch.mm(pre_activation, gate_up[e])


def measure(shape: tuple[int, ...], dtype: torch.dtype, repeats: int, brgemm) -> list[str]:
    num_tokens, hidden, intermediate, num_experts, top_k = shape

    def normal(*size: int) -> Tensor:
        return (torch.randn(size) * size[-1] ** -0.5).to(dtype).requires_grad_()

    tokens, gate_up = normal(num_tokens, hidden), normal(num_experts, 2 * intermediate, hidden)
    down = normal(num_experts, hidden, intermediate)
    weights = torch.rand(num_tokens, top_k).to(dtype).requires_grad_()
    row_order, offsets = ops.sort_by_expert(torch.rand(num_tokens, num_experts).topk(top_k).indices, num_experts)
    leaves, upstream = [tokens, weights, gate_up, down], torch.randn(num_tokens, hidden).to(dtype)
    arguments = (tokens, weights, row_order, offsets, gate_up, down)
    sorted_rows = ops.dispatch_tokens(tokens.detach(), row_order, top_k)
    rows = list(sorted_rows.split(offsets.diff().tolist()))
    parameters = gate_up.detach(), down.detach()

    def forward() -> None:
        with torch.no_grad():
            ops.expert_mlp(*arguments)

    operations = 6 * num_tokens * top_k * hidden * intermediate
    functions = {
        "own forward": forward,
        "own": lambda: torch.autograd.grad(ops.expert_mlp(*arguments), leaves, upstream),
    }
    if dtype.itemsize > 2 or operations < SLOW_AT_MM:
        functions["mm forward"] = lambda: products(rows, *parameters, backward=False)
        functions["mm"] = lambda: products(rows, *parameters, backward=True)
    if dtype != torch.float64:
        activations = [x.new_ones(x.shape[0], intermediate) for x in rows]
        transposed = [list(parameter.transpose(1, 2).contiguous()) for parameter in parameters]

        def by_brgemm() -> None:
            brgemm.multiply_all(rows, transposed[0])
            brgemm.multiply_all(activations, transposed[1])

        functions["brgemm forward"] = by_brgemm
    times = fastest(functions, repeats)

    def rate(name: str) -> str:
        return f"{operations * (1 if 'forward' in name else 3) / times[name] * 1e-9:.0f}" if name in times else "-"

    name = ",".join(map(str, shape))
    average = num_tokens * top_k // num_experts
    return [
        name,
        str(average),
        str(dtype).removeprefix("torch."),
        *map(rate, ("own forward", "mm forward", "brgemm forward", "own", "mm")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--save", help="also write the report to this file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    header = [
        "T,H,I,E,K",
        "rows per expert",
        "type",
        "expert_mlp forward",
        "at::mm forward",
        "brgemm forward",
        "expert_mlp with backward",
        "at::mm with backward",
    ]
    brgemm = load_inline("edl_brgemm", BRGEMM, functions=["multiply_all"], extra_cflags=["-O2"])
    rows = [measure(shape, dtype, arguments.repeats, brgemm) for dtype in DTYPES for shape in SHAPES]
    table = markdown_table(header, rows)
    save("expert_mlp against at::mm and brgemm, GFLOP/s", torch.device("cpu"), [table], arguments.save)


if __name__ == "__main__":
    main()
