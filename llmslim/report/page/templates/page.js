"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const press = (buttons, pressed) =>
  buttons.forEach((one) => one.setAttribute("aria-pressed", String(one === pressed)));

// Light or dark: the system's choice until the button is pressed.
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
for (const button of all("[data-theme-toggle]")) {
  const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  name();
}

// What the map shows.
const heats = all("[data-heat]");
for (const button of heats) {
  button.addEventListener("click", () => {
    all(".heat").forEach((map) => { map.dataset.shows = button.dataset.heat; });
    press(heats, button);
  });
}

// Folded rows, or every module.
const parts = all("[data-rows]");
for (const button of parts) {
  button.addEventListener("click", () => {
    all("[data-part]").forEach((part) => { part.hidden = part.dataset.part !== button.dataset.rows; });
    press(parts, button);
  });
}

// The first rows of a long table, until all are asked for.
const shown = 12;
for (const button of all("[data-more]")) {
  const table = button.previousElementSibling;
  const count = () => all("tbody:not([hidden]) tr", table).length;
  const show = () => {
    const short = table.classList.contains("short");
    button.hidden = count() <= shown;
    button.textContent = short ? `Show all ${count()} rows` : `Show the first ${shown} rows`;
  };
  table.classList.add("short");
  button.addEventListener("click", () => { table.classList.toggle("short"); show(); });
  parts.forEach((one) => one.addEventListener("click", show));
  show();
}

// Sort by a column; once more for the other direction. Numbers begin with the largest.
const names = new Intl.Collator("en", { numeric: true });
for (const table of all("table.sortable")) {
  const heads = all("thead th", table);
  heads.forEach((head, column) => {
    head.addEventListener("click", () => {
      const numbers = head.classList.contains("number");
      const up = head.ariaSort ? head.ariaSort === "descending" : !numbers;
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const order = (a, b) =>
        (numbers ? value(a) - value(b) : names.compare(value(a), value(b))) * (up ? 1 : -1);
      for (const body of table.tBodies) body.append(...[...body.rows].sort(order));
    });
  });
}

// Copy a text, where the browser lets a page do so.
for (const button of all("[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent.trim());
    button.textContent = "Copied";
  });
}
