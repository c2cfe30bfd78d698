/* An answer token by token: its colours, and the values under the pointer and the arrow keys. */
import { $, element, number, tip } from "./dom.js";

const tokenOf = new WeakMap(); // span -> {text, projections}
let scale = { centre: 0, reach: 1 };

export const valuesOf = (answer) => answer.tokens
  .map(({ projections }) => projections[$("shown").value]).filter(Number.isFinite);

const paint = (span) => {
  const value = tokenOf.get(span).projections[$("shown").value];
  const part = Math.max(-1, Math.min(1, (value - scale.centre) / scale.reach));
  span.style.background = !Number.isFinite(value) ? "" : `color-mix(in srgb, var(--${
    part < 0 ? "low" : "high"}) calc(${Math.abs(part).toFixed(2)} * var(--tint)), transparent)`;
};

/* Colours reach from the median to the 90th percentile, as in the report's pages. */
export const rescale = (answers) => {
  const quantile = (values, part) =>
    values.sort((a, b) => a - b)[Math.floor(part * (values.length - 1))];
  const all = answers.flatMap(valuesOf);
  const centre = quantile(all, 0.5) ?? 0;
  const reach = quantile(all.map((value) => Math.abs(value - centre)), 0.9) || 1;
  scale = { centre, reach };
  $("low").textContent = number(centre - reach);
  $("high").textContent = number(centre + reach);
  document.querySelectorAll(".tokens > span").forEach(paint);
};

const describe = ({ text, projections }) => {
  const values = Object.entries(projections).map(([name, value]) => `${name} ${number(value)}`);
  return `“${text.replace(/\s+/g, " ")}”: ${values.join(" · ") || "no value"}`;
};

const summarize = (answer) => Object.entries(answer.vectors)
  .map(([name, { mean, percentile }]) => `${name} ${number(mean)}` + (percentile
    ? ` · above ${number(percentile.negative)} % of negative, ${
      number(percentile.positive)} % of positive answers` : "")).join("\n");

/* Returns the element of an answer, and `append`, which adds tokens to it. */
export const answerView = (answer, title, condition) => {
  const node = element("div", "side");
  const text = Object.assign(element("div", "tokens"), { tabIndex: 0 });
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", `${title} answer; arrow keys read the tokens' values`);
  const readout = element("p", "readout", summarize(answer));
  readout.setAttribute("role", "status");
  let current = -1;
  const point = (index) => {
    text.children[current]?.classList.remove("current");
    current = index;
    const span = text.children[index];
    span?.classList.add("current");
    return span ? describe(tokenOf.get(span)) : "";
  };
  text.addEventListener("pointerover", ({ target, clientX, clientY }) => {
    if (tokenOf.has(target)) tip(point([...text.children].indexOf(target)), clientX, clientY);
  });
  text.addEventListener("pointerleave", () => tip(point(-1)));
  text.addEventListener("blur", () => {
    point(-1);
    readout.textContent = summarize(answer);
  });
  text.addEventListener("keydown", (event) => {
    const last = text.childElementCount - 1;
    const next = { ArrowRight: Math.min(last, current + 1), ArrowLeft: Math.max(0, current - 1),
      Home: 0, End: last }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    readout.textContent = point(next);
    text.children[next].scrollIntoView({ block: "nearest" });
  });
  const append = (tokens) => text.append(...tokens.map((token) => {
    const span = element("span", "", token.text);
    tokenOf.set(span, token);
    paint(span);
    return span;
  }));
  append(answer.tokens);
  node.append(element("p", "condition", condition), text, readout);
  return { node, append };
};
