// One layer at a time: domains and experts, and what is known of the chosen ones.

// What is chosen, in all runs; each finds what it has of it.
const chosen = { layer: null, domain: null, expert: null, colour: "ratio", order: "domain", listeners: [] };

function choose(change) {
  Object.assign(chosen, change);
  for (const listener of chosen.listeners) listener();
}

function chosenIn(run) {
  const layer = run.layers.find(each => each.number === chosen.layer) ?? run.layers[Math.min(run.layers.length - 1, 0)];
  const domain = Math.max(0, run.domains.indexOf(chosen.domain));
  return { layer, domain, expert: Math.min(chosen.expert ?? 0, layer.experts - 1) };
}

// The layer in which domains are furthest apart, and in it the cell that sets a domain apart most.
function mostDistinct(run) {
  const values = divergenceOf(run), P = run.pairs.length;
  let best = run.layers[0], most = -Infinity;
  for (const layer of run.layers) {
    const value = mean(values.subarray(layer.place * P, (layer.place + 1) * P));
    if (value > most) { most = value; best = layer; }
  }
  let cell = [0, 0], gain = 0;
  for (let domain = 0; domain < run.D; domain++) {
    for (let expert = 0; expert < best.experts; expert++) {
      const share = run.share(best, domain, expert), ratio = run.ratio(best, domain, expert);
      const value = ratio > 1 && run.isCertain(best, domain, expert) ? share * Math.log2(ratio) : 0;
      if (value > gain) { gain = value; cell = [domain, expert]; }
    }
  }
  return { layer: best, domain: cell[0], expert: cell[1], gain };
}

const WIDEST_RATIO = 3; // log2: from an eighth of the mean to eight times it

// What a map of domains and experts shows of a layer that `get` gives.
function usageSettings(run, get, look) {
  const experts = () => (look().order === "domain" ? run.order(get()) : null);
  const expertAt = column => experts()?.[column] ?? column;
  const isRatio = () => look().colour === "ratio" && run.D > 1;
  const highest = () => Math.max(1e-9, ...run.usage.subarray(get().cells, get().cells + run.D * get().experts).filter(Number.isFinite));
  const settings = {
    rows: run.D,
    get columns() { return get().experts; },
    get map() { return isRatio() ? "diverging" : "sequential"; },
    rowName: row => name(run.domains[row]),
    columnName: column => String(expertAt(column)),
    shade: (row, column) => {
      const layer = get(), expert = expertAt(column), share = run.share(layer, row, expert);
      if (share !== share) return UNKNOWN;
      if (layer.dead.has(expert)) return DEAD;
      if (!isRatio()) return share / settings.highest;
      if (!run.isCertain(layer, row, expert)) return GREY;
      return 0.5 + Math.log2(run.ratio(layer, row, expert)) / WIDEST_RATIO / 2;
    },
    cellText: (row, column) => {
      const layer = get(), expert = expertAt(column);
      if (layer.dead.has(expert)) return "";
      return isRatio() ? times(run.ratio(layer, row, expert)) : percent(run.share(layer, row, expert)).replace(/[ .%]+$/, "");
    },
    say: (row, column) => sayCell(run, get(), row, expertAt(column)),
    pick: (row, column) => choose({ layer: get().number, domain: run.domains[row], expert: expertAt(column) }),
    picked: () => {
      const { layer, domain, expert } = chosenIn(run);
      return layer === get() ? { row: domain, column: experts()?.indexOf(expert) ?? expert } : undefined;
    },
    get key() {
      const ends = isRatio() ? [[0, "⅛×"], [1 / 3, "½×"], [0.5, "1×"], [2 / 3, "2×"], [1, "8×"]]
        : [[0, "0"], [1, percent(settings.highest)]];
      return { ends, grey: isRatio() && run.certain ? "not certain" : "", dead: get().dead.size ? "dead" : "" };
    },
    renew: () => { settings.highest = highest(); },
  };
  settings.renew();
  return settings;
}

function sayCell(run, layer, domain, expert) {
  const place = `Layer ${layer.number}, expert ${expert}, ${name(run.domains[domain])}`;
  const share = run.share(layer, domain, expert);
  if (!Number.isFinite(share)) return `${place}: not known`;
  if (layer.dead.has(expert)) return `${place}: dead, nobody chose it`;
  const ratio = run.D > 1 ? `, ${times(run.ratio(layer, domain, expert))} the mean domain` : "";
  const certain = run.D > 1 && !run.isCertain(layer, domain, expert) ? ", not certain" : "";
  return `${place}: ${percent(share)} of its choices${ratio}${certain}`;
}

// A ranking with bars.
function ranking(title, hint, rows) {
  const most = Math.max(1e-9, ...rows.map(row => row.size));
  const body = element("ol", { class: "ranking" }, ...rows.map(row => {
    const bar = element("i", { class: row.isMuted ? "muted" : "" });
    bar.style.width = `${Math.max(0.5, (100 * row.size) / most)}%`;
    const label = row.pick ? element("button", { type: "button" }, row.label) : element("span", {}, row.label);
    if (row.pick) label.addEventListener("click", row.pick);
    return element("li", {}, label, element("span", { class: "value" }, row.text), bar);
  }));
  return [element("h4", {}, title), element("p", { class: "hint" }, rows.length ? hint : "None is known."), body];
}

function showPanels(run, box) {
  const { layer, domain, expert } = chosenIn(run);
  const panel = kind => box.querySelector(`[data-panel=${kind}]`);
  const row = (label, row, column, pick) => {
    const share = run.share(layer, row, column), isMuted = !run.isCertain(layer, row, column);
    const ratio = run.D > 1 ? `, ${times(run.ratio(layer, row, column))}` : "";
    return { label, size: Number.isFinite(share) ? share : 0, text: percent(share) + ratio, isMuted, pick };
  };
  const all = Array.from({ length: layer.experts }, (_, each) => each).filter(each => run.share(layer, domain, each) > 0);
  all.sort((a, b) => run.share(layer, domain, b) - run.share(layer, domain, a));
  panel("domain").replaceChildren(...ranking(`Experts for ${name(run.domains[domain])}`,
    `Its choices in layer ${layer.number}, times the mean domain`,
    all.slice(0, 8).map(each => row(`Expert ${each}`, domain, each, () => choose({ expert: each })))));
  const domains = run.domains.map((_, each) => each).filter(each => Number.isFinite(run.share(layer, each, expert)));
  domains.sort((a, b) => run.share(layer, b, expert) - run.share(layer, a, expert));
  panel("expert").replaceChildren(...ranking(`Domains for expert ${expert}`,
    "Of each domain’s choices, times the mean domain",
    domains.slice(0, 8).map(each => row(name(run.domains[each]), each, expert, () => choose({ domain: run.domains[each] })))));
  panel("partners").replaceChildren(...ranking(`Chosen together with expert ${expert}`, "By the same token, times what their loads say; the 8 strongest",
    run.togetherWith(layer, expert).map(each => ({ label: `Expert ${each.expert}`, size: each.lift, text: times(each.lift),
      pick: () => choose({ expert: each.expert }) }))));
}

function showReading(run, box) {
  const { layer, expert } = chosenIn(run);
  const found = run.readTokens(layer, expert);
  const most = Math.max(1, ...found.map(each => each.choices));
  const [title, hint, list] = ranking(`Expert ${expert} of layer ${layer.number} reads`,
    "Tokens that it reads most for their number: its choices by them, times the layer’s mean",
    found.map(each => ({ label: each.text, size: each.choices / most,
      text: `${each.choices.toLocaleString("en")}, ${times(each.lift)}` })));
  list.classList.add("tokens");
  box.replaceChildren(title, hint, list);
}

function showExamples(run) {
  const { layer, expert } = chosenIn(run);
  const hint = document.querySelector(`[data-example-hint][data-run="${run.number}"]`);
  if (!hint) return;
  hint.textContent = `Marked: tokens whose first choice in layer ${layer.number} is expert ${expert}. Choose a token to follow its expert.`;
  for (const box of document.querySelectorAll(`[data-example][data-run="${run.number}"]`)) {
    const { tokens, experts } = run.examples[box.dataset.example];
    box.replaceChildren(...tokens.map((text, place) => {
      const first = experts[layer.place][place];
      const made = element("span", { title: `expert ${first}` }, text);
      if (first === expert) made.className = "read";
      made.addEventListener("click", () => choose({ expert: first }));
      return made;
    }));
  }
}

function makeControls(runs) {
  const form = document.querySelector("[data-controls]"), select = form.querySelector("#layer");
  const numbers = [...new Set(runs.flatMap(run => run.layers.map(layer => layer.number)))].sort((a, b) => a - b);
  select.append(...numbers.map(each => element("option", { value: each }, each)));
  select.addEventListener("change", () => choose({ layer: Number(select.value) }));
  for (const button of form.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => {
      const place = numbers.indexOf(chosen.layer) + Number(button.dataset.step);
      if (numbers[place] !== undefined) choose({ layer: numbers[place] });
    });
  }
  form.querySelector("#colour").addEventListener("change", event => choose({ colour: event.target.value }));
  form.querySelector("#order").addEventListener("change", event => choose({ order: event.target.value }));
  form.addEventListener("submit", event => event.preventDefault());
  chosen.listeners.push(() => { select.value = chosen.layer; });
}
