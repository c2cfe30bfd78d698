"use strict";
/* Figures whose series can be toggled by their keys, and tables that say when they go on. */
(() => {
  const toggle = (figure, key) => {
    const off = key.getAttribute("aria-pressed") === "true";
    figure.querySelectorAll(`[data-series="${key.dataset.series}"]`).forEach((node) => {
      node.classList.toggle("off", off);
      if (node.matches(".key[role]")) node.setAttribute("aria-pressed", String(!off));
    });
  };

  document.querySelectorAll("figure").forEach((figure) => {
    figure.querySelectorAll(".key").forEach((key) => {
      key.addEventListener("click", () => toggle(figure, figure.querySelector(
        `.key[role][data-series="${key.dataset.series}"]`)));
      if (!key.textContent.trim()) return; // the sample beside a name
      key.setAttribute("role", "button");
      key.setAttribute("tabindex", "0");
      key.setAttribute("aria-pressed", "true");
      key.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        toggle(figure, key);
      });
    });
  });

  document.querySelectorAll(".scroll").forEach((box) => {
    const show = () =>
      box.classList.toggle("more", box.scrollLeft + box.clientWidth < box.scrollWidth - 4);
    box.addEventListener("scroll", show, { passive: true });
    new ResizeObserver(show).observe(box);
  });
})();
