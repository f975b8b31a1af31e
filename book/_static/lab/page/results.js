// What the page knows of a round of training, and how it shows it: charts, a table of numbers, and the two
// samples.
"use strict";

lab.define("results", (need) => {
  const {RULES} = need("rules");
  const {lineChart, angleChart} = need("charts");
  const {make} = controls;

  const number = (value, digits = 2) => (Number.isFinite(value) ? value.toFixed(digits) : "–");
  const series = (points, model) => points.map((point) => [point[0], point[1 + model]]);

  class Results {
    constructor(floors) {
      this.floors = floors;
      const chart = (title, says) => {
        const holder = make("div", {class: "lab-chart"});
        return [
          holder,
          make(
            "figure", {class: "lab-figure"}, make("figcaption", {}, make("strong", {}, title), ` ${says}`),
            holder)
        ];
      };
      const [loss, lossFigure] = chart(
        "Loss.",
        "Thin: training, means of ten steps. With marks: validation. " +
          "Dotted: what counting characters reaches on the same text.");
      const [cosine, cosineFigure] =
        chart("Cosine to the exact gradient", "of all weights inside the blocks, on the next batch.");
      const [angles, anglesFigure] = chart("Angle between each layer's feedback and its weight.", "");
      Object.assign(this, {loss, cosine, angles});
      this.note = make("p", {class: "lab-note"});
      anglesFigure.append(this.note);
      const sample = (i) => make("pre", {class: `lab-sample lab-${i}`, role: "region", tabindex: 0});
      this.samples = [0, 1].map(sample);
      this.names = [0, 1].map((i) => make("figcaption", {}));
      const written =
        this.samples.map((sample, i) => make("figure", {class: "lab-figure"}, this.names[i], sample));
      this.table = make("table", {class: "lab-table"});
      this.element = make(
        "div", {class: "lab-results"}, lossFigure, cosineFigure, anglesFigure,
        make("div", {class: "lab-samples"}, ...written), this.table);
    }

    reset(settings) {
      this.titles = settings.models.map(({rule}) => RULES[rule].name);
      this.data = {
        step: 0,
        train: [],
        cosine: [],
        validation: [],
        angles: [[], []],
        samples: ["", ""],
        finite: [true, true]
      };
      this.names.forEach((name, i) => {
        name.replaceChildren(
          make("span", {class: `lab-swatch lab-${i}`}), `What the model of ${this.titles[i]} writes`);
        this.samples[i].setAttribute("aria-label", name.textContent);
      });
    }

    // A second measurement at the same step replaces the first.
    add(report) {
      for (const kind of ["train", "cosine", "validation"]) {
        for (const point of report[kind]) {
          if (this.data[kind].at(-1)?.[0] === point[0]) this.data[kind].pop();
          this.data[kind].push(point);
        }
      }
      for (const kind of ["step", "angles", "samples", "finite"]) {
        if (report[kind] !== undefined) this.data[kind] = report[kind];
      }
    }

    latest(kind, model) { return this.data[kind].at(-1)?.[1 + model]; }

    // One sentence, for the status that is read aloud.
    summary() {
      const parts = this.titles.map((title, i) => `${title} ${number(this.latest("validation", i))}`);
      return `Step ${this.data.step}. Validation loss in nats per character: ${parts.join(", ")}.`;
    }

    draw() {
      const {train, validation, cosine, step} = this.data;
      const lines = (points, kind) => [0, 1].map((model) => ({model, kind, points: series(points, model)}));
      lineChart(this.loss, {
        lines: [...lines(train, "thin"), ...lines(validation, "bold")],
        levels: this.floors,
        steps: step,
        range: [2.1, 3.4],
        unit: "nats per character",
        label: `Loss over steps. ${this.summary()} The table has the numbers.`,
        height: 300,
      });
      lineChart(this.cosine, {
        lines: lines(cosine, "bold"),
        range: [-0.1, 1],
        unit: "cosine",
        height: 190,
        steps: step,
        label: `Cosine to the exact gradient over steps; now ${number(this.latest("cosine", 0))} and ${
          number(this.latest("cosine", 1))}.`,
      });
      this.drawAngles();
      this.samples.forEach((sample, i) => {
        sample.textContent = this.data.finite[i] ? this.data.samples[i] :
                                                   "The loss is no longer a number: this model has diverged.";
      });
      this.fillTable();
    }

    drawAngles() {
      const found =
        this.data.angles.map((layers) => new Map(layers.map(({name, degrees}) => [name, degrees])));
      const names = [...new Set(this.data.angles.flatMap((layers) => layers.map(({name}) => name)))];
      const short = (name) =>
        name.replace("blocks.", "block ").replace(".attn.", ": ").replace(".mlp.", ": ").replace("_proj", "");
      const rows =
        names.map((name) => ({name: short(name), values: found.map((angles) => angles.get(name))}));
      if (rows.length)
        angleChart(this.angles, {rows, label: "Angles by layer; the table has their means."});
      else
        this.angles.replaceChildren();
      const said = {
        bp: "Under backpropagation the feedback is the weight itself.",
        dfa: "Under direct feedback alignment only the head's feedback has the shape of its weight.",
      };
      const here = Object.keys(said).filter((rule) => this.titles.includes(RULES[rule].name));
      this.note.textContent = here.map((rule) => said[rule]).join(" ");
    }

    fillTable() {
      const {step, angles} = this.data;
      const mean = (numbers) => numbers.reduce((a, b) => a + b, 0) / numbers.length;
      const both = (text) => [0, 1].map(text);
      const rows = [
        ["Learning rule", both((i) => this.titles[i])],
        ["Training loss, nats per character", both((i) => number(this.latest("train", i)))],
        ["Validation loss, nats per character", both((i) => number(this.latest("validation", i)))],
        ["Cosine to the exact gradient", both((i) => number(this.latest("cosine", i)))],
        [
          "Mean angle of feedback and weight", both((i) => {
            return angles[i].length ? `${number(mean(angles[i].map(({degrees}) => degrees)), 0)}°` : "–";
          })
        ],
      ];
      const head =
        ["Measured", "First model", "Second model"].map((text) => make("th", {scope: "col"}, text));
      const body = rows.map(
        ([name, cells]) =>
          make("tr", {}, make("th", {scope: "row"}, name), ...cells.map((cell) => make("td", {}, cell))));
      this.table.replaceChildren(
        make("caption", {}, `After ${step} steps`), make("thead", {}, make("tr", {}, ...head)),
        make("tbody", {}, ...body));
    }
  }

  return {Results};
});
