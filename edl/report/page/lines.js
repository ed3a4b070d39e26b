// Lines over layers or steps, with bands of their intervals.

class Lines extends Chart {
  // Settings: x: numbers; xName: of the axis; series: [{name, values, low, high, open, colour, isDashed}], of which `low`,
  // `high` and `open` (cannot be told from chance: hollow) may be missing; top: highest value of the axis; say(place).
  constructor(figure, label, settings) {
    super(figure, label);
    this.settings = settings;
    if (settings.series.length > 1) {
      this.legend.append(...settings.series.map(each =>
        element("span", { class: "key" }, element("i", { class: `line ${each.colour}${each.isDashed ? " dashed" : ""}` }), each.name)));
    }
    this.ends();
  }

  ends() {
    let low = 0, high = this.settings.top ?? 0;
    for (const { values, low: lows = [], high: highs = [] } of this.settings.series) {
      for (const value of [...values, ...lows, ...highs]) {
        if (Number.isFinite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
      }
    }
    this.low = low;
    this.high = high > low ? high : low + 1;
  }

  layout(width) {
    const height = Math.round(Math.min(280, Math.max(190, width * 0.36)));
    this.box = { left: 52, right: width - 12, top: 12, bottom: height - 36 };
    return [width, height, height];
  }

  xAt(place) {
    const { x } = this.settings, { left, right } = this.box, span = x[x.length - 1] - x[0];
    return span > 0 ? left + 6 + ((x[place] - x[0]) / span) * (right - left - 12) : (left + right) / 2;
  }

  yAt(value) {
    const { top, bottom } = this.box;
    return bottom - ((value - this.low) / (this.high - this.low)) * (bottom - top);
  }

  draw(context) {
    this.drawAxes(context);
    if (!this.settings.series.some(({ values }) => values.some(Number.isFinite))) {
      context.textAlign = "center";
      context.fillText("not known", (this.box.left + this.box.right) / 2, (this.box.top + this.box.bottom) / 2);
    }
    if (this.cursor) {
      context.strokeStyle = ink("soft");
      context.lineWidth = 1;
      const x = Math.round(this.xAt(this.cursor.at)) + 0.5;
      this.stroke(context, [[x, this.box.top], [x, this.box.bottom]]);
    }
    for (const series of this.settings.series) this.drawBand(context, series);
    for (const series of this.settings.series) this.drawLine(context, series);
  }

  drawAxes(context) {
    const { left, right, bottom } = this.box, { x, xName } = this.settings;
    context.font = `11px ${FONT}`;
    context.lineWidth = 1;
    context.textAlign = "right";
    for (const value of ticks(this.low, this.high, 4)) {
      const y = Math.round(this.yAt(value)) + 0.5;
      context.strokeStyle = ink(value === 0 ? "axis" : "rule");
      this.stroke(context, [[left, y], [right, y]]);
      context.fillStyle = ink("soft");
      context.fillText(String(value).replace("-", "−"), left - 8, y);
    }
    context.textAlign = "center";
    const shown = x.length < 9 ? [...x] : ticks(x[0], x[x.length - 1], Math.max(4, Math.floor((right - left) / 60)));
    for (const value of new Set(shown)) {
      const span = x[x.length - 1] - x[0];
      const at = span > 0 ? left + 6 + ((value - x[0]) / span) * (right - left - 12) : (left + right) / 2;
      context.fillText(value.toLocaleString("en"), at, bottom + 13);
    }
    context.textAlign = "right";
    context.fillText(xName, right, bottom + 28);
  }

  stroke(context, points) {
    context.beginPath();
    let isDown = false;
    for (const [x, y] of points) {
      if (!Number.isFinite(y)) { isDown = false; continue; }
      if (isDown) context.lineTo(x, y); else context.moveTo(x, y);
      isDown = true;
    }
    context.stroke();
  }

  drawBand(context, { low, high, colour }) {
    if (!low) return;
    context.fillStyle = ink(colour);
    context.globalAlpha = 0.16;
    for (let place = 0; place + 1 < low.length; place++) {
      const corners = [low[place], low[place + 1], high[place + 1], high[place]];
      if (!corners.every(Number.isFinite)) continue;
      const [one, other] = [this.xAt(place), this.xAt(place + 1)], [a, b, c, d] = corners.map(each => this.yAt(each));
      context.beginPath();
      context.moveTo(one, a);
      context.lineTo(other, b);
      context.lineTo(other, c);
      context.lineTo(one, d);
      context.fill();
    }
    context.globalAlpha = 1;
  }

  drawLine(context, { values, open, colour, isDashed }) {
    const points = Array.from(values, (value, place) => [this.xAt(place), Number.isFinite(value) ? this.yAt(value) : NaN]);
    context.strokeStyle = context.fillStyle = ink(colour);
    context.lineWidth = 2;
    context.lineJoin = "round";
    context.setLineDash(isDashed ? [5, 4] : []);
    this.stroke(context, points);
    context.setLineDash([]);
    const radius = points.length > 40 ? 2 : 3;
    points.forEach(([x, y], place) => {
      const isOpen = open?.[place], isAt = this.cursor?.at === place;
      if (!Number.isFinite(y) || !(isOpen || isAt || points.length <= 24)) return;
      context.beginPath();
      context.arc(x, y, isAt ? radius + 1.5 : radius, 0, 7);
      context.fillStyle = ink(isOpen ? "paper" : colour);
      context.lineWidth = 1.5;
      context.fill();
      context.stroke();
    });
  }

  at(x) {
    let best = null, least = Infinity;
    for (let place = 0; place < this.settings.x.length; place++) {
      const distance = Math.abs(this.xAt(place) - x);
      if (distance < least) { least = distance; best = { at: place }; }
    }
    return best;
  }

  move(key) {
    const last = this.settings.x.length - 1, at = this.cursor?.at ?? -1;
    const to = { ArrowLeft: Math.max(0, at - 1), ArrowRight: Math.min(last, at + 1), Home: 0, End: last }[key];
    return to === undefined ? null : { at: to };
  }

  place({ at }) {
    const values = this.settings.series.map(series => series.values[at]).filter(Number.isFinite);
    return { x: this.xAt(at), y: values.length ? this.yAt(Math.max(...values)) : this.box.top };
  }

  describe({ at }) {
    return this.settings.say(at);
  }

  choose({ at }) {
    this.settings.pick?.(at);
  }
}
