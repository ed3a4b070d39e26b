"""The page of a routing, in a browser: what it says, shows and lets through."""

import dataclasses
import json
import re
import time

import browsers
import numpy as np
import pytest
import screenshots
import synthetic_findings as made

from edl.diagnostics import measures
from edl.report import packing, page, summaries, words

DESK, PHONE = screenshots.VIEWS["desktop"], screenshots.VIEWS["phone"]
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "😀 \u2028\u2029 line",
    "\u202e\u05e2\u05d1 \u0627\u0644",
    "x" * 256,
    "=HYPERLINK(1)",
    "{{ 7 * 7 }}\0\ud800",
    "<!--",
    "",
]


@pytest.fixture(scope="module")
def browser():
    """One browser for all."""
    with browsers.started_or_skipped() as started:
        yield started


@pytest.fixture
def show(browser, tmp_path):
    """Opens the page of runs and waits until it is there; what it says on the console is in `console`."""

    def opened(runs, changes=(), view=DESK):
        path = tmp_path / "page.html"
        page.write_page(runs, path, changes)
        screenshots.set_view(browser, *view)
        browser.get_log("browser")
        browser.get(path.as_uri())
        until(browser, "return document.documentElement.classList.contains('drawn')")
        return browser

    return opened


def until(browser, question):
    """Waits for what must come true."""
    for _ in range(200):
        if found := browser.execute_script(question):
            return found
        time.sleep(0.02)
    raise AssertionError(f"never so: {question}; console: {browser.get_log('browser')}")


def settle(browser):
    """Waits for two frames."""
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def texts(browser, selector):
    return browser.execute_script(
        "return Array.from(document.querySelectorAll(arguments[0]), each => each.textContent)", selector
    )


def focus(browser, kind):
    """The chart of a kind, in sight and focused as by Tab."""
    browser.execute_script(
        "const body = document.querySelector(`[data-chart=${arguments[0]}] .chart-body`);"
        "body.scrollIntoView({block: 'center', behavior: 'instant'}); body.focus({focusVisible: true});",
        kind,
    )
    settle(browser)


def press(browser, *keys):
    """Presses keys where the focus is."""
    for key in keys:
        code = {"windowsVirtualKeyCode": 9} if key == "Tab" else {}
        for kind in ("rawKeyDown", "keyUp"):
            browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": kind, "key": key, **code})


def hover(browser, x, y):
    """Moves the mouse to a place of the window."""
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})


def readout(browser, kind):
    return browser.execute_script(
        "return document.querySelector(`[data-chart=${arguments[0]}] .readout`).textContent", kind
    )


def box_of(browser, kind):
    """left, top, width, height of a chart's canvas in the window."""
    return browser.execute_script(
        "const box = document.querySelector(`[data-chart=${arguments[0]}] .chart-body canvas`).getBoundingClientRect();"
        "return [box.left, box.top, box.width, box.height]",
        kind,
    )


def saved(browser, label):
    """What a button gives to save."""
    return browser.execute_async_script(
        "const done = arguments[1], url = URL.createObjectURL;"
        "URL.createObjectURL = blob => { blob.text().then(done); URL.createObjectURL = url; return '#'; };"
        "const buttons = Array.from(document.querySelectorAll('.downloads button'));"
        "buttons.find(each => each.textContent === arguments[0]).click()",
        label,
    )


def dead_expert():
    run = made.findings(2, 6, 3)
    usage = np.array(run.layers[1].usage)
    usage[:, 4] = 0
    usage /= usage.sum(1, keepdims=True)
    layers = [run.layers[0], dataclasses.replace(run.layers[1], usage=usage)]
    return dataclasses.replace(run, layers=layers, dead=[[], [4]])


def unequal_layers():
    """Layers of 4 and of 9 experts, numbers that have a gap."""
    small, large = made.findings(1, 4, 3), made.findings(1, 9, 3)
    facts = large.layers[0].facts._replace(number=7)
    joined = {
        field.name: np.concatenate([getattr(small, field.name), getattr(large, field.name)])
        for field in dataclasses.fields(small)
        if field.name in "load_violation coverage overlap information decomposition divergence".split()
    }
    layers = [small.layers[0], dataclasses.replace(large.layers[0], facts=facts)]
    return dataclasses.replace(
        small, layers=layers, dead=[[], []], compared=None, beyond_token=None, course=None, **joined
    )


def a_domain_without_tokens():
    """One of three domains was counted nowhere; nothing is known of co-activation, and texts of tokens are missing."""
    run = made.findings(2, 6, 3)
    layers = []
    for each in run.layers:
        usage = np.array(each.usage)
        usage[1] = np.nan
        layers.append(dataclasses.replace(each, usage=usage, coactivation=None))
    dead = [[np.int64(3)], []]
    return dataclasses.replace(run, layers=layers, tokens=np.array([9, 0, 4]), dead=dead, token_texts={})


CASES = {
    "usual": lambda: [made.examples(made.findings(3, 16, 4))],
    "one layer": lambda: [made.findings(1, 8, 4)],
    "one domain": lambda: [made.findings(3, 8, 1)],
    "one expert": lambda: [made.findings(2, 1, 3)],
    "two domains": lambda: [made.findings(2, 8, 2)],
    "one of all": lambda: [made.findings(1, 1, 1, record=False)],
    "dead expert": lambda: [dead_expert()],
    "nothing known": lambda: [made.unknown(made.findings(3, 8, 4))],
    "nothing known, no record": lambda: [made.unknown(made.findings(2, 8, 3, record=False))],
    "hostile names": lambda: [made.examples(made.findings(2, 16, names=HOSTILE, title=HOSTILE[1]), count=9)],
    "no record": lambda: [dataclasses.replace(made.findings(3, 8, 4, record=False), course=None, notes=())],
    "a domain without tokens": lambda: [a_domain_without_tokens()],
    "unequal layers": lambda: [unequal_layers()],
    "several runs": lambda: [
        made.findings(3, 16, 4, title="before", strength=0.2),
        made.findings(4, 8, names=["law", "new"], title="after"),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_every_page_is_drawn_without_a_word_on_the_console(show, case):
    runs = CASES[case]()
    changes = [made.change(runs[0], runs[0])] if len(runs) > 1 else []
    changes += [made.unknown(each) for each in changes]
    browser = show(runs, changes)
    for view in (DESK, PHONE):
        screenshots.set_view(browser, *view)
        screenshots.scroll_through(browser)
        unpainted = browser.execute_script(
            """return Array.from(document.querySelectorAll("[data-chart] .chart-body canvas")).filter(each => {
              const copy = new OffscreenCanvas(each.width, each.height).getContext("2d", { willReadFrequently: true });
              copy.drawImage(each, 0, 0);
              return !copy.getImageData(0, 0, each.width, each.height).data.some(Boolean);
            }).length"""
        )
        assert unpainted == 0
        browser.execute_script(
            """for (const body of document.querySelectorAll(".chart-body")) {
              body.focus();
              for (const key of ["Home", "ArrowRight", "ArrowDown", "End", "PageDown", "Enter", "Escape"]) {
                body.dispatchEvent(new KeyboardEvent("keydown", { key }));
              }
            }"""
        )
        widths = browser.execute_script("return [document.scrollingElement.scrollWidth, innerWidth]")
        assert widths[0] <= widths[1]
        assert not {"NaN", "undefined", "Infinity"} & set(re.findall(r"\w+", " ".join(texts(browser, "main"))))
        assert browser.get_log("browser") == []


def test_names_are_text_and_nothing_else(show):
    browser = show(CASES["hostile names"]())
    assert browser.execute_script("return document.scripts.length") == 3  # the run, changes, and the page's own
    assert browser.execute_script("return document.images.length") == 0
    shown = [re.sub(r"\s", " ", text) for text in texts(browser, "[data-table=domains] tbody th")]
    for name in HOSTILE[:6]:
        assert any(re.sub(r"\s", " ", name) == text.strip() for text in shown), name
    assert "alert" not in browser.execute_script("return Array.from(document.scripts, s => s.textContent).join()")
    assert "\n'=HYPERLINK" not in (csv := saved(browser, "Use of experts (CSV)"))
    assert "1,'=HYPERLINK(1)," in csv and ",=HYPERLINK" not in csv
    assert browser.get_log("browser") == []


def test_the_policy_runs_and_loads_nothing_from_elsewhere(show):
    browser = show(CASES["one layer"]())
    refused = browser.execute_async_script(
        """const done = arguments[0], refused = [];
        addEventListener("securitypolicyviolation", event => refused.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "window.isHacked = true";
        document.body.append(script);
        const image = new Image();
        image.src = "http://127.0.0.1:9/x.png";
        const end = () => done([...refused, window.isHacked]);
        fetch("http://127.0.0.1:9/").catch(() => 0).then(() => setTimeout(end, 50));"""
    )
    assert set(refused) == {"script-src-elem", "img-src", "connect-src", None}
    html = page.page(CASES["one layer"]())
    assert not re.search(r"""(src|href)=["']?(https?:|//)|url\(|@import""", html)


def readings(browser, kind, xs, ys):
    """What the chart says of places of the window, and the lightness of its canvas there."""
    return browser.execute_script(
        """const [kind, xs, ys] = arguments, found = [];
        const body = document.querySelector(`[data-chart=${kind}] .chart-body`), canvas = body.querySelector("canvas");
        const box = canvas.getBoundingClientRect(), output = body.parentElement.querySelector(".readout");
        const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
        copy.drawImage(canvas, 0, 0);
        for (const y of ys) for (const x of xs) {
          const pixel = copy.getImageData(x - box.left, y - box.top, 1, 1).data;
          body.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y, pointerType: "mouse" }));
          const text = document.getElementById("tip").hidden ? "" : output.textContent;
          found.push([x, y, text, pixel[0] + pixel[1] + pixel[2]]);
        }
        return found;""",
        kind,
        [float(x) for x in xs],
        [float(y) for y in ys],
    )


def set_control(browser, **values):
    for name, value in values.items():
        browser.execute_script(
            "const select = document.getElementById(arguments[0]); select.value = arguments[1];"
            "select.dispatchEvent(new Event('change'))",
            name,
            value,
        )
    settle(browser)


@pytest.mark.parametrize("order, colour", [("number", "share"), ("domain", "ratio")])
def test_hovering_says_the_value_of_the_cell_below(show, order, colour):
    run = made.findings(3, 8, 4)
    browser = show([run])
    set_control(browser, order=order, colour=colour)
    focus(browser, "usage")
    browser.execute_script("document.activeElement.blur()")
    settle(browser)
    left, top, width, height = box_of(browser, "usage")
    seen = {}
    for x, y, text, light in readings(
        browser, "usage", np.arange(left + 2, left + width, 17), np.arange(top, top + height, 9)
    ):
        pattern = r"Layer (\d), expert (\d), \u2068(\w+)\u2069: ([\d.]+)\u00a0% of its choices, ([\d.]+)×"
        if found := re.match(pattern, text):
            layer = int(found[1]) - 1
            seen.setdefault((found[3], int(found[2])), []).append((x, y, float(found[4]), float(found[5]), light))
    assert len(seen) == 4 * 8  # every cell was met
    usage = np.asarray(run.layers[layer].usage)
    for (name, expert), places in seen.items():
        share = usage[list(run.domains).index(name), expert]
        for _, _, percent, ratio, _ in places:
            assert percent == pytest.approx(100 * share, abs=0.051)
            assert ratio == pytest.approx(share / usage[:, expert].mean(), abs=0.051)
    middles = {key: np.median(places, 0) for key, places in seen.items()}
    assert sorted(run.domains, key=lambda name: middles[name, 0][1]) == list(run.domains)
    columns = sorted(range(8), key=lambda expert: middles["code", expert][0])
    if order == "number":
        assert columns == list(range(8))
        by_share = sorted(middles.values(), key=lambda place: place[2])
        assert by_share[0][4] > by_share[16][4] > by_share[-1][4]  # more is darker
    else:
        assert (np.diff(usage.argmax(0)[columns]) >= 0).all()


def test_a_mouse_shows_the_value_beside_it(show):
    browser = show([made.findings(3, 8, 4)])
    focus(browser, "usage")
    left, top, width, height = box_of(browser, "usage")
    hover(browser, left + width * 0.5, top + height * 0.5)
    settle(browser)
    tip = browser.execute_script("const tip = document.getElementById('tip'); return [tip.hidden, tip.textContent]")
    assert tip == [False, readout(browser, "usage")] and "of its choices" in tip[1]
    hover(browser, 2, 2)
    assert browser.execute_script("return document.getElementById('tip').hidden")


def test_keys_move_a_cursor_and_choose(show):
    browser = show([made.findings(3, 8, 4)])
    set_control(browser, order="number")
    browser.execute_script("document.getElementById('order').focus()")
    press(browser, "Tab")
    assert "expert" in readout(browser, "usage")  # the map is next, and says where its cursor is
    assert browser.execute_script("return document.activeElement.getAttribute('role')") == "application"
    assert (
        browser.execute_script("return document.querySelector('[data-chart=usage] .readout').getAttribute('aria-live')")
        == "polite"
    )

    def cell():
        found = re.match(r"Layer (\d+), expert (\d+), \u2068(\w+)\u2069", readout(browser, "usage"))
        return int(found[2]), found[3]

    press(browser, "PageUp", "Home")
    assert cell() == (0, "code")
    press(browser, "ArrowRight", "ArrowRight", "ArrowDown")
    assert cell() == (2, "law")
    press(browser, "End", "PageDown", "ArrowRight", "ArrowDown")  # there is nothing beyond the corner
    assert cell() == (7, "medicine")
    press(browser, "ArrowLeft", "Enter")
    assert texts(browser, "[data-panel] h4") == [
        "Experts for \u2068medicine\u2069", "Domains for expert 6", "Chosen together with expert 6",
    ]  # fmt: skip
    assert texts(browser, "[data-reading] h4")[0].startswith("Expert 6 of layer")
    press(browser, "Escape")
    assert browser.execute_script("return document.getElementById('tip').hidden")
    focus(browser, "layers")
    press(browser, "Home", "ArrowRight")
    assert readout(browser, "layers").startswith("Layer 2 ·")
    assert browser.get_log("browser") == []


def test_panels_rank_what_the_findings_rank(show):
    run = made.findings(2, 12, 5)
    browser = show([run])
    place = int(browser.execute_script("return document.getElementById('layer').value")) - 1
    domain = list(run.domains).index(re.search("\u2068(\\w+)\u2069", texts(browser, "[data-panel=domain] h4")[0])[1])
    usage = np.asarray(run.layers[place].usage)
    shown = texts(browser, "[data-panel=domain] li > :first-child")
    assert shown == [f"Expert {each}" for each in np.argsort(-usage[domain])[:8]]
    expert = int(texts(browser, "[data-panel=expert] h4")[0].split()[-1])
    shown = texts(browser, "[data-panel=expert] li > :first-child")
    assert shown == [words.name(run.domains[each]) for each in np.argsort(-usage[:, expert])]
    partners, lifts = (each[expert].numpy() for each in measures.partners(run.layers[place].coactivation, 8))
    shown = texts(browser, "[data-panel=partners] li > :first-child")
    assert shown == [f"Expert {each}" for each in partners if each >= 0] and shown
    assert texts(browser, "[data-panel=partners] .value") == [words.times(each) for each in lifts if np.isfinite(each)]


def test_dead_and_unknown_cells_say_so(show):
    browser = show([dead_expert()])
    focus(browser, "load")
    press(browser, "End", "ArrowDown")
    assert "expert 4: dead" in readout(browser, "load")
    browser = show(CASES["nothing known"]())
    focus(browser, "usage")
    press(browser, "Home")
    assert readout(browser, "usage").endswith("not known")


@pytest.mark.parametrize("most_exact, tolerance", [(2**17, 1e-6), (0, 2**-10)])
def test_downloads_hold_the_arrays(show, monkeypatch, most_exact, tolerance):
    monkeypatch.setattr(packing, "MOST_EXACT", most_exact)
    run = made.findings(3, 10, 4)
    browser = show([run])
    whole = json.loads(saved(browser, "All of it (JSON)"))
    usage = np.stack([layer.usage for layer in run.layers])
    wanted = {
        "usage": usage,
        "rawCorrected": run.compared.corrected,
        "rawP": run.compared.p,
        "standardisedLayerLow": run.beyond_token.standardised.layer_low,
        "composition": run.beyond_token.composition,
        "overlap": run.overlap,
        "coverage": run.coverage,
        "information": run.information,
        "decomposition": run.decomposition,
        "documentEntropy": np.ravel([layer.document_entropy for layer in run.layers]),
    }
    for key, array in wanted.items():
        got = np.array(whole[key], np.float64)
        np.testing.assert_allclose(got, np.ravel(array), rtol=tolerance, atol=1e-7, err_msg=key)
    certain = np.unpackbits(np.array(whole["certain"], np.uint8), bitorder="little")[: usage.size]
    np.testing.assert_array_equal(certain, np.ravel([layer.is_certain for layer in run.layers]))
    lines = saved(browser, "Use of experts (CSV)").splitlines()
    assert lines[0] == "layer,domain," + ",".join(map(str, range(10))) and len(lines) == 1 + 3 * 4
    np.testing.assert_allclose([float(each) for each in lines[6].split(",")[2:]], usage[1, 1], rtol=tolerance)
    assert len(saved(browser, "Pairs (CSV)").splitlines()) == 1 + 3 * 6
    assert len(saved(browser, "Layers (CSV)").splitlines()) == 1 + 3


def test_pairs_are_sorted_found_and_shown_by_layer(show):
    run = made.findings(3, 8, 6)
    browser = show([run])
    values = run.compared.corrected.mean(0)
    column = "[data-table=pairs] tbody td:nth-child(2)"
    assert texts(browser, column) == [words.number(each) for each in -np.sort(-values)]
    browser.execute_script("document.querySelector('[data-table=pairs] .sort').click()")
    assert texts(browser, column) == [words.number(each) for each in np.sort(values)]
    browser.execute_script(
        "const select = document.querySelector('[data-pair-layer]'); select.value = 1;"
        "select.dispatchEvent(new Event('change'))"
    )
    assert texts(browser, column) == [words.number(each) for each in np.sort(run.compared.corrected[1])]
    browser.execute_script(
        "const find = document.querySelector('[data-pair-find]'); find.value = 'LAW';"
        "find.dispatchEvent(new Event('input'))"
    )
    assert len(found := texts(browser, "[data-table=pairs] tbody th")) == 5 and all("law" in each for each in found)


def test_dark_and_phone(show):
    run = made.findings(2, 64, 4)
    light, dark = [], []
    for is_dark, into in ((False, light), (True, dark)):
        browser = show([run], view=(*PHONE[:2], is_dark))
        focus(browser, "usage")
        into += browser.execute_script(
            "const style = getComputedStyle(document.body);"
            "const canvas = document.querySelector('[data-chart=usage] .chart-body canvas');"
            "return [style.backgroundColor, style.color, canvas.toDataURL()]"
        )
    assert all(one != other for one, other in zip(light, dark))
    body = "document.querySelector('[data-chart=usage] .chart-body')"
    assert browser.execute_script(f"return {body}.scrollWidth > {body}.clientWidth")  # it scrolls, it does not shrink
    before = browser.execute_script(f"return {body}.querySelector('canvas').toDataURL()")
    browser.execute_script(f"{body}.scrollLeft = 150")
    settle(browser)
    settle(browser)
    assert browser.execute_script(f"return {body}.querySelector('canvas').toDataURL()") != before
    press(browser, "End")
    settle(browser)
    assert browser.execute_script(f"return {body}.scrollLeft + {body}.clientWidth >= {body}.scrollWidth - 41")


def test_the_large_page_is_small_and_drawn(show, tmp_path):
    browser = show([made.large()])
    assert (tmp_path / "page.html").stat().st_size < 5 * 2**20
    assert until(browser, "return performance.getEntriesByName('first-drawing').length") == 1
    focus(browser, "usage")
    press(browser, "ArrowRight")
    assert re.match(r"Layer \d+, expert \d+, .*%", readout(browser, "usage"))
    assert browser.get_log("browser") == []


def text_of(html):
    """What of a page is there without scripts."""
    return re.sub(r"\s+", " ", re.sub(r"<(script|style).*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL))


def test_sentences_and_tables_need_no_scripts():
    run = made.findings(2, 8, 3)
    text = text_of(page.page([run]))
    whole = run.compared.whole
    ends = f"95 % interval {words.number(whole.low)} to {words.number(whole.high)}"
    assert f"diverge by {words.number(whole.value)} nats ({ends})" in text
    assert "p = 0.001" in text
    for name in run.domains:
        assert name in text
    for layer in run.layers:
        assert f"layer {layer.facts.number}, expert" in text
    assert words.number(run.compared.layer_value[1]) in text


def test_no_number_has_a_p_that_was_not_tested():
    for run in (made.findings(2, 8, 3, record=False), made.unknown(made.findings(2, 8, 3))):
        text = text_of(page.page([run]))
        assert not re.search(r"p\s=\s", text) and "Not tested" in text
        assert not re.search(r"\bnan\b", text)


def test_what_is_no_more_than_chance_has_a_bound_and_no_interval():
    run = made.findings(2, 8, 3, strength=0.05)
    weak = dataclasses.replace(run.compared, whole=made.estimate(0.001, 0.4))
    run = dataclasses.replace(run, compared=weak, beyond_token=None)
    text = text_of(page.page([run]))
    assert f"not distinguishable from chance, below {words.number(run.compared.whole.high)} nats" in text
    assert "Not found" in text and "interval" not in text.split("Which layers")[0]


def test_a_cell_that_was_not_tested_is_not_called_chance():
    html = page.page([made.findings(2, 8, 3)])  # few documents are not certain either
    assert "grey: not certain" in html and "no more than chance" not in html


def test_no_run_is_refused():
    with pytest.raises(ValueError, match=r"^edl::page: runs must be one or more \(got none\)$"):
        page.page([])


def test_summaries_are_those_of_numpy():
    run = made.findings(3, 9, 4, seed=3)
    usage = np.array(run.layers[1].usage)
    np.testing.assert_allclose(summaries.ratios(usage), usage / usage.mean(0))
    domains = usage / usage.sum(0)
    wanted = (domains * np.log2(domains * 4)).sum(0)
    np.testing.assert_allclose(summaries.specialisation(usage), wanted, atol=1e-12)
    tokens = np.asarray(run.tokens)
    counts = (usage * tokens[:, None]).sum(0)
    np.testing.assert_allclose(summaries.load(run, run.layers[1]), counts / counts.mean())
    usage[2] = np.nan
    known = np.delete(usage, 2, 0)
    np.testing.assert_allclose(np.delete(summaries.ratios(usage), 2, 0), known / known.mean(0))
    assert np.isnan(summaries.ratios(usage)[2]).all()
    assert np.isnan(summaries.mean_of([np.nan, np.nan])) and summaries.mean_of([1, np.nan, 3]) == 2


def test_a_cell_that_is_not_certain_is_not_named():
    run = made.findings(1, 8, 3)
    nothing = [dataclasses.replace(each, is_certain=np.zeros((3, 8), bool)) for each in run.layers]
    assert summaries.strongest(dataclasses.replace(run, layers=nothing), 5) == [[], [], []]
    one = np.zeros((3, 8), bool)
    one[1, 3] = True
    usage = np.full((3, 8), 0.125)
    usage[1] = [0.1] * 3 + [0.3] + [0.1] * 4
    only = [dataclasses.replace(run.layers[0], usage=usage, is_certain=one)]
    _, found, _ = summaries.strongest(dataclasses.replace(run, layers=only), 5)
    assert [(cell.expert, cell.share) for cell in found] == [(3, 0.3)]
    assert found[0].ratio == pytest.approx(0.3 / usage[:, 3].mean())


def test_the_tree_joins_the_nearest_first():
    run = made.findings(2, 8, 5)
    rows = summaries.tree(run)
    values = run.compared.corrected.mean(0)
    pairs = summaries.names_of_pairs(run)
    assert set(rows[0][:2]) == set(pairs[int(values.argmin())]) and rows[0][2] == pytest.approx(values.min())
    assert rows[-1][3] == 5 and [row[2] for row in rows] == sorted(row[2] for row in rows)
    assert summaries.tree(made.unknown(run)) == [] and summaries.tree(made.findings(2, 8, 2)) == []


@pytest.mark.parametrize(
    "value, text",
    [(0.0, "0.0000"), (-1e-9, "0.0000"), (0.01234, "0.0123"), (0.5, "0.500"), (12.345, "12.3"), (-1234.5, "−1,234"),
     (float("nan"), "–"), (float("inf"), "–")],
)  # fmt: skip
def test_numbers_have_about_three_digits(value, text):
    assert words.number(value) == text


def test_names_are_short_isolated_and_on_one_line():
    assert words.name("a\n b") == "\u2068a b\u2069" and words.name("") == "\u2068(no name)\u2069"
    assert len(words.name("x" * 256)) == 42 and words.name("\ud800") == "\u2068?\u2069"
    assert words.token(" a\n") == "␣a↵" and words.token("") == "(empty)"
