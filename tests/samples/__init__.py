"""One table of inputs for every operator; the tests of all claims that hold for every operator read it.

Adding an operator: add `<op>.py` with its SAMPLES and its REFUSALS.
"""

import importlib
import pkgutil

from samples.tables import DTYPES, Refusal, Sample, operator

__all__ = ["DTYPES", "REFUSALS", "SAMPLES", "Refusal", "Sample", "operator"]

_TABLES = [
    importlib.import_module(f"samples.{module.name}")
    for module in pkgutil.iter_modules(__path__)
    if module.name != "tables"
]
SAMPLES: list[Sample] = [sample for table in _TABLES for sample in table.SAMPLES]
REFUSALS: list[Refusal] = [refusal for table in _TABLES for refusal in table.REFUSALS]
