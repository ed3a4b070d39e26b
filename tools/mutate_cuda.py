"""Breaks the CUDA kernels one line at a time: `python tools/mutate_cuda.py [WORD ...]`; each must fail its emulation.

Every barrier is removed in turn, and every kernel gets a wrong index and loses a check of its bounds. The programs of
tests/cuda_emulation are built from a copy of csrc; the one that checks all accesses goes first, the sanitizers get what
it lets pass. WORDs choose mutations by how their line of the table begins. Needs cmake, ninja, g++ and the headers of
CUDA; takes a quarter of an hour.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import cuda_toolkit

ROOT = Path(__file__).resolve().parent.parent
KERNELS = Path("cuda/kernels")


class Mutation(NamedTuple):
    file: str
    kernel: str
    what: str
    old: str  # the first after `kernel(`, or on the line
    new: str


WRITTEN = [
    # aggregate_routing
    Mutation("segment_chunks.cuh", "sort_chunk", "index", "chunk->keys[j] == key && j < i", "chunk->keys[j] == key && j <= i"),
    Mutation("segment_chunks.cuh", "sort_chunk", "off by one", "i + kLongGroup <= valid", "i + kLongGroup < valid"),
    Mutation("segment_chunks.cuh", "sort_chunk", "bound", "if (i < rows) {\n    const int64_t id", "if (true) {\n    const int64_t id"),
    Mutation("segment_chunks.cuh", "write_index", "bound", "const bool counted = i < valid;", "const bool counted = i <= valid;"),
    Mutation("segment_chunks.cuh", "of_layer", "index", "problem->scratch.partial += layer * chunks", "problem->scratch.partial += layer"),
    Mutation("segment_chunks.cuh", "of_layer", "index", "problem->sums += layer * problem->num_segments", "problem->sums += layer"),
    Mutation("aggregate_routing.cu", "sum_chunks", "index", "chunk_index * slots + slot", "chunk_index * slots + slot + 1"),
    Mutation("aggregate_routing.cu", "add_rows", "bound", "rows[r] = at < end ?", "rows[r] = at <= end ?"),
    Mutation("aggregate_routing.cu", "add_teams", "bound", " && first_column + c < num_experts;", ";"),
    Mutation("segment_chunks.cuh", "end_of_group", "off by one", "high = middle;", "high = middle - 1;"),
    Mutation("segment_chunks.cuh", "end_of_group", "bound", "int high = valid - 1;", "int high = valid - 2;"),
    Mutation("segment_chunks.cuh", "find_group", "index", "lower_bound(sorted, header.valid, segment + 1)", "lower_bound(sorted, header.valid, segment + 2)"),
    Mutation("segment_chunks.cuh", "list_groups", "index", "(before & 0xffff) + i]", "(before & 0xffff)]"),
    Mutation("aggregate_routing.cu", "add_up_segments", "bound", "if (chunk_index < end) {", "if (chunk_index <= end) {"),
    Mutation("aggregate_routing.cu", "add_up_segments", "bound", "threadIdx.x == 0 && blockIdx.y == 0", "threadIdx.x == 0"),
    Mutation("aggregate_routing_backward.cu", "spread_rows", "bound", "const bool inside = t < problem.num_tokens;", "const bool inside = t <= problem.num_tokens;"),
    Mutation("aggregate_routing_backward.cu", "spread_rows", "index", "first_row + r * team.teams + team.index", "first_row + r + team.index"),
    Mutation("score_rows.cuh", "load_tile", "bound", "if (column < num_experts) {", "if (column <= num_experts) {"),
    Mutation("score_rows.cuh", "statistics_of_row", "off by one", "for (int64_t e = lane; e < num_experts; e += kWarp) {\n    sum", "for (int64_t e = lane + 1; e < num_experts; e += kWarp) {\n    sum"),
    # domain_moments
    Mutation("domain_moments.cu", "sum_domains", "index", "list.segment[at] = threadIdx.x;", "list.segment[at] = at;"),
    Mutation("domain_moments.cu", "sum_domains", "bound", "if (s < segments.num_segments) {", "if (s <= segments.num_segments) {"),
    Mutation("domain_moments.cu", "sum_domains", "bound", "if (warp == 0 && e < segments.num_experts) {", "if (warp == 0) {"),
    Mutation("domain_moments.cu", "spread_to_segments", "index", "(layer_row + d) * segments.num_experts + e", "(layer_row + d) * segments.num_experts"),
    Mutation("domain_moments.cu", "spread_to_segments", "bound", "e < segments.num_experts; e += blockDim.x", "e <= segments.num_experts; e += blockDim.x"),
    Mutation("warps.cuh", "block_exclusive_sum", "off by one", "inclusive += lane >= step ? before : 0;", "inclusive += lane > step ? before : 0;"),
    Mutation("warps.cuh", "block_sum", "index", "scratch[threadIdx.x / kWarp] = x;", "scratch[0] = x;"),
    # expert_divergence
    Mutation("expert_divergence.cu", "pair_divergences", "index", "(layer_row + k) * num_domains + j", "(layer_row + k) * num_domains + k"),
    Mutation("expert_divergence.cu", "pair_divergences", "bound", "if (k < j || k >= num_domains) {", "if (k < j) {"),
    Mutation("expert_divergence.cu", "list_present", "bound", "d < moments.num_domains && takes_part", "takes_part"),
    Mutation("expert_divergence.cu", "write_loss", "index", "loss.divergences + layer * num_domains * num_domains", "loss.divergences + layer * num_domains"),
    Mutation("expert_divergence.cu", "list_present", "index", "before += total;", "before = total;"),
    Mutation("expert_divergence.cu", "write_loss", "bound", "if (j < k) {", "if (j <= k) {"),
    Mutation("expert_divergence.cu", "divergence_gradients", "off by one", "for (int w = 1; w < kWarps; ++w) {", "for (int w = 1; w < kWarps - 1; ++w) {"),
    Mutation("expert_divergence.cu", "divergence_gradients", "bound", "if (warp > 0 || !inside) {", "if (warp > 0) {"),
    # expert_mlp
    Mutation("expert_mlp.cu", "are_wrong", "bound", "offsets[e] > (e > 0 ? num_rows : 0)", "false"),
    Mutation("expert_mlp.cu", "are_wrong", "off by one", "e <= num_experts; e += kThreads", "e < num_experts; e += kThreads"),
    Mutation("expert_mlp.cu", "check_rows", "bound", "i < first + kSlotsPerBlock && i < task.num_rows", "i < first + kSlotsPerBlock"),
    Mutation("expert_mlp.cu", "check_rows", "bound", "task.offsets[e] < highest ? task.offsets[e] : highest", "task.offsets[e]"),
    Mutation("expert_mlp.cu", "swiglu", "bound", "if (i >= num_rows) {", "if (i > num_rows) {"),
    Mutation("expert_mlp.cu", "swiglu", "index", "load_pack<width>(gate + columns + c)", "load_pack<width>(gate + c)"),
    Mutation("expert_mlp.cu", "swiglu", "bound", "if (i >= *num_used) {", "if (i > *num_used) {"),
    Mutation("expert_mlp.cu", "swiglu_backward", "bound", "slot >= 0 && slot < task.num_rows", "slot >= 0"),
    Mutation("expert_mlp.cu", "swiglu_backward", "index", "store_pack<width>(du, grad_gate + columns + c)", "store_pack<width>(du, grad_gate + columns)"),
    Mutation("expert_mlp.cu", "zero_unused", "index", "offsets[expert] != offsets[expert + 1]", "offsets[expert] == offsets[expert + 1]"),
    Mutation("expert_mlp.cu", "zero_unused", "bound", "i < packs_per_matrix; i += stride", "i <= packs_per_matrix; i += stride"),
    # rows
    Mutation("rows.cu", "invert", "bound", "if (i >= num_rows) {", "if (i > num_rows) {"),
    Mutation("rows.cu", "invert", "bound", "if (slot >= 0 && slot < num_rows) {", "if (slot >= 0) {"),
    Mutation("rows.cu", "invert", "index", "i < *num_used ?", "slot < *num_used ?"),
    Mutation("rows.cu", "gather", "bound", "slot >= 0 && slot < task.num_rows", "slot >= 0"),
    Mutation("rows.cu", "gather", "index", "slot / task.top_k * task.tokens_stride", "slot / task.top_k * task.width"),
    Mutation("rows.cu", "gather", "bound", "if (i >= task.num_rows) {", "if (i > task.num_rows) {"),
    Mutation("rows.cu", "combine", "bound", "if (first + k < task.top_k) {", "if (first + k <= task.top_k) {"),
    Mutation("rows.cu", "combine", "bound", "if (row >= 0 && weight != 0) {", "if (row >= 0) {"),
    Mutation("rows.cu", "combine", "index", "t * task.top_k + first + k;", "t * task.top_k + first;"),
    Mutation("rows.cu", "combine_backward", "bound", "slot >= 0 && slot < task.num_rows", "slot >= 0"),
    Mutation("rows.cu", "combine_backward", "index", "task.rows + i * task.rows_stride", "task.rows + i * task.width"),
    Mutation("rows.cu", "combine_backward", "bound", "known && lane == 0", "lane == 0"),
    # route_tokens
    Mutation("route_tokens.cu", "first_highest", "off by one", "if (keys[e] > best) {", "if (keys[e] >= best) {"),
    Mutation("route_tokens.cu", "fill_keys", "bound", "e < problem.num_experts; e += kWarp", "e <= problem.num_experts; e += kWarp"),
    Mutation("route_tokens.cu", "route_rows", "bound", "if (t >= problem.num_tokens) {", "if (t > problem.num_tokens) {"),
    Mutation("route_tokens.cu", "route_rows", "index", "shared_keys + static_cast<int64_t>(warp) * problem.num_experts", "shared_keys"),
    Mutation("route_tokens.cu", "spread_over_row", "index", "grad[k] * problem.scale - dot", "grad[0] * problem.scale - dot"),
    Mutation("route_tokens.cu", "spread_over_chosen", "bound", "e < problem.num_experts; e += kWarp", "e <= problem.num_experts; e += kWarp"),
    Mutation("route_tokens.cu", "spread_rows", "bound", "if (t >= problem.num_tokens) {", "if (t > problem.num_tokens) {"),
    Mutation("route_tokens.cu", "expert", "bound", "id >= 0 && id < num_experts ? id", "id >= 0 && id <= num_experts ? id"),
    Mutation("route_tokens.cu", "token_of", "index", "problem.allowed + t * problem.allowed_stride", "problem.allowed + t"),
    Mutation("route_tokens.cu", "ids_from", "index", "sizeof(int64_t) : sizeof(int32_t)", "sizeof(int64_t) : sizeof(int64_t)"),
    Mutation("route_tokens.cu", "is_refused", "bound", "before < k; ++before", "before + 1 < k; ++before"),
    Mutation("route_tokens.cu", "is_refused", "index", "token.forbids(e)", "token.forbids(k)"),
    Mutation("route_tokens.cu", "is_undefined", "index", "const Acc z = token[e];", "const Acc z = token[lane];"),
    Mutation("route_tokens.cu", "fill_row", "bound", "e < num_experts; e += kWarp", "e <= num_experts; e += kWarp"),
    # sort_by_expert
    Mutation("sort_by_expert.cu", "id_of", "bound", "id >= 0 && id <= problem.num_experts", "id <= problem.num_experts"),
    Mutation("sort_by_expert.cu", "count_chunks", "bound", "slot < first + kChunk && slot < problem.num_slots", "slot < first + kChunk"),
    Mutation("sort_by_expert.cu", "count_chunks", "index", "static_cast<int64_t>(id) * problem.num_chunks + blockIdx.x", "static_cast<int64_t>(id) * problem.num_chunks"),
    Mutation("sort_by_expert.cu", "count_chunks", "atomic", "atomicAdd(&counts[id_of(problem, static_cast<int>(slot))], 1)", "counts[id_of(problem, static_cast<int>(slot))] += 1"),
    Mutation("sort_by_expert.cu", "scan_counts", "bound", "if (chunk < problem.num_chunks) {", "if (chunk <= problem.num_chunks) {"),
    Mutation("sort_by_expert.cu", "scan_counts", "index", "before += total;", "before = total;"),
    Mutation("sort_by_expert.cu", "fill_places", "index", "const int offset = before + inclusive - total;", "const int offset = before + inclusive;"),
    Mutation("sort_by_expert.cu", "place_round", "index", "places[id] = place + __popc(equal);", "places[id] = place + 1;"),
    Mutation("sort_by_expert.cu", "place_slots", "bound", "ids[r] = slot < problem.num_slots ?", "ids[r] = slot <= problem.num_slots ?"),
    # token_gram
    Mutation("token_gram.cu", "row_of", "bound", "weights == nullptr || weights[slot] != 0 ?", "true ?"),
    Mutation("token_gram.cu", "multiply_rows", "bound", "others[i] = first + i < top_k ?", "others[i] = first + i <= top_k ?"),
    Mutation("token_gram.cu", "multiply_rows", "index", "gram[k * top_k + j] = sum;", "gram[k * top_k] = sum;"),
    Mutation("token_gram.cu", "multiply_rows", "unknown", "sum = is_unknown ? kNan<Acc> : sum;", ""),
    Mutation("token_gram.cu", "token_gram", "bound", "if (t >= tokens.num_tokens) {", "if (t > tokens.num_tokens) {"),
    Mutation("token_gram.cu", "token_gram_backward", "bound", "if (i >= num_rows) {", "if (i > num_rows) {"),
    Mutation("token_gram.cu", "token_gram_backward", "index", "of_gram[j * tokens.top_k + k];", "of_gram[k * tokens.top_k + j];"),
    Mutation("token_gram.cu", "token_gram_backward", "weight", "weight == 0 ? Acc(0) : sums[v]", "sums[v]"),
]  # fmt: skip


# Barriers that nothing needs: the code before each, and why.
REDUNDANT = {
    "x = team_sum(x, kWarp);\n": "no kernel calls block_sum twice",
    "first_column, team, wide, total);\n": "the next list is written after __syncthreads_or",
    "square += list.weight[i] * (x * x);\n    }\n": "the next list is written after the barriers of block_exclusive_sum",
}


def why_redundant(mutation: Mutation, text: str) -> str:
    """The reason why no test can notice that this barrier is missing; empty for all others."""
    if not mutation.kernel.startswith("line "):
        return ""
    before = "".join(text.splitlines(keepends=True)[: int(mutation.kernel.removeprefix("line ")) - 1])
    return next((reason for code, reason in REDUNDANT.items() if before.endswith(code)), "")


def barriers() -> list[Mutation]:
    """One mutation for every barrier that returns nothing."""
    found = []
    for path in sorted((ROOT / "csrc" / KERNELS).glob("*.cu*")):
        for number, line in enumerate(path.read_text().split("\n"), start=1):
            if match := re.match(r"\s*(__sync\w+)\(\);", line):
                found.append(Mutation(path.name, f"line {number}", f"no {match[1]}", f"{match[1]}()", ""))
    return found


def apply(mutation: Mutation, text: str) -> str:
    """The text with the first `old` after the kernel's name, or at its line, replaced."""
    if mutation.kernel.startswith("line "):
        lines = text.split("\n")[: int(mutation.kernel.removeprefix("line ")) - 1]
        begin = sum(len(line) + 1 for line in lines)
    else:
        begin = re.search(rf"\b{re.escape(mutation.kernel)}\(", text).start()
    at = text.index(mutation.old, begin)
    return text[:at] + mutation.new + text[at + len(mutation.old) :]


def what_failed(output: str) -> str:
    """The reason in the output of a program that failed, which breaks its lines anywhere."""
    output = " ".join(output.split())
    signs = {
        "a race": "race",
        "not written": "uninitialised",
        "wait": "divergence",
        "AddressSanitizer": "address",
        "runtime error": "undefined behaviour",
        "an input is written": "input written",
        "same_bits_as_in_forward_order": "order of threads",
        "SIG": "crash",
    }
    return next(
        (name for sign, name in signs.items() if sign in output), "wrong values" if "FAILED" in output else "crash"
    )


def caught_by(build: Path, cases: str) -> str:
    """Which program fails one of the cases, and by what; empty where none does."""
    for program in ["edl_cuda_races", "edl_cuda_sanitized"]:
        built = subprocess.run(["cmake", "--build", build, "--target", program], capture_output=True, text=True)
        if built.returncode != 0:
            return f"does not compile: {built.stdout[-300:]}"
        try:
            result = subprocess.run([build / program, "-a", cases], capture_output=True, text=True, timeout=300)
        except subprocess.TimeoutExpired:
            return f"{program.removeprefix('edl_cuda_')}: does not end"
        if result.returncode != 0:
            return f"{program.removeprefix('edl_cuda_')}: {what_failed(result.stdout + result.stderr)}"
    return ""


def cases_of(file: str) -> str:
    """The cases of the tests of one file, all for a header, as Catch2 wants them."""
    if file.endswith(".cuh"):
        return "~[.]"
    text = (ROOT / "tests" / "cuda_emulation" / f"test_{Path(file).stem}.cpp").read_text()
    names = re.findall(r'CATCH_TEST_CASE\(\s*"([^"]+)"\)', text)
    return ",".join(re.sub(r"([\\,\[\]])", r"\\\1", name) for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="mutations whose line begins so; default: all")
    words = parser.parse_args().words
    mutations = [
        m for m in WRITTEN + barriers() if not words or any(" ".join(m[:3]).startswith(word) for word in words)
    ]
    if not mutations:
        parser.error(f"a WORD must begin a line of the table (got {' '.join(words)})")
    mutations.sort(key=lambda mutation: mutation.file)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        csrc, build = Path(folder, "csrc"), Path(folder, "build")
        shutil.copytree(ROOT / "csrc", csrc)
        configure = ["cmake", "-G", "Ninja", "-S", ROOT / "tests" / "cuda_emulation", "-B", build, f"-Dcsrc={csrc}"]
        configure += [f"-DCUDA_INCLUDE={cuda_toolkit.find().include}"]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        if reason := caught_by(build, ",".join(dict.fromkeys(cases_of(mutation.file) for mutation in mutations))):
            print(f"the kernels fail before anything is broken: {reason}")
            return 1
        for mutation in mutations:
            path = csrc / KERNELS / mutation.file
            original = path.read_text()
            path.write_text(apply(mutation, original))
            caught = caught_by(build, cases_of(mutation.file))
            path.write_text(original)
            redundant = why_redundant(mutation, original)
            if redundant and not caught:
                caught = f"redundant: {redundant}"
            missed += not caught
            print(f"| {mutation.file} {mutation.kernel} | {mutation.what} | {caught or 'NOT CAUGHT'} |", flush=True)
    print(f"\n{len(mutations) - missed} of {len(mutations)} mutations caught or redundant")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
