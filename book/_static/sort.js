// Long tables of the pages are sorted by a column when its head is pressed.
"use strict";

(() => {
  const LONG = 8; // rows

  const NUMBER = /^[+-]?\d[\d.]*(e[+-]?\d+)?(?=$|[\s%])/;

  // The number that a cell begins with, such as that before "±"; null where there is none.
  function numberOf(text) {
    const found = text.replaceAll("\u2212", "-").replaceAll(",", "").match(NUMBER);
    return found && Number(found[0]);
  }

  // What has no value comes last, in either direction.
  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null);
    return a < b ? -sign : a > b ? sign : 0;
  }

  // Rows of `body` by a column: by numbers if most of its cells have one, else by words.
  function sort(body, column, sign) {
    const rows = [...body.rows];
    const texts = rows.map((row) => row.cells[column].textContent.trim());
    const numbers = texts.map(numberOf);
    const numeric = 2 * numbers.filter((number) => number !== null).length > rows.length;
    const keys = numeric ? numbers : texts.map((text) => text.toLowerCase());
    const order = rows.map((row, i) => i).sort((i, j) => compare(keys[i], keys[j], sign));
    body.append(...order.map((i) => rows[i]));
  }

  function makeSortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      Object.assign(button, {type: "button", className: "sort"});
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        sort(table.tBodies[0], column, sign);
      });
    });
  }

  // What a page's own scripts make, they sort.
  for (const table of document.querySelectorAll("article table:not(.explorer *, .lab *)")) {
    const plain = table.tHead?.rows.length === 1 && table.tBodies.length === 1;
    if (plain && table.tBodies[0].rows.length >= LONG && !table.querySelector("[rowspan], [colspan]"))
      makeSortable(table);
  }
})();
