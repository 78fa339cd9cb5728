// Tables, the scatter plot and the comparison of two objectives. All data are in the page.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
const seen = { p: floats(data.logp).map(Math.exp), rank: floats(data.rank), entropy: floats(data.entropy) };
const all = data.objectives.map((one) => ({
  ...one,
  pull: floats(one.pull),
  entropy: floats(one.entropy),
  prob: floats(one.prob),
}));
const NAMES = { p: "probability", rank: "rank", entropy: "entropy, nats" };
const sizes = new Map();
for (const one of all) sizes.set(one.cluster, (sizes.get(one.cluster) || 0) + 1);

const sum = (values) => values.reduce((total, x) => total + x, 0);
const short = (x) => (x === 0 ? "0" : Math.abs(x) < 1e-3 || Math.abs(x) >= 1e4 ? x.toExponential(1) : x.toPrecision(3));
const visible = (text) => text.replaceAll("\n", "↵\n");

const label = (x) => String(Number(x.toPrecision(3)));
const rounded = (x) => x.toFixed(2).replace(/^-(0\.0+)$/, "$1");

function ticks(low, high) {
  // about five round numbers that reach from low to high
  const rough = (high - low) / 5;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * ([1, 2, 5].find((n) => n * unit >= 0.999 * rough) || 10);
  const [first, last] = [Math.floor(low / step), Math.ceil(0.999 * (high / step))];
  return Array.from({ length: last - first + 1 }, (_, n) => (first + n) * step);
}

function cell(row, text, kind = "td", name = "") {
  const made = document.createElement(kind);
  made.textContent = text;
  made.className = name;
  row.append(made);
  return made;
}

function shade(element, share) {
  // blue above 0 and orange below, as strong as `share` of the largest
  element.style.background = `rgba(var(--${share < 0 ? "cold" : "hot"}), ${Math.min(0.75, Math.abs(share) * 0.75).toFixed(3)})`;
}

function showObjectives() {
  const head = $("objectives").insertRow();
  for (const text of ["objective", "group", "loss", "norm", "tokens", "entropy", "p of the sampled"]) cell(head, text, "th");
  for (const one of all) {
    const row = $("objectives").insertRow();
    cell(row, one.title);
    const group = cell(row, sizes.get(one.cluster) > 1 ? `${one.cluster + 1}, of ${sizes.get(one.cluster)}` : "alone");
    if (sizes.get(one.cluster) > 1) {
      const dot = document.createElement("span");
      dot.className = "dot";
      dot.style.background = data.colours[one.cluster % data.colours.length];
      group.prepend(dot);
    }
    for (const value of [short(one.loss), short(one.norm), String(one.tokens)]) cell(row, value, "td", "number");
    for (const value of [sum(one.entropy), sum(one.prob)]) cell(row, (value > 0 ? "+" : "") + short(value), "td", "number");
  }
}

function showCosines() {
  const order = all.map((_, n) => n).sort((m, n) => all[m].cluster - all[n].cluster || m - n);
  const head = $("cosines").insertRow();
  cell(head, "", "th");
  for (const n of order) cell(head, all[n].title, "th", "turned");
  for (const m of order) {
    const row = $("cosines").insertRow();
    cell(row, all[m].title, "th");
    for (const n of order) {
      const value = data.cosines[m][n];
      const made = cell(row, value === null ? "none" : rounded(value), "td", "number");
      made.title = `${all[m].title} and ${all[n].title}: ${value}`;
      if (value !== null) shade(made, value);
      made.onclick = () => {
        $("a").value = m;
        $("b").value = n;
        compare();
        $("tokens").scrollIntoView({ block: "center" });
      };
    }
  }
}

function scatter() {
  const canvas = $("scatter");
  const one = all[$("one").value];
  const [x, y] = [seen[$("x").value], one[$("y").value]];
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, 340];
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const style = getComputedStyle(document.documentElement);
  const isLog = $("x").value === "rank";
  const at = isLog ? Math.log10 : (value) => value;
  const most = x.reduce((found, value) => Math.max(found, at(value)), 1e-9);
  const heights = ticks(Math.min(0, ...y), Math.max(1e-12, ...y));
  const [bottom, top] = [heights[0], heights.at(-1)];
  const places = isLog
    ? [...Array(Math.floor(most) + 1).keys()].map((n) => 10 ** n)
    : ticks(0, $("x").value === "p" ? 1 : most);
  const end = isLog ? most : places.at(-1);
  const [left, right, above, below] = [70, 36, 14, 36];
  const px = (value) => left + ((width - left - right) * at(value)) / end;
  const py = (value) => above + ((height - above - below) * (top - value)) / (top - bottom);
  pen.font = "12px system-ui, sans-serif";
  pen.fillStyle = style.getPropertyValue("--muted");
  pen.strokeStyle = style.getPropertyValue("--line");
  for (const tick of heights) {
    pen.beginPath();
    pen.moveTo(left, py(tick));
    pen.lineTo(width - right, py(tick));
    pen.stroke();
    pen.textAlign = "right";
    pen.fillText(label(tick), left - 6, py(tick) + 4);
  }
  pen.textAlign = "center";
  for (const tick of places) pen.fillText(label(tick), px(tick), height - below + 18);
  pen.fillText(NAMES[$("x").value], (left + width - right) / 2, height - 4);
  pen.fillStyle = `rgba(${style.getPropertyValue("--hot")}, .45)`;
  for (let n = 0; n < y.length; n++) {
    if (y[n] === 0) continue;
    pen.beginPath();
    pen.arc(px(x[n]), py(y[n]), 2.2, 0, 7);
    pen.fill();
  }
  const none = y.filter((value) => value === 0).length;
  $("scatter-note").textContent = `${y.length - none} tokens; ${none} more have none.`;
}

function mostApart(a, b) {
  // number of the rollout with the token where the pulls differ most
  let [found, largest] = [0, 0];
  data.sequences.forEach((one, number) => {
    const count = one.action.filter(Boolean).length;
    for (let n = one.first; n < one.first + count; n++) {
      const apart = Math.abs(a.pull[n] - b.pull[n]);
      if (apart > largest) [found, largest] = [number, apart];
    }
  });
  return found;
}

function compare() {
  const [a, b] = [all[$("a").value], all[$("b").value]];
  const cosine = data.cosines[$("a").value][$("b").value];
  $("cosine").textContent = `cosine ${cosine === null ? "none" : cosine.toFixed(6)}`;
  const apart = a.pull.map((value, n) => value - b.pull[n]);
  const top = apart.reduce((found, value) => Math.max(found, Math.abs(value)), 1e-12);
  const figures = (n) =>
    `p ${short(seen.p[n])}, rank ${seen.rank[n]}, entropy ${seen.entropy[n].toPrecision(3)}\n` +
    [a, b].map((one) => `${one.title}: pull ${short(one.pull[n])}, entropy ${short(one.entropy[n])}, p ${short(one.prob[n])}`).join("\n");
  const box = $("tokens");
  box.replaceChildren();
  const sequence = data.sequences[$("sequence").value];
  let n = sequence.first;
  sequence.tokens.forEach((text, place) => {
    const span = document.createElement("span");
    span.textContent = visible(text);
    span.className = sequence.action[place] ? "sampled" : "given";
    if (sequence.action[place]) {
      shade(span, apart[n] / top);
      span.title = figures(n);
      n += 1;
    }
    box.append(span);
  });
  const table = $("differences");
  table.replaceChildren();
  const head = table.insertRow();
  for (const text of ["token", "rollout", "p", "rank", "entropy", `pull of ${a.title}`, `pull of ${b.title}`, "difference"])
    cell(head, text, "th");
  const places = [];
  data.sequences.forEach((one, number) => {
    let at = one.first;
    one.tokens.forEach((text, place) => {
      if (one.action[place]) places.push([at++, text, number]);
    });
  });
  places.sort((m, k) => Math.abs(apart[k[0]]) - Math.abs(apart[m[0]]));
  for (const [at, text, number] of places.slice(0, 12)) {
    const row = table.insertRow();
    row.onclick = () => {
      $("sequence").value = number;
      compare();
    };
    cell(row, visible(text).replaceAll("\n", ""));
    const values = [String(number + 1), short(seen.p[at]), String(seen.rank[at]), seen.entropy[at].toPrecision(3)];
    for (const value of [...values, short(a.pull[at]), short(b.pull[at]), short(apart[at])]) cell(row, value, "td", "number");
  }
}

function fill(id, texts, chosen = 0) {
  texts.forEach((text, n) => $(id).append(new Option(text, n)));
  $(id).value = chosen;
}

const titles = all.map((one) => one.title);
fill("one", titles);
fill("a", titles);
fill("b", titles, Math.max(0, all.findIndex((one) => one.cluster !== all[0].cluster)));
fill(
  "sequence",
  data.sequences.map((one, n) => `${n + 1}, reward ${short(one.reward)}`),
  mostApart(all[$("a").value], all[$("b").value]),
);
for (const id of ["one", "x", "y"]) $(id).onchange = scatter;
for (const id of ["a", "b", "sequence"]) $(id).onchange = compare;
window.addEventListener("resize", scatter);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", scatter);
showObjectives();
showCosines();
scatter();
compare();
