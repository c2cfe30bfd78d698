/* The browser of answers: two conditions side by side, filtered by score and text. */
(() => {
  const PAGE = 20;
  const { element, labelled, choice, count } = pvec;

  const bound = (value, limits, name) => {
    const input = element("input");
    Object.assign(input, { type: "number", min: limits.least, max: limits.most, value });
    input.setAttribute("aria-label", name);
    return input;
  };

  /* Scores go from 0 to 100; projections go as far as they go. */
  const limitsOf = (scores) => {
    const known = scores.filter((score) => score !== null && score !== undefined);
    return known.reduce(({ least, most }, score) =>
      ({ least: Math.min(least, Math.floor(score)), most: Math.max(most, Math.ceil(score)) }),
    { least: 0, most: 100 });
  };

  const range = (form, metric, scores) => {
    const limits = limitsOf(scores);
    const low = bound(limits.least, limits, `${metric} at least`);
    const high = bound(limits.most, limits, `${metric} at most`);
    const box = element("span", "range");
    box.append(low, "to", high);
    labelled(form, `${metric} (right)`, box);
    return { low, high, ...limits };
  };

  const inRange = (score, { low, high, least, most }) => {
    const from = low.value === "" ? least : Number(low.value);
    const to = high.value === "" ? most : Number(high.value);
    if (score === null || score === undefined) return from <= least && to >= most;
    return score >= from && score <= to;
  };

  const side = (data, answer, condition, words) => {
    const box = element("div", "side");
    const head = element("p", "condition", data.conditions[condition]);
    box.append(head);
    if (!answer) {
      box.append(element("p", "note", "No answer of this number in this condition."));
      return box;
    }
    data.metrics.forEach((metric, index) => {
      if (!answer[4].length) return;
      const score = answer[4][index];
      const known = score !== null && score !== undefined;
      head.append(element("span", "chip", `${metric} ${known ? Math.round(score) : "missing"}`));
    });
    const text = answer[3];
    const long = text.length > 1500;
    const body = element("p", long ? "text long" : "text");
    if (long) {
      body.tabIndex = 0;
      body.setAttribute("role", "region");
      body.setAttribute("aria-label", "The whole answer");
    }
    box.append(pvec.marked(body, text || "(empty)", words));
    return box;
  };

  const start = (root) => {
    const data = JSON.parse(root.querySelector("script").textContent);
    const form = root.querySelector("form");
    const recalled = pvec.recall(root.id);
    const chosen = (name, otherwise) => {
      const number = Number(recalled.get(name) ?? otherwise);
      return Number.isInteger(number) && number >= 0 ? number : otherwise;
    };
    const left = choice(form, "Left", data.conditions, chosen("left", data.compare[0]));
    const right = choice(form, "Right", data.conditions, chosen("right", data.compare[1]));
    const ranges = data.metrics.map((metric, index) =>
      range(form, metric, data.answers.map((answer) => answer[4][index])));
    ranges.forEach(({ low, high }, index) => {
      low.value = recalled.get(`from${index}`) ?? low.value;
      high.value = recalled.get(`to${index}`) ?? high.value;
    });
    const several = data.answers.some((answer) => answer[2] > 0);
    const orders = [{ name: "by question" }];
    data.metrics.forEach((metric, index) => orders.push(
      { name: `${metric}, highest first`, index, sign: -1 },
      { name: `${metric}, lowest first`, index, sign: 1 },
      { name: `${metric}, right most above left`, index, sign: -1, between: true },
      { name: `${metric}, right most below left`, index, sign: 1, between: true }));
    const order = choice(form, "Order", orders.map(({ name }) => name), chosen("order", 0));
    const search = pvec.searchField(form, "Contains (either side)");
    search.value = recalled.get("contains") ?? "";
    pvec.copyLink(form, () => {
      const state = { left: left.value, right: right.value, order: order.value };
      if (search.value) state.contains = search.value;
      ranges.forEach(({ low, high, least, most }, index) => {
        if (Number(low.value) !== least) state[`from${index}`] = low.value;
        if (Number(high.value) !== most) state[`to${index}`] = high.value;
      });
      pvec.remember(root.id, state);
    });

    const byKey = new Map();
    const key = (condition, question, rollout) => `${condition}/${question}/${rollout}`;
    for (const answer of data.answers) byKey.set(key(answer[0], answer[1], answer[2]), answer);
    const other = (answer) => byKey.get(key(Number(left.value), answer[1], answer[2]));

    const show = (answer) => {
      const words = search.value.toLowerCase();
      const pair = element("article", "pair");
      const heading = pvec.marked(element("h4"), `${data.questions[answer[1]]} `, words);
      if (several) heading.append(element("small", "", `answer ${answer[2] + 1}`));
      const columns = element("div", "columns");
      if (left.value !== right.value) {
        columns.append(side(data, other(answer), Number(left.value), words));
      }
      columns.append(side(data, answer, Number(right.value), words));
      pair.append(heading, columns);
      return pair;
    };
    const again = pvec.pager(root.querySelector(".pairs"), root.querySelector(".more"), show, PAGE);

    const sorted = (answers) => {
      const { index, sign, between } = orders[Number(order.value)] ?? orders[0];
      if (sign === undefined) return answers.sort((a, b) => a[1] - b[1] || a[2] - b[2]);
      const missing = sign < 0 ? -Infinity : Infinity;
      const value = (answer) => {
        const own = answer[4][index] ?? null;
        if (!between) return own ?? missing;
        const opposite = other(answer)?.[4][index] ?? null;
        return own === null || opposite === null ? missing : own - opposite;
      };
      return answers.sort((a, b) => sign * (value(a) - value(b)) || a[1] - b[1] || a[2] - b[2]);
    };

    const lower = new Map();
    const contains = (answer, words) => {
      if (!answer) return false;
      if (!lower.has(answer)) {
        lower.set(answer, `${answer[3]}\n${data.questions[answer[1]]}`.toLowerCase());
      }
      return lower.get(answer).includes(words);
    };

    const refresh = () => {
      const words = search.value.toLowerCase();
      const condition = Number(right.value);
      const all = data.answers.filter((answer) => answer[0] === condition);
      const found = sorted(all.filter((answer) =>
        ranges.every((limits, index) => inRange(answer[4][index], limits)) &&
        (!words || contains(answer, words) || contains(other(answer), words))));
      const total = data.totals[condition];
      root.querySelector(".count").textContent =
        `${count(found.length)} of ${count(all.length)} answers of “${data.conditions[condition]}”`
        + (total > all.length ? ` in this page; the run has ${count(total)}` : "");
      again(found);
    };

    form.addEventListener("input", refresh);
    form.addEventListener("submit", (event) => event.preventDefault());
    refresh();
  };

  document.addEventListener("DOMContentLoaded", () =>
    document.querySelectorAll(".answers").forEach(start));
})();
