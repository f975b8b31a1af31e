// What the interactives of the chapters share beside controls.js, and how one takes the place of its figure.
//
// A figure of class `touch-NAME` is what stands there on paper and without scripts (book/_ext/touch.py).
"use strict";

globalThis.touch = (() => {
  const {make, draw, select, button, buttons} = controls;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;

  const number = (value, digits = 2) =>
    Number.isFinite(value) ? value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−") : "–";

  const slider = (label, values, value, changed, show) =>
    controls.slider(label, values, value, changed, show, "input");

  // The sentence that says what is seen now. While something runs it changes too fast to be read out.
  class Said {
    constructor() { this.element = make("p", {class: "touch-said", role: "status"}); }
    say(text, running = false) {
      this.element.setAttribute("aria-live", running ? "off" : "polite");
      this.element.textContent = text;
    }
  }

  // A table of heads and rows, of which the first cell names its row; a cell is a text or an element.
  function table(label, heads, rows) {
    const row = ([first, ...cells]) =>
      make("tr", {}, make("th", {scope: "row"}, first), ...cells.map((cell) => make("td", {}, cell)));
    const head = make("tr", {}, ...heads.map((text) => make("th", {scope: "col"}, text)));
    return make("table", {class: "touch-table", "aria-label": label},
                make("thead", {}, head), make("tbody", {}, ...rows.map(row)));
  }

  // The i-th of the things that are compared: a circle, a square or a diamond. Nothing hangs on colour alone.
  function mark(i, x = 0, y = 0, size = 5) {
    const d = [
      `M${-size} 0A${size} ${size} 0 1 1 ${size} 0A${size} ${size} 0 1 1 ${-size} 0Z`,
      `M${-size} ${-size}H${size}V${size}H${-size}Z`,
      `M0 ${-1.35 * size}L${1.35 * size} 0L0 ${1.35 * size}L${-1.35 * size} 0Z`,
    ][i];
    return draw("path", {d, transform: `translate(${x} ${y})`, class: `touch-mark touch-${i}`});
  }
  const named = (i, text) => make(
    "span", {class: "touch-name"},
    draw("svg", {width: 16, height: 16, viewBox: "-8 -8 16 16", "aria-hidden": "true"}, mark(i)), text);

  // build(element) fills what takes the place of the figure; it may return what draws it for another width.
  function place(name, build) {
    addEventListener("DOMContentLoaded", () => {
      for (const figure of document.querySelectorAll(`figure.touch-${name}`)) {
        const live = make("div", {class: "touch"});
        figure.querySelector("figcaption").before(live);
        figure.classList.add("touch-on");
        const drawn = build(live);
        let width = live.clientWidth;
        new ResizeObserver(() => {
          if (drawn && live.clientWidth !== width) drawn();
          width = live.clientWidth;
        }).observe(live);
      }
    });
  }

  return {still, make, draw, number, slider, select, button, buttons, Said, table, mark, named, place};
})();
