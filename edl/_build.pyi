"""Facts about this build of edl: csrc/python/build_facts.cpp."""

version: str
torch_version: str
cuda_version: str  # empty: built without CUDA
compiler: str
instruction_sets: tuple[str, ...]
