/* What the page's parts share. Texts of the server, of the model and of a link are untrusted: they
   reach the page through textContent and attributes only, never as markup. */
export const $ = (id) => document.getElementById(id);

export const element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

export const svg = (tag, attributes = {}, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
};

export const select = (caption, values, chosen, form) => {
  const label = element("label", "", caption);
  const node = element("select");
  node.append(...values.map((value) => Object.assign(element("option", "", value), { value })));
  node.value = chosen;
  label.append(node);
  form.append(label);
  return node;
};

/* Three digits and a true minus sign. */
export const number = (value) => (!Number.isFinite(value) ? "–"
  : String(Number(value.toPrecision(3))).replace("-", "−"));

/* Returns a function that runs `action` once it has not been called for `delay` milliseconds. */
export const later = (action, delay) => {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, delay);
  };
};

export const tip = (text, x, y) => {
  const box = $("tip");
  box.textContent = text;
  box.hidden = !text;
  if (!text) return;
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(4, Math.min(x - width / 2, innerWidth - width - 4))}px`;
  box.style.top = `${y - height - 10 < 4 ? y + 18 : y - height - 10}px`;
};
