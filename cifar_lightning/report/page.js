"use strict";
// Mark boxes that overflow and make them scrollable by keyboard.
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
// Sort a table by the clicked column; rows without a number come last in both directions.
for (const button of document.querySelectorAll("table.sortable th button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement;
    const body = heading.closest("table").tBodies[0];
    const column = heading.cellIndex;
    const isText = button.dataset.sort === "text";
    // The first click sorts numbers descending and names ascending.
    const previous = heading.getAttribute("aria-sort");
    const ascending = previous === "ascending" ? false : previous === "descending" ? true : isText;
    const value = (row) => row.cells[column].dataset.value;
    const sign = ascending ? 1 : -1;
    const compare = (a, b) => {
      if (isText) return sign * value(a).localeCompare(value(b));
      const [x, y] = [Number.parseFloat(value(a)), Number.parseFloat(value(b))];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    };
    body.append(...[...body.rows].sort(compare));
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  });
}
