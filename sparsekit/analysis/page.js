"use strict";
const tip = document.getElementById("tip");

function point(event) {
  const mark = event.target.closest("[data-tip]");
  const text = mark && mark.getAttribute("data-tip");
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const box = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const below = event.clientY + 18;
  tip.style.left = Math.max(left, 8) + "px";
  tip.style.top = (below + box.height > innerHeight ? event.clientY - box.height - 12 : below) + "px";
}
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
document.addEventListener("scroll", () => { tip.hidden = true; }, true);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });

function sort(head) {
  const table = head.closest("table"), body = table.tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending" ||
    (head.getAttribute("aria-sort") === "none" && head.classList.contains("n"));  // numbers: the largest first
  for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...body.rows].map((row) => {
    const cell = row.cells[head.cellIndex];
    return [row, cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v)];
  });
  const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), undefined, {numeric: true});
  rows.sort(([, a], [, b]) => down ? compare(b, a) : compare(a, b));
  body.append(...rows.map(([row]) => row));
}
for (const head of document.querySelectorAll("th")) head.querySelector("button").addEventListener("click", () => sort(head));

for (const box of document.querySelectorAll("input[type=search]")) {
  const body = box.closest("label").nextElementSibling.querySelector("tbody");
  box.addEventListener("input", () => {
    const asked = box.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.cells[0].textContent.toLowerCase().includes(asked);
  });
}

for (const button of document.querySelectorAll(".legend button")) {
  const marks = button.closest("figure") ? button.closest("figure").querySelectorAll("[data-series]:not(button)") : [];
  const dim = (on) => { for (const mark of marks) mark.classList.toggle("dim", on && mark.dataset.series !== button.dataset.series); };
  for (const name of ["pointerenter", "focus"]) button.addEventListener(name, () => dim(true));
  for (const name of ["pointerleave", "blur"]) button.addEventListener(name, () => dim(false));
}
