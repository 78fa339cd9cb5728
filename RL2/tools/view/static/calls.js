// Tool calls in responses, in the formats of RL2/data/call_formats.py; they are only marked here, not read.

const CALLS = new RegExp(
  [
    "<tool_call>[\\s\\S]*?(?:</tool_call>|$)",
    "<function=[\\s\\S]*?(?:</function>|$)",
    "\\[TOOL_CALLS\\][\\s\\S]*?(?=\\[TOOL_CALLS\\]|$)",
    "<\\|python_tag\\|>[\\s\\S]*",
    '^\\s*\\{\\s*"name"\\s*:[\\s\\S]*',
    "<\uff5ctool\u2581call\u2581begin\uff5c>[\\s\\S]*?(?:<\uff5ctool\u2581call\u2581end\uff5c>|$)",
    "to=functions\\.[\\s\\S]*?(?:<\\|call\\|>|$)",
  ].join("|"),
  "g",
);

/** [start, end] of each tool call in a response. */
const callsIn = (text) => [...text.matchAll(CALLS)].map((found) => [found.index, found.index + found[0].length]);

/** A response as nodes, with its calls marked. */
function withCalls(text) {
  const nodes = [];
  let at = 0;
  for (const [start, end] of callsIn(text)) {
    nodes.push(text.slice(at, start), el("mark", { className: "call", title: "tool call" }, text.slice(start, end)));
    at = end;
  }
  return [...nodes, text.slice(at)];
}

/** Whether each token of a rollout belongs to a call, and whether it was observed: given behind a sampled token. */
function kinds(tokens) {
  const found = tokens.tokens.map(() => ({ call: false, observed: false }));
  for (let from = 0, to = 0, begun = false; from < found.length; from = to) {
    while (to < found.length && tokens.sampled[to] === tokens.sampled[from]) to++;
    if (tokens.sampled[from] === "0") {
      for (let t = from; t < to; t++) found[t].observed = begun;
      continue;
    }
    begun = true;
    const texts = tokens.tokens.slice(from, to);
    const calls = callsIn(texts.join(""));
    let [at, n] = [0, 0];
    texts.forEach((text, k) => {
      while (n < calls.length && calls[n][1] <= at) n++;
      found[from + k].call = n < calls.length && calls[n][0] < at + text.length;
      at += text.length;
    });
  }
  return found;
}
