"""What the site makes of pages for GitHub: links out of docs, titles of links, names that the reference knows."""

import ast
import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).parents[1]
REPOSITORY = "https://github.com/expert-divergence/edl"
# A block of code, which is left alone, or the target of a link.
_LINKS = re.compile(r"^(```|~~~).*?^\1|(?<=\]\()(?P<target>\.\./[^)\s]+)", re.MULTILINE | re.DOTALL)
# A block of code, or a link that is called as the file that it leads to.
_FILES = re.compile(r"^(```|~~~).*?^\1|\[(?P<file>\w+\.md)\](?=\((?P=file)[)#])", re.MULTILINE | re.DOTALL)
# What code stands in that is left alone, or a name in code.
_NAMES = re.compile(r"<(a|pre|h[1-6])\b.*?</\1>|<code>(?P<name>[\w.]*\w)(?P<call>\(\))?</code>", re.DOTALL)
_MODULES = ("integrations/megatron", "integrations/torchtitan", "integrations/transformers", "objectives", "")


def _classes():
    """Where classes are that pages call by their names alone."""
    found = {}
    for folder in _MODULES:
        module = ".".join(["edl", *filter(None, folder.split("/"))])
        for node in ast.walk(ast.parse((ROOT / "edl" / folder / "__init__.py").read_text())):
            if isinstance(node, ast.List):  # of __all__
                names = [each.value for each in node.elts if isinstance(each, ast.Constant)]
                found |= {name: f"{module}.{name}" for name in names if name[0].isupper()}
    return found


CLASSES = _classes()
# File → what the navigation calls it.
TITLES = {
    file: title for title, file in re.findall(r"- (.+): (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
}


def on_page_markdown(markdown, page, **_):
    """Links to files outside of docs lead to the repository; those to pages have the page's title for its file's name.

    Raises:
        ValueError: a link to no file.
    """
    if page.file.src_uri.startswith("reference/"):
        page.meta.setdefault("search", {"boost": 0.5})  # guides are found first
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

    def titled(match):
        return f"[{TITLES[match['file']]}]" if match["file"] in TITLES else match[0]

    return _FILES.sub(titled, _LINKS.sub(linked, markdown))


def on_page_content(html, **_):
    """Names of edl in code lead to the reference, where it has them."""

    def linked(match):
        name = CLASSES.get(match["name"], match["name"])
        if name is None or not name.startswith("edl."):
            return match[0]
        return f'<autoref identifier="{name}" optional>{match[0]}</autoref>'

    return _NAMES.sub(linked, html)
