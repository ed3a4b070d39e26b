"""`edl observe`: what it writes is what the model chose, in every family; mistakes are sentences."""

import json
import random
import sys

import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import edl
from edl import cli
from edl.diagnostics.record import Record
from edl.diagnostics.statistics import RoutingStatistics
from edl.observe import interventions, running

WINDOW, LENGTH, DOCUMENTS = 24, 40, 6
SIZE = ["--window", WINDOW, "--sequence-length", LENGTH, "--windows", 4, "--tokens", 0, "--batch-size", 3]
DOMAINS = {"letters": "abcdefgh", "numbers": "0123456789"}

NUMBERS = {letter: 3 + place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:90])}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Two domains of different letters, in folders."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for domain, letters in DOMAINS.items():
        (folder / domain).mkdir()
        for place in range(DOCUMENTS):
            words = "".join(draw.choices(letters, k=draw.randint(30, 90)))
            (folder / domain / f"{place}.txt").write_text(words + ".")
    return folder


def save_tokenizer(folder):
    """Bytes as tokens, with a beginning."""
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2} | NUMBERS
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(folder)


def save_trained(family, folder, steps=2):
    """A model of a family after a few steps with the divergence loss, and a tokenizer."""
    torch.manual_seed(3)
    model = transformers_models.make_model(family)
    handle = None
    if family not in transformers_models.MULTIMODAL:
        from edl.integrations.transformers import attach

        options = {"scores": "sigmoid"} if family == "deepseek_v3" else {}
        handle = attach(model, num_domains=2, beta=0.1, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(steps):
            ids = torch.randint(3, 90, (4, 12))
            loss = model(input_ids=ids, labels=ids).loss + handle.loss(torch.tensor([0, 1, 0, 1]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        handle.remove()
    model.eval().save_pretrained(folder)
    save_tokenizer(folder)
    return model


def observe(*arguments):
    cli.main(["observe", *map(str, arguments)])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        observe(*arguments)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.err.count("\n") == 1
    return printed.err


def choices_of(model, ids):
    """What each router of transformers chose for the tokens of a document, by what it returns."""
    seen = {}

    def keep(name):
        def hook(module, args, output):
            parts = output if isinstance(output, tuple) else (output,)
            indices = [part for part in parts if not part.is_floating_point()]
            logits = [part for part in parts if part.is_floating_point() and part.shape[-1] == 8]
            seen[name] = (indices[0] if indices else logits[-1].topk(2, dim=-1).indices).reshape(len(ids), 2)

        return hook

    routers = transformers_models.routers_of(model)
    hooks = [router.register_forward_hook(keep(name)) for name, router in routers.items()]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return [seen[name] for name in routers]


def test_quiet_is_quiet(text, tmp_path, capfd):
    save_trained("mixtral", tmp_path / "model", steps=0)
    capfd.readouterr()
    observe(tmp_path / "model", text, "--output", tmp_path / "routing", "--quiet", *SIZE)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


@pytest.mark.parametrize("family", [*transformers_models.CONFIGS, *transformers_models.MULTIMODAL])
def test_a_model_of_each_family_is_observed_and_reported(family, text, tmp_path):
    model = save_trained(family, tmp_path / "model")
    observe(tmp_path / "model", text, "--output", tmp_path / "routing", "--quiet", *SIZE)
    record = Record.load(tmp_path / "routing" / "record.safetensors")
    statistics = RoutingStatistics.load(tmp_path / "routing" / "statistics.safetensors")
    assert record.domains == statistics.domains == ("letters", "numbers") and len(record) == 8
    assert record.layers == statistics.layers
    whole = whole_documents(text)
    for place in range(len(record.layers)):
        assert record.layers[place].num_experts == 8
        counts = np.zeros((2, 8))
        for document in range(len(record)):
            begin, end = record.offsets[document : document + 2]
            ids, offset = whole[record.token_ids[begin:end].tobytes()]
            chosen = choices_of(model, ids)[place].sort(-1).values.numpy()
            own = np.sort(record.experts(place)[begin:end], axis=1)
            assert (own == chosen[offset : offset + WINDOW]).mean() > 0.97  # padding may turn a tie
            np.add.at(counts[record.labels[document]], chosen[1:].ravel(), 1)  # all tokens but the first
        sums = statistics.sums[record.layers[place].number]
        assert sums.tokens.sum() * 2 == counts.sum()
        assert np.abs(sums.choices.numpy() - counts).sum() < 0.03 * counts.sum()
        assert sums.entropy.isfinite().all() and sums.mass.sum().item() == pytest.approx(sums.tokens.sum().item())
    cli.main(["report", str(tmp_path / "routing"), "--quiet"])
    page = (tmp_path / "routing" / "report.html").read_text()
    assert "letters" in page and "numbers" in page


def whole_documents(text):
    """The tokens of each document that a model reads, and where a window begins in them, by the window's bytes."""
    places = {}
    for path in text.glob("*/*.txt"):
        ids = [NUMBERS[letter] for letter in path.read_text()][:LENGTH]
        for begin in range(1, len(ids) - WINDOW + 1):
            places[np.array(ids[begin : begin + WINDOW], np.int32).tobytes()] = (ids, begin)
    return places


LOADER = '''
import sys
import torch
from torch import nn
import edl

class Model(nn.Module):
    """Bytes, and two layers of edl."""

    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(256, 16)
        self.layers = nn.ModuleList(edl.MoELayer(16, 8, 6, 2) for _ in range(2))
        self.head = nn.Linear(16, 256)

    def forward(self, ids):
        hidden = self.bytes(ids)
        routings = []
        for layer in self.layers:
            update, routing = layer(hidden)
            hidden = hidden + update
            routings.append(routing)
        return self.head(hidden), routings

def load(path):
    torch.manual_seed(int(open(path).read()))
    return Model(), None

def load_nothing(path):
    return None


def load_small(path):
    model, _ = load(path)
    model.bytes = torch.nn.Embedding(64, 8)
    return model, None


def load_broken(path):
    model, _ = load(path)
    model.bytes.weight.data[ord("3")] = float("nan")
    return model, None


class Large(Model):
    def forward(self, ids):
        raise torch.OutOfMemoryError("2 GiB of 1 GiB\\nand more")


def load_large(path):
    return Large(), None


def load_with_a_function(path):
    return load(path)[0], str.split


no_function = 3
'''


@pytest.fixture
def own(tmp_path):
    """The options for a model of one's own."""
    (tmp_path / "own_model.py").write_text(LOADER)
    (tmp_path / "weights").write_text("5")
    return [tmp_path / "weights", "--loader", f"{tmp_path / 'own_model.py'}:load"]


def test_a_model_of_ones_own_is_observed_by_its_bytes(own, text, tmp_path):
    observe(own[0], text, *own[1:], "--output", tmp_path / "out", "--weights", "--quiet", *SIZE)
    record = Record.load(tmp_path / "out" / "record.safetensors")
    model, _ = sys.modules["own_model"].load(own[0])
    for document in range(len(record)):
        begin, end = record.offsets[document : document + 2]
        content = bytes(record.token_ids[begin:end].astype(np.uint8))
        [whole] = [
            path.read_bytes()[:LENGTH] for path in text.glob("*/*.txt") if content in path.read_bytes()[1:LENGTH]
        ]
        offset = whole.index(content, 1)
        _, routings = model(torch.tensor([list(whole)]))
        for place, routing in enumerate(routings):
            assert (record.experts(place)[begin:end] == routing.experts[offset : offset + WINDOW].numpy()).all()
            weights = routing.weights[offset : offset + WINDOW].detach().numpy()
            np.testing.assert_allclose(record.weights(place)[begin:end], weights, rtol=1e-3)
    assert record.token_texts[ord("3")] == "3"


def test_a_run_that_was_interrupted_goes_on_with_the_same_result(own, text, tmp_path, monkeypatch):
    arguments = [own[0], text, *own[1:], "--quiet", *SIZE]
    observe(*arguments, "--output", tmp_path / "whole")
    monkeypatch.setattr(running, "_PATIENCE", -1.0)
    ran = running.observe_batch
    for fail_at in (1, 2):
        calls = []

        def failing(*given, calls=calls, fail_at=fail_at):
            calls.append(given)
            if len(calls) == fail_at:
                raise KeyboardInterrupt
            return ran(*given)

        monkeypatch.setattr(running, "observe_batch", failing)
        with pytest.raises(SystemExit) as end:
            observe(*arguments, "--output", tmp_path / "out")
        assert end.value.code == 130
    assert json.loads((tmp_path / "out" / "unfinished" / "state.json").read_text())["done"] == 3
    monkeypatch.setattr(running, "observe_batch", ran)
    observe(*arguments, "--output", tmp_path / "out")
    for name in ("record.safetensors", "statistics.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"record.safetensors", "statistics.safetensors"}


def test_a_run_that_was_killed_before_its_first_state_goes_on_and_a_foreign_folder_stays(own, text, tmp_path, capsys):
    folder = tmp_path / "out" / "unfinished"
    folder.mkdir(parents=True)
    (folder / "mine.txt").write_text("mine")
    arguments = [own[0], text, *own[1:], "--output", tmp_path / "out", *SIZE]
    assert refused(capsys, *arguments).startswith("edl::observe: output must be empty, or of a run with the same ")
    (folder / "mine.txt").rename(folder / ".state.json.k2x0ab")
    observe(*arguments, "--quiet")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"record.safetensors", "statistics.safetensors"}


def test_a_finished_run_is_not_repeated_and_no_other_one_writes_over_it(own, text, tmp_path, monkeypatch, capsys):
    arguments = [own[0], text, *own[1:], "--output", tmp_path / "out", *SIZE]
    observe(*arguments, "--quiet")
    before = (tmp_path / "out" / "record.safetensors").read_bytes()
    monkeypatch.setattr(running, "observe_batch", None)
    observe(*arguments, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["domains"] == {"letters": 4, "numbers": 4} and told["window"] == WINDOW
    sentence = refused(capsys, *arguments, "--seed", 1)
    assert sentence.startswith("edl::observe: output must be empty, or of a run with the same model, text and options ")
    assert (tmp_path / "out" / "record.safetensors").read_bytes() == before


def test_what_silent_and_swapped_experts_cost(own, text, tmp_path):
    """Against the same forward passes by hand: weights of silent experts are 0, the others' have the same sum."""
    options = ["--output", tmp_path / "out", "--quiet", "--knock-out", "--knock-out-tokens", 2 * WINDOW, *SIZE]
    observe(own[0], text, *own[1:], *options)
    told = json.loads((tmp_path / "out" / "interventions.json").read_text())
    record = Record.load(tmp_path / "out" / "record.safetensors")
    model, _ = sys.modules["own_model"].load(own[0])
    assert told["documents"] == [2, 2] and told["tokens"] == [2 * WINDOW] * 2
    silent = []
    for place in range(2):
        counts = np.stack([record.counts(place)[record.labels == label].sum(0) for label in range(2)])
        shares = counts / counts.sum(1, keepdims=True)
        silent.append(int(np.argmax(shares[0] - shares[1])))  # one of six experts is a quarter
    rises = {0: [], 1: []}
    for label in (0, 1):
        for document in np.flatnonzero(record.labels == label)[:2]:
            begin, end = record.offsets[document : document + 2]
            content = bytes(record.token_ids[begin:end].astype(np.uint8))
            paths = [path.read_bytes()[:LENGTH] for path in text.glob("*/*.txt")]
            [whole] = [each for each in paths if content in each[1:]]
            offset = whole.index(content, 1)
            rises[label].append(loss_of(model, whole, offset, silent) - loss_of(model, whole, offset, None))
    assert told["own"][0][0] == pytest.approx(np.mean(rises[0]), abs=1e-6)
    assert told["others"][0][0] == pytest.approx(np.mean(rises[1]), abs=1e-6)
    assert all(low <= mean <= high for mean, low, high in [*told["own"], *told["random"], *told["permuted"]])


def test_more_text_to_knock_out_on_is_not_the_old_answer(own, text, tmp_path, monkeypatch, capsys):
    arguments = [own[0], text, *own[1:], "--output", tmp_path / "out", *SIZE]
    path = tmp_path / "out" / "interventions.json"
    for documents in (2, 3):
        observe(*arguments, "--quiet", "--knock-out", "--knock-out-tokens", documents * WINDOW)
        assert json.loads(path.read_text())["documents"] == [documents] * 2
    monkeypatch.setattr(running, "observe_batch", None)
    monkeypatch.setattr(interventions, "intervene", None)
    observe(*arguments, "--quiet", "--knock-out", "--knock-out-tokens", 3 * WINDOW)  # the same again does nothing
    for name in ("record.safetensors", "statistics.safetensors"):
        (tmp_path / "out" / name).unlink()
    assert refused(capsys, *arguments).startswith("edl::observe: output must be empty, or of a run with the same ")


def loss_of(model, content, offset, silent):
    """The mean cross entropy of a window's bytes, with an expert of each layer silent."""
    ids = torch.tensor(list(content))
    hidden = model.bytes(ids)
    for place, layer in enumerate(model.layers):
        _, routing = layer(hidden)
        weights = routing.weights
        if silent is not None:
            weights = weights.where(routing.experts != silent[place], 0.0)
            scale = routing.weights.sum(-1, keepdim=True) / weights.sum(-1, keepdim=True)
            weights = weights * scale.nan_to_num(0.0, posinf=0.0)
        outputs = []
        for expert in range(6):
            gate, up = (hidden @ layer.gate_up_proj[expert].T).chunk(2, dim=-1)
            outputs.append((torch.nn.functional.silu(gate) * up) @ layer.down_proj[expert].T)
        stacked = torch.stack(outputs, dim=1)
        chosen = stacked[torch.arange(len(ids))[:, None], routing.experts]
        hidden = hidden + (weights.unsqueeze(-1) * chosen).sum(1)
    logits = model.head(hidden)[offset - 1 : offset + WINDOW - 1]
    return torch.nn.functional.cross_entropy(logits, ids[offset : offset + WINDOW]).item()


def test_experts_of_transformers_are_silenced_and_swapped_by_their_arguments(text, tmp_path):
    """Swapping an expert for itself costs nothing; all experts silent is the model without its experts."""
    from edl.observe.interventions import changed, permuted, silenced
    from edl.observe.watch import Watch

    model = transformers_models.make_model("mixtral").eval()
    watch, ids = Watch(model), torch.randint(3, 90, (1, 12))
    names = [name for name, _, _ in watch.routers]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with changed(watch, {name: permuted(torch.arange(8)) for name in names}):
            assert torch.equal(model(input_ids=ids).logits, plain)
        with changed(watch, {name: silenced(torch.arange(8)) for name in names}):
            without = model(input_ids=ids).logits
        for layer in model.model.layers:
            layer.mlp.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
        torch.testing.assert_close(model(input_ids=ids).logits, without)


MISTAKES = {
    "text without labels": (lambda text: [text / "letters"], "labels must come from sub-folders, --column or --labels"),
    "a window that is too long": (lambda text: [text, "--window", LENGTH + 1], "--window must be less than the 40 tok"),
    "a loader without a function": (lambda text: [text, "--loader", "own_model"], "--loader must be module:function"),
    "a loader that is not there": (lambda text: [text, "--loader", "no_such:load"], "--loader must be a function in"),
    "a loader of nothing": (
        lambda text: [text, "--loader", "own_model:load_nothing"],
        "must return (model, tokenizer)",
    ),
    "a loader that is no function": (
        lambda text: [text, "--loader", "own_model:no_function"],
        "--loader must be a function in a module",
    ),
    "a function for a tokenizer": (
        lambda text: [text, "--loader", "own_model:load_with_a_function"],
        "the tokenizer of --loader must be one of transformers, None for bytes",
    ),
    "options of transformers": (lambda text: [text, "--dtype", "float32"], "--loader must come without --dtype"),
    "no text": (lambda text: [text / "nowhere"], "nowhere, which is not there"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence(name, own, text, tmp_path, capsys):
    make, sentence = MISTAKES[name]
    options = [*SIZE[2:], "--output", tmp_path / "out"]
    assert sentence in refused(capsys, *own, *options, "--window", WINDOW, *make(text)[1:], *make(text)[:1])
    assert not list(tmp_path.glob("out/*"))


FAILURES = {
    "load_small": "the model must know all tokens of its tokenizer, here up to 104 (got IndexError: index out of range",
    "load_large": "--batch-size and --sequence-length make it smaller (got 2 GiB of 1 GiB)",
    "load_broken": "scores of counted tokens must be numbers (got NaN from layers.0.router",
}


@pytest.mark.parametrize("loader", FAILURES)
def test_a_model_that_fails_is_a_sentence_and_leaves_room_for_another_run(loader, own, text, tmp_path, capsys):
    arguments = [own[0], text, "--output", tmp_path / "out", *SIZE]
    assert FAILURES[loader] in refused(
        capsys, *arguments, "--loader", f"{tmp_path / 'own_model.py'}:{loader}", "--quiet"
    )
    observe(*arguments, *own[1:], "--quiet")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"record.safetensors", "statistics.safetensors"}


def test_code_of_a_checkpoint_is_not_run(text, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    automatic = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": automatic}))
    sentence = refused(capsys, folder, text, "--output", tmp_path / "out", *SIZE)
    assert sentence.startswith("edl::observe: MODEL must be a checkpoint that transformers can load")
    assert not (tmp_path / "ran").exists()


def test_labels_of_edl_label_are_taken(own, text, tmp_path):
    cli.main(["label", "apply", str(text), "--output", str(tmp_path / "labels"), "--quiet"])
    for name, options in {"folders": [], "labels": ["--labels", tmp_path / "labels"]}.items():
        observe(own[0], text, *own[1:], "--output", tmp_path / name, "--quiet", *options, *SIZE)
    files = [(tmp_path / name / "record.safetensors").read_bytes() for name in ("folders", "labels")]
    assert files[0] == files[1]


def test_versions_match_what_is_installed(own, text, tmp_path):
    observe(own[0], text, *own[1:], "--output", tmp_path / "out", "--quiet", *SIZE)
    facts = Record.load(tmp_path / "out" / "record.safetensors").facts
    assert facts["edl"] == edl.__version__ and facts["model"] == "weights" and str(tmp_path) not in json.dumps(facts)


REPLACED = """
from transformers import AutoModelForCausalLM, AutoTokenizer
import edl

def load(path):
    model = AutoModelForCausalLM.from_pretrained(path)
    for decoder in model.model.layers:
        decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
    return model, AutoTokenizer.from_pretrained(path)
"""


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_model_and_the_same_one_made_of_layers_of_edl_give_the_same_numbers(family, text, tmp_path):
    save_trained(family, tmp_path / "model")
    (tmp_path / "replaced.py").write_text(REPLACED)
    sys.modules.pop("replaced", None)
    options = [text, "--quiet", *SIZE]
    observe(tmp_path / "model", *options, "--output", tmp_path / "theirs")
    observe(tmp_path / "model", *options, "--output", tmp_path / "ours", "--loader", f"{tmp_path / 'replaced.py'}:load")
    theirs, ours = (Record.load(tmp_path / name / "record.safetensors") for name in ("theirs", "ours"))
    sums = [RoutingStatistics.load(tmp_path / name / "statistics.safetensors").sums for name in ("theirs", "ours")]
    assert [layer._replace(name="") for layer in theirs.layers] == [layer._replace(name="") for layer in ours.layers]
    assert (theirs.token_ids == ours.token_ids).all()
    for place, layer in enumerate(theirs.layers):
        same = np.sort(theirs.experts(place), axis=1) == np.sort(ours.experts(place), axis=1)
        assert same.mean() > 0.99  # products are rounded otherwise
        first, second = (each[layer.number] for each in sums)
        assert (first.choices - second.choices).abs().sum() <= 0.02 * first.choices.sum()
        torch.testing.assert_close(first.mass, second.mass, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(first.entropy, second.entropy, rtol=1e-3, atol=1e-3)


def test_options_of_transformers_reach_it(text, tmp_path):
    save_trained("mixtral", tmp_path / "model")
    options = ["--dtype", "bfloat16", "--device-map", "cpu", "--output", tmp_path / "out", "--quiet"]
    observe(tmp_path / "model", text, *options, *SIZE)
    assert Record.load(tmp_path / "out" / "record.safetensors").facts["dtype"] == "bfloat16"


def test_columns_of_rows_are_labels_and_sources(own, text, tmp_path):
    """JSON lines and parquet give what folders give, and documents of one source a group."""
    rows = [
        {"content": path.read_text(), "meta": {"domain": path.parent.name}, "site": f"{path.parent.name}{place // 2}"}
        for place, path in enumerate(sorted(text.glob("*/*.txt")))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    columns = ["--text-column", "content", "--column", "meta.domain", "--group-column", "site"]
    sources = {"folder": [text], "jsonl": [tmp_path / "rows.jsonl", *columns], "parquet": [tmp_path / "rows.parquet"]}
    sources["parquet"] += columns
    records = {}
    for name, source in sources.items():
        observe(own[0], *source, *own[1:], "--output", tmp_path / name, "--quiet", *SIZE)
        records[name] = Record.load(tmp_path / name / "record.safetensors")
    for record in (records["jsonl"], records["parquet"]):
        assert record.domains == ("letters", "numbers")
        for field in ("token_ids", "labels", "keys"):
            assert (getattr(record, field) == getattr(records["folder"], field)).all()
        assert (record.experts(1) == records["folder"].experts(1)).all()
        assert len(np.unique(record.groups)) < len(record) == len(np.unique(records["folder"].groups))
