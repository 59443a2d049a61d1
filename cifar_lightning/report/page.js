"use strict";
// Says which boxes are wider than what is seen of them, and lets keys move those.
const boxes = document.querySelectorAll(".scroll");
const measure = () => {
  for (const box of boxes) {
    const overflows = box.scrollWidth > box.clientWidth + 1;
    box.classList.toggle("overflowing", overflows);
    if (overflows) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
};
addEventListener("load", measure);
addEventListener("resize", measure);
// Enlarges a chart whose letters are small, and back.
for (const button of document.querySelectorAll(".enlarge button")) {
  button.addEventListener("click", () => {
    const enlarged = button.closest("p").nextElementSibling.classList.toggle("enlarged");
    button.setAttribute("aria-pressed", enlarged);
    button.textContent = enlarged ? "Fit to the page" : "Enlarge";
    measure();
  });
}
// Sorts a table by the column whose heading is clicked; what has no number comes last both ways.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const body = heading.closest("table").tBodies[0];
    const column = heading.cellIndex;
    const isText = button.dataset.sort === "text";
    // Numbers fall at first, names rise.
    const before = heading.getAttribute("aria-sort");
    const rising = before === "ascending" ? false : before === "descending" ? true : isText;
    const value = (row) => row.cells[column].dataset.value;
    const sign = rising ? 1 : -1;
    const compare = (a, b) => {
      if (isText) return sign * value(a).localeCompare(value(b));
      const [x, y] = [Number.parseFloat(value(a)), Number.parseFloat(value(b))];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    };
    body.append(...[...body.rows].sort(compare));
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
  });
}
