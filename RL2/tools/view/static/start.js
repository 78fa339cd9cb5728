// Keys, and how it all begins.

/** The next rollout of the same row, in order of run and step, beside the chosen one. */
function compareNext() {
  const others = relatives(state.chosen).filter((j) => j !== state.chosen);
  if (others.length) goTo(1, others[(others.indexOf(state.beside) + 1) % others.length]);
}

function nextStatistic() {
  const n = panes.findIndex((pane) => pane.box.contains(document.activeElement));
  const pane = panes[Math.max(0, n)];
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
    if (event.target === $("search") && (event.key === "Enter" || event.key === "ArrowDown")) {
      event.preventDefault();
      $("list").focus();
      if (order.length) choose(order[0]);
    }
    return;
  }
  const inRollouts = state.view === "rollouts";
  const does = {
    1: () => show("curves"),
    2: () => {
      show("rollouts");
      $("list").focus();
    },
    3: () => show("data"),
    "?": () => $("help").showModal(),
    "/": () => (inRollouts ? $("search") : $("metric-filter")).focus(),
    ...(inRollouts && state.chosen >= 0
      ? {
          s: nextStatistic,
          c: compareNext,
          "[": () => goTo(0, neighbour(state.chosen, -1)),
          "]": () => goTo(0, neighbour(state.chosen, 1)),
        }
      : {}),
  }[event.key];
  if (does) {
    event.preventDefault();
    does();
  }
});

$("list").addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor($("list").clientHeight / HEIGHT) - 1);
  const by = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity }[
    event.key
  ];
  if (event.key === "Enter") {
    const box = document.querySelector(".pane .tokens");
    event.preventDefault();
    if (box) {
      box.focus();
      point(panes[0], 0);
    } else $("reader").focus();
  }
  if (by === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  move(by);
});

for (const tab of document.querySelectorAll("[role=tab]")) {
  tab.onclick = () => show(tab.dataset.view);
  tab.onkeydown = (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    show(VIEWS[(VIEWS.indexOf(state.view) + by + VIEWS.length) % VIEWS.length]);
    $(`tab-${state.view}`).focus();
  };
}
$("help-button").onclick = () => $("help").showModal();
$("list").addEventListener("scroll", drawRows);
for (const id of ["by-run", "by-split", "by-step", "by-outcome"]) $(id).onchange = () => list(true);
let typed;
$("search").oninput = () => {
  clearTimeout(typed);
  typed = setTimeout(search, 200);
};
$("metric-filter").oninput = () => drawCurves();
$("smooth").onchange = replot;
addEventListener("resize", () => {
  drawRows();
  if (panes.length) colour();
  hideTip();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  if (panes.length) colour();
});

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
      drawData();
      $("curves").scrollTop = scrollTop;
      drawFilters();
      if (state.query) await search();
      else list();
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
  drawData();
  $("live").hidden = !isLive;
  if (isLive) setTimeout(follow, 3000);
}

start();
