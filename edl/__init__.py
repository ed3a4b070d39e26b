"""Expert Divergence Learning for Mixture-of-Experts language models."""

from edl import _extension

_extension.load()

from edl._build import version as __version__  # noqa: E402  (load() turns a missing build into a sentence)

cmake_prefix_path = _extension.CMAKE_PREFIX_PATH
