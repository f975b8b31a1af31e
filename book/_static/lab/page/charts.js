// Two small charts in SVG: lines over steps, and a dot per layer. Colours, dashes and fonts are in lab.css.
//
// Model 0 is drawn with solid lines and circles, model 1 with dashed lines and squares: nothing hangs on
// colour alone.
"use strict";

lab.define("charts", () => {
  const {draw, ticks} = controls;
  const LEFT = 38;
  const MOST_POINTS = 400;
  const MOST_MARKS = 12;

  // At most MOST_POINTS points: the means of equally many neighbours, the last ones as they are left.
  function thinned(points) {
    const each = Math.ceil(points.length / MOST_POINTS);
    if (each < 2) return points;
    const groups = [];
    for (let i = 0; i < points.length; i += each) groups.push(points.slice(i, i + each));
    const mean = (group, place) => group.reduce((sum, point) => sum + point[place], 0) / group.length;
    return groups.map((group) => [group.at(-1)[0], mean(group, 1)]);
  }

  function marker(model, x, y, size = 3.2) {
    if (model === 0) return draw("circle", {cx: x, cy: y, r: size, class: "lab-mark lab-0"});
    const place = {x: x - size, y: y - size, width: 2 * size, height: 2 * size};
    return draw("rect", {...place, class: "lab-mark lab-1"});
  }

  function empty(holder, height, label) {
    const width = Math.max(260, holder.clientWidth);
    const svg =
      draw("svg", {width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label});
    holder.replaceChildren(svg);
    return {svg, width};
  }

  // lines: [{ model, kind, points: [[step, value]] }]; kind "thin" is drawn without marks. marks: { name:
  // value } are levels across the chart. range [low, high] grows to what the lines need; `unit` stands at the
  // axis.
  function lineChart(holder, {lines, levels = {}, range, unit, label, height = 280, steps}) {
    const {svg, width} = empty(holder, height, label);
    const shown =
      lines.map((line) => ({...line, points: thinned(line.points.filter(([, y]) => Number.isFinite(y)))}));
    const values = shown.flatMap(({points}) => points.map(([, y]) => y));
    const low = Math.min(range[0], ...values);
    const high = Math.max(range[1], ...values);
    const right = width - (Object.keys(levels).length ? 58 : 12);
    const [top, bottom] = [22, height - 34];
    const last = Math.max(steps, 200);
    const x = (step) => LEFT + ((right - LEFT) * step) / last;
    const y = (value) => bottom - ((bottom - top) * (value - low)) / (high - low);
    for (const value of ticks(low, high, 6)) {
      svg.append(draw("line", {x1: LEFT, x2: right, y1: y(value), y2: y(value), class: "lab-grid"}));
      svg.append(
        draw("text", {x: LEFT - 6, y: y(value) + 4, class: "lab-tick", "text-anchor": "end"}, value));
    }
    for (const step of ticks(0, last, width < 420 ? 3 : 6)) {
      svg.append(
        draw("text", {x: x(step), y: bottom + 16, class: "lab-tick", "text-anchor": "middle"}, step));
    }
    svg.append(draw("text", {x: 2, y: 12, class: "lab-axis"}, unit));
    svg.append(draw("text", {x: right, y: height - 4, class: "lab-axis", "text-anchor": "end"}, "steps"));
    for (const [name, value] of Object.entries(levels)) {
      if (value < low || value > high) continue;
      svg.append(draw("line", {x1: LEFT, x2: right, y1: y(value), y2: y(value), class: "lab-level"}));
      svg.append(draw("text", {x: right + 5, y: y(value) + 4, class: "lab-tick"}, name));
    }
    for (const {model, kind, points} of shown) {
      if (points.length > 1) {
        const path =
          points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`);
        svg.append(draw("path", {d: path.join(""), class: `lab-line lab-${kind} lab-${model}`}));
      }
      const each = Math.ceil(points.length / MOST_MARKS);
      const marked = kind === "thin" ? [] : points.filter((_, i) => (points.length - 1 - i) % each === 0);
      for (const [step, value] of marked) svg.append(marker(model, x(step), y(value)));
    }
  }

  // rows: [{ name, values: [of model 0, of model 1] }] in degrees, undefined where there is none.
  function angleChart(holder, {rows, label}) {
    const height = 58 + 17 * rows.length;
    const {svg, width} = empty(holder, height, label);
    const [left, right, top] = [132, width - 22, 24];
    const x = (angle) => left + ((right - left) * angle) / 120;
    const bottom = height - 32;
    for (const angle of [0, 30, 60, 90, 120]) {
      const kind = angle === 90 ? "lab-level" : "lab-grid";
      svg.append(draw("line", {x1: x(angle), x2: x(angle), y1: top - 8, y2: bottom, class: kind}));
      const place = {x: x(angle), y: bottom + 15, class: "lab-tick", "text-anchor": "middle"};
      svg.append(draw("text", place, `${angle}°`));
    }
    svg.append(draw("text", {x: x(90), y: 11, class: "lab-axis", "text-anchor": "middle"}, "right angle"));
    rows.forEach(({name, values}, i) => {
      const y = top + 17 * i + 4;
      svg.append(draw("text", {x: left - 10, y: y + 4, class: "lab-tick", "text-anchor": "end"}, name));
      values.forEach((angle, model) => {
        if (Number.isFinite(angle)) svg.append(marker(model, x(Math.min(angle, 120)), y, 4));
      });
    });
  }

  return {lineChart, angleChart};
});
