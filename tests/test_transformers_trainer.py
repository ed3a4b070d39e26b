"""EDTrainerMixin in the real Trainer: the gradient of each optimizer step is that of the plain Trainer plus beta times
the mean of the micro-batches' divergence, however the Trainer scales its own loss; and labels reach it through every
kind of batch."""

import functools
import itertools
import os
import re
import runpy
import warnings

import numpy
import pytest
import safetensors.torch
import torch
from commands import ROOT
from ranks import on_ranks
from tolerances import assert_close, tolerance
from torch import nn

import edl

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

from tokenizers import Tokenizer, models  # noqa: E402
from transformers import (  # noqa: E402
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers_models import CONFIGS, VOCABULARY, make_model  # noqa: E402

from edl.integrations.transformers import DomainCollator, EDTrainerMixin, attach, pack_documents, register  # noqa: E402
from edl.integrations.transformers.trainer import _PackedDocuments  # noqa: E402

D, BETA = 3, 0.3
# Losses and router weights pass float32 inside transformers, also in float64 models; sums over few tokens.
PRECISION = tolerance(torch.float32, 32 * 24, roundings=4)


class Gradients(TrainerCallback):
    """The gradient of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


class EDTrainer(EDTrainerMixin, Trainer):
    pass


def make_dataset(num_rows=20, length=8, labels=True):
    """Rows with some tokens that are no targets, so that micro-batches differ in their number of items."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCABULARY, (num_rows, length), generator=generator)
    targets = tokens.masked_fill(torch.rand(tokens.shape, generator=generator) < 0.3, -100)
    columns = {"input_ids": tokens.tolist(), "labels": targets.tolist(), "notes": ["dropped"] * num_rows}
    if labels:
        columns["domain_ids"] = [(0, 1, 2, 1, 0, -1)[row % 6] for row in range(num_rows)]
    return datasets.Dataset.from_dict(columns)


def arguments(folder, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
    }
    defaults |= {
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    defaults |= {"train_sampling_strategy": "sequential", "use_cpu": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def seeded_model():
    torch.manual_seed(0)
    return make_model("mixtral", torch.float64)


def train(kind, args, dataset=None, model=None, **options):
    """A trainer after training, with the gradients of its steps. The learning rate is 0, so that runs stay
    comparable."""
    dataset = make_dataset() if dataset is None else dataset
    if kind is EDTrainer:
        options = {"num_domains": D, "beta": BETA, **options}
    if "model_init" not in options:
        options["model"] = seeded_model() if model is None else model
    recorded = Gradients()
    trainer = kind(args=args, train_dataset=dataset, callbacks=[recorded], **options)
    trainer.train()
    trainer.gradients = recorded.steps
    return trainer


def added(trainer, plain):
    """What one trainer's gradients have over the other's, per step."""
    return [
        {name: step[name] - before[name] for name in step}
        for step, before in zip(trainer.gradients, plain.gradients, strict=True)
    ]


def divergence_by_hand(micro_batches, memory=None):
    """(mean value, gradient of beta times the mean of the losses) of the micro-batches of a step, from a model's own
    output."""
    model = seeded_model()
    loss = edl.ExpertDivergenceLoss(D, memory=memory)
    values = []
    for batch in micro_batches:
        batch = {name: torch.tensor(batch[name]) for name in ("input_ids", "domain_ids")}
        value = loss([*model(batch["input_ids"], output_router_logits=True).router_logits], batch["domain_ids"])
        (BETA * value / len(micro_batches)).backward()
        values.append(value.item())
    if memory is not None:
        memory.step()
    return sum(values) / len(values), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_steps(steps, wanted, scale=0.0):
    for step, reference in zip(steps, wanted, strict=True):
        for name, gradient in step.items():
            expected = reference.get(name, torch.zeros_like(gradient))
            assert_close(
                gradient, expected, PRECISION, scale=max(scale, max(g.abs().max() for g in reference.values()).item())
            )


def sum_of_items(outputs, labels, num_items_in_batch=None):
    logits, targets = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


def mean_of_batch():
    model = seeded_model()
    model.accepts_loss_kwargs = False
    return model


# How the Trainer comes to its own loss, and whether training_step divides it by the number of micro-batches.
LOSSES = {
    "items of the step": {},
    "mean of the batch": {"model": mean_of_batch},
    "compute_loss_func": {"compute_loss_func": sum_of_items},
    "label smoothing": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("memory", ["memory", "none"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_gradient_of_every_step(tmp_path, loss, accumulation, memory):
    """Five micro-batches: with three per step the last step has two."""
    options = dict(LOSSES[loss])
    make = options.pop("model", seeded_model)
    smoothing = options.pop("label_smoothing_factor", 0.0)
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, label_smoothing_factor=smoothing)
    plain = train(Trainer, args, model=make(), **options)
    ours = {"divergence_options": {"memory": None}} if memory == "none" else {}
    trainer = train(EDTrainer, args, model=make(), **options, **ours)
    dataset = make_dataset()
    micro_batches = [dataset[4 * i : 4 * i + 4] for i in range(5)]
    steps = [micro_batches[i : i + accumulation] for i in range(0, 5, accumulation)]
    carried = edl.DomainMemory(decay=0.9) if memory == "memory" and accumulation > 1 else None
    by_hand = [divergence_by_hand(step, carried) for step in steps]
    assert_steps(added(trainer, plain), [gradient for _, gradient in by_hand])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    plain_logs = [entry for entry in plain.state.log_history if "loss" in entry]
    for entry, before, (value, _) in zip(logs, plain_logs, by_hand, strict=True):
        assert entry["expert_divergence_loss"] == pytest.approx(value, rel=1e-5)
        assert entry["loss"] == pytest.approx(before["loss"] + BETA * value, rel=1e-4)


def test_two_passes_have_the_gradient_of_one_batch(tmp_path):
    """Micro-batches of four of 20 sequences, three per step and two in the last; and batches of twelve and eight."""
    accumulated = train(EDTrainer, arguments(tmp_path, gradient_accumulation_steps=3), two_passes=True)
    at_once = train(EDTrainer, arguments(tmp_path, per_device_train_batch_size=12))
    assert_steps(accumulated.gradients, at_once.gradients)
    one_pass = train(EDTrainer, arguments(tmp_path, gradient_accumulation_steps=3))
    with pytest.raises(AssertionError):
        assert_steps(one_pass.gradients, at_once.gradients)


class FailsOnce(TrainerCallback):
    """Stops a training in the middle of its first step, as a device without memory does."""

    failed = False

    def on_substep_end(self, *args, **kwargs):
        if not self.failed:
            self.failed = True
            raise MemoryError


def test_two_passes_begin_anew_after_a_step_that_failed(tmp_path):
    args = arguments(tmp_path, gradient_accumulation_steps=3)
    options = {"train_dataset": make_dataset(), "num_domains": D, "beta": BETA, "two_passes": True}
    recorded = Gradients()
    trainer = EDTrainer(seeded_model(), args, callbacks=[recorded, FailsOnce()], **options)
    with pytest.raises(MemoryError):
        trainer.train()
    trainer.train()
    assert_steps(recorded.steps, train(EDTrainer, args, two_passes=True).gradients)


def test_equal_micro_batches_have_the_gradient_of_one_batch(tmp_path):
    """Accumulation of the same sequences, and one batch of them all."""
    rows = make_dataset(4).select([0, 1, 2, 3] * 3)
    accumulated = train(EDTrainer, arguments(tmp_path, gradient_accumulation_steps=3), rows)
    at_once = train(EDTrainer, arguments(tmp_path, per_device_train_batch_size=12), rows)
    assert_steps(accumulated.gradients, at_once.gradients)


def test_a_domain_per_micro_batch_is_compared_with_the_others(tmp_path):
    """Micro-batches of one sequence hold no pair of domains; the memory of the step does."""
    args = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    dataset = make_dataset(4)
    trainer = train(EDTrainer, args, dataset)
    difference = added(trainer, train(Trainer, args, dataset))
    assert max(gradient.abs().max() for gradient in difference[0].values()) > 1e-3
    by_hand = divergence_by_hand([dataset[i : i + 1] for i in range(4)], edl.DomainMemory())
    assert_steps(difference, [by_hand[1]])


def resume(args):
    """A training begun again at its second step, with the gradients of those that follow."""
    options = {"train_dataset": make_dataset(), "num_domains": D, "beta": BETA}
    trainer = EDTrainer(seeded_model(), args, callbacks=[recorded := Gradients()], **options)
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-2")
    return recorded.steps


@pytest.mark.parametrize("saves", [True, False], ids=["everything", "only-the-model"])
def test_a_resumed_training_goes_on_with_its_memory(tmp_path, saves):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "steps"}
    args = arguments(tmp_path, **options, save_steps=2, save_only_model=not saves)
    whole = train(EDTrainer, args)
    rest = resume(args)
    assert (tmp_path / "checkpoint-2" / "objectives.pt").exists() == saves
    if saves:
        assert_steps(rest, whole.gradients[2:])
    else:  # a memory that begins anew tells
        with pytest.raises(AssertionError):
            assert_steps(rest, whole.gradients[2:])


def test_a_training_begins_with_an_empty_memory(tmp_path):
    options = {"train_dataset": make_dataset(), "num_domains": D, "beta": BETA}
    recorded = Gradients()
    trainer = EDTrainer(
        seeded_model(), arguments(tmp_path, gradient_accumulation_steps=2), callbacks=[recorded], **options
    )
    trainer.train()
    first = list(recorded.steps)
    trainer.train()
    assert_steps(recorded.steps[len(first) :], first)


def replaced(model):
    for decoder in model.model.layers:
        decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
    return model


def plain(model):
    return model


def other_weights(kind):
    torch.manual_seed(7)
    return kind(make_model("mixtral", torch.float64))


class Weights(TrainerCallback):
    """What the model holds when a training begins, and ends."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.first = {name: value.clone() for name, value in model.state_dict().items()}


def assert_resumes_with(wanted, model, args):
    """A training of the model begins with the weights that are wanted."""
    options = {"train_dataset": make_dataset(), "num_domains": D, "beta": BETA}
    trainer = EDTrainer(model, args, callbacks=[weights := Weights()], **options)
    trainer.train(resume_from_checkpoint=True)
    assert weights.first.keys() == wanted.state_dict().keys()
    for name, value in weights.first.items():
        assert value.equal(wanted.state_dict()[name]), name


@pytest.mark.parametrize("shards", [False, True], ids=["one-file", "shards"])
@pytest.mark.parametrize("kind", [plain, replaced])
def test_a_resumed_training_has_the_experts_of_its_checkpoint(tmp_path, kind, shards, monkeypatch):
    model = kind(seeded_model())
    if shards:
        save = PreTrainedModel.save_pretrained
        monkeypatch.setattr(PreTrainedModel, "save_pretrained", functools.partialmethod(save, max_shard_size="40KB"))
    args = arguments(tmp_path, learning_rate=1e-2, save_strategy="steps", save_steps=2, max_steps=2)
    first = train(EDTrainer, args, model=model)
    assert (tmp_path / "checkpoint-2" / "model.safetensors.index.json").exists() == shards
    trainer = EDTrainer(
        other_weights(kind),
        args,
        train_dataset=make_dataset(),
        num_domains=D,
        beta=BETA,
        callbacks=[weights := Weights()],
    )
    trainer.train(resume_from_checkpoint=True)
    for name, value in weights.first.items():
        assert value.equal(first.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", [plain, replaced])
def test_the_best_model_has_the_experts_of_its_checkpoint(tmp_path, kind):
    """The first step of two is the best one, as the second is much too long."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = arguments(tmp_path, learning_rate=10.0, max_steps=2, load_best_model_at_end=True, **options)
    trainer = EDTrainer(
        kind(seeded_model()), args, train_dataset=make_dataset(), eval_dataset=make_dataset(), num_domains=D, beta=BETA
    )
    trainer.train()
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint, dtype=torch.float64)
    for name, value in kind(best).state_dict().items():
        assert value.equal(trainer.model.state_dict()[name]), name


def test_checkpoints_with_the_names_of_layers_still_load(tmp_path):
    args = arguments(tmp_path, learning_rate=1e-2, save_strategy="steps", save_steps=2, max_steps=2)
    first = train(EDTrainer, args, model=replaced(seeded_model()))
    safetensors.torch.save_file(first.model.state_dict(), tmp_path / "checkpoint-2" / "model.safetensors")
    assert_resumes_with(first.model, other_weights(replaced), args)


def test_layers_that_cannot_be_saved_are_refused_before_training(tmp_path):
    model = replaced(seeded_model())
    model.model.layers[0].mlp.scores = "sigmoid"
    options = {"train_dataset": make_dataset(), "num_domains": D, "beta": BETA}
    with pytest.raises(ValueError, match=r"edl::save_pretrained: .*to_transformers.*\(got scores='sigmoid'"):
        EDTrainer(model, arguments(tmp_path, save_strategy="steps"), **options)
    EDTrainer(model, arguments(tmp_path, save_strategy="no"), **options)


def test_a_checkpoint_without_experts_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    first = train(EDTrainer, args)
    kept = {
        name: value for name, value in first.model.state_dict().items() if not name.endswith("0.mlp.experts.down_proj")
    }
    safetensors.torch.save_file(kept, tmp_path / "checkpoint-2" / "model.safetensors")
    trainer = EDTrainer(other_weights(plain), args, train_dataset=make_dataset(), num_domains=D, beta=BETA)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=True)
    assert str(error.value) == (
        "edl::EDTrainerMixin: the checkpoint must hold every parameter of the model (got none for "
        f"model.layers.0.mlp.experts.down_proj in {tmp_path / 'checkpoint-2'})"
    )


def test_tied_weights_are_not_missed(tmp_path):
    args = arguments(tmp_path, learning_rate=1e-2, save_strategy="steps", save_steps=2, max_steps=2)
    models = []
    for seed in (0, 7):
        torch.manual_seed(seed)
        models.append(make_model("mixtral", torch.float64, tie_word_embeddings=True))
    first = train(EDTrainer, args, model=models[0])
    assert_resumes_with(first.model, models[1], args)
    assert models[1].lm_head.weight is models[1].model.embed_tokens.weight


# ---- several processes ----


# average_tokens_across_devices, gradient_accumulation_steps, two_passes
RANK_CASES = [(True, 1, False), (False, 2, False), (True, 2, True)]


def be_a_rank_of_torchrun():
    """Sets what the Trainer asks for; the process group exists already."""
    rank, world_size = (str(number) for number in (torch.distributed.get_rank(), torch.distributed.get_world_size()))
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def resume_on_rank(folder):
    be_a_rank_of_torchrun()
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    args = arguments(folder, **options, save_strategy="steps", save_steps=2)
    whole = train(EDTrainer, args)
    assert_steps(resume(args), whole.gradients[2:])


def test_two_processes_resume_with_their_memory(tmp_path):
    on_ranks(2, resume_on_rank, tmp_path)


def train_on_rank(folder):
    be_a_rank_of_torchrun()
    results = []
    for average, accumulation, two_passes in RANK_CASES:
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
        args = arguments(folder, ddp_backend="gloo", average_tokens_across_devices=average, **options)
        plain = train(Trainer, args, make_dataset(8))
        trainer = train(EDTrainer, args, make_dataset(8), two_passes=two_passes)
        assert trainer.args.world_size == 2
        results.append((trainer.gradients, added(trainer, plain), trainer.state.log_history))
    return results


def logged_values(log):
    return [entry["expert_divergence_loss"] for entry in log if "expert_divergence_loss" in entry]


def test_two_processes_have_the_gradient_of_one(tmp_path):
    ranks = on_ranks(2, train_on_rank, tmp_path)
    for case, (average, accumulation, two_passes) in enumerate(RANK_CASES):
        args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
        plain = train(Trainer, args, make_dataset(8))
        trainer = train(EDTrainer, args, make_dataset(8), two_passes=two_passes)
        for results in ranks:
            gradients, difference, log = results[case]
            assert_steps(difference, added(trainer, plain))
            if average:  # then the language-model loss, too, is that of one process
                assert_steps(gradients, trainer.gradients)
            assert logged_values(log) == pytest.approx(logged_values(trainer.state.log_history), rel=1e-5)


# ---- batches ----


def make_tokenizer(side="right"):
    vocabulary = {str(i): i for i in range(VOCABULARY)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")), pad_token="2", padding_side=side
    )


def make_documents(kind):
    """Documents that fill rows of 8 tokens, with a label each, or labels that change inside."""
    lengths = [5, 3, 4, 4, 6, 2]
    tokens = [torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    labels = [0, 1, 2, 1, -1, 0]
    if kind == "token":
        labels = [[label] * (n - 2) + [2, 0] for label, n in zip(labels, lengths)]
    targets = [[-100, *document[1:]] for document in tokens]  # left padding precedes the first token
    return datasets.Dataset.from_dict({"input_ids": tokens, "labels": targets, "domain_ids": labels})


@pytest.mark.parametrize("kind", ["document", "token"])
def test_padded_flattened_and_packed_documents_are_the_same(tmp_path, kind):
    documents = make_documents(kind)
    packed = documents.map(pack_documents, batched=True, fn_kwargs={"length": 8}, remove_columns=documents.column_names)
    padding = {side: DomainCollator(DataCollatorForSeq2Seq(make_tokenizer(side))) for side in ("right", "left")}
    batches = {
        "right": (documents, 6, padding["right"]),
        "left": (documents, 6, padding["left"]),
        "flattened": (documents, 6, DomainCollator(DataCollatorWithFlattening())),
        "packed": (packed, 3, None),
    }
    results = {
        name: train(EDTrainer, arguments(tmp_path, per_device_train_batch_size=size), dataset, data_collator=collator)
        for name, (dataset, size, collator) in batches.items()
    }
    value = results["right"].state.log_history[0]["expert_divergence_loss"]
    assert value != 0.0
    for trainer in results.values():
        assert trainer.state.log_history[0]["expert_divergence_loss"] == pytest.approx(value, rel=1e-5)
        assert_steps(trainer.gradients, results["right"].gradients)


# Documents of 6 and 2 tokens in the first row, and one of 8 in the second.
PACKED_POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1], list(range(8))])
ONE_ROW = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
# What a batch of packed documents has beside its tokens, and the boundaries that transformers' attention makes of it.
FORMS = {
    "positions": ({"position_ids": PACKED_POSITIONS}, [0, 6, 8, 16]),
    "positions that begin elsewhere": ({"position_ids": PACKED_POSITIONS + 3}, [0, 6, 8, 16]),
    "positions of one row": ({"position_ids": ONE_ROW[None]}, [0, 6, 8, 14, 16]),
    "four kinds of positions": ({"position_ids": PACKED_POSITIONS.expand(4, 2, 8)}, [0, 6, 8, 16]),
    "four kinds of one row": ({"position_ids": ONE_ROW.expand(4, 1, 8)}, [0, 6, 8, 14, 16]),
    "three kinds of positions": ({"position_ids": PACKED_POSITIONS.expand(3, 2, 8)}, [0, 8, 16]),
    "positions and a mask": (
        {"position_ids": PACKED_POSITIONS, "attention_mask": torch.ones(2, 8, dtype=torch.int64)},
        [0, 8, 16],
    ),
    "cu_seq_lens_q": ({"cu_seq_lens_q": torch.tensor([0, 6, 8, 16], dtype=torch.int32)}, [0, 6, 8, 16]),
    "seq_idx": ({"seq_idx": torch.tensor([[0] * 6 + [1] * 2, [0] * 8], dtype=torch.int32)}, [0, 6, 8, 16]),
    "seq_idx of one row": ({"seq_idx": torch.tensor([[0] * 6 + [1] * 2], dtype=torch.int32)}, [0, 6, 8, 14, 16]),
}
LABELS_OF_ROWS = {
    "per token": torch.tensor([[0] * 8, [1] * 8]),
    "per row": torch.tensor([0, 1]),
    "weights": torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5]]),
}


def packed_model(form):
    torch.manual_seed(0)
    model = make_model("qwen3_vl_moe" if "kinds" in form else "mixtral", torch.float64)
    model.config.get_text_config().use_cache = False  # the Trainer does so where the text is all of the model
    return model


def divergence_of_batch(folder, batch, model, warns=False):
    """What a training step on the batch logs, and whether it warned of documents of several domains."""
    tokens = make_dataset(4).with_format("torch")["input_ids"][:2]
    batch = {"input_ids": tokens, "labels": tokens, **batch}
    args = arguments(folder, max_steps=1, remove_unused_columns=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = train(EDTrainer, args, model=model, data_collator=lambda examples: dict(batch))
    told = [entry for entry in caught if "averaged once for each" in str(entry.message)]
    assert len(told) == warns
    return trainer.state.log_history[0]["expert_divergence_loss"]


def divergence_of_documents(batch, boundaries, labels, model):
    """The same of the documents passed as such, from the logits of the same forward pass."""
    handle = attach(model, num_domains=D, beta=1.0)
    model(**{"input_ids": make_dataset(4).with_format("torch")["input_ids"][:2], **batch})
    value = handle.loss(labels, cu_seqlens=torch.tensor(boundaries)).item()
    handle.remove()
    return value


@pytest.mark.parametrize("labels", LABELS_OF_ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_packed_documents_are_those_of_transformers(tmp_path, form, labels):
    batch, boundaries = FORMS[form]
    model, labels = packed_model(form), LABELS_OF_ROWS[labels]
    of_documents = labels if labels.shape == (2, 8) else labels[torch.tensor(boundaries[:-1]) // 8]
    value = divergence_of_documents(batch, boundaries, of_documents, model)
    assert divergence_of_batch(tmp_path, {**batch, "domain_ids": labels}, model) == pytest.approx(value, rel=1e-5)
    if boundaries != [0, 8, 16]:
        one_per_row = divergence_of_documents(batch, [0, 8, 16], LABELS_OF_ROWS["per token"], model)
        two_per_row = divergence_of_documents(batch, boundaries, LABELS_OF_ROWS["per token"], model)
        assert abs(one_per_row - two_per_row) > 1e-3


@pytest.mark.parametrize("name", ["position_ids", "seq_idx"])
def test_documents_are_counted_before_the_forward_passes_of_a_step(tmp_path, monkeypatch, name):
    """Once for each micro-batch, of which each has documents of its own; what the losses get are their boundaries."""
    events, lengths = [], [[6, 2, 8], [8, 8], [1, 7, 3, 5], [4, 4, 4, 4]]
    count, boundaries = _PackedDocuments.__init__, _PackedDocuments.boundaries

    def counting(documents, *arguments):
        events.append("counted")
        count(documents, *arguments)

    def bounding(documents):
        events.append(boundaries(documents).tolist())
        return boundaries(documents)

    monkeypatch.setattr(_PackedDocuments, "__init__", counting)
    monkeypatch.setattr(_PackedDocuments, "boundaries", bounding)
    tokens = make_dataset(4).with_format("torch")["input_ids"][:2]
    batches = []
    for of_batch in lengths:
        places = torch.cat([torch.arange(length) for length in of_batch]).view(2, 8)
        documents = torch.repeat_interleave(torch.arange(len(of_batch)), torch.tensor(of_batch)).view(2, 8)
        told = {"position_ids": places, "seq_idx": documents}[name]
        batches.append({"input_ids": tokens, "labels": tokens, "domain_ids": documents % D, name: told})
    numbers = itertools.cycle(batches)  # the next one is fetched early
    args = arguments(
        tmp_path, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=1, remove_unused_columns=False
    )
    train(EDTrainer, args, model=packed_model(""), two_passes=True, data_collator=lambda examples: dict(next(numbers)))
    expected = [[0, *itertools.accumulate(of_batch)] for of_batch in lengths]
    assert events == [*["counted"] * 2, *expected[:2] * 2, *["counted"] * 2, *expected[2:] * 2]


def test_a_cache_keeps_documents_together(tmp_path):
    batch, model = {"position_ids": PACKED_POSITIONS, "domain_ids": LABELS_OF_ROWS["per token"]}, packed_model("")
    args = arguments(tmp_path, max_steps=1, remove_unused_columns=False, use_cache=True)
    tokens = make_dataset(4).with_format("torch")["input_ids"][:2]
    batch |= {"input_ids": tokens, "labels": tokens}
    trainer = train(EDTrainer, args, model=model, data_collator=lambda examples: dict(batch))
    handle = attach(model, num_domains=D, beta=1.0)
    model(tokens, position_ids=PACKED_POSITIONS, use_cache=True)
    value = handle.loss(batch["domain_ids"]).item()
    assert trainer.state.log_history[0]["expert_divergence_loss"] == pytest.approx(value, rel=1e-5)


def test_documents_that_share_a_label_with_padding_behind_them(tmp_path):
    """Boundaries that end before the tokens do: what is left is not counted."""
    form, model = {"cu_seq_lens_q": torch.tensor([0, 6, 8, 12])}, packed_model("")
    labels = LABELS_OF_ROWS["per row"]
    value = divergence_of_documents(form, [0, 6, 8, 12], torch.tensor([0, 0, 1]), model)
    assert divergence_of_batch(tmp_path, {**form, "domain_ids": labels}, model) == pytest.approx(value, rel=1e-5)


def test_flattened_batches_with_boundaries_of_flash_attention(tmp_path):
    documents, results = make_documents("document"), {}
    for name, options in {
        "positions": {},
        "boundaries": {"return_flash_attn_kwargs": True, "return_position_ids": False},
        "sequences": {"return_seq_idx": True, "return_position_ids": False},
    }.items():
        collator = DomainCollator(DataCollatorWithFlattening(**options))
        batch = collator([documents[i] for i in range(6)])
        cu_seqlens = torch.tensor([0, 5, 8, 12, 16, 22, 24])
        model = packed_model("")
        handle = attach(model, num_domains=D, beta=1.0)
        model(**{key: value for key, value in batch.items() if key not in ("domain_ids", "labels")})
        value = handle.loss(batch["domain_ids"], cu_seqlens=cu_seqlens).item()
        args = arguments(tmp_path, per_device_train_batch_size=6)
        trainer = train(EDTrainer, args, documents, packed_model(""), data_collator=collator)
        results[name] = trainer.state.log_history[0]["expert_divergence_loss"]
        assert results[name] == pytest.approx(value, rel=1e-5)


MIXED = {
    "one document": (
        {"domain_ids": torch.tensor([[0] * 6 + [1] * 2, [1] * 8]), "position_ids": PACKED_POSITIONS},
        False,
    ),
    "unknown tokens": ({"domain_ids": torch.tensor([[0, -1] * 4, [1] * 8])}, False),
    "two documents without boundary": ({"domain_ids": torch.tensor([[0] * 6 + [1] * 2, [1] * 8])}, True),
    "a mask": (
        {
            "domain_ids": torch.tensor([[0] * 6 + [1] * 2, [1] * 8]),
            "position_ids": PACKED_POSITIONS,
            "attention_mask": torch.ones(2, 8, dtype=torch.int64),
        },
        True,
    ),
    "padding": (
        {
            "domain_ids": torch.tensor([[0] * 6 + [1] * 2, [1] * 8]),
            "attention_mask": torch.tensor([[1] * 6 + [0] * 2, [1] * 8]),
        },
        False,
    ),
    "another boundary": (
        {"domain_ids": torch.tensor([[0] * 6 + [1] * 2, [1] * 8]), "cu_seq_lens_q": torch.tensor([0, 5, 8, 16])},
        True,
    ),
}


@pytest.mark.parametrize("name", MIXED)
def test_documents_of_several_domains_are_warned_of_once(tmp_path, name):
    batch, warns = MIXED[name]
    divergence_of_batch(tmp_path, batch, packed_model(""), warns)


def test_boundaries_that_are_none_are_refused(tmp_path):
    for wrong, got in (([0, 6, 8, 16], "list"), (torch.tensor([[0, 16]]), "[1, 2]")):
        with pytest.raises(ValueError, match=re.escape("cu_seq_lens_q must be a tensor of whole numbers")) as error:
            divergence_of_batch(
                tmp_path, {"cu_seq_lens_q": wrong, "domain_ids": LABELS_OF_ROWS["per token"]}, packed_model("")
            )
        assert str(error.value).endswith(f"(got {got})")


def test_packing_keeps_labels_positions_and_targets():
    documents = {
        "input_ids": [[10, 11, 12], [], [20, 21, 22, 23, 24], [30, 31]],
        "domain_ids": [0, 1, [1, 1, 2, 2, 2], -1],
        "labels": [[10, -100, 12], [], [20, 21, 22, 23, 24], [30, 31]],
    }
    assert pack_documents(documents, length=4) == {
        "input_ids": [[10, 11, 12, 20], [21, 22, 23, 24]],
        "labels": [[-100, -100, 12, -100], [21, 22, 23, 24]],
        "position_ids": [[0, 1, 2, 0], [0, 1, 2, 3]],
        "domain_ids": [[0, 0, 0, 1], [1, 2, 2, 2]],
    }
    numbers = {**documents, "domain_ids": [numpy.int64(0), torch.tensor(1), torch.tensor([1, 1, 2, 2, 2]), -1]}
    assert pack_documents(numbers, length=4) == pack_documents(documents, length=4)
    del documents["labels"]
    assert pack_documents(documents, length=5)["labels"] == [[-100, 11, 12, -100, 21], [22, 23, 24, -100, 31]]
    assert pack_documents(documents, length=11) == {"input_ids": [], "labels": [], "position_ids": [], "domain_ids": []}


def collate(labels, lengths=(2, 3), collator=None, **features):
    examples = [
        {"input_ids": list(range(3, 3 + n)), **({} if label is None else {"domain_ids": label}), **features}
        for n, label in zip(lengths, labels, strict=True)
    ]
    return DomainCollator(collator or DataCollatorForSeq2Seq(make_tokenizer()))(examples)


def test_collator_keeps_every_kind_of_label():
    flattening = DataCollatorWithFlattening()
    assert collate([1, 2])["domain_ids"].tolist() == [1, 2]
    assert collate([torch.tensor(1), torch.tensor(2)])["domain_ids"].tolist() == [1, 2]
    assert collate([[0, 1], [2, 2, 0]])["domain_ids"].tolist() == [[0, 1, -1], [2, 2, 0]]
    assert collate([1, [2, 2, 0]])["domain_ids"].tolist() == [[1, 1, -1], [2, 2, 0]]
    left = DataCollatorForSeq2Seq(make_tokenizer("left"))
    assert collate([[0, 1], [2, 2, 0]], collator=left)["domain_ids"].tolist() == [[-1, 0, 1], [2, 2, 0]]
    assert collate([[0.25, 0.75], [1.0, 0.0]])["domain_ids"].tolist() == [[0.25, 0.75], [1.0, 0.0]]
    assert collate([1, 2], collator=flattening)["domain_ids"].tolist() == [[1, 1, 2, 2, 2]]
    assert collate([[0, 1], [2, 2, 0]], collator=flattening)["domain_ids"].tolist() == [[0, 1, 2, 2, 0]]
    assert collate([1], lengths=[3], collator=flattening)["domain_ids"].tolist() == [1]
    assert "domain_ids" not in collate([None, None])


@pytest.mark.parametrize("lengths", [(2, 3), (3, 3)])
def test_collator_keeps_weights_of_tokens(lengths):
    flattening = DataCollatorWithFlattening()
    weights = [[[0.25, 0.75]] * lengths[0], [[1.0, 0.0]] * lengths[1]]
    padding = [[0.0, 0.0]] * (3 - lengths[0])
    left = DataCollatorForSeq2Seq(make_tokenizer("left"))
    longer = DataCollatorForSeq2Seq(make_tokenizer(), pad_to_multiple_of=4)
    assert collate(weights, lengths)["domain_ids"].tolist() == [weights[0] + padding, weights[1]]
    assert collate(weights, lengths, left)["domain_ids"].tolist() == [padding + weights[0], weights[1]]
    one_more = [[[*row, [0.0, 0.0]] for row in (weights[0] + padding, weights[1])]]
    assert [collate(weights, lengths, longer)["domain_ids"].tolist()] == one_more
    assert collate(weights, lengths, flattening)["domain_ids"].tolist() == [weights[0] + weights[1]]


def shorten(examples):
    return {"input_ids": torch.zeros(len(examples), 2, dtype=torch.int64)}


BAD_BATCHES = {
    "some": (lambda: collate([1, None]), "DomainCollator: every example must have domain_ids (got 1 in 2 examples)"),
    "soft": (
        lambda: collate([[0.5, 0.5], [1.0, 0.0]], collator=DataCollatorWithFlattening()),
        "DomainCollator: soft labels of examples need one row per example (got examples flattened into one row)",
    ),
    "weights of other tokens": (
        lambda: collate([[[0.5, 0.5]] * 2, [[1.0, 0.0]] * 2]),
        "DomainCollator: domain_ids must be one label per example or per token (got 2x2 for 3 tokens)",
    ),
    "weights of tokens and of an example": (
        lambda: collate([[[0.5, 0.5]] * 2, [1.0, 0.0]]),
        "DomainCollator: soft labels must have as many weights in every example, one per domain (got 2x2 and 2)",
    ),
    "other tokens": (
        lambda: collate([[0, 1], [2, 2, 0]], collator=shorten),
        (
            "DomainCollator: the collator must pad each example to a row with an attention_mask, or flatten all into "
            "one row (got 2 rows of 2 for examples of [2, 3] tokens)"
        ),
    ),
    "label list": (
        lambda: collate([[0, 1], [2, 2]]),
        "DomainCollator: domain_ids must be one label per example or per token (got 2 for 3 tokens)",
    ),
    "no label": (
        lambda: collate([None, None], domain_ids=None),
        "DomainCollator: domain_ids must be a number, -1 = unknown, or a list of numbers (got None)",
    ),
    "pack names": (
        lambda: pack_documents({"input_ids": [[1, 2]], "domain_ids": ["wiki"]}, 2),
        "pack_documents: domain_ids must be a number, -1 = unknown, or a list of numbers (got 'wiki')",
    ),
    "pack length": (lambda: pack_documents({}, 0), "pack_documents: length must be at least 1, a whole number (got 0)"),
    "pack columns": (
        lambda: pack_documents({"input_ids": [[1, 2]]}, 2),
        "pack_documents: documents must have a column domain_ids (got ['input_ids'])",
    ),
    "pack soft": (
        lambda: pack_documents({"input_ids": [[1, 2]], "domain_ids": [[0.5, 0.5]]}, 2),
        "pack_documents: domain_ids must be whole numbers (got [0.5, 0.5])",
    ),
    "pack targets": (
        lambda: pack_documents({"input_ids": [[1, 2]], "domain_ids": [0], "labels": [[1]]}, 2),
        "pack_documents: labels must have one entry per token (got 1 for 2)",
    ),
    "pack lists of lists": (
        lambda: pack_documents({"input_ids": [[1, 2]], "domain_ids": [[[0, 1], [1, 0]]]}, 2),
        "pack_documents: domain_ids must be one label per example or per token (got 2x2 for 2 tokens)",
    ),
    "soft of several lengths": (
        lambda: collate([[0.5, 0.5], [1.0, 0.0, 0.0]]),
        ("DomainCollator: soft labels must have as many weights in every example, one per domain (got 2 and 3)"),
    ),
    "pack labels": (
        lambda: pack_documents({"input_ids": [[1, 2, 3]], "domain_ids": [[0, 1]]}, 2),
        "pack_documents: domain_ids must be one label per example or per token (got 2 for 3 tokens)",
    ),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_what_collator_and_packing_refuse(name):
    make, sentence = BAD_BATCHES[name]
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == f"edl::{sentence}"


@pytest.mark.parametrize("remove_unused_columns", [True, False])
def test_columns(tmp_path, remove_unused_columns):
    """The label column survives, and does not reach the model; lists of examples work as datasets do."""
    dataset = make_dataset(4).remove_columns("notes")
    args = arguments(tmp_path, remove_unused_columns=remove_unused_columns)
    wanted = train(EDTrainer, args, dataset).gradients
    assert_steps(train(EDTrainer, args, dataset.to_list()).gradients, wanted)


# ---- the rest of a run ----


@pytest.mark.parametrize("labels", [True, False])
def test_evaluation_and_prediction_are_left_as_they_are(tmp_path, labels):
    """Also in the middle of training, and whether or not the evaluation set has labels."""
    held_out = make_dataset(6, labels=labels)
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    plain = train(Trainer, args, eval_dataset=make_dataset(6, labels=False))
    trainer = train(EDTrainer, args, eval_dataset=held_out)
    losses, plain_losses = ([x["eval_loss"] for x in t.state.log_history if "eval_loss" in x] for t in (trainer, plain))
    assert losses == plain_losses and len(losses) == 5
    unlabelled = held_out.remove_columns("labels")
    assert (
        trainer.predict(unlabelled).predictions[0]
        == plain.predict(unlabelled.select_columns("input_ids")).predictions[0]
    ).all()


@pytest.mark.parametrize("family", CONFIGS)
def test_every_family_trains(tmp_path, family):
    """On edl's experts where it has them, with AdamW, gradient accumulation and clipping."""
    register()
    model = make_model(family, experts="edl")
    args = arguments(
        tmp_path,
        optim="adamw_torch",
        learning_rate=1e-2,
        num_train_epochs=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
    )
    options = {"scores": "sigmoid"} if family in ("deepseek_v3", "llama4") else {}
    trainer = train(EDTrainer, args, model=model, divergence_options=options)
    values = [entry["expert_divergence_loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(values) == 24 and sum(values[-6:]) / 6 < sum(values[:6]) / 6 - 0.5


def test_logs_average_over_micro_batches_since_the_last_log(tmp_path):
    every = train(EDTrainer, arguments(tmp_path)).state.log_history
    values = [entry["expert_divergence_loss"] for entry in every if "loss" in entry]
    rare = train(EDTrainer, arguments(tmp_path, logging_steps=5)).state.log_history
    assert rare[0]["expert_divergence_loss"] == pytest.approx(sum(values) / 5, rel=1e-5)


def test_beta_follows_a_callback(tmp_path):
    class Off(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.trainer.expert_divergence.beta = BETA if state.global_step == 0 else 0.0

    off = Off()

    class Scheduled(EDTrainer):
        def train(self, *args, **kwargs):
            off.trainer = self
            self.add_callback(off)
            return super().train(*args, **kwargs)

    plain, full = (train(kind, arguments(tmp_path, max_steps=2)) for kind in (Trainer, EDTrainer))
    scheduled = train(Scheduled, arguments(tmp_path, max_steps=2), num_domains=D, beta=BETA)
    assert_steps(scheduled.gradients, [full.gradients[0], plain.gradients[1]])


def test_checkpointing_compilation_and_model_init_change_nothing(tmp_path):
    wanted = train(EDTrainer, arguments(tmp_path, max_steps=2)).gradients
    checkpointed = train(EDTrainer, arguments(tmp_path, max_steps=2, gradient_checkpointing=True))
    assert_steps(checkpointed.gradients, wanted)
    args = arguments(tmp_path, max_steps=2, torch_compile=True, torch_compile_backend="eager")
    assert_steps(train(EDTrainer, args).gradients, wanted)
    made_anew = train(EDTrainer, arguments(tmp_path, max_steps=2), model_init=seeded_model)
    assert_steps(made_anew.gradients, wanted)
    assert made_anew.expert_divergence.model is made_anew.model


# ---- what it refuses ----


def test_batches_without_labels_are_an_error(tmp_path):
    with pytest.raises(ValueError) as error:
        train(EDTrainer, arguments(tmp_path), make_dataset(labels=False))
    assert str(error.value) == (
        "edl::EDTrainerMixin: every training batch must have domain_ids, from a column of the dataset and a collator "
        "that keeps it, such as DomainCollator (got ['input_ids', 'labels'])"
    )


LABELS_OF_OTHER_KINDS = {"text": "web", "text per token": ["web"] * 8, "nothing": None}


@pytest.mark.parametrize("collator", ["default", "padding", "language modelling", "DomainCollator"])
@pytest.mark.parametrize("name", LABELS_OF_OTHER_KINDS)
def test_labels_that_are_no_numbers_are_refused_as_such(tmp_path, name, collator):
    label, tokenizer = LABELS_OF_OTHER_KINDS[name], make_tokenizer()
    collators = {
        "default": lambda: None,
        "padding": lambda: DataCollatorWithPadding(tokenizer),
        "language modelling": lambda: DataCollatorForLanguageModeling(tokenizer, mlm=False),
        "DomainCollator": lambda: DomainCollator(default_data_collator),
    }
    dataset = make_dataset(4, labels=False).add_column("domain_ids", [label] * 4)
    with pytest.raises(ValueError) as error:
        train(EDTrainer, arguments(tmp_path), dataset, data_collator=collators[collator]())
    assert str(error.value) == (
        f"edl::EDTrainerMixin: domain_ids must be a number, -1 = unknown, or a list of numbers (got {label!r})"
    )


def test_text_labels_become_numbers(tmp_path):
    """As the documentation has it."""
    texts = make_dataset(4, labels=False).add_column("domain_ids", ["web", "code", "web", "papers"])
    numbers = make_dataset(4, labels=False).add_column("domain_ids", [2, 0, 2, 1])
    values = [
        train(EDTrainer, arguments(tmp_path), dataset).state.log_history[0]["expert_divergence_loss"]
        for dataset in (texts.class_encode_column("domain_ids"), numbers)
    ]
    assert values[0] == values[1] != 0


def test_collators_that_pad_keep_one_label_per_example(tmp_path):
    documents = make_documents("document").remove_columns("labels")
    results = []
    for collator in (
        DataCollatorForLanguageModeling(make_tokenizer(), mlm=False),
        DomainCollator(DataCollatorForLanguageModeling(make_tokenizer(), mlm=False)),
    ):
        trainer = train(
            EDTrainer, arguments(tmp_path, per_device_train_batch_size=6), documents, data_collator=collator
        )
        results.append(trainer.gradients)
    assert_steps(*results)
    with pytest.raises(ValueError):  # lists of several lengths
        per_token = make_documents("token").remove_columns("labels")
        train(
            EDTrainer,
            arguments(tmp_path, per_device_train_batch_size=6),
            per_token,
            data_collator=DataCollatorForLanguageModeling(make_tokenizer(), mlm=False),
        )


def test_reentrant_checkpointing_is_an_error(tmp_path):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="activation checkpointing must be non-reentrant"):
        train(EDTrainer, arguments(tmp_path, **options))


@pytest.mark.parametrize("parallel", ["DataParallel", "tensor"])
def test_parallelism_that_shares_sequences_is_an_error(tmp_path, parallel, monkeypatch):
    args = arguments(tmp_path)
    if parallel == "DataParallel":
        args._n_gpu = 2
        sentence = (
            "each process must have one device, start with torchrun or accelerate launch (got DataParallel over 2)"
        )
    else:
        monkeypatch.setattr(Trainer, "get_tp_size", lambda self: 2)
        sentence = "ranks must not share sequences (got tensor, context and sequence parallel sizes (2, 1, 1))"
    with pytest.raises(ValueError) as error:
        EDTrainer(seeded_model(), args, train_dataset=make_dataset(), num_domains=D, beta=BETA)
    assert str(error.value) == f"edl::EDTrainerMixin: {sentence}"


def test_two_passes_have_a_memory_of_their_own(tmp_path):
    options = {"two_passes": True, "divergence_options": {"memory": edl.DomainMemory()}}
    with pytest.raises(ValueError) as error:
        train(EDTrainer, arguments(tmp_path), **options)
    assert (
        str(error.value) == "edl::EDTrainerMixin: two_passes has a memory of its own (got memory in divergence_options)"
    )


def test_models_without_routers_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="model must hold routers"):
        EDTrainer(nn.Linear(2, 2), arguments(tmp_path), num_domains=D, beta=BETA)


# ---- the documentation ----


def diff_of_the_documentation():
    return (
        re.search(r"```diff\n(.*?)```", (ROOT / "docs" / "transformers.md").read_text(), re.DOTALL)
        .group(1)
        .splitlines()
    )


@pytest.mark.parametrize("marker", "-+")
def test_the_diff_of_the_documentation_runs(tmp_path, marker, monkeypatch):
    """The script before and after, on a model and data set as it expects them."""
    lines = diff_of_the_documentation()
    assert sum(line.startswith("+") for line in lines) <= 5
    script = "\n".join(line[1:] for line in lines if not line or line[0] in f" {marker}")
    assert ("edl" in script) == (marker == "+")
    make_model("mixtral").save_pretrained(tmp_path / "model")
    make_dataset().rename_column("domain_ids", "source").save_to_disk(tmp_path / "data")
    (tmp_path / "script.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    log = runpy.run_path("script.py")["trainer"].state.log_history
    assert len([entry for entry in log if "loss" in entry]) == 9  # 20 rows, 3 epochs of 3 steps
    assert all(("expert_divergence_loss" in entry) == (marker == "+") for entry in log if "loss" in entry)


# ---- what is logged ----


def labelled(labels: list[int]):
    return make_dataset(num_rows=len(labels)).remove_columns("domain_ids").add_column("domain_ids", labels)


def test_batches_without_a_pair_of_domains_stay_out_of_logged_means(tmp_path):
    dataset = labelled([0, 0, 1, -1, 0, 1, 2, 1])  # two of four batches hold a pair
    args = arguments(tmp_path, per_device_train_batch_size=2, logging_steps=4)
    (entry,) = [entry for entry in train(EDTrainer, args, dataset).state.log_history if "loss" in entry]
    model, losses = seeded_model(), []
    for rows in ([4, 5], [6, 7]):
        logits = model(torch.tensor(dataset[rows]["input_ids"]), output_router_logits=True).router_logits
        labels = torch.tensor(dataset[rows]["domain_ids"])
        losses.append(edl.ExpertDivergenceLoss(D, layer_reduction="none")([*logits], labels))
    losses = torch.stack(losses).double()
    assert entry["expert_divergence_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    # Of a single pair the loss is -log(nats + eps).
    assert entry["expert_divergence/nats"] == pytest.approx(((-losses).exp() - 1e-6).mean().item(), rel=1e-4)
    assert entry["expert_divergence/pairs"] == 0.5


@pytest.mark.parametrize("accumulation, pairs", [(1, 1.0), (2, 2.0)])
def test_pairs_and_nats_are_those_of_the_loss(tmp_path, accumulation, pairs):
    """A memory compares with the micro-batches before: one pair in the first, three in the second."""
    dataset = labelled([0, 1, 0, 2] if accumulation == 2 else [0, 1, 2, 2])
    size = 2 if accumulation == 2 else 3
    args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, max_steps=1)
    (entry,) = [entry for entry in train(EDTrainer, args, dataset).state.log_history if "loss" in entry]
    assert entry["expert_divergence/pairs"] == (pairs if accumulation == 2 else 3.0)
    assert 0 < entry["expert_divergence/nats"] < numpy.log(2)


@pytest.mark.parametrize("labels", [[0] * 12, [-1] * 12], ids=["one domain", "no label"])
def test_steps_without_a_pair_log_no_loss_and_warn_once(tmp_path, labels, monkeypatch):
    assert edl.objectives.log.STEPS_WITHOUT_EFFECT == 100
    monkeypatch.setattr(edl.objectives.log, "STEPS_WITHOUT_EFFECT", 4)
    args = arguments(tmp_path, per_device_train_batch_size=1, logging_steps=2)
    told = "^edl::Objectives: a batch must hold something for expert_divergence to act on"
    with pytest.warns(UserWarning, match=told) as caught:
        trainer = train(EDTrainer, args, labelled(labels))
    assert sum("must hold something" in str(warning.message) for warning in caught) == 1
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        assert entry["expert_divergence/pairs"] == 0
        assert "expert_divergence_loss" not in entry and "expert_divergence/nats" not in entry
