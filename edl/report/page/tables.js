// Tables to copy, data to download.

// Foreign names must not become formulas of a spreadsheet.
function csvCell(value) {
  const text = typeof value === "number" ? (Number.isFinite(value) ? String(value) : "") : String(value);
  const safe = typeof value === "string" && /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function save(parts, file, type) {
  const link = element("a", { href: URL.createObjectURL(new Blob(parts, { type })), download: file });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function saveRows(rows, file) {
  save(rows.map(row => row.map(csvCell).join(",") + "\n"), file, "text/csv");
}

function addCopyButtons() {
  for (const table of document.querySelectorAll("main table")) {
    const button = element("button", { type: "button", class: "copy" }, "Copy table");
    button.addEventListener("click", () => copy(table, button));
    table.closest(".scroll").after(button);
  }
}

async function copy(table, button) {
  const rows = Array.from(table.rows, row => Array.from(row.cells, cell => cell.textContent.trim().replace(/\s+/g, " ")));
  const text = rows.map(row => row.join("\t")).join("\n");
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch { // a page that is not trusted with the clipboard marks the table for its reader
    getSelection().selectAllChildren(table);
    button.textContent = "Marked: press Ctrl+C";
  }
  setTimeout(() => { button.textContent = "Copy table"; }, 2500);
}

function* usageRows(run) {
  const most = Math.max(...run.layers.map(layer => layer.experts));
  yield ["layer", "domain", ...Array.from({ length: most }, (_, expert) => expert)];
  for (const layer of run.layers) {
    for (let domain = 0; domain < run.D; domain++) {
      const start = layer.cells + domain * layer.experts;
      yield [layer.number, run.domains[domain], ...exact(run.usage.subarray(start, start + layer.experts))];
    }
  }
}

// Numbers without digits that single precision does not have.
function exact(values) {
  return Array.from(values, value => Number(value.toPrecision(7)));
}

const PAIR_VALUES = ["divergence", "rawCorrected", "rawP", "composition", "standardisedCorrected", "standardisedP",
  "sameToken", "overlap"];

function* pairRows(run) {
  const names = PAIR_VALUES.filter(each => run[each]);
  yield ["layer", "one", "other", ...names];
  for (const layer of run.layers) {
    for (const [pair, [one, other]] of run.pairs.entries()) {
      const place = layer.place * run.pairs.length + pair;
      yield [layer.number, run.domains[one], run.domains[other], ...exact(names.map(each => run[each][place]))];
    }
  }
}

const LAYER_VALUES = ["information", "loadViolation", ...["raw", "standardised"].flatMap(kind =>
  ["Value", "Low", "High", "P"].map(part => `${kind}Layer${part}`))];

function* layerRows(run) {
  const names = LAYER_VALUES.filter(each => run[each]);
  yield ["layer", "experts", "topK", "dead", ...names];
  for (const layer of run.layers) {
    yield [layer.number, layer.experts, layer.topK, layer.dead.size, ...exact(names.map(each => run[each][layer.place]))];
  }
}

// Everything that the page holds of a run.
function asJson(run) {
  const { title, domains, documents, tokens, tree, course, arrays } = run;
  const layers = run.layers.map(({ number: layer, experts, topK, dead }) => ({ number: layer, experts, topK, dead: [...dead] }));
  const whole = { title, domains, documents, tokens, layers, tree, course, tokenTexts: run.tokenTexts };
  for (const key of Object.keys(arrays)) {
    whole[key] = exact(run[key]).map(value => (Number.isFinite(value) ? value : null));
  }
  return JSON.stringify(whole);
}

function addDownloads(run, box) {
  const file = `${run.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "run"}`;
  const offers = [
    ["Use of experts (CSV)", () => saveRows([...usageRows(run)], `${file}-usage.csv`)],
    ["Pairs (CSV)", () => saveRows([...pairRows(run)], `${file}-pairs.csv`)],
    ["Layers (CSV)", () => saveRows([...layerRows(run)], `${file}-layers.csv`)],
    ["All of it (JSON)", () => save([asJson(run)], `${file}.json`, "application/json")],
  ];
  for (const [label, act] of offers) {
    const button = element("button", { type: "button" }, label);
    button.addEventListener("click", act);
    box.append(button);
  }
}

// The table of pairs for any layer, part of a name, and order.
class Pairs {
  constructor(run, table, form) {
    this.run = run;
    this.table = table;
    this.layer = form.querySelector("[data-pair-layer]");
    this.find = form.querySelector("[data-pair-find]");
    this.most = 15;
    this.sortedBy = 1;
    this.isRising = false;
    this.layer.append(element("option", { value: "" }, "mean over layers"));
    for (const layer of run.layers) this.layer.append(element("option", { value: layer.place }, layer.number));
    this.layer.addEventListener("change", () => this.show());
    this.find.addEventListener("input", () => this.show());
    form.addEventListener("submit", event => event.preventDefault());
    this.more = element("button", { type: "button" });
    this.more.addEventListener("click", () => { this.most = this.most * 4; this.show(); });
    table.closest(".scroll").after(this.more);
    this.columns = this.makeColumns();
    this.caption = table.closest("details").querySelector("summary");
    this.meanings = new Map(Array.from(table.tHead.rows[0].cells, cell => [cell.textContent.trim(), cell.title]));
    this.show();
  }

  // [head, value(pair), text(value, pair)] of each column; tests have their place where a layer is chosen.
  makeColumns() {
    const { run } = this;
    const of = values => pair => (this.layer.value === "" ? pairMean(run, values, pair)
      : values[Number(this.layer.value) * run.pairs.length + pair]);
    const columns = [["Raw", of(divergenceOf(run)), number, "rawP"]];
    if (run.composition) {
      columns.push(["Vocabulary", of(run.composition), number], ["Equal tokens", of(run.standardisedCorrected), number, "standardisedP"],
        ["Same token", of(run.sameToken), number], ["Covered", pair => run.covered[pair], percent]);
    }
    columns.push(["Overlap", of(run.overlap), percent]);
    for (const [title, key] of [["Raw", "rawP"], ["Equal tokens", "standardisedP"]]) {
      if (run[key]) columns.push([title, pair => this.tested(key, pair), value => this.testText(value), key, true]);
    }
    return columns;
  }

  ps(key, pair) {
    return this.run.layers.map((_, place) => this.run[key][place * this.run.pairs.length + pair]);
  }

  tested(key, pair) {
    if (this.layer.value !== "") return this.ps(key, pair)[Number(this.layer.value)];
    const known = this.ps(key, pair).filter(Number.isFinite);
    return known.length ? known.filter(p => p <= 0.05).length : NaN;
  }

  testText(value) {
    if (!Number.isFinite(value)) return "not tested";
    return this.layer.value === "" ? `${value} of ${this.run.layers.length}` : value.toFixed(3);
  }

  heads() {
    const isMean = this.layer.value === "";
    return ["Pair", ...this.columns.map(([title, , , , isTest]) => (isTest ? `${title}: ${isMean ? "layers" : "p"}` : title))];
  }

  show() {
    const { run } = this, wanted = this.find.value.trim().toLowerCase();
    let found = run.pairs.map((pair, place) => ({ pair, place }));
    if (wanted) found = found.filter(({ pair }) => pair.some(each => run.domains[each].toLowerCase().includes(wanted)));
    for (const each of found) each.values = this.columns.map(column => column[1](each.place));
    const by = this.sortedBy - 1, sign = this.isRising ? 1 : -1;
    const value = each => (Number.isFinite(each.values[by]) ? each.values[by] : -Infinity * sign);
    found.sort((a, b) => (value(a) - value(b) || 0) * sign);
    const layer = run.layers[this.layer.value]?.number;
    this.caption.textContent = `Pairs of domains, ${layer === undefined ? "mean over layers" : `layer ${layer}`}`;
    this.table.tHead.replaceChildren(this.headRow());
    this.table.tBodies[0].replaceChildren(...found.slice(0, this.most).map(each => this.row(each)));
    this.more.hidden = found.length <= this.most;
    this.more.textContent = `Show more of ${found.length.toLocaleString("en")} pairs`;
  }

  headRow() {
    return element("tr", {}, ...this.heads().map((title, place) => {
      const head = element("th", { scope: "col", class: place ? "number" : "" });
      const meaning = this.meanings.get(title) ?? "adjusted for layers and pairs";
      if (meaning) head.title = meaning;
      if (!place) head.append(title);
      else {
        const button = element("button", { type: "button", class: "sort" }, title);
        if (place === this.sortedBy) head.setAttribute("aria-sort", this.isRising ? "ascending" : "descending");
        button.addEventListener("click", () => this.sort(place));
        head.append(button);
      }
      return head;
    }));
  }

  sort(place) {
    this.isRising = place === this.sortedBy && !this.isRising;
    this.sortedBy = place;
    this.show();
    this.table.tHead.querySelectorAll("button")[place - 1].focus();
  }

  row({ pair: [one, other], place, values }) {
    const { run } = this;
    const head = element("th", { scope: "row" }, `${name(run.domains[one])} – ${name(run.domains[other])}`);
    return element("tr", {}, head, ...this.columns.map(([, , text, key], column) => {
      const tested = key && run[key] ? this.tested(key, place) : NaN;
      const isChance = Number.isFinite(tested) && (this.layer.value === "" ? tested === 0 : tested > 0.05);
      return element("td", { class: `number${isChance ? " muted" : ""}` }, text(values[column]));
    }));
  }
}
