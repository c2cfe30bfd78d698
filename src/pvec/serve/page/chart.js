/* How far the answers point along one vector, over the turns of the conversation. */
import { number, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [320, 200];
const EDGE = { left: 44, right: 12, top: 10, bottom: 34 };

const ticks = (low, high) => {
  const size = 10 ** Math.floor(Math.log10((high - low) / 6));
  const step = [1, 2, 5, 10].map((n) => n * size).find((n) => (high - low) / n <= 6);
  const first = Math.ceil(low / step);
  return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, n) => (first + n) * step);
};

const mark = (side, x, y) => (side === "steered"
  ? svg("circle", { cx: x, cy: y, r: 4.5, class: "dot steered" })
  : svg("rect", { x: x - 4, y: y - 4, width: 8, height: 8, class: "dot plain" }));

/* `series`: a name and one value per turn (null where there is none) for each side; `references`:
   where the answers of the vector's extraction lie. */
export const chart = (title, series, references) => {
  const turns = Math.max(...series.map(({ values }) => values.length));
  const lines = references.filter(({ value }) => Number.isFinite(value));
  const all = [...series.flatMap(({ values }) => values), ...lines.map(({ value }) => value)]
    .filter(Number.isFinite);
  let [low, high] = [Math.min(...all), Math.max(...all)];
  const margin = (high - low) * 0.06 || 0.5;
  [low, high] = [low - margin, high + margin];
  const x = (turn) => EDGE.left + (turn + 0.5) / turns * (WIDTH - EDGE.left - EDGE.right);
  const y = (value) => HEIGHT - EDGE.bottom
    - (value - low) / (high - low) * (HEIGHT - EDGE.top - EDGE.bottom);
  const spoken = series.map(({ name, values }) => `${name} ${values.map(number).join(", ")}`);
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img",
    "aria-label": `${title} by turn: ${spoken.join("; ")}` });
  const across = (value) => `M${EDGE.left} ${y(value)}H${WIDTH - EDGE.right}`;
  ticks(low, high).forEach((tick) => picture.append(
    svg("path", { d: across(tick), class: "grid" }),
    svg("text", { x: EDGE.left - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick))));
  lines.forEach(({ name, value }) => picture.append(
    svg("path", { d: across(value), class: "reference" }),
    svg("text", { x: WIDTH - EDGE.right, y: y(value) - 4, "text-anchor": "end" }, name)));
  const every = Math.ceil(turns / 12);
  for (let turn = 0; turn < turns; turn += every) {
    picture.append(svg("text", { x: x(turn), y: HEIGHT - 18, "text-anchor": "middle" }, turn + 1));
  }
  picture.append(svg("text", { x: (EDGE.left + WIDTH - EDGE.right) / 2, y: HEIGHT - 3,
    "text-anchor": "middle" }, "turn"));
  series.forEach(({ side, name, values }) => {
    const points = values.map((value, turn) => ({ value, turn }))
      .filter(({ value }) => Number.isFinite(value));
    if (!points.length) return;
    picture.append(svg("path", { class: side,
      d: `M${points.map(({ value, turn }) => `${x(turn)} ${y(value)}`).join("L")}` }));
    points.forEach(({ value, turn }) => {
      const dot = mark(side, x(turn), y(value));
      dot.append(svg("title", {}, `turn ${turn + 1}, ${name}: ${number(value)}`));
      picture.append(dot);
    });
  });
  return picture;
};
