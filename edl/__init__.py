"""Expert Divergence Learning for Mixture-of-Experts language models."""

from edl import _extension

_extension.load()
