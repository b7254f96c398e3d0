// The index of latents as typed arrays: columns, orders by radix sort, and what a query keeps.

export const NONE = 0xffffffff; // top_token of a latent without one
export const NOT_COUNTED = 255; // modes not counted yet

const AFTER_ALL = 0xffffffff; // key of a gap: last in both directions

/** Columns as they came, with density, labels, and the ranks of texts that sorting needs. */
export class Index {
  constructor(columns, labels) {
    Object.assign(this, columns);
    this.density = Float32Array.from(this.n_fired, (n) => n / this.n_tokens);
    this.setLabels(labels);
    this.orders = new Map();
  }

  setLabels(labels) {
    this.labels = new Map(Object.entries(labels).map(([i, said]) => [Number(i), said]));
    for (const order of ["label+", "label-"]) this.orders?.delete(order);
  }

  /** Text of the token on which latent i fires most, null if not known. */
  topToken(i) {
    const token = this.top_token[i];
    return token === NONE ? null : this.tokens[token];
  }

  label = (i) => this.labels.get(i)?.label ?? "";

  /** All latents in the order of a column; gaps come last either way, ties by number. */
  order(column, descending) {
    const name = column + (descending ? "-" : "+");
    if (!this.orders.has(name)) this.orders.set(name, radixOrder(this.keys(column, descending)));
    return this.orders.get(name);
  }

  keys(column, descending) {
    const keys = new Uint32Array(this.n_latents);
    const bits = KEYS[column](this);
    for (let i = 0; i < keys.length; i++) {
      const key = bits(i);
      keys[i] = key === AFTER_ALL ? key : descending ? AFTER_ALL - 1 - key : key;
    }
    return keys;
  }
}

const KEYS = {
  latent: () => (i) => i,
  density: (index) => (i) => index.n_fired[i],
  importance: (index) => floatKeys(index.importance),
  mean: (index) => floatKeys(index.mean),
  maximum: (index) => floatKeys(index.maximum),
  kurtosis: (index) => floatKeys(index.kurtosis),
  modes: (index) => (i) => (index.modes[i] === NOT_COUNTED ? AFTER_ALL : index.modes[i]),
  top: (index) => {
    const ranks = ranksOf(index.tokens);
    return (i) => (index.top_token[i] === NONE ? AFTER_ALL : ranks[index.top_token[i]]);
  },
  label: (index) => {
    const labelled = [...index.labels.keys()];
    const ranks = ranksOf(labelled.map(index.label));
    const rankOf = new Map(labelled.map((i, at) => [i, ranks[at]]));
    return (i) => (index.label(i) ? rankOf.get(i) : AFTER_ALL);
  },
};

/** Unsigned integers in the order of floats: the sign bit flipped, and all bits of negative ones. NaN: after all. */
function floatKeys(values) {
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  return (i) => {
    const value = values[i];
    if (Number.isNaN(value)) return AFTER_ALL;
    return (bits[i] & 0x80000000 ? ~bits[i] : bits[i] | 0x80000000) >>> 0;
  };
}

/** Rank of each text in the order of the reader's language. */
function ranksOf(texts) {
  const compare = new Intl.Collator(undefined, { numeric: true }).compare;
  const trimmed = texts.map((text) => text.trimStart());
  const order = [...texts.keys()].sort((a, b) => compare(trimmed[a], trimmed[b]) || a - b);
  const ranks = new Uint32Array(texts.length);
  order.forEach((at, rank) => (ranks[at] = rank));
  return ranks;
}

/** Indices in the order of rising keys, ties by index: two passes of 16 bits, linear in the number of keys. */
function radixOrder(keys) {
  let from = Uint32Array.from(keys.keys());
  let to = new Uint32Array(keys.length);
  for (const shift of [0, 16]) {
    const starts = new Uint32Array(65537);
    for (let i = 0; i < keys.length; i++) starts[((keys[i] >>> shift) & 0xffff) + 1]++;
    for (let digit = 0; digit < 65536; digit++) starts[digit + 1] += starts[digit];
    for (let at = 0; at < from.length; at++) to[starts[(keys[from[at]] >>> shift) & 0xffff]++] = from[at];
    [from, to] = [to, from];
  }
  return from;
}
