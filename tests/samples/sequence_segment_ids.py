"""Samples of sequence_segment_ids(labels, num_tokens)."""

import torch

from samples.tables import Inputs, Refusal, Sample


def _sequence_segment_ids(case, batch, length, dtype=torch.int64, layout="dense"):
    def make(inputs: Inputs) -> tuple:
        labels = inputs.ids(batch, 2, low=-1, high=3, dtype=dtype)
        return labels[:, 0] if layout == "strided" else labels[:, 0].contiguous(), batch * length

    return Sample("sequence_segment_ids", case, make)


SAMPLES = [
    _sequence_segment_ids("small", 5, 3),
    _sequence_segment_ids("int32", 40, 17, dtype=torch.int32),
    _sequence_segment_ids("no-sequence", 0, 3),
    _sequence_segment_ids("no-token", 4, 0),
    _sequence_segment_ids("one-token-each", 9, 1),
    _sequence_segment_ids("strided", 30, 7, layout="strided"),
]

REFUSALS = [
    Refusal(
        *("sequence_segment_ids", "rank", lambda inputs: (inputs.ids(4, 2, low=0, high=2), 8)),
        "edl::sequence_segment_ids: labels must be int32 or int64 of the shape [B] (got 2 dimensions of Long)",
    ),
    Refusal(
        *("sequence_segment_ids", "dtype", lambda inputs: (inputs.normal(4), 8)),
        "edl::sequence_segment_ids: labels must be int32 or int64 of the shape [B] (got 1 dimensions of Double)",
    ),
    Refusal(
        *("sequence_segment_ids", "length", lambda inputs: (inputs.ids(4, low=0, high=2), 10)),
        "edl::sequence_segment_ids: the tokens must be a whole number of sequences of one length (got 10 tokens for 4 "
        "sequences)",
    ),
    Refusal(
        *("sequence_segment_ids", "no-sequence", lambda inputs: (inputs.ids(0, low=0, high=2), 10)),
        "edl::sequence_segment_ids: the tokens must be a whole number of sequences of one length (got 10 tokens for 0 "
        "sequences)",
    ),
    Refusal(
        *("sequence_segment_ids", "negative", lambda inputs: (inputs.ids(4, low=0, high=2), -4)),
        "edl::sequence_segment_ids: num_tokens must not be negative (got -4)",
    ),
]
