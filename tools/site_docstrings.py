"""What the site makes of docstrings: papers linked, arguments that share a line told apart, examples as Python."""

import re

import griffe

_SOURCE = re.compile(r"^Source: (?P<text>.*(?:\n +.*)*)", re.MULTILINE)
_PAPER = re.compile(r"(?<![\w/.])\d{4}\.\d{5}(?!\w)")
_NAMED_PAPER = re.compile(r"(?<=arXiv )\d{4}\.\d{5}(?!\w)")
_REPOSITORY = re.compile(r"(?<![/\w])github\.com/[\w-]+/[\w-]+")
_SECTION = re.compile(r"^(?:Args|Attributes):\n(?: +.*\n?|\n)+", re.MULTILINE)
_SHARED = re.compile(r"^ {4}(?P<names>[\w*]+(?:, [\w*]+)+)(?P<rest>(?: \(.*?\))?:.*(?:\n {8}.*)*)", re.MULTILINE)
_EXAMPLE = re.compile(r"(?<=\S\n\n)(?: {4}.*(?:\n|\Z)|\n(?= {4}))+")


def _linked_paper(number: re.Match) -> str:
    return f"[{number[0]}](https://arxiv.org/abs/{number[0]})"


def _linked_source(match: re.Match) -> str:
    text = _PAPER.sub(_linked_paper, " ".join(match["text"].split()))
    text = _REPOSITORY.sub(lambda address: f"[{address[0]}](https://{address[0]})", text)
    return f"**Source:** {text}"


def _told_apart(section: re.Match) -> str:
    return _SHARED.sub(
        lambda item: "\n".join(f"    {name}{item['rest']}" for name in item["names"].split(", ")), section[0]
    )


def _fenced(example: re.Match) -> str:
    lines = (line[4:] for line in example[0].strip("\n").split("\n"))
    return "```python\n" + "\n".join(lines) + "\n```\n"


def rendered(docstring: str) -> str:
    """A docstring of Google style and of this package's habits, as one whose Markdown says the same.

    Args:
        docstring: dedented. Several arguments may share a line, examples are indented, and `Source:` is a paragraph
            whose further lines are.
    """
    text = _SOURCE.sub(_linked_source, _SECTION.sub(_told_apart, docstring))
    return _EXAMPLE.sub(_fenced, _NAMED_PAPER.sub(_linked_paper, text))


class Docstrings(griffe.Extension):
    """Rewrites every docstring once it is read, and forgets private attributes."""

    def on_object(self, *, obj, **_):
        """Called by griffe for each object."""
        if obj.docstring:
            obj.docstring.value = rendered(obj.docstring.value)

    def on_class_members(self, *, cls, **_):
        """Called by griffe for each class: a private field of a dataclass is no argument to be shown."""
        for name in [name for name, member in cls.members.items() if name.startswith("_") and member.is_attribute]:
            cls.del_member(name)
