/* The controls of one vector: a slider, and behind a fold its layer, positions and operator. */
import { element, select } from "./dom.js";

export const POSITIONS = ["response", "prompt", "all"];
export const OPERATORS = ["add", "ablate", "cap"];

/* The coefficient that adds about one residual norm, in one digit; a ceiling is in such norms. */
const mostOf = (vector, operator, limit) => {
  if (limit !== null) return limit;
  if (operator === "cap" && vector.unit !== "raw") return 1;
  return vector.norm_ratio ? Number((1 / vector.norm_ratio).toPrecision(1)) : 4;
};

/* `set` is changed as the user does; `limit` is the server's largest coefficient, or null. */
export const vectorControls = (vector, set, limit) => {
  const box = element("fieldset");
  const slider = element("div", "slider");
  const [range, exact] = ["range", "number"].map((type) =>
    Object.assign(element("input"), { type, step: "any", required: true }));
  slider.append(range, exact);
  const fold = element("details");
  const summary = element("summary");
  const fields = element("div", "fields");
  fold.append(summary, fields);
  const layer = select("Layer", vector.layers, set.layer, fields);
  const positions = select("Positions", POSITIONS, set.positions, fields);
  const operator = select("Operator", OPERATORS, set.operator, fields);
  const show = () => {
    const caption = `${vector.name}: ${set.operator === "cap" ? "ceiling" : "coefficient"}`;
    const most = mostOf(vector, set.operator, limit);
    Object.assign(range, { min: -most, max: most, step: most / 40, value: set.coef });
    range.setAttribute("aria-label", caption);
    exact.setAttribute("aria-label", `${caption}, exact`);
    range.disabled = exact.disabled = set.operator === "ablate";
    summary.textContent = `layer ${set.layer}, ${set.positions}, ${set.operator}`;
  };
  range.addEventListener("input", () => {
    exact.value = Number(Number(range.value).toPrecision(3));
  });
  box.addEventListener("input", () => {
    Object.assign(set, { coef: Number(exact.value), layer: Number(layer.value),
      positions: positions.value, operator: operator.value });
    show();
  });
  exact.value = set.coef;
  show();
  box.append(element("legend", "", vector.name), slider, fold);
  return box;
};
