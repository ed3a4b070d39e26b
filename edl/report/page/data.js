// Findings, out of the text that the page carries: see packing.py.

const HALVES = (() => {
  // The value of every number of two bytes.
  const values = new Float32Array(65536);
  for (let code = 0; code < 65536; code++) {
    const sign = code & 0x8000 ? -1 : 1, exponent = (code >> 10) & 31, fraction = code & 1023;
    values[code] = exponent === 31
      ? (fraction ? NaN : sign * Infinity)
      : sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
  }
  return values;
})();

async function unpack(text) {
  const letters = atob(text.trim());
  const bytes = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place++) bytes[place] = letters.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const whole = await new Response(stream).arrayBuffer();
  const length = new DataView(whole).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(whole, 4, length)));
  const found = {};
  for (const [name, [type, offset, size]] of Object.entries(header.arrays)) {
    found[name] = array(whole, type, 4 + length + offset, size);
  }
  return { ...header, ...found };
}

function array(whole, type, start, size) {
  const width = Number(type.slice(1));
  if (width === 2) {
    const low = new Uint8Array(whole, start, size), high = new Uint8Array(whole, start + size, size);
    const values = type === "f2" ? new Float32Array(size) : new Uint16Array(size);
    for (let place = 0; place < size; place++) {
      const code = low[place] | (high[place] << 8);
      values[place] = type === "f2" ? HALVES[code] : code;
    }
    return values;
  }
  const kinds = { f4: Float32Array, u1: Uint8Array, u4: Uint32Array };
  return new kinds[type](whole.slice(start, start + size * width));
}

// A run with what can be asked of it.
class Run {
  constructor(header, number) {
    Object.assign(this, header);
    this.number = number;
    this.D = this.domains.length;
    this.pairs = [];
    for (let one = 0; one < this.D; one++) {
      for (let other = one + 1; other < this.D; other++) this.pairs.push([one, other]);
    }
    let cells = 0, experts = 0, tokens = 0;
    for (const [place, layer] of this.layers.entries()) {
      Object.assign(layer, { place, cells, start: experts, dead: new Set(layer.dead) });
      layer.tokenStarts = [];
      for (let expert = 0; expert < layer.experts; expert++) {
        layer.tokenStarts.push(tokens);
        tokens += this.tokenNumbers[experts + expert];
      }
      cells += this.D * layer.experts;
      experts += layer.experts;
      layer.mean = new Float32Array(layer.experts).map((_, expert) => this.meanShare(layer, expert));
    }
  }

  share(layer, domain, expert) {
    return this.usage[layer.cells + domain * layer.experts + expert];
  }

  meanShare(layer, expert) {
    let sum = 0, known = 0;
    for (let domain = 0; domain < this.D; domain++) {
      const share = this.share(layer, domain, expert);
      if (share === share) { sum += share; known++; }
    }
    return known ? sum / known : NaN;
  }

  ratio(layer, domain, expert) {
    const mean = layer.mean[expert];
    return mean > 0 ? this.share(layer, domain, expert) / mean : NaN;
  }

  // Whether the cell's difference is more than chance; true where nothing was tested.
  isCertain(layer, domain, expert) {
    if (!this.certain) return true;
    const bit = layer.cells + domain * layer.experts + expert;
    return Boolean((this.certain[bit >> 3] >> (bit & 7)) & 1);
  }

  // The experts of a layer by the domain that prefers them, then by how much it does; dead ones last.
  order(layer) {
    if (!layer.order) {
      const owner = [], excess = [];
      for (let expert = 0; expert < layer.experts; expert++) {
        let best = this.D, most = -Infinity;
        for (let domain = 0; domain < this.D; domain++) {
          const ratio = this.ratio(layer, domain, expert);
          if (ratio > most) { most = ratio; best = domain; }
        }
        owner.push(best);
        excess.push(most);
      }
      layer.order = owner.map((_, expert) => expert).sort((a, b) => owner[a] - owner[b] || excess[b] - excess[a]);
    }
    return layer.order;
  }

  // The experts of a layer, those with the largest values first.
  sorted(layer, values) {
    const of = expert => {
      const value = values[layer.start + expert];
      return value === value ? value : -1;
    };
    return Array.from({ length: layer.experts }, (_, expert) => expert).sort((a, b) => of(b) - of(a));
  }

  readTokens(layer, expert) {
    const start = layer.tokenStarts[expert], found = [];
    for (let place = start; place < start + this.tokenNumbers[layer.start + expert]; place++) {
      const id = this.tokenIds[place];
      found.push({ text: this.tokenTexts[id] ?? `[${id}]`, choices: this.tokenChoices[place], lift: this.tokenLifts[place] });
    }
    return found;
  }

  togetherWith(layer, expert) {
    const found = [];
    for (let rank = 0; rank < 8; rank++) {
      const place = (layer.start + expert) * 8 + rank;
      if (this.together[place] > 0) found.push({ expert: this.partners[place], lift: this.together[place] });
    }
    return found;
  }
}

// Numbers and names as words.py writes them.
function number(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  const digits = size < 0.0995 ? 4 : Math.max(0, 2 - Math.floor(Math.log10(size)));
  const text = size < 1000 ? value.toFixed(digits) : Math.round(value).toLocaleString("en");
  return text.replace("-0.0000", "0.0000").replace("-", "−");
}

function percent(share) {
  if (!Number.isFinite(share)) return "–";
  return `${(100 * share).toFixed(share >= 0.995 ? 0 : share >= 0.00995 ? 1 : 2)}\u00a0%`;
}

function times(ratio) {
  return Number.isFinite(ratio) ? `${ratio.toFixed(ratio < 0.095 ? 2 : 1)}×` : "–";
}

function name(text, most = 40) {
  const line = text.split(/\s+/).filter(Boolean).join(" ") || "(no name)";
  const letters = Array.from(line);
  return `\u2068${letters.length <= most ? line : letters.slice(0, most - 1).join("") + "…"}\u2069`;
}

function mean(values) {
  let sum = 0, known = 0;
  for (const value of values) if (Number.isFinite(value)) { sum += value; known++; }
  return known ? sum / known : NaN;
}
