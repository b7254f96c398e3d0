// Writes numbers one way everywhere: three significant digits, 1.2e-5 style, gaps as a dash.

export const GAP = "–";
const MINUS = "−";

/** Three significant digits; exponent form outside 0.001 to 100 000; a dash for what is not known. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return GAP;
  if (!Number.isFinite(value)) return value > 0 ? "∞" : `${MINUS}∞`;
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size < 1e-3 || size >= 1e5 ? exponent(size, digits) : plain(size, digits);
  return (value < 0 ? MINUS : "") + text;
}

function exponent(size, digits) {
  const [mantissa, power] = size.toExponential(digits - 1).split("e");
  return `${mantissa}e${Number(power)}`;
}

function plain(size, digits) {
  const text = size.toPrecision(digits);
  return text.includes("e") ? String(Math.round(size)) : text;
}

/** With its sign, + included. */
export const signed = (value, digits = 3) => (value > 0 ? "+" : "") + number(value, digits);

/** A count in full, thousands apart. */
export function count(value) {
  return value === null || value === undefined
    ? GAP
    : Math.round(value).toLocaleString("en-GB").replaceAll(",", "\u202f");
}

/** 12.3 %. */
export function percent(share, digits = 3) {
  if (share === null || share === undefined || Number.isNaN(share)) return GAP;
  const size = Math.abs(share * 100);
  const text = size === 0 ? "0" : size < 1e-3 ? exponent(size, digits) : plain(size, digits);
  return `${share < 0 ? MINUS : ""}${text}\u202f%`;
}

/** A number on an axis: no zeros that say nothing. */
export const tick = (value) =>
  value === 0 || (Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5)
    ? String(Number(value.toPrecision(3))).replace("-", MINUS)
    : number(value, 2).replace(".0e", "e");

/** [low, high]. */
export const interval = (pair, write = number) => (pair ? `[${write(pair[0])}, ${write(pair[1])}]` : "");

/** A power of ten as an axis writes it. */
export const powerOfTen = (exponentOf10) => {
  const near = Math.round(exponentOf10);
  return Math.abs(exponentOf10 - near) < 1e-9 && (near < -2 || near > 4)
    ? `1e${near}`
    : tick(Number((10 ** exponentOf10).toPrecision(2)));
};

/** A token as people can read it: what is blank becomes visible. Returns pieces [text, isMark]. */
export function tokenPieces(text) {
  const pieces = [];
  for (const part of text.split(/(\n|\r|\t|^ +| +$)/)) {
    if (part === "") continue;
    if (part === "\n" || part === "⏎") pieces.push(["⏎", true]);
    else if (part === "\r") pieces.push(["␍", true]);
    else if (part === "\t") pieces.push(["⇥", true]);
    else if (/^ +$/.test(part)) pieces.push(["␣".repeat(part.length), true]);
    else pieces.push([part, false]);
  }
  return pieces.length ? pieces : [["∅", true]];
}
