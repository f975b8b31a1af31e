// A figure of lines by uPlot, with levels across it, a note at the point under the pointer, and the colours
// of the theme. It is drawn anew when its width changes, and nothing in it moves by itself.
"use strict";

explorer.figure = (() => {
  const {make} = explorer;
  const FONT = "12px system-ui, sans-serif";
  const NEAR = 18;
  const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 4});

  // Lines with an x of their own each, as uPlot wants them: over all x that there are.
  function aligned(lines) {
    if (lines.length === 0) return [[]];
    return uPlot.join(lines.map(({xs, ys}) => [xs, ys]));
  }

  class Figure {
    // picked(line) is called when a line is chosen.
    constructor(height, picked = () => {}) {
      this.height = height;
      this.picked = picked;
      this.element = make("div", {class: "explorer-figure", role: "img"});
      this.tip = make("div", {class: "explorer-tip", hidden: ""});
      this.dot = make("div", {class: "explorer-dot", hidden: ""});
      new ResizeObserver(() => this.fit()).observe(this.element);
    }

    // content: { lines: [{ of, xs, ys, colour, dash, bold, says(x, y) }], levels: { name: y },
    // x: { label, log }, y: { label, range(low, high) }, label }. Lines that are not bold are thin, those of
    // one `of` belong together, and says gives the lines of a note.
    show(content) {
      this.content = content;
      this.element.setAttribute("aria-label", content.label);
      this.draw();
    }

    fit() {
      const width = this.element.clientWidth;
      if (this.plot && width > 0 && width !== this.plot.width)
        this.plot.setSize({width, height: this.height});
      else if (!this.plot)
        this.draw();
    }

    draw() {
      if (!this.content || this.element.clientWidth === 0) return;
      this.plot?.destroy();
      this.near = null;
      this.plot = new uPlot(this.options(), aligned(this.content.lines), this.element);
      this.plot.over.append(this.dot, this.tip);
      this.plot.over.addEventListener("click", () => {
        if (this.near) this.picked(this.content.lines[this.near - 1]);
      });
      this.hideNote();
    }

    themed(name) { return getComputedStyle(this.element).getPropertyValue(name).trim(); }

    options() {
      const {lines, levels, x, y} = this.content;
      const names = Object.keys(levels);
      const axis = (label, others) => ({
        label,
        labelFont: FONT,
        labelSize: 22,
        font: FONT,
        stroke: () => this.themed("--explorer-text"),
        grid: {stroke: () => this.themed("--explorer-rule"), width: 0.7},
        ticks: {stroke: () => this.themed("--explorer-rule"), width: 0.7, size: 5},
        ...others,
      });
      return {
        width: this.element.clientWidth,
        height: this.height,
        padding: [12, names.length ? 10 + 6.5 * Math.max(...names.map((name) => name.length)) : 14, 0, 0],
        legend: {show: false},
        focus: {alpha: 0.25},
        cursor: {focus: {prox: NEAR}, points: {show: false}, drag: {x: true, y: false}, y: false},
        scales: {
          x: {time: false, distr: x.log ? 3 : 1, range: (_, low, high) => [low, high]},
          y: {range: (_, low, high) => y.range(low, high)},
        },
        axes: [
          axis(x.label, {
            values: (_, splits) => splits.map((value) => (value === null ? "" : compact.format(value))),
            size: 34,
          }),
          axis(y.label, {size: 44}),
        ],
        series: [{}, ...lines.map((line) => this.series(line))],
        hooks: {
          draw: [(plot) => this.drawLevels(plot, levels)],
          setSeries: [(plot, near, {focus}) => {
            if (focus !== undefined) this.focus(plot, near);
          }],
          setCursor: [(plot) => this.placeNote(plot)],
        },
      };
    }

    series({colour, dash, bold, ys}) {
      const stroke = bold ? colour : `${colour}99`;
      return {
        stroke,
        dash: bold ? dash : [],
        width: bold ? 2 : 0.8,
        points: {show: bold && ys.length < 40, size: 5, fill: stroke, width: 0},
      };
    }

    drawLevels({ctx, bbox, scales, valToPos}, levels) {
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = this.themed("--explorer-text");
      ctx.lineWidth = devicePixelRatio;
      ctx.setLineDash([2 * devicePixelRatio, 4 * devicePixelRatio]);
      ctx.font = `${12 * devicePixelRatio}px system-ui, sans-serif`;
      ctx.textBaseline = "middle";
      ctx.textAlign = "left";
      for (const [name, value] of Object.entries(levels)) {
        if (value < scales.y.min || value > scales.y.max) continue;
        const y = valToPos(value, "y", true);
        ctx.beginPath();
        ctx.moveTo(bbox.left, y);
        ctx.lineTo(bbox.left + bbox.width, y);
        ctx.stroke();
        ctx.fillText(name, bbox.left + bbox.width + 5 * devicePixelRatio, y);
      }
      ctx.restore();
    }

    // The lines that belong to the one near the pointer stay as they are with it; the others fade.
    focus(plot, near) {
      this.near = near;
      const {lines} = this.content;
      lines.forEach(({of}, i) => {
        if (near && of !== undefined && of === lines[near - 1].of) plot.series[i + 1].alpha = 1;
      });
    }

    hideNote() { this.tip.hidden = this.dot.hidden = true; }

    placeNote(plot) {
      const i = this.near ? plot.cursor.idxs[this.near] : null;
      const value = i === null || i === undefined ? undefined : plot.data[this.near][i];
      if (value === undefined || value === null) return this.hideNote();
      const line = this.content.lines[this.near - 1];
      const x = plot.data[0][i];
      const [left, top] = [plot.valToPos(x, "x"), plot.valToPos(value, "y")];
      this.tip.replaceChildren(...line.says(x, value).map((text) => make("div", {}, text)));
      this.tip.hidden = this.dot.hidden = false;
      const [width, height] = [plot.over.clientWidth, plot.over.clientHeight];
      const aside = left + 12 + this.tip.offsetWidth > width ? left - 12 - this.tip.offsetWidth : left + 12;
      const above = Math.min(Math.max(0, top - this.tip.offsetHeight - 10), height - this.tip.offsetHeight);
      this.tip.style.translate = `${Math.max(0, aside)}px ${above}px`;
      this.dot.style.translate = `${left}px ${top}px`;
      this.dot.style.background = line.colour;
      return undefined;
    }
  }

  return {Figure};
})();
