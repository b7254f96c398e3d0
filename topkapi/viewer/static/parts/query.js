// The query language of the index: `density<1e-4 modes>=2 dead:no top:"Paris" label:foo -label:bar Paris`.

import { NONE, NOT_COUNTED } from "./index.js";

export class QueryError extends Error {}

const NUMBERS = {
  latent: () => (i) => i,
  fired: (index) => (i) => index.n_fired[i],
  density: (index) => (i) => index.n_fired[i] / index.n_tokens,
  importance: (index) => (i) => index.importance[i],
  mean: (index) => (i) => index.mean[i],
  maximum: (index) => (i) => index.maximum[i],
  kurtosis: (index) => (i) => index.kurtosis[i],
  modes: (index) => (i) => (index.modes[i] === NOT_COUNTED ? NaN : index.modes[i]),
};
const OTHER_NAMES = { max: "maximum", i: "latent", n_fired: "fired", token: "top" };
const TEXTS = ["top", "label", "note", "dead", "labelled"];

const COMPARE = {
  "<": (a, b) => a < b,
  "<=": (a, b) => a <= b,
  ">": (a, b) => a > b,
  ">=": (a, b) => a >= b,
  "=": (a, b) => a === b,
  ":": (a, b) => a === b,
  "!=": (a, b) => a === a && a !== b,
};

const TERM = /\s*(-?)(?:([A-Za-z_]+)\s*(<=|>=|!=|<|>|=|:)\s*("(?:[^"\\]|\\.)*"?|[^\s"]+)?|("(?:[^"\\]|\\.)*"?)|(\S+))/y;

/** The terms of a query: {negated, name, operator, value, text}; `name` is null for free text. */
function parseQuery(query) {
  const terms = [];
  TERM.lastIndex = 0;
  while (TERM.lastIndex < query.trimEnd().length) {
    const [, minus, name, operator, value, quoted, bare] = TERM.exec(query);
    const negated = minus === "-";
    if (name) terms.push(namedTerm(name.toLowerCase(), operator, value, negated));
    else terms.push({ negated, name: null, value: unquote(quoted ?? bare) });
  }
  return terms;
}

function namedTerm(given, operator, value, negated) {
  const name = OTHER_NAMES[given] ?? given;
  if (!(name in NUMBERS) && !TEXTS.includes(name)) {
    const known = [...Object.keys(NUMBERS), ...TEXTS].join(", ");
    throw new QueryError(`“${given}” is not a column. There are ${known}.`);
  }
  if (value === undefined) throw new QueryError(`“${given}${operator}” lacks what to compare with.`);
  if (name in NUMBERS) {
    const wanted = Number(value);
    if (value === "" || Number.isNaN(wanted)) throw new QueryError(`“${given}” is a number, and “${value}” is none.`);
    return { negated, name, operator, value: wanted };
  }
  if (operator !== ":" && operator !== "=") {
    throw new QueryError(`“${given}” is compared with a colon: ${given}:${value}`);
  }
  const text = unquote(value);
  if ((name === "dead" || name === "labelled") && !["yes", "no"].includes(text)) {
    throw new QueryError(`“${given}” is yes or no: ${given}:no`);
  }
  return { negated, name, operator, value: text };
}

function unquote(text) {
  if (!text.startsWith('"')) return text;
  if (text.length < 2 || !text.endsWith('"')) throw new QueryError("A quotation mark is not closed.");
  return text.slice(1, -1).replace(/\\(.)/g, "$1");
}

/** Which latents a query keeps: a function of a latent's number. */
export function compile(query, index) {
  const tests = parseQuery(query).map((term) => {
    const test = testOf(term, index);
    return term.negated ? (i) => !test(i) : test;
  });
  return (i) => tests.every((test) => test(i));
}

function testOf({ name, operator, value }, index) {
  if (name === null) return anyText(value, index);
  if (name in NUMBERS) {
    const read = NUMBERS[name](index);
    const compare = COMPARE[operator];
    return (i) => compare(read(i), value);
  }
  if (name === "dead") return (i) => (index.n_fired[i] === 0) === (value === "yes");
  if (name === "labelled") return (i) => (index.label(i) !== "") === (value === "yes");
  if (name === "top") return topIs(value, index);
  const wanted = value.toLowerCase();
  return (i) => (index.labels.get(i)?.[name] ?? "").toLowerCase().includes(wanted);
}

/** Each token is looked at once, not each latent. */
function topIs(text, index) {
  const wanted = text.toLowerCase();
  const matches = Uint8Array.from(index.tokens, (token) => (token.toLowerCase().includes(wanted) ? 1 : 0));
  return (i) => index.top_token[i] !== NONE && matches[index.top_token[i]] === 1;
}

function anyText(text, index) {
  const top = topIs(text, index);
  const wanted = text.toLowerCase();
  const asNumber = /^\d+$/.test(text) ? Number(text) : -1;
  return (i) => i === asNumber || top(i) || index.label(i).toLowerCase().includes(wanted);
}
