"""What test_documents.py runs on ranks."""

import megatron_on_cpu
import numpy
import torch

LENGTH, DOCUMENTS = 16, 40


class Tokenizer:
    """As much of Megatron's as a data set asks for."""

    eod, pad, vocab_size = 0, DOCUMENTS + 1, DOCUMENTS + 2
    unique_identifiers = {"class": "Tokenizer"}  # noqa: RUF012


def labels_of(generator):
    return generator.integers(-1, 3, DOCUMENTS).astype(numpy.int16)


def write(folder, generator):
    """A data path whose tokens are the numbers of their documents, some of two sequences; and labels for it."""
    import json

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{folder}/data/part.bin", dtype=numpy.int32)
    for document in range(DOCUMENTS):
        lengths = generator.integers(1, 30, 1 + document % 2).tolist()
        builder.add_document(torch.full([sum(lengths)], document + 1, dtype=torch.int32), lengths)
    builder.finalize(f"{folder}/data/part.idx")
    labels = labels_of(generator)
    numpy.save(f"{folder}/labels/part.npy", labels)
    index = {"version": 1, "domains": ["a", "b", "c"], "counts": {}}
    shards = [{"name": "part", "documents": DOCUMENTS}]
    with open(f"{folder}/labels/domains.json", "w") as file:
        json.dump({**index, "shards": shards}, file)
    return labels


def data_set(folder, labels, **options):
    """Samples of Megatron's own builder."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from edl.integrations.megatron import label_documents

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=([f"{folder}/data/part"], None),
        split="1,0,0",
        path_to_cache=f"{folder}/cache",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        **options,
    )
    builder = BlendedMegatronDatasetBuilder(label_documents(GPTDataset, labels), [200, 0, 0], lambda: True, config)
    return builder.build()[0]


def slices(domain_ids):
    """(what a forward step's scope holds of labels [B, S_len], by this rank's own cutting), on TP 2 × CP 2."""
    import small_gpt
    from megatron.core import parallel_state

    import edl
    from edl.integrations import megatron as edl_megatron

    megatron_on_cpu.enable()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2, context_parallel_size=2)
    config = small_gpt.make_config(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2)
    patch = {"num_domains": small_gpt.DOMAINS, "coeff": small_gpt.COEFF}
    model = small_gpt.build(config, lambda spec: edl_megatron.patch_spec(spec, **patch), small_gpt.GatheredAttention)
    small_gpt.init_micro_batches(len(domain_ids), 1)
    seen = []
    step = edl_megatron.with_domain_ids(
        lambda iterator, model: seen.append(edl.current_labels().domain_ids), sequence_length=domain_ids.shape[1]
    )
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    step(iter([{"domain_ids": domain_ids}]) if reads else None, model.train())
    quarter = domain_ids.shape[1] // 4
    rank = parallel_state.get_context_parallel_rank()
    own = [domain_ids[:, part * quarter : (part + 1) * quarter] for part in (rank, 3 - rank)]
    return seen[0], torch.cat(own, 1)
