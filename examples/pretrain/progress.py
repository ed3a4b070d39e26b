"""Progress bars."""

import sys

import tqdm


def bar(iterable=None, **options):
    """Returns a tqdm bar; where nobody watches, it writes one line now and then instead of ten a second."""
    patience = 0.1 if sys.stderr.isatty() else 20
    return tqdm.tqdm(iterable, mininterval=patience, dynamic_ncols=True, **options)
