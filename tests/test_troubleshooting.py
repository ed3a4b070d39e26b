"""Each sentence that docs/troubleshooting.md quotes is one that the sources can say."""

import ast
import re

import pytest
from commands import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
HOLE = "…"
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|//[^\n]*|[^"()/]+|/')
RAISES = re.compile(r"\b(?:EDL_ENSURE|EDL_ENSURE_INDEX|TORCH_CHECK|TORCH_CHECK_VALUE|TORCH_CHECK_INDEX)\(")


def of_python(text):
    """All strings, with holes for what an f-string fills in."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def of_cpp(text):
    """What each check says, with holes for what stands between its strings."""
    for check in RAISES.finditer(text):
        depth, parts = 1, []
        for token in TOKEN.finditer(text, check.end()):
            depth += {"(": 1, ")": -1}.get(token[0], 0)
            if depth == 0:
                break
            if token[0].startswith('"'):
                parts.append(token[0][1:-1].replace('\\"', '"'))
            elif token[0].strip() and parts[-1:] != [HOLE]:
                parts.append(HOLE)
        yield "".join(parts)


def sentences():
    for path in [*(ROOT / "edl").rglob("*.py"), ROOT / "setup.py"]:
        yield from of_python(path.read_text())
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu"):
            yield from of_cpp(path.read_text())
    yield from (ROOT / ".ci" / "preconditions").read_text().splitlines()


SENTENCES = list(dict.fromkeys(sentences()))
QUOTES = re.findall(r"^\| `([^`]{12,})` \|", PAGE, re.MULTILINE)


def says(sentence, quote):
    """Whether the quoted words stand in a sentence, in their order, each run of them between two holes."""
    place = 0
    for words in quote.removeprefix("edl::" + HOLE).split(HOLE):
        place = sentence.find(words, place)
        if place < 0:
            return False
        place += len(words)
    return True


@pytest.mark.parametrize("quote", QUOTES)
def test_what_is_quoted_is_said(quote):
    assert any(says(sentence, quote) for sentence in SENTENCES)


def test_what_is_not_said_is_found_out():
    assert len(QUOTES) >= 60 and len(set(QUOTES)) == len(QUOTES)
    assert says("edl::…: domain_ids must have one row per sequence, … (got …)", "edl::…: domain_ids must have one row")
    assert says("…: labels must be at least -1 and below num_domains = …", "edl::…: labels must be at least -1")
    assert not says("edl::a: x must be … and y (got …)", "edl::a: x must be z and y")
    assert not any(says(sentence, "edl::…: labels must be at most") for sentence in SENTENCES)
