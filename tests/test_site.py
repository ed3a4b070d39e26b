"""The documentation as a site: it builds, stands alone, has no dead link, and its reference names everything once."""

import collections
import functools
import html.parser
import re
import sys
import time
import types
import urllib.parse

import browsers
import pytest
import reference_pages
import screenshots
import site_hooks
from commands import ENVIRONMENT, ROOT, run

import edl

# Modules whose `__all__` is public.
PUBLIC = [
    "edl",
    "edl.diagnostics.exports",
    "edl.diagnostics.measures",
    "edl.diagnostics.significance",
    "edl.diagnostics.statistics",
    "edl.diagnostics.traces",
    "edl.integrations.megatron",
    "edl.integrations.torchtitan",
    "edl.integrations.transformers",
    "edl.labels",
    "edl.moe",
    "edl.objectives",
    "edl.ops",
]
# What is public beside it.
BESIDE = [
    "edl.diagnostics.interventions.read_interventions",
    "edl.diagnostics.interventions.write_interventions",
    "edl.diagnostics.layers.LayerFacts",
    "edl.diagnostics.looking.findings_of",
    "edl.diagnostics.record.Record",
    "edl.routers.Router",
    "edl.routers.TopK",
    "edl.routing.Observation",
    "edl.segments.document_segments",
]


class Page(html.parser.HTMLParser):
    """What a page links to, loads, and can be linked at."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.anchors, self.entries = [], [], collections.Counter(), []
        self.classes, self.tags = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        given = dict(attributes)
        classes = (given.get("class") or "").split()
        self.classes |= set(classes)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.loads.append(given["href"])
        self.loads += [given[name] for name in ("src", "data", "poster") if tag != "a" and given.get(name)]
        if "srcset" in given:
            self.loads += [each.split()[0] for each in given["srcset"].split(",")]
        if given.get("id"):
            self.anchors[given["id"]] += 1
            if "doc-heading" in classes:
                self.entries.append(given["id"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="needs what docs/requirements.txt names")
    folder = tmp_path_factory.mktemp("site") / "site"
    quiet = {**ENVIRONMENT, "NO_MKDOCS_2_WARNING": "1"}
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder, cwd=ROOT, env=quiet)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_every_page_is_there(site, pages):
    written = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert {path.relative_to(site) for path in pages} == written | {(site / "404.html").relative_to(site)}
    assert not (site / "requirements.txt").exists()


def test_nothing_is_loaded_from_elsewhere(site, pages):
    for path, page in pages.items():
        foreign = [address for address in page.loads if urllib.parse.urlsplit(address).netloc]
        assert not foreign, f"{path} loads {foreign}"
        # The theme's script would fetch what draws it.
        assert "mermaid" not in page.classes, path
    for path in site.rglob("*.css"):
        text = path.read_text()
        assert "@import" not in text, path
        assert not any(f"url({quote}{scheme}" in text for quote in ("", "'", '"') for scheme in ("http", "//")), path


def test_every_link_and_anchor_exists(site, pages):
    for path, page in pages.items():
        if path.name == "404.html":  # whose links begin at the address of the site
            continue
        for link in page.links + page.loads:
            address = urllib.parse.urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_relative_to(site.resolve()), f"{path}: {link}"
            assert target.exists(), f"{path}: {link}"
            anchor = urllib.parse.unquote(address.fragment)
            if anchor and not anchor.startswith("__") and target in pages:
                assert anchor in pages[target].anchors, f"{path}: {link}"


def test_no_formula_is_taken_for_a_tag(pages):
    for path, page in pages.items():
        assert not {tag for tag in page.tags if not re.fullmatch("[a-z][a-z0-9-]*", tag)}, path


def test_links_out_of_docs_lead_to_the_repository(site, pages):
    links = pages[site / "megatron.html"].links
    assert "https://github.com/expert-divergence/edl/blob/main/examples/megatron/pretrain_gpt.py" in links


def test_names_in_text_lead_to_the_reference(site, pages):
    links = pages[site / "objectives.html"].links
    assert "reference/operators.html#edl.ops.mean_squared_cosine" in links
    assert "reference/objectives.html#edl.objectives.RouterZ" in links


@functools.cache
def package():
    griffe = pytest.importorskip("griffe")
    return griffe.load("edl", search_paths=[str(ROOT)], allow_inspection=False)


def canonical(name):
    """Where a name is defined, whatever else it is imported as."""
    found = package()[name.removeprefix("edl.")]
    return found.final_target.path if found.is_alias else found.path


def test_each_public_name_is_in_the_reference_once(pages):
    entries = [name for page in pages.values() for name in page.entries]
    documented = collections.Counter(map(canonical, entries))
    assert not [name for name, times in documented.items() if times > 1]
    public = {f"{module}.{name}" for module in PUBLIC for name in exported(module)} | set(BESIDE)
    assert len(public) > 100
    missing = {name for name in public if canonical(name) not in documented}
    # Two texts, of which the first page of the reference speaks.
    assert missing == {"edl.__version__", "edl.cmake_prefix_path"}
    assert all(f"`{name}`" in (ROOT / "docs/reference/index.md").read_text() for name in missing)


def exported(module):
    """The names of `__all__`, of the branches too that this environment does not take."""
    found = package() if module == "edl" else package()[module.removeprefix("edl.")]
    return [str(name) for name in found.exports]


def test_edl_has_the_names_that_the_reference_was_asked_for():
    assert set(exported("edl")) == set(edl.__all__)
    assert set(exported("edl.ops")) == set(edl.ops.__all__)


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_written_pages_are_up_to_date(name):
    written = (ROOT / "docs/reference" / name).read_text()
    assert written == reference_pages.PAGES[name](), "run python tools/reference_pages.py"


def test_private_fields_are_no_arguments(site):
    assert ">_op<" not in (site / "reference/objectives.html").read_text()


def test_a_link_to_no_file_is_an_error():
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="megatron.md"), meta={})
    markdown = "[a](../README.md#try-it) [b](../examples) [c](scaling.md)\n```\n[d](../nothing)\n```\n"
    assert site_hooks.on_page_markdown(markdown, page) == markdown.replace(
        "../README.md", f"{site_hooks.REPOSITORY}/blob/main/README.md"
    ).replace("../examples", f"{site_hooks.REPOSITORY}/tree/main/examples")
    with pytest.raises(ValueError, match=r"links must lead to files \(got ../nothing in megatron.md\)"):
        site_hooks.on_page_markdown("[d](../nothing)", page)


def test_links_are_called_as_the_navigation_calls_their_pages():
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="start.md"), meta={})
    others = "[seeing.md](labels.md)\n```\n[seeing.md](seeing.md)\n```\n"
    found = site_hooks.on_page_markdown(f"[scaling.md](scaling.md#a) {others}", page)
    assert found == f"[Ranks and micro-batches](scaling.md#a) {others}"


def test_names_in_code_that_is_linked_already_stay():
    html = "<a><code>edl.ops</code></a><pre><code>edl.ops</code></pre><h2><code>edl.ops</code></h2><code>edl = 1</code>"
    assert site_hooks.on_page_content(html) == html
    assert 'identifier="edl.MoELayer"' in site_hooks.on_page_content("<code>MoELayer</code>")


def test_docstrings_say_in_markdown_what_they_say_in_text():
    pytest.importorskip("griffe", reason="needs what docs/requirements.txt names")
    import site_docstrings

    docstring = """Adds (arXiv 2602.14159).

    total = add(1, 2)

    print(total)

Then:

Args:
    first, second (int): what is added,
        in this order.
    **others: more.

Source: arXiv 2603.00054, by
    github.com/a/b.
"""
    assert (
        site_docstrings.rendered(docstring)
        == """Adds (arXiv [2602.14159](https://arxiv.org/abs/2602.14159)).

```python
total = add(1, 2)

print(total)
```

Then:

Args:
    first (int): what is added,
        in this order.
    second (int): what is added,
        in this order.
    **others: more.

**Source:** arXiv [2603.00054](https://arxiv.org/abs/2603.00054), by [github.com/a/b](https://github.com/a/b).
"""
    )


@pytest.fixture(scope="module")
def browser():
    """A browser that reaches nothing."""
    with browsers.started_or_skipped() as started:
        started.execute_cdp_cmd("Network.enable", {})
        started.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["http://*", "https://*"]})
        yield started


def test_pages_work_from_a_folder_and_search_finds(site, browser):
    screenshots.set_view(browser, *screenshots.VIEWS["desktop"])
    browser.get((site / "index.html").as_uri())
    browser.execute_script("document.querySelector('#__search').click()")
    field = browser.find_element("css selector", "[data-md-component=search-query]")
    found = []
    for _ in range(200):
        if not field.get_attribute("value") and field.is_displayed():
            field.send_keys("load balancing")
        found = [each.get_attribute("href") for each in browser.find_elements("class name", "md-search-result__link")]
        if found:
            break
        time.sleep(0.05)
    assert any("edl.objectives.LoadBalancing" in address for address in found), found
    assert not browser.get_log("browser")


@pytest.mark.parametrize("page", ["index", "objectives", "reference/command_line", "reference/layer"])
def test_no_page_is_wider_than_a_phone(site, browser, page):
    screenshots.set_view(browser, *screenshots.VIEWS["phone"])
    browser.get((site / f"{page}.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
