"use strict";
// Tables are sorted by the heading that is pressed, and copied as tab-separated text.

const valueOf = (row, place) => {
  const cell = row.cells[place];
  return "value" in cell.dataset ? Number(cell.dataset.value) : cell.textContent;
};

const compare = (a, b) => {
  if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
};

const sort = (heading) => {
  const table = heading.closest("table");
  const place = heading.cellIndex;
  const isDescending = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  rows.sort((one, other) => {
    const [a, b] = [valueOf(one, place), valueOf(other, place)];
    if (a === "" || b === "") return compare(a, b);
    return isDescending ? compare(b, a) : compare(a, b);
  });
  table.tBodies[0].append(...rows);
};

const asText = (table) =>
  [...table.rows].map((row) => [...row.cells].map((cell) => cell.dataset.value ?? cell.textContent.trim()).join("\t")).join("\n");

const copy = async (button) => {
  const table = document.getElementById(button.dataset.copies);
  const said = button.nextElementSibling;
  try {
    await navigator.clipboard.writeText(asText(table));
    said.textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(table);
    said.textContent = "Selected: press Ctrl+C to copy.";
  }
};

for (const button of document.querySelectorAll(".sort")) {
  button.addEventListener("click", () => sort(button.closest("th")));
}
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = false;
  button.addEventListener("click", () => copy(button));
}
