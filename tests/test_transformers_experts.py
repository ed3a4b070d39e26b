"""experts_implementation="edl": the same outputs and gradients as transformers' own experts, on every model that it can
run."""

import copy
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from commands import run
from tolerances import assert_close, tolerance
from torch import nn

import edl

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    grouped_mm_experts_forward,
    use_experts_implementation,
)
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers_models import CONFIGS, VOCABULARY, make_model

from edl.integrations.transformers import register
from edl.integrations.transformers.experts import _warned, experts_forward

PLAIN = [name for name in CONFIGS if name not in ("gpt_oss", "llama4")]  # llama4 has experts outside the registry


@pytest.fixture(autouse=True)
def registered():
    register()
    _warned.clear()


def calls_of_edl(monkeypatch):
    """Counts the calls of the operator that only edl's experts make."""
    calls = []
    expert_mlp = edl.ops.expert_mlp
    monkeypatch.setattr(edl.ops, "expert_mlp", lambda *args: calls.append(None) or expert_mlp(*args))
    return calls


def outputs_and_gradients(model, tokens, implementation):
    model.set_experts_implementation(implementation)
    torch.manual_seed(1)  # Phi-MoE draws while it trains
    output = model(input_ids=tokens).logits
    parameters = [p for p in model.parameters() if p.requires_grad]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(output)
    return [output.detach(), *torch.autograd.grad(output, parameters, grad)]


@pytest.mark.parametrize("family", PLAIN)
def test_models_of_plain_experts_run_on_edl_with_equal_outputs_and_gradients(family, monkeypatch):
    model = make_model(family, torch.float64)
    tokens = torch.randint(0, VOCABULARY, (4, 9))
    wanted = outputs_and_gradients(model, tokens, "eager")
    calls = calls_of_edl(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "edl::")
        results = outputs_and_gradients(model, tokens, "edl")
    assert len(calls) == sum(hasattr(module, "gate_up_proj") for module in model.modules())
    for actual, expected in zip(results, wanted, strict=True):
        assert_close(actual, expected, tolerance(torch.float64, 32 * 24, roundings=8))


def test_gpt_oss_runs_on_grouped_mm_with_one_warning(monkeypatch):
    model = make_model("gpt_oss")
    tokens = torch.randint(0, VOCABULARY, (4, 9))
    wanted = outputs_and_gradients(model, tokens, "grouped_mm")
    calls = calls_of_edl(monkeypatch)
    with pytest.warns(UserWarning) as caught:
        results = outputs_and_gradients(model, tokens, "edl")
        outputs_and_gradients(model, tokens, "edl")
    assert not calls and all(actual.equal(expected) for actual, expected in zip(results, wanted, strict=True))
    assert [str(w.message) for w in caught if "edl::" in str(w.message)] == [
        (
            "edl::register: GptOssExperts runs on transformers' grouped_mm, edl has plain SwiGLU experts only "
            "(got biases and transposed weights and interleaved gate and up weights and a gate of their own)"
        )
    ]


def make_experts(dtype=torch.float32, num_experts=6, hidden=32, inner=24):
    config = SimpleNamespace(
        num_local_experts=num_experts,
        hidden_size=hidden,
        intermediate_size=inner,
        hidden_act="silu",
        _experts_implementation="edl",
    )
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return experts.to(dtype)


class OtherGate(MixtralExperts):
    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return (gate * torch.sigmoid(1.702 * gate)) * (up + 1)


class WithoutGate(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts, self.act_fn = config.num_local_experts, nn.SiLU()
        self.up_proj = nn.Parameter(torch.randn(6, 24, 32))
        self.down_proj = nn.Parameter(torch.randn(6, 32, 24))


class WithNorm(MixtralExperts):
    def __init__(self, config):
        super().__init__(config)
        self.post_expert_norm = nn.LayerNorm(32)


CONFIG = SimpleNamespace(
    num_local_experts=6, hidden_size=32, intermediate_size=24, hidden_act="silu", _experts_implementation="edl"
)
OTHERS = {
    "no gate": lambda: use_experts_implementation(WithoutGate, has_gate=False)(CONFIG),
    "a norm behind each expert": lambda: use_experts_implementation(WithNorm, has_post_expert_norm=True)(CONFIG),
    "a gate of their own": lambda: OtherGate(CONFIG),
    "the activation GELUActivation": lambda: MixtralExperts(SimpleNamespace(**{**vars(CONFIG), "hidden_act": "gelu"})),
}


@pytest.mark.parametrize("obstacle", OTHERS)
def test_experts_that_edl_does_not_compute_run_on_grouped_mm(obstacle):
    experts = OTHERS[obstacle]()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    hidden, weights = torch.randn(10, 32), torch.rand(10, 2)
    index = torch.randint(0, 6, (10, 2))
    with pytest.warns(UserWarning) as caught:
        output = experts(hidden, index, weights)
    assert len(caught) == 1 and str(caught[0].message).endswith(f"edl has plain SwiGLU experts only (got {obstacle})")
    assert output.equal(grouped_mm_experts_forward(experts, hidden, index, weights))


def experts_and_gradients(experts, function, hidden, index, weights):
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    output = function(experts, hidden, index, weights)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).bfloat16()
    return [output.detach(), *torch.autograd.grad(output, [hidden, weights, *experts.parameters()], grad.to(output))]


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def test_bfloat16_is_as_close_to_float64_as_transformers():
    experts = make_experts(torch.bfloat16)
    hidden, weights = torch.randn(60, 32).bfloat16(), torch.rand(60, 2).bfloat16()
    index = torch.stack([torch.randperm(6)[:2] for _ in range(60)])
    exact = copy.deepcopy(experts).double()
    wanted = experts_and_gradients(exact, experts_forward, hidden.double(), index, weights.double())
    theirs = experts_and_gradients(experts, grouped_mm_experts_forward, hidden, index, weights)
    ours = experts_and_gradients(experts, experts_forward, hidden, index, weights)
    for ours_i, theirs_i, wanted_i in zip(ours, theirs, wanted, strict=True):
        assert ours_i.dtype == theirs_i.dtype
        bound = max(1.5 * relative_error(theirs_i, wanted_i), 4 * torch.finfo(torch.bfloat16).eps)
        assert relative_error(ours_i, wanted_i) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_types_mix_as_in_transformers(dtype):
    """float32 activations before parameters of any type, with and without autocast."""
    experts = make_experts(dtype)
    hidden, index = torch.randn(20, 32), torch.randint(0, 6, (20, 2))
    for weights in (torch.rand(20, 2), torch.rand(20, 2).bfloat16()):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                ours = experts(hidden, index, weights)
                theirs = grouped_mm_experts_forward(experts, hidden, index, weights)
            assert ours.dtype == theirs.dtype == torch.float32
            assert_close(ours, theirs.double(), tolerance(torch.bfloat16, 32 * 24, roundings=4))


def test_sentinels_of_expert_parallelism_contribute_nothing():
    experts = make_experts(torch.float32)
    experts._is_expert_parallel = True  # for transformers; edl always takes the id E as "no expert here"
    hidden, index = torch.randn(30, 32), torch.randint(0, 7, (30, 3))
    weights = torch.rand(30, 3).masked_fill(index == 6, 0.0)
    wanted = experts_and_gradients(experts, grouped_mm_experts_forward, hidden, index, weights)
    ours = experts_and_gradients(experts, experts_forward, hidden, index, weights)
    assert (index == 6).any() and ours[2][index == 6].eq(0).all()
    for ours_i, wanted_i in zip(ours, wanted, strict=True):
        assert_close(ours_i, wanted_i.double(), tolerance(torch.float32, 32 * 24))


# int8, and 4 bits packed by two, by rows or by columns; 8-bit floats, which need a scale.
QUANTISED = {
    "int8": lambda weight: weight.to(torch.int8),
    "packed": lambda weight: weight.to(torch.uint8)[..., ::2],
    "float8": lambda weight: weight.to(torch.float8_e4m3fn),
    "flat": lambda weight: weight.to(torch.uint8).reshape(-1, 1),
}


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_experts_are_refused_by_their_name(kind, name):
    model = make_model("mixtral", experts="edl")
    experts = model.model.layers[0].mlp.experts
    weight = QUANTISED[kind](getattr(experts, name).detach())
    setattr(experts, name, nn.Parameter(weight, requires_grad=False))
    with pytest.raises(ValueError) as error:
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert str(error.value) == (
        "edl::register: expert weights must be float32, float64, bfloat16 or float16, not quantised "
        f"(got {name} of {weight.dtype})"
    )


def test_every_way_to_choose_it(tmp_path, monkeypatch):
    model = make_model("mixtral", experts="edl")
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    calls = calls_of_edl(monkeypatch)
    assert model.config._experts_implementation == "edl"
    wanted = model(tokens).logits
    assert len(calls) == 2
    model.save_pretrained(tmp_path)
    assert '"edl"' not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="edl")
    assert again.train()(tokens).logits.equal(wanted) and len(calls) == 4
    again.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(again(tokens).logits, wanted)
    assert len(calls) == 4
    again.set_experts_implementation("edl")
    assert again(tokens).logits.equal(wanted) and len(calls) == 6


def test_transformers_is_imported_only_when_used():
    run(
        *(sys.executable, "-c"),
        "import sys; sys.modules['transformers'] = None; import edl.integrations.transformers as module; "
        "assert all(hasattr(module, name) for name in module.__all__ if name != 'RoutingStatisticsCallback')",
    )


def test_what_derives_from_transformers_says_that_it_is_missing():
    printed = run(
        *(sys.executable, "-c"),
        "import sys; sys.modules['transformers'] = None\n"
        "try: from edl.integrations.transformers import RoutingStatisticsCallback\n"
        "except ImportError as error: print(error)",
    )
    assert printed.startswith("edl::RoutingStatisticsCallback: transformers must be installed, pip install ")


def test_registering_again_changes_nothing():
    before = dict(ALL_EXPERTS_FUNCTIONS)
    register()
    assert dict(ALL_EXPERTS_FUNCTIONS) == before and before["edl"] is experts_forward


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_models_compile_whole(family):
    model = make_model(family, experts="edl")
    tokens = torch.randint(0, VOCABULARY, (2, 6))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = compiled(tokens).logits
    assert sum("edl::register" in str(warning.message) for warning in caught) == (family == "gpt_oss")
    torch.testing.assert_close(output, model(tokens).logits)
