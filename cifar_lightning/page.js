"use strict";
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
