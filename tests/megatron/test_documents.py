"""Labels of documents in Megatron's data sets: each token has that of its own, in any sample and on any rank."""

import importlib.util

import numpy
import pytest
import torch
from ranks import on_ranks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("megatron.core") is None, reason="needs megatron-core")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "labels").mkdir()
    return tmp_path


def test_each_token_has_the_label_of_its_document(folder):
    import labelled_documents

    import edl

    labels = torch.from_numpy(labelled_documents.write(folder, numpy.random.default_rng(0))).long()
    for options in ({}, {"add_extra_token_to_sequence": False}):
        samples = labelled_documents.data_set(folder, edl.labels.read(folder / "labels"), **options)
        assert len(samples) >= 200
        seen = 0
        for sample in (samples[i] for i in range(len(samples))):
            tokens = sample["tokens"]
            is_document = (tokens > 0) & (tokens <= labelled_documents.DOCUMENTS)
            expected = labels[(tokens - 1).clamp(min=0)].where(is_document, -1)
            assert sample["domain_ids"].dtype == torch.int64 and torch.equal(sample["domain_ids"], expected)
            seen += int((tokens.diff() != 0).sum())
        assert seen > 100  # documents that begin inside of samples
    batch = next(iter(torch.utils.data.DataLoader(samples, 4)))
    assert batch["domain_ids"].shape == (4, labelled_documents.LENGTH)
    assert samples[None]["domain_ids"].eq(-1).all()  # what fills a batch


def test_refused_with_a_sentence(folder):
    import labelled_documents
    from megatron.core.datasets.gpt_dataset import GPTDataset

    import edl
    from edl.integrations.megatron import label_documents, with_domain_ids

    labelled_documents.write(folder, numpy.random.default_rng(0))
    labels = edl.labels.read(folder / "labels")
    with pytest.raises(
        ValueError, match=r"^edl::megatron.label_documents: dataset must be Megatron's GPTDataset \(got"
    ):
        label_documents(list, labels)
    with pytest.raises(ValueError, match="^edl::megatron.label_documents: labels must be those of edl.labels.read"):
        label_documents(GPTDataset, {})
    with pytest.raises(ValueError, match="^edl::megatron.with_domain_ids: domains are those of data paths"):
        with_domain_ids(print, [0], sequence_length=4)
    index = folder / "labels" / "domains.json"
    numpy.save(folder / "labels" / "part.npy", numpy.zeros(7, numpy.int16))
    index.write_text(index.read_text().replace(str(labelled_documents.DOCUMENTS), "7"))
    with pytest.raises(ValueError, match="a shard must have a label for each document of its data path"):
        labelled_documents.data_set(folder, edl.labels.read(folder / "labels"))
    (folder / "labels" / "part.npy").rename(folder / "labels" / "other.npy")
    index.write_text(index.read_text().replace("part", "other"))
    with pytest.raises(ValueError, match="a data path must end in the name of a shard"):
        labelled_documents.data_set(folder, edl.labels.read(folder / "labels"))


def test_tensor_and_context_parallel_ranks_have_their_part():
    import labelled_documents

    domain_ids = torch.randint(-1, 3, (2, 16), generator=torch.Generator().manual_seed(0))
    for seen, expected in on_ranks(4, labelled_documents.slices, domain_ids):
        assert torch.equal(seen, expected)
