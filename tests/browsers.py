"""A browser for tests of pages."""

import contextlib

import pytest
import screenshots


@contextlib.contextmanager
def started_or_skipped():
    """A headless browser; where there is none, the tests are skipped with the reason."""
    try:
        browser = screenshots.start_browser()
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        yield browser
    finally:
        browser.quit()
