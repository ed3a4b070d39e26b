"""Sections of the caller's own on a page: shown where they belong, and markup only where the caller made it."""

import pytest
from synthetic_findings import findings

from edl.report.page import Section, page

pytest.importorskip("scipy")
markupsafe = pytest.importorskip("markupsafe")
pytest.importorskip("jinja2")


def test_sections_stand_after_the_answer_and_in_the_navigation():
    made = [
        Section("The <arms>", markupsafe.Markup('<p>one <img src="data:," alt="a picture"></p>')),
        Section("Foreign", "<p>& two</p>"),
    ]
    html = page([findings()], sections=made)
    places = [html.index(text) for text in ('id="answer"', 'id="section-1"', 'id="section-2"', 'id="load"')]
    assert places == sorted(places)
    assert '<a href="#section-1">The &lt;arms&gt;</a>' in html and "<h2>The &lt;arms&gt;</h2>" in html
    assert '<p>one <img src="data:," alt="a picture"></p>' in html
    assert "&lt;p&gt;&amp; two&lt;/p&gt;" in html and "<p>& two" not in html


def test_no_section_of_ones_own():
    assert "section-1" not in page([findings()])
