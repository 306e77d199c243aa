
"use strict";

const byId = (id) => document.getElementById(id);
const facts = JSON.parse(byId("facts").textContent);
const pairs = JSON.parse(byId("pairs").textContent);
const NUMBER = new Intl.NumberFormat("en");

/** An element with properties and children; texts become text nodes, never markup. */
function element(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

// ---- what is filtered and sorted by

const isNumber = (value) => typeof value === "number";
const length = (pieces) => pieces.reduce((sum, [text]) => sum + text.length, 0);
const joined = (pieces) => pieces.map(([text]) => text).join("");
const changed = (pieces) => pieces.reduce((sum, [text, differs]) => sum + (differs ? text.length : 0), 0) / length(pieces);

for (const [number, pair] of pairs.entries()) {
  const { retrieval_rank: rank, retrieval_score: score, response_similarity: similarity } = pair.provenance;
  pair.number = number;
  Object.assign(pair, { rank, score, similarity, kindSet: new Set(pair.kinds) });
}

/** Everything that a search looks at, made when it is first needed. */
function haystack(pair) {
  const { key, shard, prompt, chosen, rejected, provenance } = pair;
  const prompts = prompt.flatMap(([, parts]) => parts.filter((part) => typeof part === "string"));
  const ids = [provenance.image_id ?? "", provenance.retrieved_id ?? ""];
  pair.haystack ??= [key, shard, ...ids, ...prompts, joined(chosen), joined(rejected)].join("\n").toLowerCase();
  return pair.haystack;
}

const state = { page: 0, size: 10, order: "", text: "", from: null, to: null, ranks: new Set(), kinds: new Set() };

const filters = {
  text: (pair) => !state.text || haystack(pair).includes(state.text),
  similarity: ({ similarity }) =>
    (state.from === null && state.to === null) ||
    (isNumber(similarity) && similarity >= (state.from ?? -Infinity) && similarity < (state.to ?? Infinity)),
  rank: ({ rank }) => !state.ranks.size || state.ranks.has(rank),
  kind: ({ kindSet }) => !state.kinds.size || [...state.kinds].some((kind) => kindSet.has(kind)),
};

const without = (name) => Object.keys(filters).filter((other) => other !== name);
const select = (names) => pairs.filter((pair) => names.every((name) => filters[name](pair)));

const orders = {
  "": ["as in the shards", (pair) => pair.number],
  similar: ["most similar answers", (pair) => -pair.similarity],
  different: ["least similar answers", (pair) => pair.similarity],
  changed: ["most text changed", (pair) => -changed(pair.chosen)],
  unchanged: ["least text changed", (pair) => changed(pair.chosen)],
  near: ["nearest images", (pair) => -pair.score],
  far: ["farthest images", (pair) => pair.score],
  late: ["last ranks", (pair) => -pair.rank],
  long: ["longest answers", (pair) => -length(pair.chosen)],
};

/** Sorted by the chosen order; pairs without that number come last. */
function sorted(selected) {
  const [, value] = orders[state.order];
  const keyed = selected.map((pair) => [Number(value(pair)), pair]);
  keyed.sort(([a], [b]) => Number.isNaN(a) - Number.isNaN(b) || a - b || 0);
  return keyed.map(([, pair]) => pair);
}

// ---- charts

/** Edges of at most 25 bins of a round width that hold all values. */
function binEdges(values) {
  const [low, high] = values.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  const width = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2].find((step) => (high - low) / step < 24) ?? (high - low) / 24;
  const edges = [];
  for (let index = Math.floor(low / width); edges.length < 2 || edges.at(-1) <= high; index++) {
    edges.push(Number((index * width).toPrecision(6)));
  }
  return edges;
}

const binOf = (edges, value) => edges.findLastIndex((edge) => edge <= value);

function count(items) {
  const counts = new Map();
  for (const item of items) counts.set(item, (counts.get(item) ?? 0) + 1);
  return counts;
}

const edges = binEdges(pairs.map((pair) => pair.similarity).filter(isNumber));
const rankSet = new Set(pairs.map((pair) => pair.rank).filter(isNumber));
const highestRank = Math.max(-1, ...rankSet);
// Ranks that no pair has show as gaps, unless they are so many that bars would vanish.
const rankValues = highestRank < 60 ? [...Array(highestRank + 1).keys()] : [...rankSet].sort((a, b) => a - b);
const kindValues = [...new Set(pairs.flatMap((pair) => pair.kinds))].sort();

const toggled = (set, value) => (set.delete(value) ? set : set.add(value));

function setRange(from, to) {
  const same = state.from === from && state.to === to;
  [state.from, state.to] = same ? [null, null] : [from, to];
  byId("from").value = state.from ?? "";
  byId("to").value = state.to ?? "";
}

const charts = {
  similarities: {
    filter: "similarity",
    form: "bars",
    values: edges.slice(0, -1).map((_, index) => index),
    of: ({ similarity }) => (isNumber(similarity) ? [binOf(edges, similarity)] : []),
    label: (bin) => (bin % Math.ceil(edges.length / 9) ? "" : String(edges[bin])),
    name: (bin) => `similarity ${edges[bin]} to ${edges[bin + 1]}`,
    isPressed: (bin) => state.from === edges[bin] && state.to === edges[bin + 1],
    press: (bin) => setRange(edges[bin], edges[bin + 1]),
  },
  ranks: {
    filter: "rank",
    form: "bars",
    values: rankValues,
    of: ({ rank }) => (isNumber(rank) ? [rank] : []),
    label: (rank) => (rankValues.length > 15 && rank % 5 ? "" : String(rank)),
    name: (rank) => `rank ${rank}`,
    isPressed: (rank) => state.ranks.has(rank),
    press: (rank) => toggled(state.ranks, rank),
  },
  kinds: {
    filter: "kind",
    form: "rows",
    values: kindValues,
    of: ({ kindSet }) => [...kindSet],
    label: String,
    name: (kind) => `masked ${kind}`,
    isPressed: (kind) => state.kinds.has(kind),
    press: (kind) => toggled(state.kinds, kind),
  },
};

/** Bars of all pairs, and over them of those that the other filters let pass; clicking one filters by it. */
function drawChart(id) {
  const chart = charts[id];
  const all = count(pairs.flatMap(chart.of));
  const highest = Math.max(1, ...all.values());
  const side = chart.form === "bars" ? "height" : "width";
  const box = element("div", { className: chart.form });
  chart.buttons = chart.values.map((value) => {
    const [total, passing] = [element("i"), element("i")];
    total.style[side] = `${(100 * (all.get(value) ?? 0)) / highest}%`;
    const label = element("span", { className: "label" }, chart.label(value));
    const tally = element("span", { className: "count" });
    const graph = element("span", { className: chart.form === "bars" ? "column" : "row" }, total, passing);
    const button = element("button", { type: "button" }, ...(chart.form === "bars" ? [graph, label] : [label, graph, tally]));
    button.addEventListener("click", () => {
      chart.press(value);
      refresh();
    });
    box.append(button);
    return { value, button, passing, tally };
  });
  chart.update = () => {
    const shown = count(select(without(chart.filter)).flatMap(chart.of));
    for (const { value, button, passing, tally } of chart.buttons) {
      const number = NUMBER.format(shown.get(value) ?? 0);
      passing.style[side] = `${(100 * (shown.get(value) ?? 0)) / highest}%`;
      tally.textContent = number;
      button.title = `${chart.name(value)}: ${number} of ${NUMBER.format(all.get(value) ?? 0)} pairs`;
      button.setAttribute("aria-label", button.title);
      button.setAttribute("aria-pressed", String(chart.isPressed(value)));
    }
  };
  const missing = pairs.filter((pair) => !chart.of(pair).length).length;
  if (missing && chart.values.length) {
    byId(id).querySelector("figcaption").append(element("span", {}, ` · ${NUMBER.format(missing)} without`));
  }
  byId(id).append(chart.values.length ? box : element("p", {}, "These pairs tell none."));
}

// ---- pairs

/** Any JSON value, for reading: objects as lists of terms, lists of objects as tables. */
function describe(value) {
  if (Array.isArray(value) && value.length && value.every((item) => item && typeof item === "object" && !Array.isArray(item))) {
    const columns = [...new Set(value.flatMap(Object.keys))];
    const head = element("tr", {}, ...columns.map((name) => element("th", { scope: "col" }, name)));
    const rows = value.map((item) =>
      element("tr", {}, ...columns.map((name) => element("td", {}, name in item ? describe(item[name]) : ""))),
    );
    const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
    return element("div", { className: "scroll", tabIndex: 0, role: "group", "aria-label": "table" }, table);
  }
  if (Array.isArray(value)) return document.createTextNode(value.map((item) => (typeof item === "object" ? JSON.stringify(item) : String(item))).join(", "));
  if (value && typeof value === "object") {
    const terms = Object.entries(value).flatMap(([name, item]) => [element("dt", {}, name), element("dd", {}, describe(item))]);
    return element("dl", { className: "facts" }, ...terms);
  }
  return document.createTextNode(isNumber(value) ? String(Number(value.toPrecision(6))) : String(value));
}

/** A fold whose content is made when it is first opened. */
function fold(title, content) {
  const details = element("details", {}, element("summary", {}, title));
  details.addEventListener("toggle", () => details.append(content()), { once: true });
  return details;
}

/** Pieces of a response with their marks: what differs, and masked spans with their kind at their end. */
function marked(pieces, tag, kinds = []) {
  return pieces.map(([text, differs, span], index) => {
    let node = document.createTextNode(text);
    if (span >= 0) {
      const isEnd = pieces[index + 1]?.[2] !== span;
      node = element("mark", { title: `masked: ${kinds[span]}` }, node, ...(isEnd ? [element("sub", {}, kinds[span])] : []));
    }
    return differs ? element(tag, {}, node) : node;
  });
}

const response = (title, nodes) =>
  element("section", {}, element("h3", {}, title), element("p", { className: "body", dir: "auto" }, ...nodes));

function prompt(turns) {
  const lines = turns.map(([role, parts]) => {
    const nodes = parts.map((part) => (typeof part === "string" ? part : element("span", { className: "place" }, "image")));
    const label = turns.length > 1 || role !== "user" ? [element("span", { className: "role" }, role)] : [];
    return element("p", { className: "body", dir: "auto" }, ...label, ...nodes);
  });
  return element("section", {}, element("h3", {}, "Prompt"), ...lines);
}

const waiting = new Set();

/** Give an image its picture, if the browser has read that far. */
function fill(image) {
  const block = byId(`i-${image.dataset.name}`);
  // A block that is still being read has nothing behind it.
  if (!block || (document.readyState === "loading" && !block.nextSibling)) return false;
  image.src = `data:${block.textContent}`;
  return true;
}

function picture(pair, part, title) {
  const [width, height] = pair.sizes[part];
  const id = pair.provenance[part === "image" ? "image_id" : "retrieved_id"];
  const image = element("img", { alt: `${title}${id === undefined ? "" : ` ${id}`}`, decoding: "async" });
  image.className = Math.max(width, height) <= 96 ? "tiny" : "";
  image.dataset.name = pair[part];
  if (!fill(image)) waiting.add(image);
  const caption = element("figcaption", {}, element("b", {}, title), ` ${id ?? ""} · ${width} × ${height}`);
  return element("figure", {}, element("div", { className: "frame" }, image), caption);
}

const SHORT = { retrieval_rank: "rank", retrieval_score: "image similarity", response_similarity: "response similarity" };

function scores(provenance) {
  const terms = Object.entries(provenance).filter(([name, value]) => isNumber(value) && !name.endsWith("_id"));
  const rank = ([name]) => (Object.keys(SHORT).indexOf(name) + 1 || Infinity);
  terms.sort((a, b) => rank(a) - rank(b) || 0);
  const shown = terms.map(([name, value]) => {
    const text = Number.isInteger(value) ? String(value) : value.toFixed(3);
    return element("div", {}, element("dt", {}, SHORT[name] ?? name), element("dd", { title: String(value) }, text));
  });
  return element("dl", { className: "scores" }, ...shown);
}

function card(pair) {
  const heading = element("h2", {}, `${NUMBER.format(pair.number + 1)} `, element("span", {}, `${pair.key} · ${pair.shard}`));
  const images = [picture(pair, "image", "Image"), picture(pair, "retrieved", "Retrieved")];
  const texts = [
    prompt(pair.prompt),
    response("Chosen", marked(pair.chosen, "ins", pair.kinds)),
    response("Rejected", marked(pair.rejected, "del")),
    ...(pair.problem ? [element("p", { className: "problem" }, pair.problem)] : []),
  ];
  const parts = [
    element("header", {}, heading, scores(pair.provenance)),
    element("div", { className: "pictures" }, ...images),
    element("div", { className: "texts" }, ...texts),
  ];
  // Spans that are marked in the text need no table.
  const { spans, ...rest } = pair.provenance;
  const told = pair.problem ? pair.provenance : rest;
  if (Object.keys(told).length) parts.push(fold("Provenance", () => describe(told)));
  return element("article", {}, ...parts);
}

// ---- the page

function refresh(page = 0) {
  const selected = sorted(select(Object.keys(filters)));
  const last = Math.max(0, Math.ceil(selected.length / state.size) - 1);
  state.page = Math.min(Math.max(0, page), last);
  const start = state.page * state.size;
  const shown = selected.slice(start, start + state.size);
  waiting.clear();
  const empty = element("p", { className: "empty" }, "No pair passes these filters.");
  byId("list").replaceChildren(...(shown.length ? shown.map(card) : [empty]));
  const range = shown.length ? `${NUMBER.format(start + 1)}–${NUMBER.format(start + shown.length)}` : "0";
  const of = selected.length < pairs.length ? ` (of ${NUMBER.format(pairs.length)})` : "";
  byId("counter").replaceChildren(element("b", {}, range), ` of ${NUMBER.format(selected.length)} pairs${of}`);
  for (const id of ["first", "previous"]) byId(id).disabled = state.page === 0;
  for (const id of ["next", "last"]) byId(id).disabled = state.page === last;
  for (const chart of Object.values(charts)) chart.update();
}

/** Go to a page, and to its top if that is out of sight. */
function turn(page) {
  if (byId("list").getBoundingClientRect().top < 0) byId("list").scrollIntoView();
  const before = state.page;
  refresh(page);
  return state.page !== before;
}

function plural(number, one, many) {
  return `${NUMBER.format(number)} ${number === 1 ? one : many}`;
}

function introduce() {
  const source = facts.sources.join(", ");
  document.title = `Pairs of ${source}`;
  const readable = facts.samples - facts.skipped_samples;
  const part = facts.pairs < readable ? `${NUMBER.format(facts.pairs)} of ${plural(facts.samples, "sample", "samples")}, spread evenly` : plural(facts.pairs, "pair", "pairs");
  byId("source").textContent = `${source} · ${part}`;
  const notes = byId("notes");
  if (Object.keys(facts.built_with).length) notes.append(fold("How they were built", () => describe(facts.built_with)));
  const left = [
    ...(facts.skipped_samples ? [plural(facts.skipped_samples, "damaged sample", "damaged samples")] : []),
    ...(facts.skipped_shards ? [plural(facts.skipped_shards, "damaged shard", "damaged shards")] : []),
  ];
  if (left.length) {
    const rows = facts.skipped.map(([shard, key, reason]) => ({ shard, key, reason }));
    notes.append(fold(`${left.join(" and ")} left out`, () => describe(rows)));
  }
}

for (const [name, [label]] of Object.entries(orders)) byId("order").append(element("option", { value: name }, label));
for (const id of Object.keys(charts)) drawChart(id);

const numeric = (id) => (byId(id).value === "" ? null : Number(byId(id).value));

byId("filters").addEventListener("input", () => {
  state.text = byId("text").value.trim().toLowerCase();
  [state.from, state.to] = [numeric("from"), numeric("to")];
  state.order = byId("order").value;
  state.size = Number(byId("size").value);
  refresh();
});
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("reset", () => {
  Object.assign(state, { size: 10, order: "", text: "", from: null, to: null, ranks: new Set(), kinds: new Set() });
  refresh();
});

const moves = {
  first: () => turn(0),
  previous: () => turn(state.page - 1),
  next: () => turn(state.page + 1),
  last: () => turn(Infinity),
};
for (const [id, move] of Object.entries(moves)) byId(id).addEventListener("click", move);

const KEYS = { Home: "first", k: "previous", ArrowLeft: "previous", j: "next", ArrowRight: "next", End: "last" };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, .scroll")) return;
  if (event.key === "/") byId("text").focus();
  else if (event.key in KEYS) moves[KEYS[event.key]]();
  else return;
  event.preventDefault();
});

introduce();
refresh();

// Pictures stand behind this script, so that the page can be used while the rest of a large file is still being read.
function fillWaiting() {
  for (const image of waiting) if (fill(image)) waiting.delete(image);
}
const timer = setInterval(fillWaiting, 100);
document.addEventListener("DOMContentLoaded", () => {
  clearInterval(timer);
  fillWaiting();
});
