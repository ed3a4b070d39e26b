// A heat map: rows with names, columns, a cell for each. Only cells in sight are drawn.

const UNKNOWN = NaN, GREY = -1, DEAD = -2;

class HeatMap extends Chart {
  // Settings: rows, columns: numbers; rowName(row); columnName(column) or null; shade(row, column) → 0 to 1, UNKNOWN,
  // GREY or DEAD; map: of colours; cellText(row, column) for wide cells; say(row, column) → text; pick(row, column);
  // picked() → {row, column}; key: {ends: [[at, text], …], grey, dead: texts}; mostRow: of pixels.
  constructor(figure, label, settings) {
    super(figure, label);
    this.settings = settings;
    this.makeLegend();
  }

  makeLegend() {
    const { key } = this.settings;
    this.ramp = element("canvas", { class: "ramp" });
    const marks = element("div", { class: "ramp-marks" });
    for (const [at, text] of key.ends) {
      const mark = element("span", {}, text);
      mark.style.left = `${100 * at}%`;
      mark.style.transform = `translateX(${-100 * at}%)`;
      marks.append(mark);
    }
    this.legend.replaceChildren(element("div", { class: "ramp-box" }, this.ramp, marks));
    for (const kind of ["grey", "dead"]) {
      if (key[kind]) this.legend.append(element("span", { class: "key" }, element("i", { class: `swatch ${kind}` }), key[kind]));
    }
  }

  paintLegend() {
    const context = this.ramp.getContext("2d"), { map } = this.settings;
    this.ramp.width = 200;
    this.ramp.height = 10;
    for (let x = 0; x < 200; x++) {
      context.fillStyle = shade(map, x / 199);
      context.fillRect(x, 0, 1, 10);
    }
  }

  layout(width) {
    const { rows, columns, rowName, columnName, mostRow = 26 } = this.settings;
    const context = this.canvas.getContext("2d");
    context.font = `12px ${FONT}`;
    let widest = 0;
    for (let row = 0; row < Math.min(rows, 400); row++) widest = Math.max(widest, context.measureText(rowName(row)).width);
    this.left = Math.ceil(Math.min(widest + 10, width * 0.34, 200));
    this.top = columnName ? 20 : 2;
    const least = innerWidth < 600 || isCoarse.matches ? 7 : 3;
    this.cell = Math.min(80, Math.max(least, (width - this.left) / columns));
    this.row = Math.min(mostRow, Math.max(mostRow === 26 ? 16 : 11, 460 / rows));
    this.isNumbered = Boolean(this.settings.cellText) && this.cell >= 34 && this.row >= 18;
    const full = this.left + this.cell * columns, height = this.top + this.row * rows + 4;
    return [full, height, Math.min(height, 1000)];
  }

  column(x) {
    return this.left + x * this.cell - this.body.scrollLeft;
  }

  line(y) {
    return this.top + y * this.row - this.body.scrollTop;
  }

  draw(context) {
    const { rows, columns } = this.settings;
    const first = Math.max(0, Math.floor(this.body.scrollLeft / this.cell));
    const last = Math.min(columns, Math.ceil((this.body.scrollLeft + this.width - this.left) / this.cell));
    const upper = Math.max(0, Math.floor(this.body.scrollTop / this.row));
    const lower = Math.min(rows, Math.ceil((this.body.scrollTop + this.height - this.top) / this.row));
    context.save();
    context.beginPath();
    context.rect(this.left, this.top, this.width - this.left, this.height - this.top);
    context.clip();
    this.drawCells(context, upper, lower, first, last);
    this.drawFrames(context);
    this.drawCue(context, last < columns || this.column(columns) > this.width + 1);
    context.restore();
    this.drawRowNames(context, upper, lower);
    this.drawColumnNames(context, first, last);
  }

  drawCells(context, upper, lower, first, last) {
    const { map, cellText } = this.settings, shadeOf = this.settings.shade;
    const gap = this.cell >= 7 ? 1 : 0, grey = ink("grey-cell"), dead = ink("dead"), rule = ink("rule");
    context.textAlign = "center";
    context.font = `11px ${FONT}`;
    for (let row = upper; row < lower; row++) {
      const top = Math.round(this.line(row)), height = Math.round(this.line(row + 1)) - top - 1;
      for (let column = first; column < last; column++) {
        const value = shadeOf(row, column);
        if (value === null) continue;
        const left = Math.round(this.column(column)), width = Math.round(this.column(column + 1)) - left - gap;
        if (value !== value) {
          context.fillStyle = rule;
          context.fillRect(left, top + height / 2, width, 1);
          continue;
        }
        context.fillStyle = value === GREY ? grey : value === DEAD ? dead : shade(map, value);
        context.fillRect(left, top, width, height);
        if (this.isNumbered) {
          context.fillStyle = value === GREY ? ink("soft") : isDeep(map, value) ? "#fff" : "#111";
          context.fillText(cellText(row, column), left + width / 2, top + height / 2 + 1);
        }
      }
    }
  }

  drawFrames(context) {
    const picked = this.settings.picked?.();
    if (picked && picked.column >= 0) this.frame(context, picked.row, picked.column, ink("soft"), 1.5);
    if (this.cursor) this.frame(context, this.cursor.row, this.cursor.column, ink("ink"), 2);
  }

  frame(context, row, column, colour, width) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    const wide = Math.max(6, this.cell);
    context.strokeRect(this.column(column) + (this.cell - wide) / 2 - 0.5, this.line(row) - 0.5, wide, this.row);
  }

  // More columns stand to the right.
  drawCue(context, isMore) {
    if (!isMore) return;
    const fade = context.createLinearGradient(this.width - 36, 0, this.width, 0);
    fade.addColorStop(0, `${ink("paper")}00`);
    fade.addColorStop(1, ink("paper"));
    context.fillStyle = fade;
    context.fillRect(this.width - 36, this.top, 36, this.height);
    context.fillStyle = ink("ink");
    context.font = `16px ${FONT}`;
    context.textAlign = "right";
    const middle = this.top + Math.min(this.height - this.top, 300) / 2;
    context.fillText("›", this.width - 2, middle);
  }

  drawRowNames(context, upper, lower) {
    const { rowName } = this.settings, step = Math.max(1, Math.ceil(13 / this.row));
    const marked = this.cursor?.row ?? this.settings.picked?.()?.row;
    context.textAlign = "right";
    for (let row = upper; row < lower; row++) {
      if (row % step && row !== marked) continue;
      if (row !== marked && marked !== undefined && Math.abs(row - marked) * this.row < 12) continue;
      context.font = `${row === marked ? "600 " : ""}12px ${FONT}`;
      context.fillStyle = ink(row === marked ? "ink" : "soft");
      context.fillText(cut(context, rowName(row), this.left - 8), this.left - 7, this.line(row + 0.5));
    }
  }

  drawColumnNames(context, first, last) {
    const { columnName } = this.settings;
    if (!columnName) return;
    context.font = `11px ${FONT}`;
    context.textAlign = "center";
    context.fillStyle = ink("soft");
    const step = [1, 2, 4, 8, 16, 32, 64, 128].find(each => each * this.cell >= 26) ?? 256;
    for (let column = first; column < last; column++) {
      const x = this.column(column + 0.5);
      if (column % step === 0 && x >= this.left && x <= this.width - 8) context.fillText(columnName(column), x, 9);
    }
  }

  at(x, y) {
    const column = Math.floor((x - this.left + this.body.scrollLeft) / this.cell);
    const row = Math.floor((y - this.top + this.body.scrollTop) / this.row);
    return x >= this.left && y >= this.top ? this.within(row, column) : null;
  }

  within(row, column) {
    const { rows, columns } = this.settings, shadeOf = this.settings.shade;
    const fits = row >= 0 && row < rows && column >= 0 && column < columns && shadeOf(row, column) !== null;
    return fits ? { row, column } : null;
  }

  move(key) {
    const { rows, columns } = this.settings;
    const { row, column } = this.cursor ?? this.settings.picked?.() ?? { row: 0, column: 0 };
    const to = {
      ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
      Home: [row, 0], End: [row, columns - 1], PageUp: [Math.max(0, row - 10), column],
      PageDown: [Math.min(rows - 1, row + 10), column],
    }[key];
    return to ? this.within(...to) ?? this.within(row, column) ?? this.within(0, 0) : null;
  }

  reveal({ row, column }) {
    const x = this.column(column), y = this.line(row), { body } = this;
    if (x < this.left) body.scrollLeft += x - this.left - 20;
    if (x + this.cell > this.width) body.scrollLeft += x + this.cell - this.width + 40;
    if (y < this.top) body.scrollTop += y - this.top;
    if (y + this.row > this.height) body.scrollTop += y + this.row - this.height;
    const top = this.canvas.getBoundingClientRect().top + this.line(row);
    if (top < 110 || top > innerHeight - 60) scrollBy(0, top - innerHeight / 2);
  }

  place({ row, column }) {
    return { x: this.column(column + 0.5), y: this.line(row) };
  }

  describe({ row, column }) {
    return this.settings.say(row, column);
  }

  choose({ row, column }) {
    this.settings.pick?.(row, column);
  }
}
