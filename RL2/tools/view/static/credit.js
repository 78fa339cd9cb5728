// Measured credit of a rollout (`rl2 credit`): its value along the answer, what each objective does, alternatives.

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const signed = (x) => (x > 0 ? "+" : "") + x.toFixed(2).replace("-", "−");
const withInterval = ([value, low, high]) => `${signed(value)} (${signed(low)} to ${signed(high)})`;
const alternativeTo = (tokens, k) => tokens.credit?.alternatives.find((one) => one.at === k);

/** Lines about token `k` for the tip. */
function creditLines(tokens, k) {
  if (!tokens.credit) return [];
  const other = alternativeTo(tokens, k);
  const lines = [["advantage", withInterval(tokens.credit.advantage[k])]];
  if (other) lines.push([`of ${visibleText(other.text)}`, withInterval(other.advantage)]);
  return lines.flatMap(([name, text]) => [el("dt", { className: "of" }, name), el("dd", { className: "range" }, text)]);
}

/** The value curve, the pulls and the alternatives below the tokens of a pane; nothing without credit. */
function creditParts(pane) {
  const { credit } = pane.tokens;
  if (!credit) return [];
  pane.other = el("div", { className: "other", role: "region", "aria-label": "Alternative" });
  const sizes = credit.advantage.map(([value, low, high]) => (low > 0 || high < 0 ? 10 : 0) + Math.abs(value));
  showAlternative(pane, sizes.indexOf(Math.max(...sizes)));
  return [
    el("h3", {}, "Value along the answer"),
    valueCurve(pane),
    el("h3", {}, "What it was worth, and what objectives do"),
    pullRows(pane),
    pane.other,
  ];
}

/** Mean reward of continuations from before each token, with its interval. */
function valueCurve(pane) {
  const { value, rewards, number: counts } = pane.tokens.credit;
  const [least, most] = rewards;
  const last = value.length - 1;
  const at = ([k, x]) => `${k},${(1 - (x - least) / (most - least)).toFixed(4)}`;
  const points = (which) => value.map((bounds, k) => [k, bounds[which]]);
  pane.mark = svg("line", { class: "mark", x1: -1, x2: -1, y1: 0, y2: 1 });
  const figure = svg(
    "svg",
    { viewBox: `0 0 ${last} 1`, preserveAspectRatio: "none", role: "img", "aria-label": "Value along the answer" },
    svg("polygon", { class: "band", points: [...points(1), ...points(2).reverse()].map(at).join(" ") }),
    svg("polyline", { class: "line", points: points(0).map(at).join(" ") }),
    pane.mark,
  );
  const total = counts.reduce((sum, n) => sum + n, 0);
  return el(
    "div",
    { className: "value" },
    el("span", {}, number(most)),
    figure,
    el("span", {}, number(least)),
    el(
      "p",
      { className: "hint" },
      `mean reward of ${whole(total)} continuations, with 95% intervals for all places at once`,
    ),
  );
}

/** A row of colours for the advantages and for each objective's pull, each relative to its largest. */
function pullRows(pane) {
  const { credit } = pane.tokens;
  const titles = Object.keys(credit.pulls);
  const rows = [["measured advantage", "advantage"], ...titles.map((title) => [title, `pull:${title}`])];
  return el(
    "div",
    { className: "pulls", role: "group", "aria-label": "Pulls" },
    ...rows.flatMap(([title, statistic]) => {
      const numbers = values(pane.tokens, statistic);
      const most = Math.max(...numbers.map(Math.abs)) || 1;
      const each = 100 / numbers.length;
      const stops = numbers.map((x, k) => `${tint(x / most)} ${k * each}% ${(k + 1) * each}%`);
      const choose = () => setStatistic(panes.indexOf(pane), statistic);
      return [
        el("button", { className: "quiet", onclick: choose, title: "Colour the tokens by this" }, title),
        el("i", { style: `background:linear-gradient(90deg, ${stops.join(", ")})` }),
      ];
    }),
  );
}

/** Show the rest of the answer from token `k` on, and beside it a continuation of the alternative to it. */
function showAlternative(pane, k) {
  if (!pane.other || k < 0) return;
  pane.mark?.setAttribute("x1", k + 0.5);
  pane.mark?.setAttribute("x2", k + 0.5);
  const { tokens } = pane;
  const other = alternativeTo(tokens, k);
  const rest = tokens.tokens.slice(pane.places[k] + 1).join("");
  const column = (title, first, text, facts) =>
    el(
      "div",
      {},
      el("p", { className: "who" }, title),
      el("pre", { className: "text" }, el("b", {}, first), text),
      el("p", { className: "hint" }, facts),
    );
  const own = column(
    `token ${whole(k + 1)}, as sampled`,
    tokens.tokens[pane.places[k]],
    rest,
    `advantage ${withInterval(tokens.credit.advantage[k])}; reward ${number(tokens.credit.reward)}`,
  );
  const example = other?.examples[0];
  const instead = other
    ? column(
        "the alternative, with a continuation",
        other.text,
        example?.text ?? "",
        `advantage ${withInterval(other.advantage)} from ${whole(other.number)} continuations` +
          (example ? `; reward of this one ${number(example.reward)}` : ""),
      )
    : el("div", {}, el("p", { className: "who" }, "the alternative was not sampled here"));
  pane.other.replaceChildren(own, instead);
}

/** How objectives and selection rules agree with the measured advantages, a table for each step. */
function drawCredits() {
  const measures = [
    ["rank", "rank of |pull|"],
    ["signed", "rank, signed"],
    ["share", "share on decisive tokens"],
    ["sign", "sign on these"],
  ];
  const cell = (found) =>
    found
      ? el("td", {}, `${number(found[0], 2)} `, el("small", {}, `${number(found[1], 2)} to ${number(found[2], 2)}`))
      : el("td", {}, "");
  $("credits").replaceChildren(
    ...data.credits.flatMap(({ run, step, agreement }) => {
      const rows = [...agreement].sort((a, b) => (b.rank?.[0] ?? -2) - (a.rank?.[0] ?? -2));
      const equal = rows.find((row) => row.random !== null)?.random;
      return [
        el("h2", {}, `Agreement with the measured credit: ${data.runs[run].name}, step ${step}`),
        el(
          "div",
          { className: "scroll" },
          el(
            "table",
            {},
            el(
              "thead",
              {},
              el("tr", {}, el("th", {}, "objective or rule"), ...measures.map(([, title]) => el("th", {}, title))),
            ),
            el(
              "tbody",
              {},
              ...rows.map((row) => el("tr", {}, el("th", {}, row.title), ...measures.map(([name]) => cell(row[name])))),
            ),
          ),
        ),
        el(
          "p",
          { className: "hint" },
          equal === undefined
            ? "95% intervals over problems"
            : `95% intervals over problems; equal pulls would have a share of ${number(equal, 2)} on decisive tokens`,
        ),
      ];
    }),
  );
}
