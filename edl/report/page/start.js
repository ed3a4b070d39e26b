// Puts everything into its place.

function chartsOf(kind) {
  return document.querySelectorAll(`[data-chart="${kind}"]`);
}

function labelOf(figure) {
  return figure.querySelector("figcaption").textContent.trim().replace(/\s+/g, " ");
}

function addPictures(runs) {
  for (const figure of chartsOf("picture")) {
    const run = runs[figure.dataset.run], { layer } = mostDistinct(run);
    new HeatMap(figure, labelOf(figure), usageSettings(run, () => layer, () => ({ colour: "ratio", order: "domain" })));
  }
  for (const figure of chartsOf("usage")) {
    const run = runs[figure.dataset.run], settings = usageSettings(run, () => chosenIn(run).layer, () => chosen);
    const map = new HeatMap(figure, labelOf(figure), settings);
    chosen.listeners.push(() => {
      settings.renew();
      map.makeLegend();
      map.cursor = null;
      map.fit();
    });
  }
}

// A map with a row for each layer, its experts sorted by a value.
function sortedMap(figure, run, values, settings) {
  const orders = run.layers.map(layer => run.sorted(layer, values));
  const value = (row, column) => values[run.layers[row].start + orders[row][column]];
  new HeatMap(figure, labelOf(figure), {
    rows: run.layers.length,
    columns: Math.max(...run.layers.map(layer => layer.experts)),
    mostRow: 18,
    rowName: row => `layer ${run.layers[row].number}`,
    map: settings.map,
    key: settings.key,
    shade: (row, column) => {
      const expert = orders[row][column];
      if (expert === undefined) return null;
      return run.layers[row].dead.has(expert) ? DEAD : settings.shade(value(row, column));
    },
    say: (row, column) => {
      const expert = orders[row][column], place = `Layer ${run.layers[row].number}, expert ${expert}`;
      return `${place}: ${run.layers[row].dead.has(expert) ? "dead, nobody chose it" : settings.say(value(row, column), run.layers[row])}`;
    },
    pick: (row, column) => choose({ layer: run.layers[row].number, expert: orders[row][column] }),
  });
}

function addOverviews(runs) {
  for (const figure of chartsOf("load")) {
    const run = runs[figure.dataset.run];
    sortedMap(figure, run, run.load, {
      map: "diverging",
      key: { ends: [[0, "¼×"], [0.25, "½×"], [0.5, "1×"], [0.75, "2×"], [1, "4×"]],
        dead: run.layers.some(layer => layer.dead.size) ? "dead" : "" },
      shade: value => (value === 0 ? 0 : 0.5 + Math.log2(value) / 4),
      say: (value, layer) => (Number.isFinite(value)
        ? `${value.toFixed(2)}× an even share, ${percent(value / layer.experts)} of all choices` : "not known"),
    });
  }
  const most = Math.max(0, highest(runs.map(run => run.specialisation))) || 1;
  for (const figure of chartsOf("narrow")) {
    const run = runs[figure.dataset.run];
    sortedMap(figure, run, run.specialisation, {
      map: "sequential",
      key: { ends: [[0, "0"], [0.5, (most / 2).toFixed(2)], [1, `${most.toFixed(2)} bits`]],
        dead: run.layers.some(layer => layer.dead.size) ? "dead" : "" },
      shade: value => value / most,
      say: value => (Number.isFinite(value)
        ? `${value.toFixed(2)} bits, as if ${(run.D / 2 ** value).toFixed(1)} of ${run.D} domains chose it alike` : "not known"),
    });
  }
  const shares = runs.map(run => run.coverage.map((count, at) => count / run.layers[Math.floor(at / run.D)].experts));
  for (const figure of chartsOf("coverage")) addCoverage(figure, runs[figure.dataset.run], shares);
}

// The largest of the known numbers in several arrays.
function highest(arrays) {
  let most = -Infinity;
  for (const array of arrays) for (const value of array) if (value > most && value < Infinity) most = value;
  return most;
}

function addCoverage(figure, run, shares) {
  const most = highest(shares), least = -highest(shares.map(array => array.map(share => (share > 0 ? -share : NaN))));
  const span = most > least ? most - least : 1;
  const count = (row, column) => run.coverage[column * run.D + row];
  const share = (row, column) => (count(row, column) > 0 ? count(row, column) / run.layers[column].experts : UNKNOWN);
  new HeatMap(figure, labelOf(figure), {
    rows: run.D,
    columns: run.layers.length,
    rowName: row => name(run.domains[row]),
    columnName: column => String(run.layers[column].number),
    map: "sequential",
    key: { ends: most > 0 ? [[0, percent(least)], [1, percent(most)]] : [] },
    shade: (row, column) => (share(row, column) - least) / span,
    cellText: (row, column) => String(count(row, column)),
    say: (row, column) => {
      const place = `Layer ${run.layers[column].number}, ${name(run.domains[row])}`;
      return share(row, column) > 0
        ? `${place}: ${count(row, column)} of ${run.layers[column].experts} experts, ${percent(share(row, column))}` : `${place}: not known`;
    },
    pick: (row, column) => choose({ layer: run.layers[column].number, domain: run.domains[row] }),
  });
}

// The lines of a run's layers: divergence, and what the token makes of it.
function layerSeries(run) {
  const means = values => run.layers.map(({ place }) => mean(values.subarray(place * run.pairs.length, (place + 1) * run.pairs.length)));
  const of = (title, key, colour) => {
    const p = run[`${key}LayerP`], isChance = Array.from(p, each => each > 0.05);
    const ends = part => Array.from(run[`${key}Layer${part}`], (end, place) => (isChance[place] ? NaN : end));
    return { name: title, values: run[`${key}LayerValue`], low: ends("Low"), high: ends("High"), open: isChance, colour, p,
      bound: run[`${key}LayerHigh`] };
  };
  const series = [run.rawLayerValue ? of("all of it", "raw", "raw")
    : { name: "all of it", values: means(run.divergence), colour: "raw" }];
  if (run.composition) {
    series.push({ name: "vocabulary", values: means(run.composition), colour: "token", isDashed: true });
    series.push(of("at equal tokens", "standardised", "standardised"));
  }
  return series;
}

function sayPoint({ name: title, values, low, high, open, p, bound }, at) {
  if (open?.[at]) return `${title}: chance${Number.isFinite(bound[at]) ? `, below ${number(bound[at])}` : ""}`;
  const ends = low && Number.isFinite(low[at]) ? ` (${number(low[at])} to ${number(high[at])}${p ? `, p = ${p[at].toFixed(3)}` : ""})` : "";
  return `${title}: ${number(values[at])}${ends}`;
}

function addLayerLines(runs) {
  const all = runs.map(layerSeries);
  const top = Math.max(...all.flat().flatMap(each => [...each.values, ...(each.high ?? [])]).filter(Number.isFinite), 0);
  for (const figure of chartsOf("layers")) {
    const run = runs[figure.dataset.run], series = all[run.number];
    new Lines(figure, labelOf(figure), {
      x: run.layers.map(layer => layer.number),
      xName: "layer",
      series,
      top,
      say: at => `Layer ${run.layers[at].number} · ${series.map(each => sayPoint(each, at)).join(" · ")} nats`,
      pick: at => choose({ layer: run.layers[at].number }),
    });
  }
}

function addCourses(runs) {
  for (const kind of ["information", "maxViolation", "dead", "tokenEntropy"]) {
    const known = runs.map(run => run.course?.[kind].map(row => row.map(value => value ?? NaN)));
    const least = rows => rows.map(row => Math.min(...row.filter(Number.isFinite)));
    const most = rows => rows.map(row => Math.max(...row.filter(Number.isFinite)));
    const top = Math.max(0, ...known.filter(Boolean).flatMap(most).filter(Number.isFinite));
    for (const figure of chartsOf(`course-${kind}`)) {
      const run = runs[figure.dataset.run], rows = known[run.number];
      const values = rows.map(mean), low = least(rows), high = most(rows);
      new Lines(figure, labelOf(figure), {
        x: run.course.steps,
        xName: "step",
        top,
        series: [{ name: "mean over layers", values, low, high, colour: "raw" }],
        say: at => `Step ${run.course.steps[at].toLocaleString("en")}: ${number(values[at])} (layers ${number(low[at])} to ${number(high[at])})`,
      });
    }
  }
}

function addChanges(changes) {
  for (const [kind, title] of [["change", "information"], ["saturation", "saturation"]]) {
    for (const figure of chartsOf(kind)) {
      const { layers, ...values } = changes[figure.dataset.run];
      const shown = values[title].map(value => value ?? NaN);
      new Lines(figure, labelOf(figure), {
        x: layers,
        xName: "layer",
        top: title === "saturation" ? 1 : 0,
        series: [{ name: title, values: shown, colour: title === "saturation" ? "token" : "raw" }],
        say: at => `Layer ${layers[at]}: ${title === "saturation" ? percent(shown[at]) : `${number(shown[at])} nats`}`,
        pick: at => choose({ layer: layers[at] }),
      });
    }
  }
}

function addTrees(runs) {
  for (const figure of chartsOf("tree")) {
    const run = runs[figure.dataset.run];
    if (run.tree.length) new Tree(figure, labelOf(figure), run);
    else figure.remove();
  }
}

function addPanels(runs) {
  makeControls(runs);
  const each = (kind, act) => {
    for (const box of document.querySelectorAll(`[data-${kind}]`)) chosen.listeners.push(() => act(runs[box.dataset.run], box));
  };
  each("panels", showPanels);
  each("reading", showReading);
  for (const run of runs) chosen.listeners.push(() => showExamples(run));
}

function addTables(runs) {
  for (const form of document.querySelectorAll("[data-pair-controls]")) {
    const run = runs[form.dataset.run];
    new Pairs(run, document.querySelector(`[data-table=pairs][data-run="${run.number}"]`), form);
  }
  for (const box of document.querySelectorAll("[data-downloads]")) addDownloads(runs[box.dataset.run], box);
  addCopyButtons();
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(each => { each.open = true; }));
}

async function start() {
  const texts = Array.from(document.querySelectorAll("[data-packed]"), each => each.textContent);
  const runs = (await Promise.all(texts.map(unpack))).map((header, place) => new Run(header, place));
  const { changes } = await unpack(document.getElementById("changes").textContent);
  document.documentElement.classList.add("drawn");
  addPictures(runs);
  addOverviews(runs);
  addLayerLines(runs);
  addCourses(runs);
  addChanges(changes);
  addTrees(runs);
  addPanels(runs);
  addTables(runs);
  const [first] = runs.map(run => ({ run, ...mostDistinct(run) })).sort((a, b) => b.gain - a.gain);
  choose({ layer: first.layer.number, domain: first.run.domains[first.domain], expert: first.expert });
  watch();
}

start();
