// One rollout, or two side by side, token by token.

const STATISTICS = {
  p: ["p, the sampled token's probability", "low"],
  p_max: ["p max, the most likely token's", "low"],
  rank: ["rank of the sampled token", "log"],
  entropy: ["entropy, nats", "high"],
  loss: ["loss", "both"],
  pull: ["gradient weight", "both"],
  gap: ["trainer − engine, nats", "both"],
  advantage: ["measured advantage", "both"],
};
const exp = (x) => (x === null ? null : Math.exp(x)); // null: no number
const SHORT = { p: "p", p_max: "p max", rank: "rank", entropy: "entropy", loss: "loss", pull: "gradient", gap: "gap" };

/** A number for each sampled token, or null if it was not kept. */
function values(tokens, statistic) {
  if (statistic === "p") return tokens.logp.map(exp);
  if (statistic === "p_max") return tokens.max_logp.map(exp);
  if (statistic.startsWith("replay:")) return tokens.replay[statistic.slice(7)] ?? null;
  if (statistic.startsWith("pull:")) return tokens.credit?.pulls[statistic.slice(5)] ?? null;
  if (statistic === "advantage") return tokens.credit?.advantage.map(([value]) => value) ?? null;
  return tokens[statistic];
}

function offered(tokens) {
  const own = Object.entries(STATISTICS)
    .filter(([key]) => values(tokens, key))
    .map(([key, [title]]) => [key, title]);
  return [
    ...own,
    ...Object.keys(tokens.replay).map((title) => [`replay:${title}`, `gradient weight by ${title}`]),
    ...Object.keys(tokens.credit?.pulls ?? {}).map((title) => [`pull:${title}`, `pull on the logit by ${title}`]),
  ];
}

const kindOf = (statistic) => STATISTICS[statistic]?.[1] ?? "both";

/** Value -> -1 .. 1: how strongly it is coloured, and with which of the two colours. */
function shade(statistic, largest) {
  const kind = kindOf(statistic);
  if (kind === "low") return (x) => 1 - x;
  if (kind === "log") return (x) => Math.log(x) / Math.log(Math.max(2, largest));
  return (x) => x / (largest || 1);
}

const tint = (strength) =>
  `rgba(var(--${strength < 0 ? "cold" : "hot"}), ${(0.62 * Math.min(1, Math.abs(strength))).toFixed(3)})`;

function endsOf(statistic, largest) {
  const kind = kindOf(statistic);
  if (kind === "low") return ["1", "0"];
  if (kind === "log") return ["1", whole(Math.max(2, largest))];
  return kind === "both" ? [number(-largest, 2), number(largest, 2)] : ["0", number(largest, 2)];
}

/** Rollouts of the same row of the same split, over all runs and steps. */
function relatives(i) {
  const found = [];
  const same = [data.row, data.split, data.role];
  for (let j = 0; j < data.size; j++) if (same.every((column) => column[j] === column[i])) found.push(j);
  return found.sort(
    (a, b) => data.run[a] - data.run[b] || data.step[a] - data.step[b] || data.sample[a] - data.sample[b],
  );
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
    $("reader").replaceChildren(
      el(
        "div",
        { className: "empty" },
        data.size ? "Choose a rollout: a click, or ↑ and ↓ in the list." : "No rollouts yet.",
      ),
    );
    return;
  }
  const found = await Promise.all(wanted.map(async (i) => ({ i, tokens: await tokensOf(i), texts: await textOf(i) })));
  if (mine !== reading) return;
  panes = found.map((pane, n) => {
    const choices = pane.tokens ? offered(pane.tokens) : [];
    const statistic = choices.some(([key]) => key === state.stats[n])
      ? state.stats[n]
      : (choices.find(([key]) => key === "entropy") ?? [""])[0];
    return { ...pane, choices, statistic, at: -1 };
  });
  $("reader").replaceChildren(el("div", { className: "panes" }, ...panes.map(drawPane)));
  colour();
  highlight();
  $("reader").dataset.shown = panes.map((pane) => nameOf(pane.i)).join(" ");
}

function drawPane(pane, n) {
  const { i, tokens, texts } = pane;
  const run = data.runs[data.run[i]];
  const named = (values) =>
    Object.entries(values ?? {})
      .map(([name, value]) => `${name} ${number(value)}`)
      .join(", ");
  const facts = [
    texts.role ? `role ${texts.role}` : null,
    named(texts.parts),
    `${SPLITS[data.split[i]]} ${texts.set ? `set ${texts.set}, ` : ""}row ${data.row[i]}`,
    data.sample[i] < 0 ? null : `sample ${data.sample[i]}`,
    data.length[i] < 0 ? null : `${whole(data.length[i])} tokens`,
    Number.isNaN(data.loss[i]) ? null : `loss ${number(data.loss[i])}`,
    data.mark[i] & TRUNCATED ? "cut off at the length limit" : null,
    texts.unscored ? `unscored: ${texts.unscored}` : null,
    named(texts.metrics),
  ];
  const bar = el("div", { className: "bar" });
  if (pane.choices.length) {
    const select = el(
      "select",
      { "aria-label": "Statistic", className: "statistic", onchange: () => setStatistic(n, select.value) },
      ...pane.choices.map(([key, title]) => el("option", { value: key, selected: key === pane.statistic }, title)),
    );
    bar.append(select);
  }
  const step = (by, mark, title) => {
    const to = neighbour(i, by);
    return el("button", { title, "aria-label": title, disabled: to < 0, onclick: () => goTo(n, to) }, mark);
  };
  bar.append(
    el(
      "span",
      { className: "steps" },
      step(-1, "‹", "The same row at an earlier step"),
      step(1, "›", "The same row at a later step"),
    ),
  );
  bar.append(n ? el("button", { className: "quiet", onclick: () => goTo(1, -1) }, "Close") : comparison(i));
  const box = el(
    "section",
    { className: "pane", "aria-label": n ? "Compared rollout" : "Chosen rollout" },
    el(
      "header",
      {},
      el("h2", {}, dot(i), `${run.name}, step ${data.step[i]}`),
      reward(i),
      el("span", { className: "facts" }, facts.filter(Boolean).join(" · ")),
    ),
    bar,
  );
  pane.box = box;
  box.append(...(tokens ? microscope(pane, n) : plainTexts(texts.texts, texts.role, data.length[i] === 0)));
  return box;
}

function comparison(i) {
  const others = relatives(i)
    .filter((j) => j !== i)
    .slice(0, 500);
  const hasSamples = others.some((j) => data.sample[j] !== data.sample[i]);
  const option = (j) => {
    const sample = hasSamples ? `sample ${data.sample[j]}, ` : "";
    const title = `step ${data.step[j]}, ${sample}reward ${number(data.reward[j])}`;
    return el("option", { value: j, selected: j === state.beside }, title);
  };
  const byRun = data.runs
    .map((run, r) => [run.name, others.filter((j) => data.run[j] === r)])
    .filter(([, of]) => of.length);
  return el(
    "select",
    {
      "aria-label": "Compare with",
      className: "comparison",
      onchange: (event) => goTo(1, event.target.value === "" ? -1 : +event.target.value),
    },
    el("option", { value: "" }, "compare with…"),
    el("option", { value: i, selected: state.beside === i }, "itself, by another statistic"),
    ...byRun.map(([name, of]) => el("optgroup", { label: name }, ...of.map(option))),
  );
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

function plainTexts(texts, role, isOpponent) {
  const by = role ? ` of ${role}` : "";
  const parts = texts.flatMap((text, n) => {
    if (n % 2) {
      const who = `response${by}${callsIn(text).length ? " with tool calls" : ""}`;
      return [el("p", { className: "who" }, who), el("pre", { className: "text" }, ...withCalls(text))];
    }
    const before = n ? texts[n - 2] + texts[n - 1] : "";
    const added = text.startsWith(before) ? text.slice(before.length) : text; // otherwise the history was rewritten
    const who = n === 0 ? "prompt" : "observation";
    return [el("p", { className: "who" }, who), el("pre", { className: "text state" }, added)];
  });
  return [
    ...parts,
    el(
      "p",
      { className: "hint" },
      role && isOpponent
        ? "An opponent has played this role; its tokens never train."
        : "This rollout has no token statistics; trainer.token_stats_freq=N records them at every N-th step.",
    ),
  ];
}

/** The rollout token by token. */
function microscope(pane, n) {
  const { tokens } = pane;
  let k = 0;
  const spans = [];
  const places = []; // of the sampled tokens
  const kindOfToken = kinds(tokens);
  const all = tokens.tokens.map((text, t) => {
    const shown = text === "" ? "·" : text.replaceAll("\n", "↵\n");
    const { call, observed } = kindOfToken[t];
    if (tokens.sampled[t] === "0") return el("span", { className: observed ? "given observed" : "given" }, text);
    const className = `said${tokens.rank[k] > 1 ? " off" : ""}${call ? " call" : ""}`;
    const span = el("span", { className, id: `token-${n}-${k}` }, shown);
    span.dataset.k = k++;
    spans.push(span);
    places.push(t);
    return span;
  });
  Object.assign(pane, { spans, places });
  const box = el(
    "div",
    { className: "tokens", tabIndex: 0, role: "group", "aria-label": "Tokens: ← and → move" },
    ...all,
  );
  box.addEventListener("pointermove", (event) => {
    const span = event.target.closest(".said");
    if (span && event.pointerType !== "touch") showTip(pane, +span.dataset.k);
    else hideTip();
  });
  box.addEventListener("pointerleave", hideTip);
  box.addEventListener("click", (event) => {
    const span = event.target.closest(".said");
    if (span) point(pane, +span.dataset.k);
  });
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
  pane.legend = [
    kindOfToken.some((kind) => kind.call) && "bold: tool call",
    kindOfToken.some((kind) => kind.observed) && "barred: observation",
    "underlined: not the most likely",
  ]
    .filter(Boolean)
    .join(" · ");
  return [pane.scale, pane.strip, box, ...creditParts(pane)];
}

/** Colour all tokens; panes with the same statistic have the same scale. */
function colour() {
  const largest = {};
  for (const pane of panes) {
    if (!pane.tokens) continue;
    pane.values = values(pane.tokens, pane.statistic);
    const floor = pane.statistic === "gap" ? 1e-5 : (pane.tokens.floors[pane.statistic] ?? 0); // less is rounding
    largest[pane.statistic] = pane.values.reduce(
      (most, x) => Math.max(most, Math.abs(x)),
      Math.max(floor, largest[pane.statistic] ?? 0),
    );
  }
  for (const pane of panes) {
    if (!pane.tokens) continue;
    const most = largest[pane.statistic] ?? 0;
    const strength = shade(pane.statistic, most);
    pane.values.forEach((x, k) => {
      pane.spans[k].style.backgroundColor = tint(strength(x));
    });
    const [low, high] = endsOf(pane.statistic, most);
    const ramp = kindOf(pane.statistic) === "both" ? `${tint(-1)}, transparent, ${tint(1)}` : `transparent, ${tint(1)}`;
    pane.scale.replaceChildren(
      el("span", {}, low),
      el("i", { style: `background:linear-gradient(90deg, ${ramp})` }),
      el("span", {}, high),
      el("span", {}, pane.legend),
    );
    drawStrip(pane, strength);
  }
}

function drawStrip(pane, strength) {
  const canvas = pane.strip;
  const ratio = devicePixelRatio || 1;
  const width = (canvas.width = Math.round(canvas.clientWidth * ratio));
  const height = (canvas.height = Math.round(canvas.clientHeight * ratio));
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  const colours = {
    true: `rgb(${style.getPropertyValue("--cold")})`,
    false: `rgb(${style.getPropertyValue("--hot")})`,
  };
  const n = pane.values.length;
  const each = width / n;
  const isBoth = kindOf(pane.statistic) === "both";
  const zero = isBoth ? height / 2 : height;
  pane.values.forEach((x, k) => {
    const s = strength(x);
    const tall = Math.abs(s) * (isBoth ? height / 2 : height);
    pen.fillStyle = colours[s < 0];
    pen.fillRect(k * each, s < 0 ? zero : zero - tall, Math.max(1, each - (each > 4 ? ratio : 0)), tall);
  });
}

/** Make token `k` of a pane the one that the keys move from; -1: none. */
function point(pane, k) {
  pane.spans[pane.at]?.classList.remove("at");
  pane.at = k;
  const span = pane.spans[k];
  if (!span) {
    hideTip();
    return;
  }
  span.classList.add("at");
  span.scrollIntoView({ block: "nearest" });
  span.parentElement.setAttribute("aria-activedescendant", span.id);
  showAlternative(pane, k);
  showTip(pane, k);
}

const visibleText = (text) =>
  text === "" ? "·" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

function showTip(pane, k) {
  const { tokens } = pane;
  const tip = $("tip");
  const name = tokens.tokens[pane.places[k]];
  const figures = Object.keys(SHORT)
    .filter((key) => values(tokens, key))
    .flatMap((key) => {
      const x = values(tokens, key)[k];
      return [
        el("dt", {}, SHORT[key]),
        el("dd", {}, key === "p" || key === "p_max" ? probability(x) : key === "rank" ? whole(x) : number(x)),
      ];
    });
  const replayed = Object.entries(tokens.replay).flatMap(([title, of]) => [
    el("dt", { className: "wide" }, `gradient by ${title}`),
    el("dd", {}, number(of[k])),
  ]);
  const top = tokens.top[k].map((text, j) => ({
    text,
    p: exp(tokens.top_logp[k][j]),
    taken: tokens.rank[k] === j + 1,
  }));
  if (!top.some((one) => one.taken)) top.push({ text: name, p: exp(tokens.logp[k]), taken: true });
  tip.replaceChildren(
    el("span", { className: "place" }, `${whole(k + 1)} of ${whole(pane.spans.length)}`),
    el("b", {}, visibleText(name)),
    el("dl", {}, ...figures, ...replayed, ...creditLines(tokens, k)),
    el(
      "ol",
      {},
      ...top.map(({ text, p, taken }) =>
        el(
          "li",
          { className: taken ? "taken" : "" },
          el("code", {}, visibleText(text)),
          el("i", { style: `width:${Math.max(1, 100 * p)}%` }),
          el("span", {}, p < 0.001 ? "< .001" : p.toFixed(3)),
        ),
      ),
    ),
  );
  tip.hidden = false;
  const at = pane.spans[k].getClientRects()[0];
  const box = tip.getBoundingClientRect();
  const below = at.bottom + 8 + box.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(innerWidth - box.width - 8, at.left))}px`;
  tip.style.top = `${below ? at.bottom + 8 : Math.max(8, at.top - box.height - 8)}px`;
}

function hideTip() {
  $("tip").hidden = true;
}

/** Mark what was searched for in the texts that are open. */
function highlight() {
  if (!("highlights" in CSS)) return;
  CSS.highlights.delete("found");
  if (!state.query) return;
  const ranges = [];
  for (const box of document.querySelectorAll(".pane .text, .pane .tokens")) {
    const nodes = [];
    const walker = document.createTreeWalker(box, NodeFilter.SHOW_TEXT);
    let text = "";
    while (walker.nextNode()) {
      nodes.push([text.length, walker.currentNode]);
      text += walker.currentNode.data;
    }
    text = text.toLowerCase();
    const where = (place) => {
      const [start, node] = nodes.findLast(([from]) => from <= place);
      return [node, Math.min(node.length, place - start)];
    };
    for (
      let from = text.indexOf(state.query);
      from >= 0 && ranges.length < 1000;
      from = text.indexOf(state.query, from + 1)
    ) {
      const range = new Range();
      range.setStart(...where(from));
      range.setEnd(...where(from + state.query.length));
      ranges.push(range);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}
