"""What the tokens of a batch count for: masks, packing, labels, and the scope that brings them to routers; labels from
files, and batches that hold several domains."""

from edl.labels.batch_sampler import DomainBatchSampler
from edl.labels.files import LabelFiles, read

__all__ = ["DomainBatchSampler", "LabelFiles", "read"]
