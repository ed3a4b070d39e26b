"""Connections to training frameworks; each imports its framework only when used."""

import importlib
import sys


def tell_transformers() -> None:
    """Lets the `save_pretrained` of models, if there are any in this process, know of layers."""
    if "transformers" in sys.modules:  # which imports its models when they are asked for
        importlib.import_module("edl.integrations.transformers.blocks").write_names_of_families()
