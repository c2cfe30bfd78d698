"use strict";
/* What the parts of a page share. Texts of data are untrusted: they reach the page through
   textContent and attributes only, never as markup. */
const pvec = (() => {
  const starters = {};
  const taken = new Map();
  const waiting = new Map();

  const element = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  const svg = (tag, attributes = {}, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };

  const button = (className, text, action) => {
    const node = element("button", className, text);
    node.type = "button";
    node.addEventListener("click", action);
    return node;
  };

  const labelled = (form, caption, control, className) => {
    const label = element("label", className, caption);
    if (/INPUT|SELECT/.test(control.tagName)) control.setAttribute("aria-label", caption);
    label.append(control);
    form.append(label);
    return control;
  };

  const choice = (form, caption, names, selected) => {
    const select = element("select");
    names.forEach((name, index) => {
      const option = element("option", "", name);
      option.value = String(index);
      option.selected = index === selected;
      select.append(option);
    });
    return labelled(form, caption, select, "wide");
  };

  const searchField = (form, caption) => {
    const input = labelled(form, caption, element("input"), "wide");
    input.type = "search";
    return input;
  };

  /* Text with every place of `words` marked. */
  const marked = (node, text, words) => {
    if (!words) {
      node.append(text);
      return node;
    }
    const lower = text.toLowerCase();
    let start = 0;
    for (let at = lower.indexOf(words); at >= 0; at = lower.indexOf(words, start)) {
      node.append(text.slice(start, at), element("mark", "", text.slice(at, at + words.length)));
      start = at + words.length;
    }
    node.append(text.slice(start));
    return node;
  };

  const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

  const half = (bits) => {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  };

  const number = (value, digits = 3) => {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (Number.isInteger(value)) return value.toLocaleString("en").replace("-", "−");
    const size = Math.abs(value);
    return (size >= 1000 ? Math.round(value).toLocaleString("en")
      : size >= 10 ? value.toFixed(1) : value.toPrecision(digits)).replace("-", "−");
  };

  const count = (value) => value.toLocaleString("en");

  /* The numbers of a column with the same decimals, as in tables: three digits of the largest. */
  const column = (values, { sign = false } = {}) => {
    const known = values.filter(Number.isFinite).map(Math.abs);
    const digits = known.every(Number.isInteger) ? 0
      : Math.max(1, 2 - Math.floor(Math.log10(Math.max(...known))));
    return values.map((value) => fixed(value, digits, sign));
  };

  const fixed = (value, digits, sign = false) => (!Number.isFinite(value) ? "–"
    : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits,
      signDisplay: sign ? "exceptZero" : "negative" }).replace("-", "−"));

  /* Round steps of an axis that covers [low, high], each with its text. */
  const ticks = (low, high, most = 6) => {
    const span = high - low || 1;
    const size = 10 ** Math.floor(Math.log10(span / most));
    const step = [1, 2, 5, 10].map((n) => n * size).find((n) => span / n <= most);
    const found = [];
    const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    for (let n = Math.ceil(low / step); n * step <= high + step * 1e-9; n += 1) {
      found.push([n * step, fixed(n * step, digits)]);
    }
    return found;
  };

  /* Shows `items` a page at a time: `show` returns a node, `again` starts over with others. */
  const pager = (list, more, show, page) => {
    let items = [];
    let shown = 0;
    const grow = () => {
      const next = items.slice(shown, shown + page);
      list.append(...next.map(show));
      shown += next.length;
      more.hidden = shown >= items.length;
    };
    more.addEventListener("click", () => {
      const first = list.childElementCount;
      grow();
      list.children[first]?.querySelector("[tabindex], button")?.focus();
    });
    return (others) => {
      items = others;
      shown = 0;
      list.replaceChildren();
      grow();
    };
  };

  const tip = (() => {
    const box = element("div", "tip");
    box.hidden = true;
    document.body.append(box);
    return {
      show: (text, x, y) => {
        box.textContent = text;
        box.hidden = false;
        const { width, height } = box.getBoundingClientRect();
        box.style.left = `${Math.max(4, Math.min(x - width / 2, innerWidth - width - 4))}px`;
        box.style.top = `${y - height - 10 < 4 ? y + 18 : y - height - 10}px`;
      },
      hide: () => { box.hidden = true; },
    };
  })();

  /* Parts of a widget's data: in the page, or a script file beside it that calls `take`. */
  const take = (id, part, data) => {
    taken.set(`${id}/${part}`, data);
    (waiting.get(`${id}/${part}`) || []).forEach((resolve) => resolve(data));
    waiting.delete(`${id}/${part}`);
  };

  const load = (root, data, part) => {
    const key = `${root.id}/${part}`;
    if (taken.has(key)) return Promise.resolve(taken.get(key));
    if (!data.beside) {
      take(root.id, part, JSON.parse(root.querySelectorAll("script.part")[part].textContent));
      return Promise.resolve(taken.get(key));
    }
    return new Promise((resolve, reject) => {
      if (waiting.has(key)) {
        waiting.get(key).push(resolve);
        return;
      }
      waiting.set(key, [resolve]);
      const script = element("script");
      script.src = `${data.beside}/${String(part).padStart(5, "0")}.js`;
      script.addEventListener("error", () => {
        waiting.delete(key);
        reject(new Error(`${script.src} is not there: keep the folder beside this page.`));
      });
      document.head.append(script);
    });
  };

  /* The state of one part of the page in its address, so that a filtered view has a link. */
  const remember = (id, state) => {
    const text = new URLSearchParams({ view: id, ...state }).toString();
    history.replaceState(null, "", `#${text}`);
  };
  const recall = (id) => {
    const state = new URLSearchParams(location.hash.slice(1));
    return state.get("view") === id ? state : new URLSearchParams();
  };

  const copyLink = (form, copy) => {
    const node = button("link", "Copy link to this view", () => {
      copy();
      const text = location.href;
      const done = (word) => { node.textContent = word; };
      if (navigator.clipboard) {
        navigator.clipboard.writeText(text).then(() => done("Link copied"),
          () => done("The link is in the address bar"));
      } else {
        done("The link is in the address bar");
      }
    });
    form.append(node);
  };

  const widgets = new Map();
  const begin = () => {
    document.querySelectorAll(".widget").forEach((root) => {
      const data = JSON.parse(root.querySelector("script.data").textContent);
      widgets.set(root.id, { root, data });
    });
    widgets.forEach((widget) => {
      widget.shown = starters[widget.root.dataset.kind](widget.root, widget.data);
    });
    const target = new URLSearchParams(location.hash.slice(1)).get("view");
    if (target) document.getElementById(target)?.scrollIntoView();
    document.querySelectorAll(".scroll").forEach(cue);
  };

  /* Tables that are wider than their box say so. */
  const cue = (box) => {
    const tell = () => {
      box.classList.toggle("wide", box.clientWidth < box.scrollWidth - 2);
      box.classList.toggle("more-right", box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
    };
    box.addEventListener("scroll", tell, { passive: true });
    new ResizeObserver(tell).observe(box);
  };

  return {
    starters, widgets, element, svg, button, labelled, choice, searchField, marked, bytes, half,
    number, fixed, column, count, ticks, pager, tip, take, load, remember, recall, copyLink, cue,
    begin,
  };
})();
document.addEventListener("DOMContentLoaded", pvec.begin);
