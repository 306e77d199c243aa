
"use strict";

const byId = (id) => document.getElementById(id);
const facts = JSON.parse(byId("facts").textContent);
const flips = JSON.parse(byId("flips").textContent);
const NUMBER = new Intl.NumberFormat("en");
const [FIRST, SECOND] = facts.names;
const DIRECTIONS = { "right to wrong": "became wrong", "wrong to right": "became right" };

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

// ---- filters

const START = { page: 0, size: 10, text: "", benchmark: "", direction: "" };
const state = { ...START };

/** Everything that a search looks at, made when it is first needed. */
function haystack(flip) {
  const answers = [flip.first, flip.second].map(({ answer }) => answer.map(([text]) => text).join(""));
  flip.haystack ??= [flip.key, flip.image, flip.question, ...answers].join("\n").toLowerCase();
  return flip.haystack;
}

const passes = (flip) =>
  (!state.benchmark || flip.benchmark === state.benchmark) &&
  (!state.direction || flip.change === state.direction) &&
  (!state.text || haystack(flip).includes(state.text));

// ---- one flipped answer

function describe(value) {
  if (Array.isArray(value) && value.every((item) => typeof item !== "object")) return value.join(", ") || "none";
  if (Array.isArray(value)) return JSON.stringify(value);
  if (value && typeof value === "object") return Object.entries(value).map(([name, item]) => `${name}: ${describe(item)}`).join("; ");
  return String(value);
}

function notes(values) {
  const terms = Object.entries(values).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, describe(value))]);
  return terms.length ? [element("dl", { className: "facts" }, ...terms)] : [];
}

function answer(name, { answer: pieces, correct, badness, notes: values }) {
  const verdict = correct ? "right" : "wrong";
  const size = badness && badness !== 1 ? `, badness ${Number(badness.toPrecision(4))}` : "";
  const words = pieces.map(([text, differs]) => (differs ? element("ins", {}, text) : document.createTextNode(text)));
  const title = element("h3", {}, `${name}: `, element("b", {}, verdict), size);
  return element("section", { className: verdict }, title, element("p", { className: "body", dir: "auto" }, ...words), ...notes(values));
}

const waiting = new Set();

/** Give an image its picture, if the browser has read that far. */
function fill(image) {
  const block = byId(image.dataset.name);
  // A block that is still being read has nothing behind it.
  if (!block || (document.readyState === "loading" && !block.nextSibling)) return false;
  image.src = `data:${block.textContent}`;
  return true;
}

function picture(flip) {
  const image = element("img", { alt: flip.image, decoding: "async" });
  image.dataset.name = flip.picture;
  if (!fill(image)) waiting.add(image);
  const frame = element("div", { className: "frame" }, image);
  return element("div", { className: "pictures" }, element("figure", {}, frame, element("figcaption", {}, flip.image)));
}

function card(flip, number) {
  const image = flip.image && !flip.picture ? ` · ${flip.image}` : "";
  const heading = element("h2", {}, `${NUMBER.format(number)} `, element("span", {}, `${flip.benchmark} · ${flip.key}${image}`));
  const question = element("section", {}, element("h3", {}, "Question"), element("p", { className: "body", dir: "auto" }, flip.question));
  if (flip.target !== null) question.append(element("p", { className: "target" }, `marked against: ${describe(flip.target)}`));
  const answers = element("div", { className: "answers" }, answer(FIRST, flip.first), answer(SECOND, flip.second));
  const parts = [
    element("header", {}, heading, element("span", { className: "target" }, DIRECTIONS[flip.change])),
    ...(flip.picture ? [picture(flip)] : []),
    element("div", { className: "texts" }, question, answers),
  ];
  return element("article", { className: flip.picture ? "pictured" : "" }, ...parts);
}

// ---- the page

function refresh(page = 0) {
  const selected = flips.filter(passes);
  const last = Math.max(0, Math.ceil(selected.length / state.size) - 1);
  state.page = Math.min(Math.max(0, page), last);
  const start = state.page * state.size;
  const shown = selected.slice(start, start + state.size);
  waiting.clear();
  const empty = element("p", { className: "empty" }, flips.length ? "No answer passes these filters." : "No answer flipped.");
  byId("list").replaceChildren(...(shown.length ? shown.map((flip, index) => card(flip, start + index + 1)) : [empty]));
  const range = shown.length ? `${NUMBER.format(start + 1)}–${NUMBER.format(start + shown.length)}` : "0";
  const of = selected.length < flips.length ? ` (of ${NUMBER.format(flips.length)})` : "";
  byId("counter").replaceChildren(element("b", {}, range), ` of ${NUMBER.format(selected.length)} flipped answers${of}`);
  for (const id of ["first", "previous"]) byId(id).disabled = state.page === 0;
  for (const id of ["next", "last"]) byId(id).disabled = state.page === last;
}

/** Go to a page, and to its top if that is out of sight. */
function turn(page) {
  if (byId("list").getBoundingClientRect().top < 0) byId("list").scrollIntoView();
  refresh(page);
}

function introduce() {
  const questions = Object.values(facts.questions).reduce((sum, number) => sum + number, 0);
  const wrong = flips.filter(({ change }) => change === "right to wrong").length;
  document.title = `${SECOND} against ${FIRST}: flipped answers`;
  const counts = `${NUMBER.format(wrong)} became wrong, ${NUMBER.format(flips.length - wrong)} became right`;
  byId("source").textContent = `${SECOND} against ${FIRST} · ${NUMBER.format(questions)} questions, ${counts}`;
  for (const name of Object.keys(facts.questions)) {
    const number = flips.filter(({ benchmark }) => benchmark === name).length;
    byId("benchmark").append(element("option", { value: name }, `${name} (${NUMBER.format(number)})`));
  }
  for (const [value, label] of Object.entries(DIRECTIONS)) byId("direction").append(element("option", { value }, label));
}

byId("filters").addEventListener("input", () => {
  state.text = byId("text").value.trim().toLowerCase();
  for (const id of ["benchmark", "direction"]) state[id] = byId(id).value;
  state.size = Number(byId("size").value);
  refresh();
});
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("filters").addEventListener("reset", () => {
  Object.assign(state, START);
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
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select")) return;
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
