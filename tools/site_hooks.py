"""What the site makes of pages that are written for GitHub: links out of docs, and names that the reference knows."""

import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).parents[1]
REPOSITORY = "https://github.com/expert-divergence/edl"
# A block of code, which is left alone, or the target of a link.
_LINKS = re.compile(r"^(```|~~~).*?^\1|(?<=\]\()(?P<target>\.\./[^)\s]+)", re.MULTILINE | re.DOTALL)
# What names in code are left alone in, or such a name.
_NAMES = re.compile(
    r"<(a|pre|h\d|span class=\"doc)\b.*?</(?:\1|span)>|<code>(?P<name>edl\.[\w.]*\w)(?P<call>\(\))?</code>", re.DOTALL
)


def on_page_markdown(markdown, page, **_):
    """Links to files outside of docs lead to the repository.

    Raises:
        ValueError: a link to no file.
    """
    folder = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def linked(match):
        target = match["target"]
        if target is None:
            return match[0]
        path, hash_sign, anchor = posixpath.normpath(posixpath.join(folder, target)).partition("#")
        if path.startswith("docs/"):
            return target
        if not (ROOT / path).exists():
            raise ValueError(f"site: links must lead to files (got {target} in {page.file.src_uri})")
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{REPOSITORY}/{kind}/main/{path}{hash_sign}{anchor}"

    return _LINKS.sub(linked, markdown)


def on_page_content(html, **_):
    """Names of edl in code lead to the reference, where it has them."""

    def linked(match):
        name = match["name"]
        return match[0] if name is None else f'<autoref identifier="{name}" optional>{match[0]}</autoref>'

    return _NAMES.sub(linked, html)
