// The table of arms: sorted by a column, filtered by a text; it chooses which arms are drawn, and opens one.
"use strict";

explorer.table = (() => {
  const {make, number, spread} = explorer;
  const {draw} = controls;

  // Colour and dash of an arm's line, as its name carries them.
  function swatch({colour, dash}) {
    const look = {x1: 0, x2: 26, y1: 6, y2: 6, stroke: colour, "stroke-width": 3, "stroke-dasharray": dash};
    return draw("svg", {width: 26, height: 12, "aria-hidden": true}, draw("line", look));
  }

  const machines = (arm) => [...new Set(arm.runs.map((run) => run.device))].join(", ") || "–";
  const finished = ({loss: [, , n], runs}) => (n === runs.length ? `${n}` : `${n} of ${runs.length}`);

  // title, by what a column is sorted, what it shows
  const COLUMNS = {
    label: ["Arm", (arm) => arm.label.toLowerCase()],
    loss: ["Final loss", (arm) => arm.loss[0], (arm) => spread(arm.loss)],
    n: ["Runs", (arm) => arm.loss[2], finished],
    gap: ["To backprop", (arm) => arm.gap[0], (arm) => spread(arm.gap, true)],
    tflops: ["TFLOPs", (arm) => arm.tflops, (arm) => number(arm.tflops, arm.tflops < 100 ? 1 : 0)],
    seconds: ["Seconds", (arm) => arm.seconds, (arm) => number(arm.seconds, 0)],
    machine: ["Machine", machines, machines],
  };

  // What is not there comes last, in either direction.
  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null);
    return a < b ? -sign : a > b ? sign : 0;
  }

  class Table {
    // toggled() is called when `drawn` has changed, picked(arm) when an arm is opened.
    constructor(toggled, picked) {
      Object.assign(this, {toggled, picked, sorted: "loss", sign: 1, drawn: new Set(), arms: []});
      this.filter = make("input", {type: "text", autocomplete: "off", spellcheck: "false"});
      this.filter.addEventListener("input", () => this.fill());
      this.listed = make("span", {class: "explorer-listed", role: "status"});
      this.all = make("input", {type: "checkbox", "aria-label": "Draw all arms that are listed"});
      this.all.addEventListener("change", () => {
        for (const arm of this.found()) this.drawn[this.all.checked ? "add" : "delete"](arm.name);
        this.fill();
        this.toggled();
      });
      this.heads = Object.entries(COLUMNS).map(([key, [title]]) => {
        const button = make("button", {type: "button"}, title);
        button.addEventListener("click", () => this.sortBy(key));
        return make("th", {scope: "col", "data-key": key}, button);
      });
      this.note = make("p", {class: "explorer-note"});
      this.body = make("tbody");
      const first = make("th", {scope: "col", class: "explorer-check"}, this.all);
      const head = make("thead", {}, make("tr", {}, first, ...this.heads));
      const table = make("table", {class: "explorer-table", "aria-label": "Arms"}, head, this.body);
      const box = {class: "explorer-scroll", tabindex: 0, role: "region", "aria-label": "Table of arms"};
      this.element = make(
        "div", {},
        make("div", {class: "explorer-filter"}, make("label", {}, "Filter arms ", this.filter), this.listed),
        make("div", box, table), this.note);
    }

    show(suite, drawn, opened) {
      const reference = suite.arms.find((arm) => arm.name === suite.reference);
      this.note.textContent =
        "Loss in nats per character, mean of the finished runs and 95 % interval" +
        (reference ? `; the difference to ${reference.label} is of runs with the same seed.` : ".") +
        " TFLOPs and seconds are those of a whole run without its evaluations; seconds also say how busy" +
        " the machine was.";
      this.arms = suite.arms;
      this.drawn = drawn;
      this.opened = opened;
      this.fill();
    }

    sortBy(key) {
      this.sign = this.sorted === key ? -this.sign : 1;
      this.sorted = key;
      this.fill();
    }

    found() {
      const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
      const text = (arm) => `${arm.label} ${arm.name} ${machines(arm)}`.toLowerCase();
      const [, by] = COLUMNS[this.sorted];
      return this.arms.filter((arm) => words.every((word) => text(arm).includes(word)))
        .sort((a, b) => compare(by(a), by(b), this.sign));
    }

    fill() {
      for (const head of this.heads) {
        const up = this.sign > 0 ? "ascending" : "descending";
        head.setAttribute("aria-sort", head.dataset.key === this.sorted ? up : "none");
      }
      const found = this.found();
      const drawn = found.filter((arm) => this.drawn.has(arm.name));
      this.all.checked = found.length > 0 && drawn.length === found.length;
      this.all.indeterminate = drawn.length > 0 && drawn.length < found.length;
      this.listed.textContent = `${found.length} of ${this.arms.length} arms listed`;
      this.body.replaceChildren(...found.map((arm) => this.row(arm)));
    }

    row(arm) {
      const check = make("input", {type: "checkbox", "aria-label": `Draw ${arm.label}`});
      check.checked = this.drawn.has(arm.name);
      check.disabled = arm.runs.length === 0;
      check.addEventListener("change", () => {
        this.drawn[check.checked ? "add" : "delete"](arm.name);
        this.toggled();
        const drawn = this.found().filter(({name}) => this.drawn.has(name)).length;
        this.all.checked = drawn === this.body.children.length;
        this.all.indeterminate = drawn > 0 && !this.all.checked;
      });
      const name = make("button", {type: "button", "aria-expanded": arm.name === this.opened}, swatch(arm));
      name.append(make("span", {}, arm.label));
      name.disabled = check.disabled;
      name.addEventListener("click", () => this.picked(arm));
      const cells = Object.values(COLUMNS).slice(1).map(([, , text]) => make("td", {}, text(arm)));
      const head = make("th", {scope: "row"}, name);
      return make("tr", {"data-arm": arm.name}, make("td", {class: "explorer-check"}, check), head, ...cells);
    }

    // Marks the row of the arm that is open, without making the rows anew: the focus stays where it is.
    open(name) {
      this.opened = name;
      for (const row of this.body.children) {
        row.querySelector("th button").setAttribute("aria-expanded", row.dataset.arm === name);
      }
    }
  }

  return {Table};
})();
