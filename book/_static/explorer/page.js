// The page: what is chosen, the figure of losses, and how figure, table and the open arm hang together.
"use strict";

explorer.page = (() => {
  const {make} = explorer;
  const {AXES, LOSSES, lines} = explorer.runs;
  const {Figure} = explorer.figure;
  const UNITS = {tokens: "characters", tflops: "× 10¹² FLOPs", seconds: "s"};

  // A group of radio buttons; names are unique on the page.
  let groups = 0;
  function radios(legend, entries, value, changed) {
    groups += 1;
    const fields = Object.entries(entries).map(([key, text]) => {
      const input = make("input", {type: "radio", name: `explorer-${groups}`, value: key});
      input.checked = key === value;
      input.addEventListener("change", () => changed(key));
      return make("label", {}, input, make("span", {}, text));
    });
    return make("fieldset", {class: "explorer-radios"}, make("legend", {}, legend), ...fields);
  }

  class Explorer {
    constructor(holder, suites, asked) {
      Object.assign(this, {suites, asked, axis: "steps", loss: "val_loss", log: false});
      this.figure = new Figure(380, ({arm}) => this.open(arm));
      this.detail = new explorer.detail.Detail();
      this.table = new explorer.table.Table(() => this.draw(), (arm) => this.open(arm, true));
      const log = make("input", {type: "checkbox"});
      log.addEventListener("change", () => this.set({log: log.checked}));
      const titles = Object.fromEntries(Object.entries(AXES).map(([name, [title]]) => [name, title]));
      const form = make(
        "form", {class: "explorer-form", "aria-label": "What the figure shows"}, ...this.choice(),
        radios("Loss", LOSSES, this.loss, (loss) => this.set({loss})),
        radios("Against", titles, this.axis, (axis) => this.set({axis})),
        make("label", {class: "explorer-log"}, log, " Logarithmic"));
      form.addEventListener("submit", (event) => event.preventDefault());
      const hint = make(
        "p", {class: "explorer-note"},
        "Thick: mean of the seeds. Thin: each seed. Dotted: n-gram floors. Drag across the figure to look " +
          "closer, double-click to go back; a click on a line opens its arm, as its name in the table does.");
      holder.replaceChildren(form, this.figure.element, hint, this.table.element, this.detail.element);
      this.choose(suites[0]);
      new MutationObserver(() => this.themed()).observe(
        document.documentElement, {attributes: true, attributeFilter: ["data-theme"]});
    }

    choice() {
      if (this.suites.length < 2) return [];
      const options = this.suites.map(
        ({name, preset}, i) => make("option", {value: i}, `${name} (preset ${preset})`));
      const field = make("select", {}, ...options);
      field.addEventListener("change", () => this.choose(this.suites[field.value]));
      return [make("label", {class: "explorer-choice"}, "Suite ", field)];
    }

    choose(suite) {
      this.suite = suite;
      const recorded = suite.arms.filter((arm) => arm.runs.length).map((arm) => arm.name);
      const asked = recorded.filter((name) => this.asked.includes(name));
      this.table.show(suite, new Set(asked.length ? asked : recorded), null);
      this.detail.close();
      this.draw();
    }

    set(changed) {
      Object.assign(this, changed);
      this.draw();
    }

    themed() {
      this.figure.draw();
      this.detail.draw();
    }

    open(arm, again = false) {
      const closes = again && this.table.opened === arm.name;
      this.table.open(closes ? null : arm.name);
      if (closes)
        this.detail.close();
      else
        this.detail.open(this.suite, arm);
    }

    draw() {
      const {suite, axis, loss, log} = this;
      const arms = suite.arms.filter(({name}) => this.table.drawn.has(name));
      const found = arms.flatMap((arm) => lines(suite, arm, {axis, loss, log}));
      const shown = found.map((line) => ({
        ...line,
        of: line.arm.name,
        colour: line.arm.colour,
        dash: line.arm.dash,
        bold: line.run === null || line.arm.runs.length === 1,
        says: (x, y) => this.note(line, x, y),
      }));
      // The start of training is high for every arm: it is cut, so that it does not hide the end.
      const ends = arms.map((arm) => arm.loss[0]).filter((value) => value !== null);
      const [best, worst] = ends.length ? [Math.min(...ends), Math.max(...ends)] : [0, Infinity];
      const cut = worst + Math.max(0.4, 0.5 * (worst - best));
      const range = (low, high) => {
        const top = Math.min(high, cut);
        return low === null ? [0, 1] : [low - 0.03 * (top - low), top];
      };
      const [, label] = AXES[axis];
      const title = LOSSES[loss];
      this.figure.show({
        lines: shown,
        levels: suite.floors,
        x: {label, log},
        y: {
          label: `${title.toLowerCase()} (nats per character)`,
          range,
        },
        label: `${title} of ${arms.length} arms of suite ${suite.name}, over ${label}. ` +
          "The table below has the final losses.",
      });
    }

    note({arm, run, xs, steps}, x, y) {
      const step = steps[xs.indexOf(x)];
      const where = [`${y.toFixed(3)} nats at step ${step}`];
      const amount = Number(x.toPrecision(4)).toLocaleString("en");
      if (this.axis !== "steps") where.push(`${amount} ${UNITS[this.axis]}`);
      if (run === null) return [arm.label, `mean of ${arm.runs.length} seeds`, ...where];
      return [`${arm.label}, seed ${run.seed}`, ...where, run.device, `digest ${run.digest}`];
    }
  }

  return {Explorer};
})();

document.addEventListener("DOMContentLoaded", () => {
  for (const holder of document.querySelectorAll("div.explorer")) {
    const suites = holder.dataset.suites.split(/\s+/).map((name) => explorer.suites[name]);
    const asked = (holder.dataset.arms ?? "").split(",").map((name) => name.trim());
    new explorer.page.Explorer(holder, suites, asked);
  }
});
