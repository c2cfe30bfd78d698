/* A chat with a steered model: the conversation, the requests, and the state that a link keeps. */
import { chart } from "./chart.js";
import { OPERATORS, POSITIONS, vectorControls } from "./controls.js";
import { $, element, later, number } from "./dom.js";
import { pack, unpack } from "./link.js";
import { events, request, useKey } from "./server.js";
import { answerView, rescale, valuesOf } from "./tokens.js";

const SIDES = { steered: "steered", plain: "unsteered" };
const SETTINGS = ["preset", "system", "seed", "temperature", "max_tokens", "compare", "auto", "shown"];
const LINK_LIMIT = 60_000; // characters; longer addresses are cut by some browsers
const RETRY = 2000; // milliseconds

let server = null; // what GET /pvec/vectors answers
const steering = {}; // vector's name -> {coef, layer, positions, operator}
let turns = []; // {question, steered?: answer, plain?: answer}
let busy = null; // the AbortController of the answers that are being given
let pending = false; // the steering has changed meanwhile
const views = new Map(); // turn -> {node, steered?, plain?}

const problem = (text) => {
  $("problem").textContent = text;
  $("problem").hidden = !text;
};

/* ── what is asked of the server ───────────────────────────────────────────────────────────── */

const vectorOf = (name) => server.vectors.find((vector) => vector.name === name);
const entryOf = ([vector, { coef, ...set }]) => ({ vector, ...set,
  ...(set.operator !== "ablate" && { coef }),
  ...(set.operator === "cap" && vectorOf(vector).unit !== "raw" && { unit: "norm" }) });
const entries = () => (server.fixed ? server.defaults : Object.entries(steering)
  .filter(([, { operator, coef }]) => operator !== "add" || coef !== 0).map(entryOf));
const sidesNow = () => {
  if (!entries().length && !$("preset").value) return ["plain"];
  return $("compare").checked && !server.fixed ? ["steered", "plain"] : ["steered"];
};
const steerRequest = (side) => {
  if (server.fixed) return {};
  if (side === "plain") return { steer: [] };
  return { steer: entries(), ...($("preset").value && { preset: $("preset").value }) };
};
const generation = () => ({ seed: Number($("seed").value),
  temperature: Number($("temperature").value), max_tokens: Number($("max_tokens").value) });
/* What an answer depends on beside the turns before it. */
const keyNow = (side) => JSON.stringify([$("system").value, generation(), steerRequest(side)]);

const messagesFor = (turn) => {
  const messages = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  for (const { question, steered, plain } of turns.slice(0, turns.indexOf(turn))) {
    messages.push({ role: "user", content: question },
      { role: "assistant", content: (steered || plain).text });
  }
  return [...messages, { role: "user", content: turn.question }];
};

const answer = async (turn, side, signal) => {
  const given = { text: "", tokens: [], vectors: {}, steer: side === "steered" ? entries() : [],
    key: keyNow(side), done: false };
  turn[side] = given;
  draw(turn);
  const response = await request("v1/chat/completions", { model: server.model, stream: true,
    messages: messagesFor(turn), ...generation(), pvec: { ...steerRequest(side), tokens: true } },
  signal);
  for await (const event of events(response)) {
    const text = event.choices?.[0]?.delta?.content || "";
    const last = event.pvec?.vectors; // what was applied and measured
    const tokens = (!last && event.pvec?.tokens) || (text ? [{ text, projections: {} }] : []);
    given.text += text;
    given.tokens.push(...tokens);
    follow(turn, () => views.get(turn)[side].append(tokens));
    rescaleSoon();
    if (!last) continue;
    const asked = given.steer;
    given.steer = event.pvec.steer.map((entry) => asked.find(({ vector, layer, operator }) =>
      operator === "cap" && entry.operator === "cap" // said in raw units, asked in residual norms
      && vector === entry.vector && layer === entry.layer) ?? entry);
    for (const [name, { answer: mean, percentile }] of Object.entries(last)) {
      given.vectors[name] = { mean, percentile };
    }
  }
  given.done = true;
};

/* Answers a turn on some sides. What has arrived when it is stopped, or the server goes, stays. */
const respond = async (turn, sides) => {
  const before = { ...turn };
  const isNew = !turn.steered?.text && !turn.plain?.text;
  const control = new AbortController();
  busy = control;
  problem("");
  buttons();
  $("status").textContent = "answering …";
  let failure = null;
  await Promise.all(sides.map((side) => answer(turn, side, control.signal).catch((error) => {
    if (error.name !== "AbortError") failure ??= error;
    control.abort(); // the other side too
  })));
  busy = null;
  if (failure) problem(failure.message);
  $("key-form").hidden = failure?.status !== 401;
  if (!pending && (failure?.status || !sides.some((side) => turn[side]?.text || turn[side]?.done))) {
    for (const side of Object.keys(SIDES)) delete turn[side];
    Object.assign(turn, before);
    if (isNew) {
      turns.pop();
      $("message").value ||= turn.question;
    }
  }
  const counts = sides.map((side) => turn[side]?.tokens.length || 0).join(" and ");
  $("status").textContent = failure ? "" : control.signal.aborted ? "stopped" : `${counts} tokens`;
  follow(turn, drawAll);
  remember();
  const more = pending;
  pending = false;
  if (more) again(true);
};

/* Answers the last turn again; after a change of the steering only what it changes. */
const again = (changed) => {
  const turn = turns.at(-1);
  if (!turn || !$("controls").reportValidity()) return;
  const sides = sidesNow();
  const extra = Object.keys(SIDES).filter((side) => turn[side] && !sides.includes(side));
  const redone = sides.filter((side) => !changed || turn[side]?.key !== keyNow(side)
    || !(turn[side].done || busy));
  pending = Boolean(busy) && redone.length + extra.length > 0;
  if (pending) busy.abort(); // and then again
  if (busy) return;
  extra.forEach((side) => delete turn[side]);
  if (redone.length) {
    respond(turn, redone);
  } else if (extra.length) {
    drawAll();
    remember();
  }
};

const send = () => {
  const question = $("message").value.trim();
  if (busy || !server || !question || !$("controls").reportValidity()) return;
  const turn = { question };
  turns.push(turn);
  $("message").value = "";
  respond(turn, sidesNow());
  views.get(turn).node.scrollIntoView({ block: "end" });
};

/* ── what is shown ─────────────────────────────────────────────────────────────────────────── */

const drawControls = () => {
  for (const { name, layer } of server.vectors) {
    const { coef = 0, ...set } = server.defaults.find(({ vector }) => vector === name) || {};
    steering[name] = { coef, layer: set.layer ?? layer, positions: set.positions ?? "response",
      operator: set.operator ?? "add" };
  }
  $("preset").replaceChildren(...["", ...server.presets].map((name) =>
    Object.assign(element("option", "", name || "none"), { value: name })));
  $("presets").hidden = server.fixed || !server.presets.length;
  $("compare").parentElement.hidden = server.fixed;
  $("shown").replaceChildren(...server.vectors.map(({ name }) => element("option", "", name)));
  const notes = server.policies.map(({ vector, ceiling, alarm }) => `${vector} is capped at `
    + `${number(ceiling)}${Number.isFinite(alarm) ? ` when it passes ${number(alarm)}` : ""}.`);
  if (server.fixed) notes.unshift("The steering is fixed by the server.");
  $("policies").textContent = notes.join(" ");
};

const drawVectors = () => $("vectors").replaceChildren(...(server.fixed ? [] : server.vectors
  .map((vector) => vectorControls(vector, steering[vector.name], server.max_coef))));

const buttons = () => {
  $("send").hidden = Boolean(busy);
  $("stop").hidden = !busy;
  $("send").disabled = !server;
  $("again").disabled = $("reset").disabled = !turns.length || Boolean(busy);
  $("empty").hidden = turns.length > 0;
};

const conditionOf = (side, { steer, done }) => [SIDES[side], ...steer.map(
  ({ vector, coef, layer, operator }) => `${vector} ${operator}${
    operator === "ablate" ? "" : ` ${number(coef)}`} at layer ${layer}`)].join(", ")
  + (done || busy ? "" : " (stopped)");

const draw = (turn) => {
  const view = { node: element("article", "turn") };
  const columns = element("div", "columns");
  for (const side of Object.keys(SIDES).filter((each) => turn[each])) {
    view[side] = answerView(turn[side], SIDES[side], conditionOf(side, turn[side]));
    view[side].node.dataset.side = side;
    columns.append(view[side].node);
  }
  view.node.append(element("h3", "", turn.question), columns);
  if (views.has(turn)) views.get(turn).node.replaceWith(view.node);
  else $("turns").append(view.node);
  views.set(turn, view);
};

/* Keeps the end of a growing turn in view, unless the reader has scrolled away from it. */
const follow = (turn, grow) => {
  const inView = views.get(turn)?.node.getBoundingClientRect().bottom < innerHeight;
  grow();
  if (inView) views.get(turn)?.node.scrollIntoView({ block: "nearest" });
};

const drawAll = () => {
  $("turns").replaceChildren();
  views.clear();
  turns.forEach(draw);
  drawPersona();
  buttons();
};

const rescaleAll = () => rescale(turns.flatMap(({ steered, plain }) => [steered, plain])
  .filter(Boolean));
const rescaleSoon = later(rescaleAll, 200);

const drawPersona = () => {
  rescaleAll();
  const name = $("shown").value;
  const vector = vectorOf(name);
  const mean = (values) => (values.length ? values.reduce((a, b) => a + b) / values.length : null);
  const valueOf = (given) => given && (given.vectors[name]?.mean ?? mean(valuesOf(given)));
  const series = Object.entries(SIDES)
    .map(([side, title]) => ({ side, name: title, values: turns.map((turn) => valueOf(turn[side])) }))
    .filter(({ values }) => values.some(Number.isFinite));
  $("persona").hidden = !series.length;
  if (!series.length) return;
  const unit = vector.unit === "raw" ? "raw units" : "residual norms";
  $("middle").textContent = `${unit}, steering included; middle: median of the tokens`;
  const references = ["negative", "positive"]
    .map((end) => ({ name: `${end} answers`, value: vector[end] }));
  $("chart").replaceChildren(chart(`Projection on ${name}`, series, references),
    ...series.map(({ side, name: title }) => element("span", `key ${side}`, title)));
};

/* ── the state in the address ──────────────────────────────────────────────────────────────── */

const property = (id) => ($(id).type === "checkbox" ? "checked" : "value");

/* `short` leaves out the values of single tokens. */
const stateNow = (short) => ({
  model: server.model, steering, settings: SETTINGS.map((id) => $(id)[property(id)]),
  turns: turns.map(({ question, ...given }) => ({ question, ...Object.fromEntries(
    Object.entries(given).map(([side, { tokens, ...rest }]) => [side, { ...rest, tokens: short
      ? [{ text: rest.text, projections: {} }] : tokens }])) })),
});

const remember = later(async () => {
  let text = await pack(stateNow(false));
  const long = text.length > LINK_LIMIT;
  if (long) text = await pack(stateNow(true));
  history.replaceState(null, "", `#${text}`);
  $("link-note").textContent = long
    ? "The conversation is long: its link leaves out the values of single tokens." : "";
}, 300);

const readAnswer = ({ text, tokens, vectors, steer, key, done }) => ({
  text: String(text), key: String(key), done: done === true, vectors: { ...vectors }, steer: [...steer],
  tokens: tokens.map((token) => ({ text: String(token.text), projections: { ...token.projections } })),
});

/* Takes over what a link says, as far as this server can do it; returns what it cannot. */
const restore = (state) => {
  const missing = [];
  if (state.model !== server.model) missing.push(`the model ${state.model}`);
  for (const [name, { coef, layer, positions, operator }] of Object.entries(state.steering)) {
    const vector = vectorOf(name);
    if (vector && Number.isFinite(coef) && vector.layers.includes(layer)
        && POSITIONS.includes(positions) && OPERATORS.includes(operator)) {
      steering[name] = { coef, layer, positions, operator };
    } else if (coef) {
      missing.push(`${name} at layer ${layer}`);
    }
  }
  SETTINGS.forEach((id, index) => { $(id)[property(id)] = state.settings[index]; });
  for (const id of ["preset", "shown"]) if ($(id).selectedIndex < 0) $(id).selectedIndex = 0;
  turns = state.turns.map(({ question, ...given }) => ({ question: String(question),
    ...Object.fromEntries(Object.keys(SIDES).filter((side) => given[side])
      .map((side) => [side, readAnswer(given[side])])) }));
  return missing;
};

const start = async () => {
  try {
    server = await (await request("pvec/vectors")).json();
  } catch (error) {
    problem(error.message);
    $("key-form").hidden = error.status !== 401;
    if (error.status !== 401) setTimeout(start, RETRY);
    return;
  }
  problem("");
  $("key-form").hidden = true;
  $("model").textContent = server.model;
  drawControls();
  try {
    const missing = location.hash.length > 1 ? restore(await unpack(location.hash.slice(1))) : [];
    if (missing.length) problem(`The link asks for ${missing.join(" and ")}, which this server does not have.`);
    drawAll();
  } catch {
    turns = [];
    problem("The link in the address could not be read.");
    drawAll();
  }
  drawVectors();
};

/* ── what the user does ────────────────────────────────────────────────────────────────────── */

const steeringChanged = later(() => {
  remember();
  if ($("auto").checked && turns.length) again(true);
}, 250);

for (const id of ["vectors", "presets"]) $(id).addEventListener("change", steeringChanged);
$("compare").addEventListener("change", steeringChanged);
$("controls").addEventListener("change", () => server && remember());
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("shown").addEventListener("change", () => {
  drawPersona();
  remember();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
$("message").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
addEventListener("keydown", (event) => { if (event.key === "Escape") busy?.abort(); });
addEventListener("hashchange", () => location.reload());
$("stop").addEventListener("click", () => busy?.abort());
$("again").addEventListener("click", () => again(false));
$("reset").addEventListener("click", () => {
  turns = [];
  problem("");
  drawAll();
  remember();
  $("message").focus();
});
$("link").addEventListener("click", () => {
  const done = (word) => { $("status").textContent = word; };
  if (!navigator.clipboard) done("the link is in the address bar");
  else navigator.clipboard.writeText(location.href).then(() => done("link copied"),
    () => done("the link is in the address bar"));
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey($("key").value);
  $("key").value = "";
  $("key-form").hidden = true;
  problem("");
  if (!server) start();
});
start();
