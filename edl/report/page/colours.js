// Colours of the theme, and maps of values from 0 to 1.

const STEPS = 128;
const darkness = matchMedia("(prefers-color-scheme: dark)");
let isPrinting = false;

function isDark() {
  return darkness.matches && !isPrinting;
}

function ink(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function blend(hexes) {
  const points = hexes.map(hex => [1, 3, 5].map(start => parseInt(hex.slice(start, start + 2), 16)));
  return Array.from({ length: STEPS + 1 }, (_, step) => {
    const at = (step / STEPS) * (points.length - 1), low = Math.min(points.length - 2, Math.floor(at));
    const mixed = points[low].map((part, place) => Math.round(part + (at - low) * (points[low + 1][place] - part)));
    return `rgb(${mixed.join(",")})`;
  });
}

const MAPS = Object.fromEntries(Object.entries(COLOURS).map(([name, themes]) => [name, themes.map(blend)]));

// The colour of a value from 0 to 1.
function shade(map, value) {
  return MAPS[map][Number(isDark())][Math.round(Math.min(1, Math.max(0, value)) * STEPS)];
}

// Whether a text on it must be light.
function isDeep(map, value) {
  const [red, green, blue] = shade(map, value).match(/\d+/g).map(Number);
  return 0.3 * red + 0.59 * green + 0.11 * blue < 128;
}
