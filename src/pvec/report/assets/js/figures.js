/* Figures whose series can be toggled by their keys. */
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
})();
