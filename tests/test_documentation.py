"""Every Python snippet of README.md and docs, run as it stands, in the order of its page.

What a snippet takes for granted (a model, a loader, an optimizer) is stated here, by the snippet's first line; those of
a page share their names. Diffs run where their examples do: tests/test_transformers_trainer.py, tests/megatron.
"""

import pkgutil
import re
import sys

import pytest
from commands import ROOT, run

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]

ONE_RANK = """
import torch.distributed as dist
from torch.distributed.tensor import Shard, init_device_mesh

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("data",))
"""

HUGGING_FACE = """
from transformers_models import make_model

model, beta = make_model("mixtral"), 1e-2
optimizer = torch.optim.AdamW(model.parameters())
loader = [(torch.randint(3, 40, (4, 8)), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
micro_batches = loader
tokens, domain_ids = loader[0]
"""

TRAINER = """
import datasets
from transformers import Trainer, TrainingArguments

examples = {"input_ids": tokens.tolist(), "labels": tokens.tolist(), "domain_ids": domain_ids.tolist()}
dataset = datasets.Dataset.from_dict(examples)
args = TrainingArguments(output_dir="output", max_steps=1, logging_steps=1, use_cpu=True, report_to=[])
"""

DATASETS = """
import datasets
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

dataset = datasets.Dataset.from_dict({"input_ids": [list(range(1500))] * 3, "domain_ids": [0, 1, 2]})
"""

BEFORE = {
    "README.md": {
        "import edl": HUGGING_FACE,
    },
    "docs/expert_parallel.md": {
        "layer = edl.MoELayer(": ONE_RANK
        + """
import edl
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

hidden_size, intermediate_size, group = 16, 8, dist.group.WORLD
hidden = torch.randn(4, 8, 16)
""",
        "mesh = init_device_mesh(": """
N, R, hidden = 1, 1, hidden.detach()

class Block(nn.Module):
    def __init__(self, expert_group):
        super().__init__()
        self.layer = edl.MoELayer(16, 8, 8, 2, num_shared_experts=1, expert_group=expert_group)

    def forward(self, hidden):
        return hidden + self.layer(hidden)[0]

class Model(nn.Module):
    def __init__(self, expert_group):
        super().__init__()
        self.blocks = nn.ModuleList([Block(expert_group)])

    def forward(self, hidden):
        return self.blocks[0](hidden)
""",
        "fully_shard([layer.router": "layer = Block(mesh['experts']).layer",
        "edl.expert_parallel.exclude_from_ddp(model)": """
model = Model(mesh["experts"])
optimizer, replica_group = torch.optim.SGD(model.parameters()), None
""",
        "gathered = StateDictOptions(": "model = Model(mesh['experts'])",
    },
    "docs/domain_batches.md": {
        "import edl": """
import json, pathlib
import numpy

folder = pathlib.Path("labels")
(folder / "part").mkdir(parents=True)
numpy.save(folder / "part" / "00.npy", numpy.array([0, 1, 2, 1, 0, -1, 1, 0] * 3, numpy.int16))
shards = [{"name": "part/00", "documents": 24}]
index = {"version": 1, "domains": ["code", "news", "prose"], "counts": {}, "shards": shards}
(folder / "domains.json").write_text(json.dumps(index))
""",
        "dataset = dataset.add_column(": """
import datasets

tokens = torch.randint(3, 40, (24, 8))
dataset = datasets.Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
""",
        "trainer = EDTrainer(": """
from transformers import Trainer, TrainingArguments
from transformers_models import make_model

from edl.integrations.transformers import EDTrainerMixin


class EDTrainer(EDTrainerMixin, Trainer):
    pass


model = make_model("mixtral")
args = TrainingArguments(output_dir="output", max_steps=1, logging_steps=1, use_cpu=True, report_to=[])
""",
    },
    "docs/labels.md": {
        "import edl": """
import pathlib

import edl
from edl.corpus import labelling
from edl.corpus.readers import shards_of

for name in ("English", "maths"):
    pathlib.Path("my-text", name).mkdir(parents=True)
    for number in range(6):
        pathlib.Path("my-text", name, f"{number}.txt").write_text(f"{name} {number}")
labelling.apply(shards_of(["my-text"]), None, "labels")
layer = edl.MoELayer(8, 8, 4, 2)
embed = lambda texts: torch.randn(len(texts), 5, 8)
""",
    },
    "docs/megatron.md": {
        "labelled = edl_megatron.": """
import json, pathlib, types
import numpy
from megatron.core.datasets.gpt_dataset import GPTDataset

import edl
from edl.integrations import megatron as edl_megatron

folder = pathlib.Path("labels")
folder.mkdir()
numpy.save(folder / "part.npy", numpy.zeros(2, numpy.int16))
shards = [{"name": "part", "documents": 2}]
(folder / "domains.json").write_text(json.dumps({"version": 1, "domains": ["a"], "counts": {}, "shards": shards}))
args, forward_step = types.SimpleNamespace(seq_length=8), print
""",
        "with edl.domain_scope(": """
import edl

domain_ids, cu_seqlens = torch.tensor([0, 1]), torch.tensor([0, 3, 8])
tokens = position_ids = attention_mask = labels = packed_seq_params = None

def model(*arguments, **options):
    return edl.current_labels()
""",
    },
    "docs/objectives.md": {
        "from edl.objectives import ": ONE_RANK
        + """
import torch
import torch.nn.functional as F

import edl

layer = edl.MoELayer(16, 8, 8, 2)
optimizer = torch.optim.SGD(layer.parameters())
loader = [(torch.randn(4, 8, 16), torch.randn(4, 8, 16), torch.tensor([0, 1, 2, 0]), torch.ones(4, 8))]
""",
    },
    "docs/routers.md": {
        "import edl": "hidden, languages = torch.randn(4, 8, 512), torch.randint(0, 4, (32,), dtype=torch.int32)",
        "def tell(": HUGGING_FACE,
    },
    "docs/scaling.md": {
        "divergence = edl.ExpertDivergenceLoss(num_domains=49, group=mesh": "import edl\n" + ONE_RANK + HUGGING_FACE,
        "finish = divergence.begin(": """
import torch.nn.functional as F

output = model(tokens, output_router_logits=True)
output.logits, targets = output.logits.flatten(0, 1), tokens.flatten()
""",
        "memory = edl.DomainMemory()": "group = mesh['data']",
        "class Router(": """
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.router = nn.Embedding(40, 16), Router(16, 8)
        self.router.divergence, self.router.beta = edl.ExpertDivergenceLoss(num_domains=3), 1e-2

    def forward(self, tokens):
        return self.router(self.embedding(tokens))
""",
    },
    "docs/seeing.md": {
        "statistics = edl": "import edl\n" + HUGGING_FACE,
        "from edl.integrations.transformers import EDTrainerMixin, Routing": TRAINER,
    },
    "docs/start.md": {
        "import edl": HUGGING_FACE,
        "layer = edl.MoELayer(": """
hidden = torch.randn(4, 8, 512)
lm_loss = torch.zeros(())
block = model.model.layers[0].mlp
""",
        "from transformers import Trainer": """
import datasets

examples = {"input_ids": tokens.tolist(), "labels": tokens.tolist(), "domain_ids": domain_ids.tolist()}
dataset = datasets.Dataset.from_dict(examples)
""",
    },
    "docs/torchtitan.md": {
        "import edl": """
import types
from torchtitan_released import model_config, without_triton

without_triton()
config = types.SimpleNamespace(
    training=types.SimpleNamespace(), model_spec=types.SimpleNamespace(model=model_config())
)

class Trainer:
    def forward_backward_step(self, *, input_dict, labels, global_valid_tokens):
        return input_dict, edl.current_labels().domain_ids
""",
        "from edl.integrations.torchtitan import add_objectives": "config.model_spec.model = model_config()",
    },
    "docs/transformers.md": {
        "from edl.integrations.transformers import EDTrainerMixin": HUGGING_FACE + TRAINER,
        "from edl.integrations.transformers import DomainCollator": DATASETS,
        "from edl.integrations.transformers import attach": HUGGING_FACE
        + 'batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}',
        "from edl.integrations.transformers import register": 'make_model("mixtral").save_pretrained("model")',
    },
}

# What must hold after a snippet.
AFTER = {
    "docs/choose.md": {
        "from edl.objectives import": """
schedule = off_after(linear_warmup(1e-2, steps=1000), step=20000)
assert [schedule(step) for step in (0, 500, 5000, 20000)] == [0, 5e-3, 1e-2, 0] and len(objectives.weights) == 3
""",
    },
    "README.md": {
        "import edl": "assert loss.isfinite() and loss != lm_loss",
    },
    "docs/expert_parallel.md": {
        "layer = edl.MoELayer(": "assert hidden.shape == (4, 8, 16)",
        "mesh = init_device_mesh(": "model(hidden).sum().backward()",
        "fully_shard([layer.router": "layer(hidden)[0].sum().backward()",
        "gathered = StateDictOptions(": "assert state['blocks.0.layer.gate_up_proj'].shape == (8, 16, 16)",
    },
    "docs/domain_batches.md": {
        "import edl": "assert domain_ids.shape == (24,)",
        "from torch.utils.data import DataLoader": "assert len(batch['domain_ids'].unique()) > 1",
        "trainer = EDTrainer(": "trainer.train()",
    },
    "docs/labels.md": {"import edl": "assert len(examples) == 12 and loss.isfinite() and len(labels.domains) == 2"},
    "docs/megatron.md": {
        "labelled = edl_megatron.": "assert issubclass(labelled, GPTDataset)",
        "with edl.domain_scope(": "assert output.domain_ids.tolist() == [0, 1]",
    },
    "docs/routers.md": {
        "import edl": "assert (routing.experts // 16 == languages[:, None]).all() and routing.logits.isfinite().all()",
        "def tell(": """
chosen = []
for decoder in model.model.layers:
    decoder.mlp.router.register_forward_hook(lambda router, arguments, choice: chosen.append(choice.experts // 16))
model.gradient_checkpointing_enable()
output = model(tokens, routing_context=edl.RoutingContext(groups=languages))
output.logits.sum().backward()
assert len(chosen) == 4 and all((quarters == languages[:, None]).all() for quarters in chosen)
""",
    },
    "docs/scaling.md": {
        "finish = divergence.begin(": "assert loss.isfinite() and loss != lm_loss",
        "class Router(": """
assert output.sum().backward() is None and model.router.weight.grad.abs().sum() > 0
""",
    },
    "docs/seeing.md": {
        "statistics = edl": """
assert statistics.sums[0].tokens.tolist() == [32, 16, 16] and len(statistics.layers) == 2
assert edl.RoutingStatistics.load("statistics.safetensors").snapshots[0].step == 2
""",
        "from edl.integrations.transformers import EDTrainerMixin, Routing": """
assert edl.RoutingStatistics.load("output/routing_statistics.safetensors").sums[0].tokens.sum() > 0
""",
    },
    "docs/start.md": {
        "layer = edl.MoELayer(": "assert hidden.shape == (4, 8, 512) and loss.isfinite() and layer(torch.randn(4, 32))",
        "from edl.integrations.transformers import attach": "assert loss.isfinite()",
        "from transformers import Trainer": """
assert {"expert_divergence_loss", "expert_divergence/nats"} <= trainer.state.log_history[0].keys()
""",
        # The commands that the page has next, on less text.
        '"""Trains a small Qwen3-MoE': """
import re

from commands import ROOT

from edl import cli

lines = re.findall(r"^edl (.*routing/with.*)$", (ROOT / "docs" / "start.md").read_text(), re.MULTILINE)
assert [line.split()[0] for line in lines] == ["observe", "observe", "report"]
small = "--windows 2 --tokens 0 --sequence-length 129".split()
for line in lines:
    cli.main(line.split() + (small if line.startswith("observe") else []))
assert "<html" in pathlib.Path("comparison.html").read_text()
""",
    },
    "docs/torchtitan.md": {
        "import edl": """
assert repr(config.model_spec.model).count("ExpertDivergence") == 2
step = DomainTrainer().forward_backward_step
inputs, labels = step(input_dict={"input": 1, "domain_ids": torch.tensor([0, 1])}, labels=None, global_valid_tokens=1)
assert inputs == {"input": 1} and labels.tolist() == [0, 1]
""",
        "from edl.integrations.torchtitan import add_objectives": """
assert repr(config.model_spec.model).count("coarse=ExpertDivergence(num_domains=49") == 2
""",
    },
    "docs/transformers.md": {
        "from edl.integrations.transformers import EDTrainerMixin": """
assert {"expert_divergence_loss", "load_balancing_loss"} <= trainer.state.log_history[0].keys()
""",
        "from edl.integrations.transformers import DomainCollator": "assert len(packed) == 2 and collator",
        "from edl.integrations.transformers import attach": "assert loss.isfinite()",
        "from edl.objectives import ExpertDivergence, LoadBalancing, Objectives": "assert len(handle.values) == 2",
        "from edl.integrations.transformers import register": "assert model(tokens).logits.isfinite().all()",
    },
}


# What needs a GPU or minutes, run without.
CHANGED = {'init_device_mesh("cuda"': 'init_device_mesh("cpu"', "STEPS, LENGTH = 200, 128": "STEPS, LENGTH = 2, 128"}


def of(table, page, snippet):
    """What stands in a table for a snippet, found by its first line."""
    return "\n".join(text for first, text in table.get(page, {}).items() if snippet.startswith(first))


def snippets(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)])
def test_every_snippet_runs(page, tmp_path):
    for package in ("transformers", "datasets", *(["torchtitan"] if "torchtitan" in page else [])):
        pytest.importorskip(package)
    script = ["import torch", "torch.manual_seed(0)"]
    for snippet in snippets(page):
        here = snippet
        for written, run_as in CHANGED.items():
            here = here.replace(written, run_as)
        script += [of(BEFORE, page, snippet), here, of(AFTER, page, snippet)]
    (tmp_path / "page.py").write_text("\n".join(script))
    code = f"import sys, runpy; sys.path[:0] = {[str(ROOT / 'tests')]}; runpy.run_path('page.py')"
    run(sys.executable, "-c", code, cwd=tmp_path)


def test_what_is_stated_belongs_to_a_snippet():
    for table in (BEFORE, AFTER):
        for page, entries in table.items():
            for first in entries:
                assert any(snippet.startswith(first) for snippet in snippets(page)), (page, first)


def test_the_first_page_changes_the_same_lines_as_the_pages_of_frameworks():
    """Those are run: tests/megatron/test_example.py, and the snippets of docs/torchtitan.md."""
    diffs = re.findall(r"^```diff\n(.*?)^```", (ROOT / "docs/start.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(diffs) == 2
    for diff, page in zip(diffs, ("docs/megatron.md", "docs/torchtitan.md")):
        there = [line.strip("+- ") for line in (ROOT / page).read_text().splitlines()]
        for line in diff.splitlines():
            assert line.strip("+- ") in there, (page, line)


def test_what_the_equations_name_is_there():
    page = (ROOT / "docs/equations.md").read_text()
    names, paths = re.findall(r"`(edl(?:\.\w+)+)", page), re.findall(r"`(tests/\S+\.py)`", page)
    assert len(set(names)) > 30 and len(set(paths)) > 10
    for name in names:
        assert pkgutil.resolve_name(name) is not None
    for path in paths:
        assert (ROOT / path).exists(), path
