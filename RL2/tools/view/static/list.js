// The list of rollouts: filtered, sorted, searched; only the rows in sight are drawn.

const HEIGHT = 48; // of a row, as in the style sheet
const HEADS = [
  ["step", "step"],
  ["", "split"],
  ["", "row"],
  ["reward", "reward"],
  ["length", "length"],
  ["loss", "loss"],
];
let order = new Uint32Array(0); // the rollouts of the list
let matches = null; // of the search: 1 where a text holds it
let searching = 0; // number of the latest search

function chooseFrom(id, first, pairs) {
  const select = $(id);
  const value = select.value;
  select.replaceChildren(
    el("option", { value: "" }, first),
    ...pairs.map(([key, name]) => el("option", { value: key }, name)),
  );
  select.value = value;
  if (select.selectedIndex < 0) select.value = "";
}

function drawFilters() {
  $("total").textContent = whole(data.size);
  chooseFrom(
    "by-run",
    "all runs",
    data.runs.map((run, i) => [i, run.name]),
  );
  chooseFrom(
    "by-split",
    "all splits",
    SPLITS.map((name, i) => [i, name]).filter(([i]) => data.split.includes(i)),
  );
  chooseFrom(
    "by-step",
    "all steps",
    [...new Set(data.step)].sort((a, b) => a - b).map((step) => [step, `step ${step}`]),
  );
  $("heads").replaceChildren(
    ...HEADS.map(([key, name]) =>
      key
        ? el(
            "button",
            { "aria-pressed": state.sort === key, onclick: () => sortBy(key) },
            `${name}${state.sort === key ? (state.falls ? " ↓" : " ↑") : ""}`,
          )
        : el("span", {}, name),
    ),
  );
}

function sortBy(key) {
  if (state.sort === key) state.falls = !state.falls;
  else {
    state.sort = key;
    state.falls = key !== "step";
  }
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
    if (
      (run === "" || data.run[i] === +run) &&
      (split === "" || data.split[i] === +split) &&
      (step === "" || data.step[i] === +step) &&
      passes(i) &&
      (!matches || matches[i])
    )
      kept[count++] = i;
  }
  order = kept.subarray(0, count);
  const column = data[state.sort];
  const sign = state.falls ? -1 : 1;
  const missing = (x) => Number.isNaN(x) || (x < 0 && state.sort === "length");
  order.sort((a, b) => {
    const x = column[a];
    const y = column[b];
    if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b; // last, whichever way
    return sign * (x - y) || a - b;
  });
  $("found").textContent =
    count === data.size ? `${whole(count)} rollouts` : `${whole(count)} of ${whole(data.size)} rollouts`;
  $("rows").style.height = `${count * HEIGHT}px`;
  if (toTop) $("list").scrollTop = 0;
  drawRows();
}

function reward(i) {
  if (data.mark[i] & UNSCORED) return el("span", { className: "none" }, "unscored");
  const value = data.reward[i];
  if (Number.isNaN(value)) return el("span", { className: "none" }, data.role[i] < 0 ? "–" : "frozen");
  return el("span", { className: value > 0 ? "good" : "bad" }, `${value > 0 ? "✓" : "✗"} ${number(value)}`);
}

function row(place) {
  const i = order[place];
  const text = el("p", {});
  textOf(i).then(({ texts, role }) => {
    const by = role ? `${role}: ` : "";
    text.textContent = by + (texts[1] ?? texts[0] ?? "").replace(/\s+/g, " ").slice(0, 160);
  });
  return el(
    "div",
    {
      className: "row",
      role: "option",
      id: `row-${i}`,
      style: `top:${place * HEIGHT}px`,
      "aria-selected": i === state.chosen,
      "aria-posinset": place + 1,
      "aria-setsize": order.length,
      onclick: () => {
        choose(i);
        $("list").focus();
      },
    },
    el(
      "div",
      { className: "figures" },
      el("span", {}, String(data.step[i])),
      el("span", { className: "what" }, SPLITS[data.split[i]]),
      el(
        "span",
        { className: "what" },
        dot(i),
        data.sample[i] < 0 ? String(data.row[i]) : `${data.row[i]}·${data.sample[i]}`,
      ),
      reward(i),
      el("span", {}, data.length[i] < 0 ? "–" : whole(data.length[i])),
      el("span", {}, number(data.loss[i], 2)),
    ),
    text,
  );
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
  const box = $("list");
  const top = place * HEIGHT;
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
  const wanted = (state.query = $("search").value.toLowerCase());
  if (!wanted) {
    matches = null;
    list(true);
    highlight();
    return;
  }
  const found = new Uint8Array(data.size);
  matches = found;
  let drawn = performance.now();
  for (let n = 0; n < data.texts.length; n++) {
    // not kept: it would push out what is looked at
    const items = await (unpacked.get(`text-${n}`) ?? unpack(`text-${n}`));
    if (mine !== searching) return;
    items.forEach(({ texts }, k) => {
      if (texts.some((text) => text.toLowerCase().includes(wanted))) found[data.texts[n] + k] = 1;
    });
    if (performance.now() - drawn > 250) {
      list();
      $("found").textContent += ` · looked through ${Math.round((100 * n) / data.texts.length)}%`;
      drawn = performance.now();
    }
  }
  list(true);
  highlight();
}
