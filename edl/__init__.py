"""Expert Divergence Learning for Mixture-of-Experts language models."""

from edl import _extension

_extension.load()

from edl import ops, reference, segments  # noqa: E402
from edl._build import version as __version__  # noqa: E402  (load() turns a missing build into a sentence)
from edl.divergence import ExpertDivergenceLoss, expert_divergence_loss  # noqa: E402

cmake_prefix_path = _extension.CMAKE_PREFIX_PATH

__all__ = [
    "ExpertDivergenceLoss",
    "__version__",
    "cmake_prefix_path",
    "expert_divergence_loss",
    "ops",
    "reference",
    "segments",
]
