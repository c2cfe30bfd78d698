/* Screened samples: how they are distributed, a threshold to move, and the samples to read. */
pvec.starters.screening = (root, data) => {
  const { element, svg, number, count } = pvec;
  const PAGE = 10;
  const POINTS = 4000;
  const names = data.columns.map((column) => column.name);
  const width = names.length;
  const table = (text) => {
    const values = new Float32Array(pvec.bytes(text).buffer);
    return names.map((_, c) => Float32Array.from({ length: values.length / width },
      (_unused, n) => values[n * width + c]));
  };
  const values = table(data.values);
  const clean = table(data.reference);
  const total = values[0].length;
  const sorted = (list) => list.filter((value) => !Number.isNaN(value)).sort();
  const ordered = { data: values.map(sorted), clean: clean.map(sorted) };
  const spread = ordered.data.map((list) => {
    const mean = list.reduce((sum, value) => sum + value, 0) / (list.length || 1);
    return Math.sqrt(list.reduce((sum, value) => sum + (value - mean) ** 2, 0)
      / (list.length || 1)) || 1;
  });
  const quantile = (list, q) => list[Math.min(list.length - 1, Math.floor(q * list.length))];
  const both = names.map((_, c) => sorted(Float32Array.from([...values[c], ...clean[c]])));
  const recalled = pvec.recall(root.id);
  const limits = data.columns.map(({ threshold }, c) => Number(recalled.get(`t${c}`)
    ?? threshold ?? quantile(ordered.data[c], 0.95)));
  /* Samples above a value: the place of the first greater one in the sorted list. */
  const above = (list, limit) => {
    let [low, high] = [0, list.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] > limit) high = middle;
      else low = middle + 1;
    }
    return list.length - low;
  };
  const goes = (n) => limits.some((limit, c) => values[c][n] > limit);

  const stage = root.querySelector(".stage");
  const form = element("form", "filters");
  const column = pvec.choice(form, "Difference along", names, Number(recalled.get("column")) || 0);
  const limit = pvec.labelled(form, "Threshold", element("input"), "");
  Object.assign(limit, { type: "number", step: "any" });
  const chart = element("div", "chart");
  const verdict = element("p", "verdict");
  verdict.setAttribute("role", "status");
  const cloud = element("div", "chart");
  const browse = element("form", "filters");
  const kinds = ["would be removed", "borderline", "would be kept", "all"];
  const kind = pvec.choice(browse, "Samples that", kinds, Number(recalled.get("kind")
    ?? (data.columns.some(({ threshold }) => threshold !== null) ? 0 : 3)));
  const order = pvec.choice(browse, "Order", ["furthest out first", "nearest to the threshold",
    "as in the file"], Number(recalled.get("order")) || 0);
  const search = pvec.searchField(browse, "Contains");
  search.value = recalled.get("contains") || "";
  pvec.copyLink(browse, () => pvec.remember(root.id, { column: column.value, kind: kind.value,
    order: order.value, ...(search.value && { contains: search.value }),
    ...Object.fromEntries(limits.map((value, c) => [`t${c}`, value])) }));
  const status = element("p", "count");
  status.setAttribute("role", "status");
  const list = element("div", "pairs");
  const more = element("button", "more", "Show more");
  more.type = "button";
  stage.append(form, chart, verdict, cloud);
  if (root.querySelector(".table")) stage.append(root.querySelector(".table"));
  if (data.samples.length) stage.append(element("h4", "", "Samples"), browse, status, list, more);

  let line = null;
  let tell = null;

  const drawChart = () => {
    const c = Number(column.value);
    const low = Math.min(quantile(both[c], 0.001), limits[c]);
    const high = Math.max(quantile(both[c], 0.999), limits[c]);
    const [wide, tall] = [Math.max(320, Math.min(chart.clientWidth || 720, 900)), 260];
    const edge = { left: 44, right: 12, top: 26, bottom: 42 };
    const x = (value) => edge.left + (value - low) / (high - low || 1)
      * (wide - edge.left - edge.right);
    const value = (at) => low + (at - edge.left) / (wide - edge.left - edge.right) * (high - low);
    const bins = 60;
    const heights = (all) => {
      const found = new Array(bins).fill(0);
      all.forEach((one) => {
        const bin = Math.floor((one - low) / (high - low || 1) * bins);
        found[Math.max(0, Math.min(bins - 1, bin))] += 1 / all.length;
      });
      return found;
    };
    const groups = [["data", ordered.data[c]], ["clean", ordered.clean[c]]]
      .filter(([, all]) => all.length).map(([name, all]) => [name, heights(all)]);
    const most = Math.max(...groups.flatMap(([, bars]) => bars));
    const y = (share) => tall - edge.bottom - share / most * (tall - edge.top - edge.bottom);
    const picture = svg("svg", { viewBox: `0 0 ${wide} ${tall}`, class: "drag",
      role: "group", "aria-label": `Differences along ${names[c]}` });
    pvec.ticks(low, high, Math.min(7, wide / 75)).forEach(([tick, text]) => picture.append(
      svg("path", { d: `M${x(tick)} ${tall - edge.bottom}v4`, class: "grid" }),
      svg("text", { x: x(tick), y: tall - 22, "text-anchor": "middle" }, text)));
    pvec.ticks(0, 100 * most, 3).forEach(([tick, text]) => picture.append(
      svg("path", { d: `M${edge.left} ${y(tick / 100)}H${wide - edge.right}`, class: "grid" }),
      svg("text", { x: edge.left - 6, y: y(tick / 100) + 4, "text-anchor": "end" }, `${text} %`)));
    picture.append(svg("text", { x: (edge.left + wide) / 2, y: tall - 5, "text-anchor": "middle" },
      "projection difference"));
    groups.forEach(([name, bars]) => {
      let path = `M${x(low)} ${y(0)}`;
      bars.forEach((share, bin) => {
        path += `V${y(share).toFixed(1)}H${x(low + (bin + 1) / bins * (high - low)).toFixed(1)}`;
      });
      const area = svg("path", { d: `${path}V${y(0)}z`, class: `area ${name}` });
      area.append(svg("title", {}, name === "data" ? "this data set" : "clean set"));
      picture.append(area);
    });
    groups.forEach(([name], i) => picture.append(
      svg("rect", { x: edge.left + 8 + i * 120, y: 4, width: 12, height: 12, class: `area ${name}` }),
      svg("text", { x: edge.left + 25 + i * 120, y: 14 },
        name === "data" ? "this data set" : "clean set")));
    const handle = svg("g", { class: "threshold", tabindex: 0, role: "slider",
      "aria-label": `Threshold along ${names[c]}`, "aria-orientation": "horizontal",
      "aria-valuemin": low, "aria-valuemax": high });
    handle.append(svg("path", { d: `M0 ${edge.top - 4}V${tall - edge.bottom}` }),
      svg("circle", { cy: edge.top - 4, r: 8 }));
    picture.append(handle);
    line = () => {
      const at = Math.max(low, Math.min(high, limits[c]));
      handle.setAttribute("transform", `translate(${x(at)} 0)`);
      handle.setAttribute("aria-valuenow", limits[c]);
      handle.setAttribute("aria-valuetext", verdict.textContent);
    };
    const move = (to) => {
      limits[c] = Math.max(low, Math.min(high, to));
      limit.value = Number(limits[c].toPrecision(4));
      tell();
    };
    const scaled = (event) => {
      const box = picture.getBoundingClientRect();
      return value((event.clientX - box.left) / box.width * wide);
    };
    picture.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      picture.setPointerCapture(event.pointerId);
      handle.focus();
      move(scaled(event));
    });
    picture.addEventListener("pointermove", (event) => {
      if (event.buttons && picture.hasPointerCapture(event.pointerId)) move(scaled(event));
    });
    picture.addEventListener("pointerup", refresh);
    handle.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10,
        PageDown: -10 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      move(limits[c] + step * (high - low) / 100);
    });
    handle.addEventListener("keyup", (event) => {
      if (event.key.startsWith("Arrow") || event.key.startsWith("Page")) refresh();
    });
    chart.replaceChildren(picture);
    limit.value = Number(limits[c].toPrecision(4));
    tell();
  };

  const share = (part, whole) => `${number(whole ? 100 * part / whole : 0, 2)} %`;
  tell = () => {
    const c = Number(column.value);
    const gone = above(ordered.data[c], limits[c]);
    let text = `At ${number(limits[c])}, ${count(gone)} of ${count(total)} samples would be removed `
      + `(${share(gone, total)})`;
    if (ordered.clean[c].length) {
      const lost = above(ordered.clean[c], limits[c]);
      text += `, and ${count(lost)} of ${count(ordered.clean[c].length)} of the clean set `
        + `(${share(lost, ordered.clean[c].length)})`;
    }
    text += ".";
    if (width > 1) {
      let any = 0;
      for (let n = 0; n < total; n += 1) any += goes(n);
      text += ` With the thresholds of all ${width} columns: ${count(any)} (${share(any, total)}).`;
    }
    verdict.textContent = text;
    line();
    if (width > 1) drawLimits();
  };

  let drawLimits = () => {};
  const drawCloud = () => {
    if (width < 2) return;
    const across = Number(column.value);
    const up = across === 0 ? 1 : 0;
    const vertical = cloud.dataset.up === undefined ? up : Number(cloud.dataset.up);
    const v = vertical === across ? up : vertical;
    const [wide, tall] = [Math.max(320, Math.min(cloud.clientWidth || 720, 620)), 380];
    const edge = { left: 66, right: 12, top: 12, bottom: 42 };
    const range = (c) => [quantile(both[c], 0), both[c][both[c].length - 1]];
    const [[left, right], [bottom, top]] = [range(across), range(v)];
    const x = (value) => edge.left + (value - left) / (right - left || 1)
      * (wide - edge.left - edge.right);
    const y = (value) => tall - edge.bottom - (value - bottom) / (top - bottom || 1)
      * (tall - edge.top - edge.bottom);
    const picture = svg("svg", { viewBox: `0 0 ${wide} ${tall}`, role: "img",
      style: `max-width: ${wide}px`, "aria-label": `Samples by their differences along ${names[across]} and ${names[v]}` });
    pvec.ticks(left, right, Math.min(6, wide / 75)).forEach(([tick, text]) => picture.append(
      svg("path", { d: `M${x(tick)} ${edge.top}V${tall - edge.bottom}`, class: "grid" }),
      svg("text", { x: x(tick), y: tall - 22, "text-anchor": "middle" }, text)));
    pvec.ticks(bottom, top, 6).forEach(([tick, text]) => picture.append(
      svg("path", { d: `M${edge.left} ${y(tick)}H${wide - edge.right}`, class: "grid" }),
      svg("text", { x: edge.left - 6, y: y(tick) + 4, "text-anchor": "end" }, text)));
    const points = [];
    [["clean", clean], ["data", values]].forEach(([name, group]) => {
      const stride = Math.max(1, Math.ceil(group[0].length / POINTS));
      let path = "";
      for (let n = 0; n < group[0].length; n += stride) {
        const [a, b] = [group[across][n], group[v][n]];
        if (!Number.isNaN(a) && !Number.isNaN(b)) {
          path += `M${x(a).toFixed(1)} ${y(b).toFixed(1)}h0`;
          if (name === "data") points.push([x(a), y(b), n]);
        }
      }
      picture.append(svg("path", { d: path, class: `points ${name}` }));
    });
    picture.append(svg("text", { x: (edge.left + wide) / 2, y: tall - 5, "text-anchor": "middle" },
      names[across]),
      svg("text", { transform: `translate(13 ${tall / 2}) rotate(-90)`, "text-anchor": "middle" },
        names[v]));
    const cuts = svg("path", { class: "cuts" });
    picture.append(cuts);
    drawLimits = () => cuts.setAttribute("d",
      `M${x(limits[across])} ${edge.top}V${tall - edge.bottom}`
      + `M${edge.left} ${y(limits[v])}H${wide - edge.right}`);
    drawLimits();
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      const [px, py] = [(event.clientX - box.left) / box.width * wide,
        (event.clientY - box.top) / box.height * tall];
      const near = points.reduce((best, [a, b, n]) => {
        const far = (a - px) ** 2 + (b - py) ** 2;
        return far < best.far ? { far, n } : best;
      }, { far: 100, n: -1 });
      if (near.n < 0) pvec.tip.hide();
      else {
        pvec.tip.show(names.map((name, c) => `${name} ${number(values[c][near.n])}`).join(" · "),
          event.clientX, event.clientY);
      }
    });
    picture.addEventListener("pointerleave", pvec.tip.hide);
    const shown = Math.ceil(total / Math.max(1, Math.ceil(total / POINTS)));
    const caption = element("p", "count", `A point per sample`
      + (shown < total ? ` (${count(shown)} of ${count(total)}, evenly chosen)` : "")
      + "; orange: this data set, blue: the clean set; the lines are the thresholds.");
    if (width > 2) {
      const label = element("label", "", "Vertical: ");
      const select = element("select");
      names.forEach((name, i) => {
        if (i === across) return;
        const option = element("option", "", name);
        option.value = String(i);
        option.selected = i === v;
        select.append(option);
      });
      select.addEventListener("input", () => {
        cloud.dataset.up = select.value;
        drawCloud();
      });
      label.append(select);
      cloud.replaceChildren(label, picture, caption);
    } else cloud.replaceChildren(picture, caption);
  };

  const side = (title, text, chips, words) => {
    const box = element("div", "side");
    const head = element("p", "condition", title);
    chips.forEach((chip) => head.append(element("span", "chip", chip)));
    const body = element("p", text.length > 1500 ? "text long" : "text");
    if (text.length > 1500) body.tabIndex = 0;
    box.append(head, pvec.marked(body, text || "(empty)", words));
    return box;
  };
  const show = (sample) => {
    const words = search.value.toLowerCase();
    const card = element("article", "pair");
    const head = element("h4", "", "");
    pvec.marked(head, `${sample.question} `, words);
    head.append(element("small", "", `line ${count(sample.line)}`));
    const chips = names.map((name, c) => `${name} ${number(values[c][sample.number])}`);
    const columns = element("div", "columns");
    columns.append(side("response in the data", sample.response, chips, words),
      sample.natural === null
        ? element("p", "note side", "No natural response was generated for this prompt.")
        : side("natural response", sample.natural, [], words));
    card.append(head, columns);
    return card;
  };
  const again = pvec.pager(list, more, show, PAGE);

  const refresh = () => {
    const c = Number(column.value);
    const words = search.value.toLowerCase();
    const difference = (sample) => values[c][sample.number];
    const near = (sample) => Math.abs(difference(sample) - limits[c]) / spread[c];
    const tests = [(s) => goes(s.number), (s) => near(s) <= 0.25, (s) => !goes(s.number), () => true];
    const chosen = data.samples.filter((sample) => tests[Number(kind.value)](sample)
      && (!words || [sample.question, sample.response, sample.natural || ""]
        .some((text) => text.toLowerCase().includes(words))));
    const keys = [(s) => -difference(s), near, (s) => s.number];
    const key = keys[Number(order.value)];
    chosen.sort((a, b) => (key(a) - key(b)) || a.number - b.number);
    status.textContent = `${count(chosen.length)} samples`
      + (data.samples.length < total ? `, of ${count(data.samples.length)} kept for reading `
        + `(of ${count(total)}: those furthest out, near the threshold, and an even spread)` : "")
      + (Number(kind.value) === 1 ? "; borderline: within a quarter of a standard deviation" : "");
    again(chosen);
  };

  column.addEventListener("input", () => {
    drawChart();
    drawCloud();
    refresh();
  });
  limit.addEventListener("input", () => {
    if (limit.value === "") return;
    limits[Number(column.value)] = Number(limit.value);
    tell();
    refresh();
  });
  browse.addEventListener("input", refresh);
  [form, browse].forEach((one) => one.addEventListener("submit", (event) => event.preventDefault()));
  drawChart();
  drawCloud();
  refresh();
  let size = stage.clientWidth;
  new ResizeObserver(() => {
    if (stage.clientWidth === size) return;
    size = stage.clientWidth;
    drawChart();
    drawCloud();
  }).observe(stage);
  return {};
};
