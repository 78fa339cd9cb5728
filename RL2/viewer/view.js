// The page of `rl2 view`. Data comes in chunks (RL2/viewer/book.py), unpacked when they are looked at. Whatever a model
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
const probability = (p) => (p > 0.99995 && p < 1 ? "≈ 1" : p < 0.00005 && p > 0 ? p.toExponential(0).replace("-", "−") : p.toFixed(4));

// ---------------------------------------------------------------------------------------------------------------- data

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
  let low = 0, high = starts.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (starts[middle] <= i) low = middle; else high = middle - 1;
  }
  return (await chunk(`${kind}-${low}`))[i - starts[low]];
}

const textOf = (i) => item("text", data.texts, i);
const tokensOf = (i) => (data.token[i] < 0 ? Promise.resolve(null) : item("token", data.tokens, data.token[i]));

const SPLITS = ["train", "test"];
const TRUNCATED = 1, UNSCORED = 2;
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

const nameOf = (i) => [data.run, data.step, data.split, data.row, data.group, data.sample].map((column) => column[i]).join(".");

function find(name) {
  if (!name) return -1;
  const parts = name.split(".").map(Number);
  const columns = [data.run, data.step, data.split, data.row, data.group, data.sample];
  for (let i = 0; i < data.size; i++) if (columns.every((column, c) => column[i] === parts[c])) return i;
  return -1;
}

const colourOf = (method) => look.colours[method % look.colours.length];
const dot = (i) => el("i", { className: "dot", style: `--colour:${colourOf(data.runs[data.run[i]].method)}`, title: data.runs[data.run[i]].name });

// --------------------------------------------------------------------------------------------------------------- state

const state = { view: "curves", chosen: -1, beside: -1, stats: ["entropy", "entropy"], sort: "step", falls: false, query: "" };

function remember() {
  const parts = new URLSearchParams({ view: state.view });
  if (state.chosen >= 0) parts.set("at", nameOf(state.chosen));
  if (state.beside >= 0) parts.set("with", nameOf(state.beside));
  parts.set("by", state.stats.join("|"));
  history.replaceState(null, "", `#${parts}`);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  if (parts.get("view") === "rollouts") state.view = "rollouts";
  state.chosen = find(parts.get("at"));
  state.beside = find(parts.get("with"));
  const by = (parts.get("by") ?? "").split("|");
  if (by.length === 2) state.stats = by;
}

function show(view) {
  state.view = view;
  for (const name of ["curves", "rollouts"]) {
    $(name).hidden = name !== view;
    $(`tab-${name}`).setAttribute("aria-selected", name === view);
    $(`tab-${name}`).tabIndex = name === view ? 0 : -1;
  }
  hideTip();
  if (view === "rollouts") {
    scrollTo(Math.max(0, order.indexOf(state.chosen)));
    drawRows();
    if (!panes.length) read(); else colour();
  }
  remember();
}

// -------------------------------------------------------------------------------------------------------------- curves

const MAIN = ["test/score", "train/score", "train/entropy", "train/length", "actor/loss", "test/accuracy", "test/loss", "actor/accuracy", "critic/loss"];
const TITLES = {
  "test/score": "Test score", "train/score": "Training score", "train/entropy": "Entropy, nats a token",
  "train/length": "Response length, tokens", "actor/loss": "Loss",
};
const hidden = new Set(); // methods
const drawn = new Set(); // plots
const visible = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) if (isIntersecting && !drawn.has(target)) { drawn.add(target); plot(target); }
}, { rootMargin: "300px" });

const smoothed = (values, reach = 3) => values.map((_, i) => {
  const r = Math.min(reach, i, values.length - 1 - i); // as many on each side
  let sum = 0;
  for (let j = i - r; j <= i + r; j++) sum += values[j];
  return sum / (2 * r + 1);
});

function traces(metric) {
  const found = [];
  data.methods.forEach((name, method) => {
    const curves = data.runs.filter((run) => run.method === method).map((run) => run.curves[metric]).filter(Boolean);
    if (!curves.length) return;
    const isSmooth = $("smooth").checked && curves[0][0].length >= 20;
    const colour = colourOf(method), dash = look.dashes[method % look.dashes.length];
    const shared = { name, meta: method, visible: !hidden.has(method), showlegend: false, cliponaxis: false };
    const thin = { ...shared, mode: "lines", hoverinfo: "skip" };
    const few = curves[0][0].length < 12;
    const line = { ...shared, mode: few ? "lines+markers" : "lines", line: { color: colour, width: 2.2, dash }, marker: { size: 6 }, hovertemplate: "%{customdata:.4~g}" };
    if (curves.length === 1) {
      const [steps, values] = curves[0];
      if (isSmooth) found.push({ ...thin, x: steps, y: values, line: { color: colour, width: 1 }, opacity: 0.3 });
      found.push({ ...line, x: steps, y: isSmooth ? smoothed(values) : values, customdata: values });
      return;
    }
    const at = new Map(); // step -> the seeds' values
    for (const [steps, values] of curves) steps.forEach((step, i) => at.set(step, [...(at.get(step) ?? []), values[i]]));
    const steps = [...at.keys()].sort((a, b) => a - b);
    const of = (what) => { const values = steps.map((step) => what(at.get(step))); return isSmooth ? smoothed(values) : values; };
    const mean = (values) => values.reduce((a, b) => a + b) / values.length;
    found.push({ ...thin, x: steps, y: of((values) => Math.min(...values)), line: { width: 0, color: colour } });
    found.push({ ...thin, x: steps, y: of((values) => Math.max(...values)), line: { width: 0, color: colour }, fill: "tonexty", fillcolor: `${colour}33` });
    const means = steps.map((step) => mean(at.get(step)));
    const notes = steps.map((step, i) => `${number(means[i], 4)} (${number(Math.min(...at.get(step)), 3)} to ${number(Math.max(...at.get(step)), 3)})`);
    found.push({ ...line, x: steps, y: of(mean), customdata: notes, hovertemplate: "%{customdata}" });
  });
  return found;
}

/** Plotly.js is a third of a second's work: it runs when the first curve is looked at. */
function plotly() {
  if (!window.Plotly) document.head.append(el("script", { textContent: $("plotly").textContent }));
  return window.Plotly;
}

const plot = (target) => plotly().react(target, traces(target.dataset.metric), { ...look.layout, height: target.clientHeight }, look.config);
const replot = () => drawn.forEach((target) => target.isConnected && plot(target));

function drawCurves() {
  $("legend").replaceChildren(...data.methods.map((name, method) => {
    const seeds = data.runs.filter((run) => run.method === method).length;
    const button = el("button", { style: `--colour:${colourOf(method)}`, "aria-pressed": !hidden.has(method) },
      el("i", { className: "dot" }), name, seeds > 1 ? el("small", {}, `mean and range of ${seeds} seeds`) : null);
    button.onclick = () => {
      if (!hidden.delete(method)) hidden.add(method);
      button.setAttribute("aria-pressed", !hidden.has(method));
      replot();
    };
    return button;
  }));
  const all = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))];
  const wanted = $("metric-filter").value.trim().toLowerCase();
  const shown = all.filter((metric) => metric.toLowerCase().includes(wanted) || (TITLES[metric] ?? "").toLowerCase().includes(wanted));
  const main = wanted ? [] : MAIN.filter((metric) => all.includes(metric)).slice(0, 5);
  const figure = (metric) => el("figure", {}, el("figcaption", {}, TITLES[metric] ?? metric), el("div", { className: "plot", "data-metric": metric }));
  const groups = new Map();
  for (const metric of shown.filter((name) => !main.includes(name))) {
    const group = metric.split("/")[0];
    groups.set(group, [...(groups.get(group) ?? []), metric]);
  }
  visible.disconnect();
  drawn.clear();
  $("charts").replaceChildren(
    el("div", { className: "grid main" }, ...main.map(figure)),
    ...[...groups].map(([name, metrics]) => el("details", { className: "group", open: true },
      el("summary", {}, name, el("small", {}, `${metrics.length}`)), el("div", { className: "grid" }, ...metrics.map(figure)))),
  );
  if (!all.length) $("charts").append(el("p", { className: "empty" }, "No metrics yet."));
  for (const target of document.querySelectorAll(".plot")) visible.observe(target);
  $("replays").replaceChildren(...data.replays.flatMap(replayTable));
  const settings = Object.entries(data.settings);
  $("settings").hidden = !settings.length;
  $("settings").querySelector("table").replaceChildren(
    el("thead", {}, el("tr", {}, el("th", {}, "key"), ...data.runs.map((run) => el("th", {}, run.name)))),
    el("tbody", {}, ...settings.map(([key, values]) => el("tr", {}, el("th", {}, key), ...values.map((value) => el("td", {}, value))))),
  );
}

/** What `rl2 replay` found about a step: what each objective does, and how alike their gradients are. */
function replayTable({ run, step, objectives, cosines }) {
  const cosine = (a, b) => cosines.find((one) => (one.of === a && one.and === b) || (one.of === b && one.and === a))?.cosine;
  const heads = ["objective", "loss", "gradient norm", "tokens", "entropy", "log p correct", "log p wrong", ...objectives.map((_, n) => `cos ${n + 1}`)];
  const rows = objectives.map((one, n) => el("tr", {}, el("th", {}, `${n + 1} ${one.title}`),
    ...["loss", "norm", "tokens", "entropy", "correct", "wrong"].map((key) => el("td", {}, number(one[key]))),
    ...objectives.map((other) => el("td", {}, number(cosine(one.title, other.title))))));
  return [
    el("h2", {}, `${data.runs[run].name}, step ${step}, through several objectives`),
    el("p", { className: "hint" }, "First-order changes for a step of length 1 in weight space; the tokens are among the rollouts of this step."),
    el("div", { className: "scroll figures" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", {}, head)))), el("tbody", {}, ...rows))),
  ];
}

// -------------------------------------------------------------------------------------------------------- list of rollouts

const HEIGHT = 48; // of a row, as in the style sheet
const HEADS = [["step", "step"], ["", "split"], ["", "row"], ["reward", "reward"], ["length", "length"], ["loss", "loss"]];
let order = new Uint32Array(0); // the rollouts of the list
let matches = null; // of the search: 1 where a text holds it
let searching = 0; // number of the latest search

function chooseFrom(id, first, pairs) {
  const select = $(id), value = select.value;
  select.replaceChildren(el("option", { value: "" }, first), ...pairs.map(([key, name]) => el("option", { value: key }, name)));
  select.value = value;
  if (select.selectedIndex < 0) select.value = "";
}

function drawFilters() {
  $("total").textContent = whole(data.size);
  chooseFrom("by-run", "all runs", data.runs.map((run, i) => [i, run.name]));
  chooseFrom("by-split", "all splits", SPLITS.map((name, i) => [i, name]).filter(([i]) => data.split.includes(i)));
  chooseFrom("by-step", "all steps", [...new Set(data.step)].sort((a, b) => a - b).map((step) => [step, `step ${step}`]));
  $("heads").replaceChildren(...HEADS.map(([key, name]) => key
    ? el("button", { "aria-pressed": state.sort === key, onclick: () => sortBy(key) }, `${name}${state.sort === key ? (state.falls ? " ↓" : " ↑") : ""}`)
    : el("span", {}, name)));
}

function sortBy(key) {
  if (state.sort === key) state.falls = !state.falls;
  else { state.sort = key; state.falls = key !== "step"; }
  drawFilters();
  list(true);
}

/** Filter and sort. */
function list(toTop = false) {
  const [run, split, step, outcome] = ["by-run", "by-split", "by-step", "by-outcome"].map((id) => $(id).value);
  const passes = {
    "": () => true,
    right: (i) => data.reward[i] > 0,
    wrong: (i) => data.reward[i] <= 0,
    truncated: (i) => data.mark[i] & TRUNCATED,
    unscored: (i) => data.mark[i] & UNSCORED,
    tokens: (i) => data.token[i] >= 0,
  }[outcome];
  const kept = new Uint32Array(data.size);
  let count = 0;
  for (let i = 0; i < data.size; i++) {
    if ((run === "" || data.run[i] === +run) && (split === "" || data.split[i] === +split) && (step === "" || data.step[i] === +step)
      && passes(i) && (!matches || matches[i])) kept[count++] = i;
  }
  order = kept.subarray(0, count);
  const column = data[state.sort], sign = state.falls ? -1 : 1;
  const missing = (x) => Number.isNaN(x) || (x < 0 && state.sort === "length");
  order.sort((a, b) => {
    const x = column[a], y = column[b];
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b; // last, whichever way
    return sign * (x - y) || a - b;
  });
  $("found").textContent = count === data.size ? `${whole(count)} rollouts` : `${whole(count)} of ${whole(data.size)} rollouts`;
  $("rows").style.height = `${count * HEIGHT}px`;
  if (toTop) $("list").scrollTop = 0;
  drawRows();
}

function reward(i) {
  if (data.mark[i] & UNSCORED) return el("span", { className: "none" }, "unscored");
  const value = data.reward[i];
  return el("span", { className: value > 0 ? "good" : "bad" }, `${value > 0 ? "✓" : "✗"} ${number(value)}`);
}

function row(place) {
  const i = order[place];
  const text = el("p", {});
  textOf(i).then(({ texts }) => { text.textContent = (texts[1] ?? texts[0] ?? "").replace(/\s+/g, " ").slice(0, 160); });
  return el("div", { className: "row", role: "option", id: `row-${i}`, style: `top:${place * HEIGHT}px`, "aria-selected": i === state.chosen, "aria-posinset": place + 1, "aria-setsize": order.length, onclick: () => { choose(i); $("list").focus(); } },
    el("div", { className: "figures" },
      el("span", {}, String(data.step[i])), el("span", { className: "what" }, SPLITS[data.split[i]]),
      el("span", { className: "what" }, dot(i), data.sample[i] < 0 ? String(data.row[i]) : `${data.row[i]}·${data.sample[i]}`),
      reward(i), el("span", {}, data.length[i] < 0 ? "–" : whole(data.length[i])), el("span", {}, number(data.loss[i], 2))), text);
}

let queued = 0;
function drawRows() {
  cancelAnimationFrame(queued);
  queued = requestAnimationFrame(() => {
    const box = $("list");
    const first = Math.max(0, Math.floor(box.scrollTop / HEIGHT) - 4);
    const last = Math.min(order.length, Math.ceil((box.scrollTop + box.clientHeight) / HEIGHT) + 4);
    $("rows").replaceChildren(...Array.from({ length: Math.max(0, last - first) }, (_, k) => row(first + k)));
    if (state.chosen >= 0) box.setAttribute("aria-activedescendant", `row-${state.chosen}`);
    $("heads").style.paddingRight = `${16 + box.offsetWidth - box.clientWidth}px`; // the scroll bar takes some
    box.dataset.drawn = order.length;
  });
}

function choose(i) {
  state.chosen = i;
  state.beside = -1;
  drawRows();
  read();
  remember();
}

function scrollTo(place) {
  const box = $("list"), top = place * HEIGHT;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top + HEIGHT > box.scrollTop + box.clientHeight) box.scrollTop = top + HEIGHT - box.clientHeight;
}

/** Move through the list by `by` rows. */
function move(by) {
  if (!order.length) return;
  const place = order.indexOf(state.chosen);
  const next = Math.max(0, Math.min(order.length - 1, place < 0 ? (by > 0 ? 0 : order.length - 1) : place + by));
  scrollTo(next);
  choose(order[next]);
}

/** Look for a text in all rollouts, a chunk at a time, so that the page stays at hand. */
async function search() {
  const mine = ++searching;
  const wanted = state.query = $("search").value.toLowerCase();
  if (!wanted) { matches = null; list(true); highlight(); return; }
  const found = new Uint8Array(data.size);
  matches = found;
  let drawn = performance.now();
  for (let n = 0; n < data.texts.length; n++) {
    const items = await (unpacked.get(`text-${n}`) ?? unpack(`text-${n}`)); // not kept: it would push out what is looked at
    if (mine !== searching) return;
    items.forEach(({ texts }, k) => { if (texts.some((text) => text.toLowerCase().includes(wanted))) found[data.texts[n] + k] = 1; });
    if (performance.now() - drawn > 250) { list(); $("found").textContent += ` · looked through ${Math.round((100 * n) / data.texts.length)}%`; drawn = performance.now(); }
  }
  list(true);
  highlight();
}

// -------------------------------------------------------------------------------------------------------------- reader

const STATISTICS = {
  p: ["p, the sampled token's probability", "low"],
  p_max: ["p max, the most likely token's", "low"],
  rank: ["rank of the sampled token", "log"],
  entropy: ["entropy, nats", "high"],
  loss: ["loss", "both"],
  pull: ["gradient weight", "both"],
  gap: ["trainer − engine, nats", "both"],
};
const SHORT = { p: "p", p_max: "p max", rank: "rank", entropy: "entropy", loss: "loss", pull: "gradient", gap: "gap" };

/** A number for each sampled token, or null if it was not kept. */
function values(tokens, statistic) {
  if (statistic === "p") return tokens.logp.map(Math.exp);
  if (statistic === "p_max") return tokens.max_logp.map(Math.exp);
  if (statistic.startsWith("replay:")) return tokens.replay[statistic.slice(7)] ?? null;
  return tokens[statistic];
}

function offered(tokens) {
  const own = Object.entries(STATISTICS).filter(([key]) => values(tokens, key)).map(([key, [title]]) => [key, title]);
  return [...own, ...Object.keys(tokens.replay).map((title) => [`replay:${title}`, `gradient weight by ${title}`])];
}

const kindOf = (statistic) => STATISTICS[statistic]?.[1] ?? "both";

/** Value -> -1 .. 1: how strongly it is coloured, and with which of the two colours. */
function shade(statistic, largest) {
  const kind = kindOf(statistic);
  if (kind === "low") return (x) => 1 - x;
  if (kind === "log") return (x) => Math.log(x) / Math.log(Math.max(2, largest));
  return (x) => x / (largest || 1);
}

const tint = (strength) => `rgba(var(--${strength < 0 ? "cold" : "hot"}), ${(0.62 * Math.min(1, Math.abs(strength))).toFixed(3)})`;

function endsOf(statistic, largest) {
  const kind = kindOf(statistic);
  if (kind === "low") return ["1", "0"];
  if (kind === "log") return ["1", whole(Math.max(2, largest))];
  return kind === "both" ? [number(-largest, 2), number(largest, 2)] : ["0", number(largest, 2)];
}

/** Rollouts of the same row of the same split, over all runs and steps. */
function relatives(i) {
  const found = [];
  for (let j = 0; j < data.size; j++) if (data.row[j] === data.row[i] && data.split[j] === data.split[i]) found.push(j);
  return found.sort((a, b) => data.run[a] - data.run[b] || data.step[a] - data.step[b] || data.sample[a] - data.sample[b]);
}

/** The same row and sample of this run, `by` steps on; -1 if there is none. */
function neighbour(i, by) {
  const mine = relatives(i).filter((j) => data.run[j] === data.run[i] && data.sample[j] === data.sample[i]);
  return mine[mine.indexOf(i) + by] ?? -1;
}

let reading = 0;
let panes = []; // of what is read: { i, tokens, texts, statistic, spans, places, box, at }

async function read() {
  const mine = ++reading;
  const wanted = [state.chosen, state.beside].filter((i) => i >= 0);
  hideTip();
  if (!wanted.length || state.chosen < 0) {
    panes = [];
    $("reader").replaceChildren(el("div", { className: "empty" }, data.size ? "Choose a rollout: a click, or ↑ and ↓ in the list." : "No rollouts yet."));
    return;
  }
  const found = await Promise.all(wanted.map(async (i) => ({ i, tokens: await tokensOf(i), texts: await textOf(i) })));
  if (mine !== reading) return;
  panes = found.map((pane, n) => {
    const choices = pane.tokens ? offered(pane.tokens) : [];
    const statistic = choices.some(([key]) => key === state.stats[n]) ? state.stats[n] : (choices.find(([key]) => key === "entropy") ?? [""])[0];
    return { ...pane, choices, statistic, at: -1 };
  });
  $("reader").replaceChildren(el("div", { className: "panes" }, ...panes.map(drawPane)));
  colour();
  highlight();
  $("reader").dataset.shown = panes.map((pane) => nameOf(pane.i)).join(" ");
}

function drawPane(pane, n) {
  const { i, tokens, texts } = pane, run = data.runs[data.run[i]];
  const facts = [
    `${SPLITS[data.split[i]]} row ${data.row[i]}`, data.sample[i] < 0 ? null : `sample ${data.sample[i]}`,
    data.length[i] < 0 ? null : `${whole(data.length[i])} tokens`, Number.isNaN(data.loss[i]) ? null : `loss ${number(data.loss[i])}`,
    data.mark[i] & TRUNCATED ? "cut off at the length limit" : null, texts.unscored ? `unscored: ${texts.unscored}` : null,
  ];
  const bar = el("div", { className: "bar" });
  if (pane.choices.length) {
    const select = el("select", { "aria-label": "Statistic", className: "statistic", onchange: () => setStatistic(n, select.value) },
      ...pane.choices.map(([key, title]) => el("option", { value: key, selected: key === pane.statistic }, title)));
    bar.append(select);
  }
  const step = (by, mark, title) => {
    const to = neighbour(i, by);
    return el("button", { title, "aria-label": title, disabled: to < 0, onclick: () => goTo(n, to) }, mark);
  };
  bar.append(el("span", { className: "steps" }, step(-1, "‹", "The same row at an earlier step"), step(1, "›", "The same row at a later step")));
  bar.append(n ? el("button", { className: "quiet", onclick: () => goTo(1, -1) }, "Close") : comparison(i));
  const box = el("section", { className: "pane", "aria-label": n ? "Compared rollout" : "Chosen rollout" },
    el("header", {}, el("h2", {}, dot(i), `${run.name}, step ${data.step[i]}`), reward(i), el("span", { className: "facts" }, facts.filter(Boolean).join(" · "))), bar);
  pane.box = box;
  box.append(...(tokens ? microscope(pane, n) : plainTexts(texts.texts)));
  return box;
}

function comparison(i) {
  const others = relatives(i).filter((j) => j !== i).slice(0, 500);
  const option = (j) => el("option", { value: j, selected: j === state.beside }, `step ${data.step[j]}${data.sample[j] > 0 || data.sample[i] > 0 ? `, sample ${data.sample[j]}` : ""}, reward ${number(data.reward[j])}`);
  const byRun = data.runs.map((run, r) => [run.name, others.filter((j) => data.run[j] === r)]).filter(([, of]) => of.length);
  return el("select", { "aria-label": "Compare with", className: "comparison", onchange: (event) => goTo(1, event.target.value === "" ? -1 : +event.target.value) },
    el("option", { value: "" }, "compare with…"), el("option", { value: i, selected: state.beside === i }, "itself, by another statistic"),
    ...byRun.map(([name, of]) => el("optgroup", { label: name }, ...of.map(option))));
}

/** Show rollout `i` in a pane; -1 closes the second. */
function goTo(n, i) {
  if (n === 0 && i < 0) return;
  if (n === 0) {
    state.chosen = i;
    scrollTo(Math.max(0, order.indexOf(i)));
    drawRows();
  } else state.beside = i;
  read();
  remember();
}

function setStatistic(n, statistic) {
  state.stats[n] = panes[n].statistic = statistic;
  if (n === 0 && panes.length < 2) state.stats[1] = statistic;
  panes[n].box.querySelector(".statistic").value = statistic;
  colour();
  remember();
}

function plainTexts(texts) {
  const parts = texts.flatMap((text, n) => [
    el("p", { className: "who" }, n === 0 ? "prompt" : n % 2 ? "response" : "environment"),
    el("pre", { className: n % 2 ? "text" : "text state" }, text),
  ]);
  return [...parts, el("p", { className: "hint" }, "The statistics of this rollout's tokens were not kept; trainer.token_stats_freq=N keeps those of every N-th step.")];
}

/** The rollout token by token. */
function microscope(pane, n) {
  const { tokens } = pane;
  let k = 0;
  const spans = [], places = []; // of the sampled tokens
  const all = tokens.tokens.map((text, t) => {
    const shown = text === "" ? "·" : text.replaceAll("\n", "↵\n");
    if (tokens.sampled[t] === "0") return el("span", { className: "given" }, text);
    const span = el("span", { className: tokens.rank[k] > 1 ? "said off" : "said", id: `token-${n}-${k}` }, shown);
    span.dataset.k = k++;
    spans.push(span);
    places.push(t);
    return span;
  });
  Object.assign(pane, { spans, places });
  const box = el("div", { className: "tokens", tabIndex: 0, role: "group", "aria-label": "Tokens: ← and → move" }, ...all);
  box.addEventListener("pointermove", (event) => {
    const span = event.target.closest(".said");
    if (span && event.pointerType !== "touch") showTip(pane, +span.dataset.k); else hideTip();
  });
  box.addEventListener("pointerleave", hideTip);
  box.addEventListener("click", (event) => { const span = event.target.closest(".said"); if (span) point(pane, +span.dataset.k); });
  box.addEventListener("keydown", (event) => {
    const to = { ArrowRight: pane.at + 1, ArrowLeft: pane.at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (to === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    point(pane, Math.max(0, Math.min(spans.length - 1, to)));
  });
  box.addEventListener("blur", () => point(pane, -1));
  pane.strip = el("canvas", { className: "strip", title: "The statistic along the response; a click goes there" });
  pane.strip.addEventListener("click", (event) => {
    box.focus();
    point(pane, Math.min(spans.length - 1, Math.floor((event.offsetX / pane.strip.clientWidth) * spans.length)));
  });
  pane.scale = el("p", { className: "scale" });
  return [pane.scale, pane.strip, box];
}

/** Colour all tokens; panes with the same statistic have the same scale. */
function colour() {
  const largest = {};
  for (const pane of panes) {
    if (!pane.tokens) continue;
    pane.values = values(pane.tokens, pane.statistic);
    const floor = pane.statistic === "gap" ? 1e-5 : (pane.tokens.floors[pane.statistic] ?? 0); // less is rounding
    largest[pane.statistic] = pane.values.reduce((most, x) => Math.max(most, Math.abs(x)), Math.max(floor, largest[pane.statistic] ?? 0));
  }
  for (const pane of panes) {
    if (!pane.tokens) continue;
    const most = largest[pane.statistic] ?? 0, strength = shade(pane.statistic, most);
    pane.values.forEach((x, k) => { pane.spans[k].style.backgroundColor = tint(strength(x)); });
    const [low, high] = endsOf(pane.statistic, most);
    const ramp = kindOf(pane.statistic) === "both" ? `${tint(-1)}, transparent, ${tint(1)}` : `transparent, ${tint(1)}`;
    pane.scale.replaceChildren(el("span", {}, low), el("i", { style: `background:linear-gradient(90deg, ${ramp})` }), el("span", {}, high),
      el("span", {}, "underlined: not the most likely"));
    drawStrip(pane, strength);
  }
}

function drawStrip(pane, strength) {
  const canvas = pane.strip, ratio = devicePixelRatio || 1;
  const width = (canvas.width = Math.round(canvas.clientWidth * ratio)), height = (canvas.height = Math.round(canvas.clientHeight * ratio));
  const pen = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const colours = { true: `rgb(${style.getPropertyValue("--cold")})`, false: `rgb(${style.getPropertyValue("--hot")})` };
  const n = pane.values.length, each = width / n;
  const isBoth = kindOf(pane.statistic) === "both", zero = isBoth ? height / 2 : height;
  pane.values.forEach((x, k) => {
    const s = strength(x), tall = Math.abs(s) * (isBoth ? height / 2 : height);
    pen.fillStyle = colours[s < 0];
    pen.fillRect(k * each, s < 0 ? zero : zero - tall, Math.max(1, each - (each > 4 ? ratio : 0)), tall);
  });
}

/** Make token `k` of a pane the one that the keys move from; -1: none. */
function point(pane, k) {
  pane.spans[pane.at]?.classList.remove("at");
  pane.at = k;
  const span = pane.spans[k];
  if (!span) { hideTip(); return; }
  span.classList.add("at");
  span.scrollIntoView({ block: "nearest" });
  span.parentElement.setAttribute("aria-activedescendant", span.id);
  showTip(pane, k);
}

const visibleText = (text) => (text === "" ? "·" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣"));

function showTip(pane, k) {
  const { tokens } = pane, tip = $("tip");
  const name = tokens.tokens[pane.places[k]];
  const figures = Object.keys(SHORT).filter((key) => values(tokens, key)).flatMap((key) => {
    const x = values(tokens, key)[k];
    return [el("dt", {}, SHORT[key]), el("dd", {}, key === "p" || key === "p_max" ? probability(x) : key === "rank" ? whole(x) : number(x))];
  });
  const replayed = Object.entries(tokens.replay).flatMap(([title, of]) => [el("dt", { className: "wide" }, `gradient by ${title}`), el("dd", {}, number(of[k]))]);
  const top = tokens.top[k].map((text, j) => ({ text, p: Math.exp(tokens.top_logp[k][j]), taken: tokens.rank[k] === j + 1 }));
  if (!top.some((one) => one.taken)) top.push({ text: name, p: Math.exp(tokens.logp[k]), taken: true });
  tip.replaceChildren(el("span", { className: "place" }, `${whole(k + 1)} of ${whole(pane.spans.length)}`), el("b", {}, visibleText(name)),
    el("dl", {}, ...figures, ...replayed),
    el("ol", {}, ...top.map(({ text, p, taken }) => el("li", { className: taken ? "taken" : "" }, el("code", {}, visibleText(text)),
      el("i", { style: `width:${Math.max(1, 100 * p)}%` }), el("span", {}, p < 0.001 ? "< .001" : p.toFixed(3))))));
  tip.hidden = false;
  const at = pane.spans[k].getClientRects()[0], box = tip.getBoundingClientRect();
  const below = at.bottom + 8 + box.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(innerWidth - box.width - 8, at.left))}px`;
  tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - box.height - 8)}px`;
}

function hideTip() { $("tip").hidden = true; }

/** Mark what was searched for in the texts that are open. */
function highlight() {
  if (!("highlights" in CSS)) return;
  CSS.highlights.delete("found");
  if (!state.query) return;
  const ranges = [];
  for (const box of document.querySelectorAll(".pane .text, .pane .tokens")) {
    const nodes = [], walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    let text = "";
    while (walker.nextNode()) { nodes.push([text.length, walker.currentNode]); text += walker.currentNode.data; }
    text = text.toLowerCase();
    const where = (place) => { const [start, node] = nodes.findLast(([from]) => from <= place); return [node, Math.min(node.length, place - start)]; };
    for (let from = text.indexOf(state.query); from >= 0 && ranges.length < 1000; from = text.indexOf(state.query, from + 1)) {
      const range = new Range();
      range.setStart(...where(from));
      range.setEnd(...where(from + state.query.length));
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// ---------------------------------------------------------------------------------------------------------------- keys

/** The next rollout of the same row, in order of run and step, beside the chosen one. */
function compareNext() {
  const others = relatives(state.chosen).filter((j) => j !== state.chosen);
  if (others.length) goTo(1, others[(others.indexOf(state.beside) + 1) % others.length]);
}

function nextStatistic() {
  const n = panes.findIndex((pane) => pane.box.contains(document.activeElement)), pane = panes[Math.max(0, n)];
  if (!pane?.choices.length) return;
  const keys = pane.choices.map(([key]) => key);
  setStatistic(Math.max(0, n), keys[(keys.indexOf(pane.statistic) + 1) % keys.length]);
  if (pane.at >= 0) showTip(pane, pane.at);
}

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || $("help").open) return;
  if (event.key === "Escape") {
    if (event.target === $("search") || event.target.closest?.(".reader")) $("list").focus();
    else if (state.beside >= 0) goTo(1, -1);
    return;
  }
  if (event.target.matches("input[type=search], select")) {
    if (event.target === $("search") && (event.key === "Enter" || event.key === "ArrowDown")) { event.preventDefault(); $("list").focus(); if (order.length) choose(order[0]); }
    return;
  }
  const inRollouts = state.view === "rollouts";
  const does = {
    "1": () => show("curves"), "2": () => { show("rollouts"); $("list").focus(); }, "?": () => $("help").showModal(),
    "/": () => (inRollouts ? $("search") : $("metric-filter")).focus(),
    ...(inRollouts && state.chosen >= 0 ? {
      "s": nextStatistic, "c": compareNext,
      "[": () => goTo(0, neighbour(state.chosen, -1)), "]": () => goTo(0, neighbour(state.chosen, 1)),
    } : {}),
  }[event.key];
  if (does) { event.preventDefault(); does(); }
});

$("list").addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor($("list").clientHeight / HEIGHT) - 1);
  const by = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[event.key];
  if (event.key === "Enter") {
    const box = document.querySelector(".pane .tokens");
    event.preventDefault();
    if (box) { box.focus(); point(panes[0], 0); } else $("reader").focus();
  }
  if (by === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  move(by);
});

// --------------------------------------------------------------------------------------------------------------- start

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.onclick = () => show(tab.dataset.view);
  tab.onkeydown = (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    show(state.view === "curves" ? "rollouts" : "curves");
    $(`tab-${state.view}`).focus();
  };
}
$("help-button").onclick = () => $("help").showModal();
$("list").addEventListener("scroll", drawRows);
for (const id of ["by-run", "by-split", "by-step", "by-outcome"]) $(id).onchange = () => list(true);
let typed;
$("search").oninput = () => { clearTimeout(typed); typed = setTimeout(search, 200); };
$("metric-filter").oninput = () => drawCurves();
$("smooth").onchange = replot;
addEventListener("resize", () => { drawRows(); if (panes.length) colour(); hideTip(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (panes.length) colour(); });

/** Ask the server now and then whether there is more. */
async function follow() {
  try {
    const version = +(await (await fetch("/version")).text());
    $("live").classList.remove("lost");
    $("live").textContent = "live";
    if (version !== data.version) {
      const names = [state.chosen, state.beside].map((i) => (i < 0 ? null : nameOf(i)));
      const before = [state.chosen, state.beside].join();
      data = await readHead();
      unpacked.clear();
      // a resumed run has begun its files anew: the numbers are others, the names are not
      [state.chosen, state.beside] = names.map(find);
      const { scrollTop } = $("curves");
      drawCurves();
      $("curves").scrollTop = scrollTop;
      drawFilters();
      if (state.query) await search(); else list();
      // what is open stays as it is, unless there is more of it
      const isSame = before === [state.chosen, state.beside].join() && panes.length;
      if (!isSame || panes.some((pane) => !pane.tokens && data.token[pane.i] >= 0)) read();
    }
  } catch {
    $("live").classList.add("lost");
    $("live").textContent = "server gone";
  }
  setTimeout(follow, 3000);
}

async function start() {
  data = await readHead();
  recall();
  drawFilters();
  list();
  show(state.view);
  drawCurves();
  $("live").hidden = !isLive;
  if (isLive) setTimeout(follow, 3000);
}

start();
