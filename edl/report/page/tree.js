// A dendrogram: domains, and the heights at which they join.

class Tree extends Chart {
  constructor(figure, label, run) {
    super(figure, label);
    this.run = run;
    this.leaves = this.order(run.D + run.tree.length - 1);
    this.highest = Math.max(...run.tree.map(row => row[2]), 1e-12);
  }

  order(node) {
    const { tree, D } = this.run;
    return node < D ? [node] : [...this.order(tree[node - D][0]), ...this.order(tree[node - D][1])];
  }

  layout(width) {
    const context = this.canvas.getContext("2d");
    context.font = `12px ${FONT}`;
    const widest = Math.max(...this.run.domains.map(each => context.measureText(name(each)).width));
    this.right = width - Math.ceil(Math.min(widest + 14, width * 0.42, 240));
    const height = 20 * this.leaves.length + 30;
    return [width, height, height];
  }

  xAt(height) {
    return 14 + (1 - height / this.highest) * (this.right - 14);
  }

  yAt(place) {
    return 20 * place + 12;
  }

  draw(context) {
    const { tree, D, domains } = this.run, middle = [];
    this.leaves.forEach((domain, place) => { middle[domain] = { x: this.xAt(0), y: this.yAt(place) }; });
    context.lineWidth = 1.5;
    context.strokeStyle = ink("raw");
    tree.forEach(([one, other, height], place) => {
      const x = this.xAt(height), a = middle[one], b = middle[other];
      context.beginPath();
      context.moveTo(a.x, a.y);
      context.lineTo(x, a.y);
      context.lineTo(x, b.y);
      context.lineTo(b.x, b.y);
      context.stroke();
      middle[D + place] = { x, y: (a.y + b.y) / 2 };
    });
    this.leaves.forEach((domain, place) => {
      const isAt = this.cursor?.at === place;
      context.textAlign = "left";
      context.font = `${isAt ? "600 " : ""}12px ${FONT}`;
      context.fillStyle = ink(isAt ? "ink" : "soft");
      context.fillText(cut(context, name(domains[domain]), this.width - this.right - 10), this.right + 8, this.yAt(place));
    });
    this.drawAxis(context);
  }

  drawAxis(context) {
    const y = this.height - 10;
    context.font = `11px ${FONT}`;
    context.textAlign = "center";
    context.fillStyle = ink("soft");
    for (const height of ticks(0, this.highest, Math.max(2, Math.floor(this.right / 110)))) {
      context.fillText(height ? `${height} nats` : "0", Math.max(24, this.xAt(height)), y);
    }
  }

  at(x, y) {
    const place = Math.round((y - 12) / 20);
    return place >= 0 && place < this.leaves.length ? { at: place } : null;
  }

  move(key) {
    const last = this.leaves.length - 1, at = this.cursor?.at ?? -1;
    const to = { ArrowUp: Math.max(0, at - 1), ArrowDown: Math.min(last, at + 1), Home: 0, End: last }[key];
    return to === undefined ? null : { at: to };
  }

  place({ at }) {
    return { x: this.right, y: this.yAt(at) - 8 };
  }

  describe({ at }) {
    const leaf = this.leaves[at], { domains, pairs } = this.run;
    let nearest = null, least = Infinity;
    pairs.forEach(([one, other], pair) => {
      const value = pairMean(this.run, divergenceOf(this.run), pair);
      if ((one === leaf || other === leaf) && value < least) { least = value; nearest = one === leaf ? other : one; }
    });
    return `${name(domains[leaf])}: nearest is ${name(domains[nearest])}, ${number(least)} nats`;
  }
}

// Of choices, corrected where there is a record.
function divergenceOf(run) {
  return run.rawCorrected ?? run.divergence;
}

// A value of pairs, mean over layers.
function pairMean(run, values, pair) {
  return mean(run.layers.map((_, place) => values[place * run.pairs.length + pair]));
}
