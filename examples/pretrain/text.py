"""From the bytes of a file to plain text: gzip, HTML and UTF-8, with the standard library alone."""

import gzip
import html.parser
import io
import re
import zlib

# Elements whose text is furniture of a web site, not part of the document.
FURNITURE = frozenset({"script", "style", "title", "header", "footer", "nav", "aside", "noscript", "button"})
# Elements that stand on lines of their own.
BLOCKS = frozenset(
    "address article blockquote br dd div dl dt figure h1 h2 h3 h4 h5 h6 hr li ol p pre section table td th tr "
    "ul".split()
)
# A file with more undecodable bytes than this share is not UTF-8 text with a few accidents; it is something else.
TOLERATED_DAMAGE = 0.01

IDEOGRAPH = re.compile(r"[\u4e00-\u9fff]")
LETTER = re.compile(r"[^\W\d_]")


def printable(words):
    """Returns a name or a message without what a terminal, a page or a picture would obey instead of showing it."""
    known = words.encode(errors="replace").decode()
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in known)


class UnreadableText(Exception):
    """A file that holds no usable text; the message says why in a few words, to be counted rather than shown."""


class _TextOfHTML(html.parser.HTMLParser):
    """Collects the text between tags, one line per block element, furniture left out."""

    def __init__(self):
        super().__init__()
        self.pieces = []
        self.furniture_depth = 0
        self.verbatim_depth = 0

    def handle_starttag(self, tag, attributes):
        self.furniture_depth += tag in FURNITURE
        self.verbatim_depth += tag == "pre"
        if tag in BLOCKS:
            self.pieces.append("\n")

    def handle_endtag(self, tag):
        # Pages with a stray end tag exist; a negative depth would let furniture through later on.
        self.furniture_depth = max(0, self.furniture_depth - (tag in FURNITURE))
        self.verbatim_depth = max(0, self.verbatim_depth - (tag == "pre"))
        if tag in BLOCKS:
            self.pieces.append("\n")

    def handle_data(self, data):
        if not self.furniture_depth:
            self.pieces.append(data if self.verbatim_depth else re.sub(r"\s+", " ", data))


def html_to_text(markup):
    """Returns the text of an HTML page, without navigation, scripts and style sheets; a tag that the page does not
    finish is dropped, with what follows it, as browsers do."""
    parser = _TextOfHTML()
    try:
        parser.feed(markup)
        # What is left is text, or begins with an unfinished tag, in which close() would look for tags again and again.
        if not parser.rawdata.startswith("<"):
            parser.close()
    except AssertionError as error:  # how html.parser reports declarations that it does not know
        raise UnreadableText("damaged HTML") from error
    return "".join(parser.pieces)


def decode(content):
    """Decodes UTF-8 and drops a few damaged bytes.

    Arguments:
        content: bytes.

    Returns:
        (text, number of bytes that were dropped).

    Raises:
        UnreadableText: for binary files and other encodings, where dropping bytes would leave rubbish.
    """
    if b"\0" in content:
        raise UnreadableText("not text")
    try:
        return content.decode("utf-8-sig"), 0
    except UnicodeDecodeError:
        text = content.decode("utf-8-sig", errors="ignore")
    dropped = len(content) - len(text.encode())
    if dropped > TOLERATED_DAMAGE * len(content):
        raise UnreadableText("not UTF-8")
    return text, dropped


def read_text(name, content, limit):
    """Turns a file into tidy text.

    Arguments:
        name: file name; `.gz` is unpacked and `.html`, `.htm` or `.xhtml` is stripped of its markup.
        content: bytes of the file.
        limit: number of bytes to keep after unpacking, so that one enormous file cannot fill the memory.

    Returns:
        (text, number of undecodable bytes that were dropped).
    """
    if name.endswith(".gz"):
        name = name[: -len(".gz")]
        try:
            with gzip.open(io.BytesIO(content)) as unpacked:
                content = unpacked.read(limit)
        except (OSError, EOFError, zlib.error) as error:
            raise UnreadableText("damaged gzip") from error
    if len(content) >= limit:
        content = content[:limit]
        content = content.rpartition(b"\n")[0] or content  # a cut inside a character would count as damage
    text, dropped = decode(content)
    if name.lower().endswith((".html", ".htm", ".xhtml")):
        text = html_to_text(text)
    return tidy(text), dropped


def tidy(text):
    """Removes trailing blanks and piles of empty lines, which would only teach the model to count newlines."""
    lines = (line.rstrip() for line in text.expandtabs(4).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def chinese_share(text):
    """Returns the share of letters that are Chinese characters; untranslated manual pages have next to none."""
    letters = len(LETTER.findall(text))
    return len(IDEOGRAPH.findall(text)) / letters if letters else 0.0
