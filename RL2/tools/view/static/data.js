// The page of `rl2 view`. Data comes in chunks (RL2/tools/view/run_index.py), unpacked when they are looked at. Whatever a model
// wrote enters the page as textContent, never as HTML.
"use strict";

const $ = (id) => document.getElementById(id);
const look = JSON.parse($("look").textContent);
const isLive = "live" in document.body.dataset;

/** An element with properties and children; strings become text. */
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "style") element.style.cssText = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name in element && name !== "role") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const number = (x, digits = 3) => {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e6)) return x.toExponential(1).replaceAll("-", "−");
  return String(Number(x.toPrecision(digits))).replace("-", "−");
};
const whole = (x) => x.toLocaleString("en");
function probability(p) {
  if (p === null) return "–";
  if (p > 0.99995 && p < 1) return "≈ 1";
  return p > 0 && p < 0.00005 ? p.toExponential(0).replace("-", "−") : p.toFixed(4);
}

/** The content of a chunk: a script element of the page, or from the server. */
async function packed(name) {
  if (!isLive) return $(name).textContent;
  const answer = await fetch(`/chunk/${name}?v=${data?.version}`);
  if (!answer.ok) throw new Error(`the server has no ${name}`);
  return answer.text();
}

async function unpack(name) {
  const letters = atob(await packed(name));
  const bytes = Uint8Array.from(letters, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(stream).text());
}

const KEPT = 24;
const unpacked = new Map(); // name -> promise of a chunk, the latest used last

function chunk(name) {
  const found = unpacked.get(name) ?? unpack(name);
  unpacked.delete(name);
  unpacked.set(name, found);
  if (unpacked.size > KEPT) unpacked.delete(unpacked.keys().next().value);
  return found;
}

/** Item `i` of the chunks that begin with the items `starts`. */
async function item(kind, starts, i) {
  let low = 0;
  let high = starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= i) low = middle;
    else high = middle - 1;
  }
  return (await chunk(`${kind}-${low}`))[i - starts[low]];
}

const textOf = (i) => item("text", data.texts, i);
const tokensOf = (i) => (data.token[i] < 0 ? Promise.resolve(null) : item("token", data.tokens, data.token[i]));

const VIEWS = ["curves", "rollouts", "data"];
const SPLITS = ["train", "test"];
const TRUNCATED = 1;
const UNSCORED = 2;
let data; // what `head` holds, columns as typed arrays

async function readHead() {
  const head = await unpack("head");
  const { columns } = head;
  for (const name of Object.keys(columns)) {
    const isReal = name === "reward" || name === "loss";
    head[name] = isReal
      ? Float32Array.from(columns[name], (x) => (x === null ? NaN : x))
      : Int32Array.from(columns[name], (x) => (x === null ? -1 : x));
  }
  head.size = head.step.length;
  delete head.columns;
  return head;
}

const nameOf = (i) =>
  [data.run, data.step, data.split, data.row, data.group, data.sample, data.role].map((column) => column[i]).join(".");

function find(name) {
  if (!name) return -1;
  const parts = name.split(".").map(Number);
  const columns = [data.run, data.step, data.split, data.row, data.group, data.sample, data.role];
  for (let i = 0; i < data.size; i++) if (columns.every((column, c) => column[i] === (parts[c] ?? -1))) return i;
  return -1;
}

const colourOf = (method) => look.colours[method % look.colours.length];
const dot = (i) =>
  el("i", {
    className: "dot",
    style: `--colour:${colourOf(data.runs[data.run[i]].method)}`,
    title: data.runs[data.run[i]].name,
  });

const state = {
  view: "curves",
  chosen: -1,
  beside: -1,
  stats: ["entropy", "entropy"],
  sort: "step",
  falls: false,
  query: "",
};

function remember() {
  const parts = new URLSearchParams({ view: state.view });
  if (state.chosen >= 0) parts.set("at", nameOf(state.chosen));
  if (state.beside >= 0) parts.set("with", nameOf(state.beside));
  parts.set("by", state.stats.join("|"));
  history.replaceState(null, "", `#${parts}`);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (VIEWS.includes(parts.get("view"))) state.view = parts.get("view");
  state.chosen = find(parts.get("at"));
  state.beside = find(parts.get("with"));
  const by = (parts.get("by") ?? "").split("|");
  if (by.length === 2) state.stats = by;
}

function show(view) {
  state.view = view;
  for (const name of VIEWS) {
    $(name).hidden = name !== view;
    $(`tab-${name}`).setAttribute("aria-selected", name === view);
    $(`tab-${name}`).tabIndex = name === view ? 0 : -1;
  }
  hideTip();
  if (view === "rollouts") {
    scrollTo(Math.max(0, order.indexOf(state.chosen)));
    drawRows();
    if (!panes.length) read();
    else colour();
  }
  remember();
}
