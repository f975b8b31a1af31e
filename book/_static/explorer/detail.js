// One arm: how its directions agree with the exact gradient over training, its runs, its losses as numbers.
"use strict";

explorer.detail = (() => {
  const {make, number, spread} = explorer;
  const {curve, average} = explorer.runs;
  const {Figure} = explorer.figure;

  const degrees = (cosine) => (Math.acos(Math.min(1, Math.max(-1, cosine))) * 180) / Math.PI;
  const MEASURES = {
    cosine: {
      title: "Cosine to the exact gradient",
      label: "cosine to the exact gradient",
      value: (cosine) => cosine,
      text: (value) => value.toFixed(3).replace("-", "−"),
      range: (low) => [Math.min(0, low) - 0.02, 1.02],
      levels: {},
    },
    feedback: {
      title: "Angle of the feedback",
      label: "angle to what it stands in for (degrees)",
      value: degrees,
      text: (value) => `${value.toFixed(1)}°`,
      range: (_, high) => [-2, Math.max(92, high + 2)],
      levels: {"right angle": 90},
    },
  };
  const WHOLE = "all parameters";

  const block = (place) => place.match(/^blocks\.(\d+)\./)?.[1];
  // blocks.0.attn.q_proj.weight becomes "block 0: q"
  const short = (place) => place.replace(/^blocks\.(\d+)\./, "block $1: ")
                             .replace(/\.weight$|_proj|attn\.|mlp\.(?=fc)/g, "")
                             .replace("mlp.", "mlp ");

  // A colour for each block, the first the lightest, and grey for what is in none.
  function colours(places, dark) {
    const blocks = [...new Set(places.map(block).filter(Boolean))].sort((a, b) => a - b);
    const [first, last] = dark ? [40, 80] : [62, 28];
    const of = (i) => first + ((last - first) * i) / Math.max(1, blocks.length - 1);
    const hex = (lightness, saturation) => {
      const a = (saturation * Math.min(lightness, 100 - lightness)) / 10000;
      const part = (n) => {
        const k = (n + 205 / 30) % 12;
        return Math.round(255 * (lightness / 100 - a * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
      };
      return `#${[0, 8, 4].map((n) => part(n).toString(16).padStart(2, "0")).join("")}`;
    };
    const found = Object.fromEntries(blocks.map((name, i) => [name, hex(of(i), 75)]));
    return (place) => found[block(place)] ?? (dark ? "#aaaaaa" : "#777777");
  }

  function table(caption, heads, rows) {
    const head = make("tr", {}, ...heads.map((text) => make("th", {scope: "col"}, text)));
    const body = rows.map(([first, ...cells]) => make(
                            "tr", {}, make("th", {scope: "row"}, first),
                            ...cells.map((text) => make("td", {}, text))));
    const made = make(
      "table", {class: "explorer-table"}, make("caption", {}, caption), make("thead", {}, head),
      make("tbody", {}, ...body));
    return make("div", {class: "explorer-scroll", tabindex: 0, role: "region", "aria-label": caption}, made);
  }

  class Detail {
    constructor() {
      this.element = make("section", {class: "explorer-detail", "aria-label": "One arm", hidden: ""});
      this.figure = new Figure(240);
      this.measure = "cosine";
    }

    close() {
      this.element.hidden = true;
      this.arm = null;
    }

    open(suite, arm) {
      Object.assign(this, {suite, arm});
      this.element.hidden = false;
      const measured = Object.keys(MEASURES).filter((name) => name in arm.diagnostics);
      const title = make("p", {class: "explorer-title", role: "status"}, make("strong", {}, arm.label));
      const parts = [title];
      if (measured.length) {
        if (!measured.includes(this.measure)) [this.measure] = measured;
        this.legend = make("p", {class: "explorer-note"});
        parts.push(this.choice(measured), this.figure.element, this.legend);
      } else {
        title.append(" How its directions agree with the exact gradient was not measured.");
      }
      this.element.replaceChildren(...parts, this.runs(), this.numbers());
      if (measured.length) this.draw();
    }

    choice(measured) {
      const field = make("select", {}, ...measured.map((name) => make(
                                         "option", {value: name}, MEASURES[name].title)));
      field.value = this.measure;
      field.addEventListener("change", () => {
        this.measure = field.value;
        this.draw();
      });
      return make("label", {class: "explorer-choice"}, "Shown: ", field);
    }

    draw() {
      if (!this.arm || !(this.measure in this.arm.diagnostics)) return;
      const {title, label, value, text, range, levels} = MEASURES[this.measure];
      const found = this.arm.diagnostics[this.measure];
      const dark = document.documentElement.dataset.theme === "dark";
      const colour = colours(Object.keys(found), dark);
      const line = (place, curves, others) => {
        const {steps, values} = average(curves.map((one) => curve(this.suite, one)));
        const ys = values.map(value);
        const says = (step, y) => [place, `${text(y)} at step ${step}`, "mean of the seeds"];
        return {xs: steps, ys, dash: [], bold: false, says, ...others};
      };
      const lines =
        Object.entries(found).map(([place, one]) => line(short(place), [one], {colour: colour(place)}));
      const total = this.measure === "cosine" ? Object.values(this.arm.diagnostics.total ?? {}) : [];
      if (total.length) lines.push(line(WHOLE, total, {colour: this.arm.colour, bold: true}));
      this.legend.textContent = (total.length ? "Thick: all parameters together. " : "") +
        `Thin: a matrix each, the ${dark ? "lighter" : "darker"} the higher its block; grey: in no block.`;
      const ends = lines.map(({ys}) => ys.at(-1)).filter(Number.isFinite);
      const said = ends.length ?
        `at the end from ${text(Math.min(...ends))} to ${text(Math.max(...ends))} over the layers` :
        "without a value";
      this.figure.show({
        lines,
        levels,
        x: {label: "training step", log: false},
        y: {label, range},
        label: `${title} over training, ${this.arm.label}: ${said}.`,
      });
    }

    runs() {
      const rows = this.arm.runs.map((run) => [
        `seed ${run.seed}`, run.loss === null ? run.status : number(run.loss), run.device, run.digest]);
      return table(`Runs of ${this.arm.label}`, ["Run", "Final loss", "Machine", "Digest"], rows);
    }

    // Validation loss and total cosine at every evaluation, for those who do not see the figures.
    numbers() {
      const losses = average(this.arm.runs.map((run) => curve(this.suite, run.val_loss)));
      const cosines =
        average(Object.values(this.arm.diagnostics.total ?? {}).map((one) => curve(this.suite, one)));
      const rows = losses.steps.map((step, i) => {
        const at = cosines.steps.indexOf(step);
        return [`${step}`, number(losses.values[i]), at < 0 ? "–" : number(cosines.values[at])];
      });
      const heads = ["Step", "Validation loss", "Cosine, all parameters"];
      return make(
        "details", {}, make("summary", {}, "The same over training, as numbers"),
        table(`${this.arm.label}: means of the seeds`, heads, rows));
    }
  }

  return {Detail};
})();
