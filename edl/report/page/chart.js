// What all charts share: a canvas in a box that scrolls, a cursor that pointer and keys move, and a text that says its value.

const charts = [];
const tip = document.getElementById("tip");
const FONT = getComputedStyle(document.body).fontFamily;
const isCoarse = matchMedia("(pointer: coarse)");

function element(kind, attributes = {}, ...children) {
  const made = document.createElement(kind);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

class Chart {
  // Subclasses give: layout(width) → [full width, height, shown height]; draw(context); at(x, y) → cursor or null;
  // move(key) → cursor or null; place(cursor) → {x, y}; describe(cursor) → text; they may give choose(cursor).
  constructor(figure, label) {
    const id = `hint-${charts.length}`;
    this.figure = figure;
    this.body = element("div", { class: "chart-body", tabindex: "0", role: "application", "aria-label": label,
      "aria-roledescription": "chart", "aria-describedby": id });
    this.canvas = element("canvas");
    this.extent = element("div", { class: "extent" });
    this.output = element("output", { class: "readout", "aria-live": "polite", id }, this.hint());
    this.body.append(this.canvas, this.extent);
    this.legend = element("div", { class: "legend" });
    figure.append(this.legend, this.body, this.output);
    this.cursor = null;
    this.isVisible = false;
    this.isStale = true;
    charts.push(this);
    this.listen();
  }

  // What the first chart says before it is touched.
  hint() {
    if (charts.length) return "";
    return isCoarse.matches ? "Tap for values." : "Hover for values, or use the arrow keys.";
  }

  listen() {
    const { body } = this;
    body.addEventListener("pointermove", event => this.point(event));
    body.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") this.leave(); });
    body.addEventListener("click", event => { this.point(event); this.enter(); });
    body.addEventListener("keydown", event => this.press(event));
    body.addEventListener("blur", () => this.leave());
    body.addEventListener("focus", () => { if (body.matches(":focus-visible")) this.show(this.cursor ?? this.start()); });
    body.addEventListener("scroll", () => { tip.hidden = true; this.refresh(); }, { passive: true });
  }

  start() {
    return this.move("Home");
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const found = this.at(event.clientX - box.left, event.clientY - box.top);
    if (found) this.show(found); else this.leave();
  }

  press(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") return this.leave();
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      return this.enter();
    }
    const found = this.move(event.key);
    if (!found) return;
    event.preventDefault();
    this.reveal(found);
    this.show(found);
  }

  enter() {
    if (this.cursor && this.choose) this.choose(this.cursor);
  }

  reveal() {}

  show(cursor) {
    if (!cursor) return;
    this.cursor = cursor;
    const text = this.describe(cursor);
    if (this.output.textContent !== text) this.output.textContent = text;
    tip.textContent = text;
    tip.hidden = false;
    const box = this.canvas.getBoundingClientRect(), { x, y } = this.place(cursor);
    const width = tip.offsetWidth, height = tip.offsetHeight;
    const left = Math.min(innerWidth - width - 8, Math.max(8, box.left + x - width / 2));
    const above = box.top + y - height - 14;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 50 ? box.top + y + 26 : above}px`;
    this.refresh();
  }

  leave() {
    tip.hidden = true;
    if (!this.cursor) return;
    this.cursor = null;
    this.refresh();
  }

  // Sizes may have changed.
  fit() {
    const width = Math.floor(this.figure.clientWidth);
    if (!width) return;
    const [full, height, shown] = this.layout(width);
    const ratio = window.devicePixelRatio || 1;
    this.width = width;
    this.height = shown;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${shown}px`;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(shown * ratio);
    this.body.style.maxHeight = shown < height ? `${shown}px` : "";
    this.extent.style.width = `${full}px`;
    this.extent.style.height = `${height}px`;
    this.extent.style.marginTop = `${-shown}px`;
    this.isScrolling = full > width + 1;
    this.refresh();
  }

  // Draws before the next frame, if it is in sight.
  refresh() {
    this.isStale = true;
    if (!this.isVisible || this.isAwaited) return;
    this.isAwaited = true;
    requestAnimationFrame(() => { this.isAwaited = false; this.paint(); });
  }

  paint() {
    if (!this.width || !this.isStale) return;
    this.isStale = false;
    const context = this.canvas.getContext("2d"), ratio = this.canvas.width / this.width;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.width, this.height);
    context.font = `12px ${FONT}`;
    context.textBaseline = "middle";
    this.paintLegend?.();
    this.draw(context);
    if (!Chart.isFirstDrawn) {
      Chart.isFirstDrawn = true;
      performance.mark("first-drawing");
    }
  }
}

// Ends of what fits into a width, as text.
function cut(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  const letters = Array.from(text);
  let low = 0, high = letters.length;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (context.measureText(letters.slice(0, middle).join("") + "…").width <= width) low = middle; else high = middle - 1;
  }
  return letters.slice(0, low).join("") + "…";
}

// Round numbers between two ends.
function ticks(low, high, most) {
  const span = high - low;
  if (!(span > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(span / most));
  const step = power * [1, 2, 5, 10].find(factor => span / (factor * power) <= most);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + span * 1e-9; at++) found.push(Number((at * step).toPrecision(12)));
  return found;
}

// Draws charts when they come into sight, and again when theme or size changes.
function watch() {
  const sight = new IntersectionObserver(entries => {
    for (const entry of entries) {
      const chart = charts.find(each => each.figure === entry.target);
      chart.isVisible = entry.isIntersecting;
      if (chart.isVisible && chart.isStale) chart.refresh();
    }
  }, { rootMargin: "300px" });
  const sizes = new ResizeObserver(entries => {
    for (const entry of entries) {
      const chart = charts.find(each => each.figure === entry.target);
      if (Math.floor(chart.figure.clientWidth) !== chart.width) chart.fit();
    }
  });
  for (const chart of charts) {
    chart.fit();
    sight.observe(chart.figure);
    sizes.observe(chart.figure);
  }
  darkness.addEventListener("change", () => charts.forEach(chart => chart.refresh()));
  const print = state => {
    isPrinting = state;
    for (const chart of charts) {
      chart.isStale = true;
      if (state) chart.paint(); else chart.refresh();
    }
  };
  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
}
