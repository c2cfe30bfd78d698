/* Answers token by token: colour, value under the pointer or the arrow keys, a strip over each. */
pvec.starters.tokens = (root, data) => {
  const { element, svg, count } = pvec;
  const say = (value, c) => pvec.fixed(value, data.columns[c].digits);
  const PAGE = 10;
  const stage = root.querySelector(".stage");
  const form = element("form", "filters");
  const recalled = pvec.recall(root.id);
  const stored = (name) => Number(recalled.get(name)) || 0;
  const total = data.line.length;
  const numbers = Array.from({ length: total }, (_, n) => n);
  const names = data.columns.map((column) => column.name);

  const column = pvec.choice(form, "Colour by", names, stored("column"));
  const orders = ["as in the file", "highest passage first", "lowest passage first",
    "highest mean first", "lowest mean first"];
  const order = pvec.choice(form, "Order", orders, recalled.has("order") ? stored("order") : 1);
  const inPage = !data.beside && data.part.every((part) => part >= 0);
  const search = pvec.searchField(form, inPage ? "Contains" : "Question contains");
  search.value = recalled.get("contains") || "";
  const line = pvec.labelled(form, "Line", element("input"), "");
  Object.assign(line, { type: "number", min: 1, value: recalled.get("line") || "" });
  const state = () => ({ column: column.value, order: order.value,
    ...(search.value && { contains: search.value }), ...(line.value && { line: line.value }) });
  pvec.copyLink(form, () => pvec.remember(root.id, state()));

  const legend = element("p", "token-legend");
  const top = element("details", "top-passages");
  const status = element("p", "count");
  status.setAttribute("role", "status");
  const list = element("div", "pairs");
  const more = element("button", "more", "Show more");
  more.type = "button";
  stage.append(form, legend, top, status, list, more);

  const place = (n) => `line ${count(data.line[n])}` + (data.turns ? `, turn ${data.turn[n]}` : "");

  const tint = (value, c) => {
    const { centre, reach } = data.columns[c];
    const part = Math.max(-1, Math.min(1, (value - centre) / reach));
    return `color-mix(in srgb, var(--${part < 0 ? "low" : "high"}) calc(${
      Math.abs(part).toFixed(2)} * var(--tint)), transparent)`;
  };

  const decode = (answer) => {
    if (answer.tokens) return answer.tokens;
    const widths = new Uint16Array(pvec.bytes(answer.widths).buffer);
    const bits = new Uint16Array(pvec.bytes(answer.values).buffer);
    let at = 0;
    answer.tokens = Array.from(widths, (width, t) => {
      const text = answer.text.slice(at, at + width);
      at += width;
      const values = data.columns.map(({ factor }, c) =>
        pvec.half(bits[t * data.columns.length + c]) * factor);
      return { text, values };
    });
    return answer.tokens;
  };

  const strip = (tokens, c, n) => {
    const { centre, reach, means } = data.columns[c];
    const high = 36;
    const width = tokens.length;
    const picture = svg("svg", { viewBox: `0 0 ${width} ${high}`, preserveAspectRatio: "none",
      class: "strip", role: "img", "aria-label": `Projection on ${names[c]} over ${width} tokens: `
        + `mean ${say(data.mean[c][n], c)}, highest passage ${say(data.high[c].value[n], c)}` });
    const paths = { low: "", high: "" };
    tokens.forEach(({ values }, t) => {
      const part = Math.max(-1.4, Math.min(1.4, (values[c] - centre) / reach)) / 1.4;
      paths[part < 0 ? "low" : "high"] += `M${t} ${high / 2}h1v${(-part * high / 2).toFixed(2)}h-1z`;
    });
    for (const [side, path] of Object.entries(paths)) {
      picture.append(svg("path", { d: path, fill: `var(--${side})` }));
    }
    picture.append(svg("path", { d: `M0 ${high / 2}h${width}`, stroke: "var(--muted)",
      "stroke-width": ".5", "vector-effect": "non-scaling-stroke" }));
    means.map(({ value }) => (value - centre) / reach / 1.4).filter((part) => Math.abs(part) < 1)
      .forEach((part) => picture.append(svg("path", { d: `M0 ${high / 2 * (1 - part)}h${width}`,
        class: "level", "vector-effect": "non-scaling-stroke" })));
    return picture;
  };

  const fill = (card, body, n, answer) => {
    const c = Number(column.value);
    const tokens = decode(answer);
    const words = search.value.toLowerCase();
    const question = element("p", "asked");
    pvec.marked(question, answer.question.length > 600 ? `…${answer.question.slice(-600)}`
      : answer.question, words);
    const text = element("div", "text tokens");
    Object.assign(text, { tabIndex: 0 });
    text.setAttribute("role", "group");
    text.setAttribute("aria-label",
      `Answer of ${place(n)}, ${tokens.length} tokens; arrow keys read their values`);
    const passage = data.high[c].start[n];
    tokens.forEach((token, t) => {
      const node = element("span", "", token.text);
      node.style.background = tint(token.values[c], c);
      node.dataset.t = t;
      if (t >= passage && t < passage + data.passage) node.classList.add("passage");
      if (data.think && t < data.think[n]) node.classList.add("think");
      text.append(node);
    });
    if (!tokens.length) text.append("(empty)");
    const readout = element("p", "readout");
    readout.setAttribute("role", "status");
    const describe = (t) => `${data.think && t < data.think[n] ? "reasoning, " : ""}`
      + `token ${t + 1} of ${tokens.length} `
      + `“${tokens[t].text.replace(/\s+/g, " ")}”: `
      + names.map((name, i) => `${name} ${say(tokens[t].values[i], i)}`).join(" · ");
    let current = -1;
    const point = (t) => {
      text.querySelector(".current")?.classList.remove("current");
      current = t;
      if (t < 0) return;
      text.children[t].classList.add("current");
      readout.textContent = describe(t);
    };
    const picture = strip(tokens, c, n);
    picture.addEventListener("pointermove", (event) => {
      const { left, width } = picture.getBoundingClientRect();
      const t = Math.floor((event.clientX - left) / width * tokens.length);
      if (!tokens[t]) return;
      point(t);
      pvec.tip.show(describe(t), event.clientX, event.clientY);
    });
    picture.addEventListener("pointerleave", pvec.tip.hide);
    picture.addEventListener("click", () =>
      text.children[current]?.scrollIntoView({ block: "nearest" }));
    text.addEventListener("pointerover", (event) => {
      if (event.target.dataset.t === undefined) return;
      point(Number(event.target.dataset.t));
      pvec.tip.show(describe(current), event.clientX, event.clientY);
    });
    text.addEventListener("pointerleave", pvec.tip.hide);
    text.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const jump = { Home: 0, End: tokens.length - 1 }[event.key];
      if ((step === undefined && jump === undefined) || !tokens.length) return;
      event.preventDefault();
      point(jump ?? Math.max(0, Math.min(tokens.length - 1, current + step)));
      text.children[current].scrollIntoView({ block: "nearest" });
    });
    body.replaceChildren(question, picture, text, readout);
  };

  const show = (n) => {
    const c = Number(column.value);
    const card = element("article", "pair");
    const head = element("h4", "", `${place(n)} `);
    const chip = (name, value) => head.append(element("span", "chip", `${name} ${say(value, c)}`));
    chip("mean", data.mean[c][n]);
    if (data.think && data.think[n]) chip("mean of its reasoning", data.thinkMean[c][n]);
    chip("highest passage", data.high[c].value[n]);
    chip("lowest passage", data.low[c].value[n]);
    const body = element("div", "");
    if (data.part[n] < 0) {
      pvec.marked(body, data.question[n], search.value.toLowerCase());
      body.append(element("p", "note", "The tokens of this answer are not in this page: write it "
        + "with pvec report --beside to open every answer."));
    } else {
      body.append(element("p", "note", "Loading …"));
      pvec.load(root, data, data.part[n]).then((part) => fill(card, body, n, part[n]),
        (error) => body.replaceChildren(element("p", "note", error.message)));
    }
    card.append(head, body);
    return card;
  };
  const again = pvec.pager(list, more, show, PAGE);

  const keys = [
    () => 0,
    (n, c) => -(data.high[c].value[n] ?? -Infinity),
    (n, c) => data.low[c].value[n] ?? Infinity,
    (n, c) => -(data.mean[c][n] ?? -Infinity),
    (n, c) => data.mean[c][n] ?? Infinity,
  ];

  const texts = () => {
    const found = [];
    const parts = [...root.querySelectorAll("script.part")];
    parts.forEach((script, part) => pvec.load(root, data, part).then((answers) =>
      Object.entries(answers).forEach(([n, answer]) => {
        found[n] = `${answer.question}\n${answer.text}`.toLowerCase();
      })));
    return found;
  };
  let lower = null;

  const listTop = () => {
    const c = Number(column.value);
    top.replaceChildren(element("summary", "", `Top passages along ${names[c]}`));
    for (const [end, title] of [["high", "Highest"], ["low", "Lowest"]]) {
      const ordered = element("ol", "passages");
      data.top[c][end].forEach(({ answer, value, text }) => {
        const item = element("li");
        item.append(element("span", "chip", say(value, c)), pvec.button("passage-link", text, () => {
          line.value = data.line[answer];
          refresh();
          list.querySelector("h4").scrollIntoView();
        }), element("small", "", place(answer)));
        ordered.append(item);
      });
      top.append(element("h4", "", title), ordered);
    }
    const { centre, reach, means } = data.columns[c];
    legend.replaceChildren(element("span", "", say(centre - reach, c)), element("span", "scale"),
      element("span", "", say(centre + reach, c)),
      element("span", "", `projection on ${names[c]}; middle: ${say(centre, c)}, the median`
        + means.map(({ label, value }) => `; mean of the extraction's ${label} answers: `
          + say(value, c)).join("")));
  };

  const refresh = () => {
    const c = Number(column.value);
    const words = search.value.toLowerCase();
    if (words && inPage && !lower) lower = texts();
    const matches = (n) => !words || (inPage ? lower[n] || "" : data.question[n].toLowerCase())
      .includes(words);
    const chosen = numbers.filter((n) =>
      matches(n) && (!line.value || data.line[n] === Number(line.value)));
    const key = keys[Number(order.value)];
    if (line.value) chosen.sort((a, b) => data.turn[a] - data.turn[b]);
    else chosen.sort((a, b) => key(a, c) - key(b, c) || a - b);
    status.textContent = `${count(chosen.length)} of ${count(total)} answers`;
    pvec.tip.hide();
    listTop();
    again(chosen);
  };

  form.addEventListener("input", async () => {
    refresh();
    if (lower) {
      await Promise.resolve();
      refresh();
    }
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  refresh();
  return {
    /* Reads one conversation, from its first turn. */
    open: (chosen, c) => {
      line.value = chosen;
      column.value = String(c);
      refresh();
      root.scrollIntoView();
      list.querySelector(".tokens")?.focus({ preventScroll: true });
    },
  };
};
