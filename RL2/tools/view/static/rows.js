// The first rows that each run trains on, with what trains marked.

/** One row: what trains is highlighted, all else is what the model is given. */
function dataRow({ name, pieces }) {
  const parts = pieces.map(([text, trains]) => el("span", { className: trains ? "trains" : "given" }, text));
  return el("article", {}, el("p", { className: "who" }, name), el("pre", { className: "text" }, ...parts));
}

function drawData() {
  const runs = data.runs.filter((run) => run.rows.length);
  $("data").replaceChildren(
    runs.length
      ? el("p", { className: "hint" }, "Highlighted: what trains. A loss is taken at these tokens and at no others.")
      : el("p", { className: "empty" }, "No rows: the environment generates the tasks, or nothing has been read yet."),
    ...runs.flatMap((run) => [el("h2", {}, run.name), ...run.rows.map(dataRow)]),
  );
}
