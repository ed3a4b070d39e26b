"""Which of its two interfaces the installed torchtitan has."""

try:
    import torchtitan.models.common.aux_loss  # noqa: F401
except ModuleNotFoundError:  # up to 0.3.0
    HAS_AUX_LOSS = False
else:
    HAS_AUX_LOSS = True
