"""`EDTrainerMixin(domains_per_batch=...)`: the Trainer's batches are those of `DomainBatchSampler`, of all processes
together, in every epoch and where a training resumes."""

import itertools
import os

import pytest
import torch
from ranks import on_ranks
from torch.utils.data import StackDataset

from edl.labels import DomainBatchSampler

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
pytest.importorskip("transformers")

from transformers import Trainer, TrainingArguments  # noqa: E402
from transformers_models import VOCABULARY, make_model  # noqa: E402

from edl.integrations.transformers import DomainCollator, EDTrainerMixin  # noqa: E402
from edl.objectives import ModalityDivergence, RouterZ  # noqa: E402

LABELS = torch.tensor([0, 0, 1, 0, 2, 0, 0, -1, 1, 0, 0, 2, 0] * 2)  # 26 sequences, most of one domain


class EDTrainer(EDTrainerMixin, Trainer):
    """Keeps the sequences of every micro-batch, which their first token tells."""

    def training_step(self, model, inputs, *arguments, **options):
        self.seen = [*getattr(self, "seen", []), (inputs["input_ids"][:, 0] - 3).tolist()]
        return super().training_step(model, inputs, *arguments, **options)


def columns():
    tokens = torch.randint(3, VOCABULARY, (len(LABELS), 6), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = 3 + torch.arange(len(LABELS))
    return {"input_ids": tokens, "labels": tokens, "domain_ids": LABELS}


def hugging_face():
    return datasets.Dataset.from_dict({name: column.tolist() for name, column in columns().items()})


def arguments(folder, **options):
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 3, "seed": 7, "use_cpu": True, "report_to": []}
    defaults |= {"learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True}
    defaults |= {"dataloader_pin_memory": False, "dataloader_drop_last": True}
    return TrainingArguments(output_dir=str(folder), **{**defaults, **options})


def make_trainer(args, dataset=None, **options):
    torch.manual_seed(0)
    options = {"num_domains": 3, "beta": 0.1, "domains_per_batch": 2, **options}
    return EDTrainer(
        make_model("mixtral"), args, train_dataset=hugging_face() if dataset is None else dataset, **options
    )


def wanted_batches(batch_size, epochs, each=1, seed=7, drop_last=True):
    sampler = DomainBatchSampler(LABELS, batch_size, 2, each, rank=0, num_ranks=1, seed=seed, drop_last=drop_last)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        yield from sampler


@pytest.mark.parametrize("options", [{}, {"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("make", [hugging_face, lambda: StackDataset(**columns())], ids=["datasets", "torch"])
def test_its_batches_are_those_of_the_sampler(tmp_path, make, options):
    trainer = make_trainer(arguments(tmp_path, **options), make())
    trainer.train()
    assert trainer.seen == list(wanted_batches(4, 3))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all("expert_divergence_loss" in entry for entry in logged)  # none without a pair of domains


def test_the_last_batch_and_the_seed_are_those_of_the_arguments(tmp_path):
    trainer = make_trainer(arguments(tmp_path, dataloader_drop_last=False, data_seed=3), sequences_per_domain=2)
    with pytest.warns(UserWarning, match="2 domains with 2 sequences each"):
        trainer.train()
    with pytest.warns(UserWarning, match="2 domains with 2 sequences each"):
        assert trainer.seen == list(wanted_batches(4, 3, 2, 3, drop_last=False))


@pytest.mark.parametrize("steps", [4, 6, 8])
def test_a_training_resumes_in_the_middle_of_an_epoch(tmp_path, steps):
    args = arguments(tmp_path, save_strategy="steps", save_steps=steps)
    whole = make_trainer(args)
    whole.train()
    resumed = make_trainer(args)
    resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{steps}")
    assert resumed.seen == whole.seen[steps:]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def seen_on_rank(folder):
    rank, world_size = (str(number) for number in (torch.distributed.get_rank(), torch.distributed.get_world_size()))
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    options = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 8}
    whole = make_trainer(arguments(folder, **options))
    whole.train()
    resumed = make_trainer(arguments(folder, **options))
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-8")
    return whole.seen, resumed.seen


def test_batches_are_of_all_processes_together_also_where_they_resume(tmp_path):
    """After 8 of 6 batches an epoch, that is in the second."""
    ranks = on_ranks(2, seen_on_rank, tmp_path)
    together = [first + second for first, second in zip(*(whole for whole, _ in ranks), strict=True)]
    assert together == list(wanted_batches(4, 3))
    for whole, resumed in ranks:
        assert resumed == whole[8:]


def test_without_it_the_batches_are_the_trainers_own(tmp_path):
    trainer = make_trainer(arguments(tmp_path), domains_per_batch=None)
    trainer.train()
    assert trainer.seen[:6] != list(wanted_batches(4, 1))
    assert len(set(itertools.chain.from_iterable(trainer.seen[:6]))) == 24


def unlabelled():
    return hugging_face().remove_columns("domain_ids")


def labelled_by_token():
    return hugging_face().map(lambda example: {"domain_ids": [0] * 6})


@pytest.mark.parametrize(
    "sentence, dataset, options, of_arguments",
    [
        (
            "sequences_per_domain needs domains_per_batch",
            None,
            {"domains_per_batch": None, "sequences_per_domain": 2},
            {},
        ),
        ("train_sampling_strategy 'random'", None, {}, {"train_sampling_strategy": "group_by_length"}),
        ("known length", hugging_face().to_iterable_dataset, {}, {"max_steps": 3}),
        (
            "an objective with labels domain_ids",
            None,
            {"num_domains": None, "beta": None, "objectives": {"z": (RouterZ(), 1e-3)}},
            {},
        ),
        (
            r"an objective with labels domain_ids \(got labels \['modality_ids'\]\)",
            None,
            {
                "num_domains": None,
                "beta": None,
                "objectives": {"modality": (ModalityDivergence(num_modalities=2), 1e-3)},
            },
            {},
        ),
        ("domain_ids in every example", unlabelled, {}, {}),
        ("labels must be whole numbers", labelled_by_token, {}, {}),
        ("labels must have at least 4 domains", None, {"domains_per_batch": 4}, {}),
        ("domains_per_batch must be at least 1", None, {"domains_per_batch": 0}, {}),
        ("domains_per_batch must be an integer", None, {"domains_per_batch": "two"}, {}),
    ],
)
def test_what_cannot_be_is_a_sentence(tmp_path, sentence, dataset, options, of_arguments):
    with pytest.raises(ValueError, match=f"^edl::.*{sentence}"):
        made = None if dataset is None else dataset()
        collator = DomainCollator(lambda examples: {"input_ids": torch.tensor([e["input_ids"] for e in examples])})
        make_trainer(arguments(tmp_path, **of_arguments), made, data_collator=collator, **options).train()
