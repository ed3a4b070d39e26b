"""The documentation as a site: it builds, stands alone, has no dead link, and its reference names everything once."""

import collections
import functools
import html.parser
import importlib.util
import sys
import urllib.parse

import pytest
import reference_pages
from commands import ENVIRONMENT, ROOT, run

import edl

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("mkdocs", "material", "mkdocstrings_handlers")),
    reason="needs mkdocs-material and mkdocstrings-python: docs/requirements.txt",
)
# What a public module of edl holds, whose members are named instead of it where it has a page section of its own.
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
# These are public without a list of names.
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
        self.classes = set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
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


def test_links_out_of_docs_lead_to_the_repository(site, pages):
    links = pages[site / "megatron.html"].links
    assert "https://github.com/expert-divergence/edl/blob/main/examples/megatron/pretrain_gpt.py" in links


def test_names_in_text_lead_to_the_reference(site, pages):
    assert "reference/operators.html#edl.ops.mean_squared_cosine" in pages[site / "objectives.html"].links


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
    # Numbers and texts of the package stand in the page of its operators.
    assert not missing, sorted(missing)


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
