/* Drift over the turns of conversations: a line each, mean and interval, the turns that moved. */
pvec.starters.turns = (root, { source }) => {
  const { element, svg, count } = pvec;
  const DRAWN = 300;
  const LISTED = 12;
  const { data } = pvec.widgets.get(source);
  const say = (value, c) => pvec.fixed(value, data.columns[c].digits);
  const stage = root.querySelector(".stage");
  const form = element("form", "filters");
  const column = pvec.choice(form, "Projection on", data.columns.map(({ name }) => name), 0);
  const picture = element("div", "chart");
  const list = element("div", "");
  stage.append(form, picture, list);

  const conversations = new Map();
  data.line.forEach((line, n) => {
    if (!conversations.has(line)) conversations.set(line, []);
    conversations.get(line).push(n);
  });
  const lines = [...conversations.entries()];
  const stride = Math.max(1, Math.ceil(lines.length / DRAWN));
  const open = (line) =>
    pvec.widgets.get(source).shown.open(line, Number(column.value));

  const draw = () => {
    const c = Number(column.value);
    const mean = data.turns[c];
    const [wide, high] = [Math.max(320, Math.min(picture.clientWidth || 720, 900)), 300];
    const edge = { left: 52, right: 12, top: 12, bottom: 40 };
    const { means } = data.columns[c];
    const values = data.mean[c].filter((value) => value !== null)
      .concat(means.map(({ value }) => value));
    const low = Math.min(...values);
    const most = Math.max(...values);
    const last = Math.max(2, mean.length);
    const x = (turn) => edge.left + (turn - 1) / (last - 1) * (wide - edge.left - edge.right);
    const y = (value) => high - edge.bottom
      - (value - low) / (most - low || 1) * (high - edge.top - edge.bottom);
    const chart = svg("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img",
      "aria-label": `Projection on ${data.columns[c].name} by turn: mean `
        + mean.map((point, t) => `turn ${t + 1} ${say(point.mean, c)}`).join(", ") });
    pvec.ticks(low, most, 5).forEach(([tick, text]) => {
      chart.append(svg("path", { d: `M${edge.left} ${y(tick)}H${wide - edge.right}`, class: "grid" }),
        svg("text", { x: edge.left - 8, y: y(tick) + 4, "text-anchor": "end" }, text));
    });
    means.forEach(({ label, value }) => {
      const level = svg("path", { d: `M${edge.left} ${y(value)}H${wide - edge.right}`, class: "level" });
      level.append(svg("title", {}, `mean of the extraction's ${label} answers: ${say(value, c)}`));
      chart.append(level, svg("text", { x: wide - edge.right, y: y(value) + (y(value) < 30 ? 14 : -4),
        "text-anchor": "end" }, `${label} answers`));
    });
    pvec.ticks(1, last, Math.min(last, 12)).filter(([turn]) => Number.isInteger(turn)).forEach(([turn]) => {
      chart.append(svg("text", { x: x(turn), y: high - 20, "text-anchor": "middle" }, turn));
    });
    chart.append(svg("text", { x: (edge.left + wide) / 2, y: high - 4, "text-anchor": "middle" },
      "turn"));
    lines.filter((_, i) => i % stride === 0).forEach(([line, turns]) => {
      const points = turns.filter((n) => data.mean[c][n] !== null)
        .map((n) => `${x(data.turn[n]).toFixed(1)} ${y(data.mean[c][n]).toFixed(1)}`);
      const path = svg("path", { d: `M${points.join("L")}`, class: "thread" });
      path.append(svg("title", {}, `line ${line}: ${turns.length} turns`));
      path.addEventListener("click", () => open(line));
      chart.append(path);
    });
    const known = mean.map((point, t) => ({ ...point, turn: t + 1 }))
      .filter((point) => point.mean !== null);
    const band = known.filter((point) => point.low !== null);
    if (band.length) {
      const up = band.map((p) => `${x(p.turn)} ${y(p.high)}`);
      const down = band.map((p) => `${x(p.turn)} ${y(p.low)}`).reverse();
      chart.append(svg("path", { d: `M${[...up, ...down].join("L")}z`, class: "band" }));
    }
    chart.append(svg("path", { d: `M${known.map((p) => `${x(p.turn)} ${y(p.mean)}`).join("L")}`,
      class: "mean" }));
    known.forEach((point) => {
      const dot = svg("circle", { cx: x(point.turn), cy: y(point.mean), r: 4.5, class: "dot" });
      dot.append(svg("title", {}, `turn ${point.turn}: mean ${say(point.mean, c)}`
        + (point.low === null ? "" : ` (95 %: ${say(point.low, c)} to ${say(point.high, c)})`)
        + `, ${count(point.n)} conversations`));
      chart.append(dot);
    });
    picture.replaceChildren(chart, element("p", "count", `${count(lines.length)} conversations`
      + (stride > 1 ? `; every ${stride}th is drawn, the mean is of all` : "")));
    listMoves(c);
  };

  const listMoves = (c) => {
    const moves = [];
    lines.forEach(([line, turns]) => turns.slice(1).forEach((n, i) => {
      const change = data.mean[c][n] - data.mean[c][turns[i]];
      if (data.mean[c][n] !== null && data.mean[c][turns[i]] !== null) moves.push({ line, n, change });
    }));
    moves.sort((a, b) => Math.abs(b.change) - Math.abs(a.change));
    const box = element("div", "scroll");
    Object.assign(box, { tabIndex: 0 });
    box.setAttribute("role", "region");
    box.setAttribute("aria-label", "Turns that moved most");
    const table = element("table");
    const head = element("tr");
    ["conversation", "turn", "change", "projection", "question"].forEach((name, i) => {
      const cell = element("th", i > 0 && i < 4 ? "number" : "", name);
      cell.scope = "col";
      head.append(cell);
    });
    const top = element("thead");
    top.append(head);
    const body = element("tbody");
    const listed = moves.slice(0, LISTED);
    const changes = pvec.column(listed.map(({ change }) => change), { sign: true });
    const reached = pvec.column(listed.map(({ n }) => data.mean[c][n]));
    listed.forEach(({ line, n }, i) => {
      const row = element("tr");
      const first = element("td");
      first.append(pvec.button("text-button", `line ${line}`, () => open(line)));
      row.append(first, element("td", "number", data.turn[n]),
        element("td", "number", changes[i]), element("td", "number", reached[i]), element("td", "wide", data.question[n]));
      body.append(row);
    });
    table.append(top, body);
    box.append(table);
    pvec.cue(box);
    list.replaceChildren(element("h4", "", "Turns that moved most from the turn before"), box);
  };

  form.addEventListener("input", draw);
  form.addEventListener("submit", (event) => event.preventDefault());
  draw();
  let size = stage.clientWidth;
  new ResizeObserver(() => {
    if (stage.clientWidth === size) return;
    size = stage.clientWidth;
    draw();
  }).observe(stage);
  return {};
};
