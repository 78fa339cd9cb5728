// Curves of all metrics, one plot each, drawn when it comes into sight.

const MAIN = [
  "test/score",
  "train/score",
  "train/entropy",
  "train/length",
  "actor/loss",
  "test/accuracy",
  "test/loss",
  "actor/accuracy",
  "critic/loss",
];
const TITLES = {
  "test/score": "Test score",
  "train/score": "Training score",
  "train/entropy": "Entropy, nats a token",
  "train/length": "Response length, tokens",
  "actor/loss": "Loss",
};
const hidden = new Set(); // methods
const drawn = new Set(); // plots
const visible = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries)
      if (isIntersecting && !drawn.has(target)) {
        drawn.add(target);
        plot(target);
      }
  },
  { rootMargin: "300px" },
);

const smoothed = (values, reach = 3) =>
  values.map((_, i) => {
    const r = Math.min(reach, i, values.length - 1 - i); // as many on each side
    let sum = 0;
    for (let j = i - r; j <= i + r; j++) sum += values[j];
    return sum / (2 * r + 1);
  });

function traces(metric) {
  const found = [];
  data.methods.forEach((name, method) => {
    const curves = data.runs
      .filter((run) => run.method === method)
      .map((run) => run.curves[metric])
      .filter(Boolean);
    if (!curves.length) return;
    const isSmooth = $("smooth").checked && curves[0][0].length >= 20;
    const colour = colourOf(method);
    const dash = look.dashes[method % look.dashes.length];
    const shared = { name, meta: method, visible: !hidden.has(method), showlegend: false, cliponaxis: false };
    const thin = { ...shared, mode: "lines", hoverinfo: "skip" };
    const few = curves[0][0].length < 12;
    const line = {
      ...shared,
      mode: few ? "lines+markers" : "lines",
      line: { color: colour, width: 2.2, dash },
      marker: { size: 6 },
      hovertemplate: "%{customdata:.4~g}",
    };
    if (curves.length === 1) {
      const [steps, values] = curves[0];
      if (isSmooth) found.push({ ...thin, x: steps, y: values, line: { color: colour, width: 1 }, opacity: 0.3 });
      found.push({ ...line, x: steps, y: isSmooth ? smoothed(values) : values, customdata: values });
      return;
    }
    const at = new Map(); // step -> the seeds' values
    for (const [steps, values] of curves)
      steps.forEach((step, i) => at.set(step, [...(at.get(step) ?? []), values[i]]));
    const steps = [...at.keys()].sort((a, b) => a - b);
    const of = (what) => {
      const values = steps.map((step) => what(at.get(step)));
      return isSmooth ? smoothed(values) : values;
    };
    const mean = (values) => values.reduce((a, b) => a + b) / values.length;
    found.push({ ...thin, x: steps, y: of((values) => Math.min(...values)), line: { width: 0, color: colour } });
    found.push({
      ...thin,
      x: steps,
      y: of((values) => Math.max(...values)),
      line: { width: 0, color: colour },
      fill: "tonexty",
      fillcolor: `${colour}33`,
    });
    const means = steps.map((step) => mean(at.get(step)));
    const notes = steps.map(
      (step, i) =>
        `${number(means[i], 4)} (${number(Math.min(...at.get(step)), 3)} to ${number(Math.max(...at.get(step)), 3)})`,
    );
    found.push({ ...line, x: steps, y: of(mean), customdata: notes, hovertemplate: "%{customdata}" });
  });
  return found;
}

/** Plotly.js is a third of a second's work: it runs when the first curve is looked at. */
function plotly() {
  if (!window.Plotly) document.head.append(el("script", { textContent: $("plotly").textContent }));
  return window.Plotly;
}

const plot = (target) =>
  plotly().react(target, traces(target.dataset.metric), { ...look.layout, height: target.clientHeight }, look.config);
const replot = () => drawn.forEach((target) => target.isConnected && plot(target));

function drawCurves() {
  $("legend").replaceChildren(
    ...data.methods.map((name, method) => {
      const seeds = data.runs.filter((run) => run.method === method).length;
      const button = el(
        "button",
        { style: `--colour:${colourOf(method)}`, "aria-pressed": !hidden.has(method) },
        el("i", { className: "dot" }),
        name,
        seeds > 1 ? el("small", {}, `mean and range of ${seeds} seeds`) : null,
      );
      button.onclick = () => {
        if (!hidden.delete(method)) hidden.add(method);
        button.setAttribute("aria-pressed", !hidden.has(method));
        replot();
      };
      return button;
    }),
  );
  const all = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))];
  const wanted = $("metric-filter").value.trim().toLowerCase();
  const shown = all.filter(
    (metric) => metric.toLowerCase().includes(wanted) || (TITLES[metric] ?? "").toLowerCase().includes(wanted),
  );
  const main = wanted ? [] : MAIN.filter((metric) => all.includes(metric)).slice(0, 5);
  const figure = (metric) =>
    el(
      "figure",
      {},
      el("figcaption", {}, TITLES[metric] ?? metric),
      el("div", { className: "plot", "data-metric": metric }),
    );
  const groups = new Map();
  for (const metric of shown.filter((name) => !main.includes(name))) {
    const group = metric.split("/")[0];
    groups.set(group, [...(groups.get(group) ?? []), metric]);
  }
  visible.disconnect();
  drawn.clear();
  $("charts").replaceChildren(
    el("div", { className: "grid main" }, ...main.map(figure)),
    ...[...groups].map(([name, metrics]) =>
      el(
        "details",
        { className: "group", open: true },
        el("summary", {}, name, el("small", {}, `${metrics.length}`)),
        el("div", { className: "grid" }, ...metrics.map(figure)),
      ),
    ),
  );
  if (!all.length) $("charts").append(el("p", { className: "empty" }, "No metrics yet."));
  for (const target of document.querySelectorAll(".plot")) visible.observe(target);
  $("replays").replaceChildren(...data.replays.flatMap(replayTable));
  drawCredits();
  const settings = Object.entries(data.settings);
  $("settings").hidden = !settings.length;
  $("settings")
    .querySelector("table")
    .replaceChildren(
      el("thead", {}, el("tr", {}, el("th", {}, "key"), ...data.runs.map((run) => el("th", {}, run.name)))),
      el(
        "tbody",
        {},
        ...settings.map(([key, values]) =>
          el("tr", {}, el("th", {}, key), ...values.map((value) => el("td", {}, value))),
        ),
      ),
    );
}

/** What `rl2 replay` found about a step: what each objective does, and how alike their gradients are. */
function replayTable({ run, step, objectives, cosines }) {
  const cosine = (a, b) =>
    cosines.find((one) => (one.of === a && one.and === b) || (one.of === b && one.and === a))?.cosine;
  const heads = [
    "objective",
    "loss",
    "gradient norm",
    "tokens",
    "entropy",
    "log p correct",
    "log p wrong",
    ...objectives.map((_, n) => `cos ${n + 1}`),
  ];
  const rows = objectives.map((one, n) =>
    el(
      "tr",
      {},
      el("th", {}, `${n + 1} ${one.title}`),
      ...["loss", "norm", "tokens", "entropy", "correct", "wrong"].map((key) => el("td", {}, number(one[key]))),
      ...objectives.map((other) => el("td", {}, number(cosine(one.title, other.title)))),
    ),
  );
  return [
    el("h2", {}, `${data.runs[run].name}, step ${step}, through several objectives`),
    el(
      "p",
      { className: "hint" },
      "First-order changes for a step of length 1 in weight space; the tokens are among the rollouts of this step.",
    ),
    el(
      "div",
      { className: "scroll figures" },
      el(
        "table",
        {},
        el("thead", {}, el("tr", {}, ...heads.map((head) => el("th", {}, head)))),
        el("tbody", {}, ...rows),
      ),
    ),
  ];
}
