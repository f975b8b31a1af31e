// A small chart of lines in SVG, drawn anew at every change. Colours and dashes are in touch.css.
"use strict";

touch.charts = (() => {
  const {draw, mark} = touch;
  const [LEFT, RIGHT, TOP, BOTTOM] = [40, 12, 24, 34];

  // About n round numbers that cover low ... high, or the powers of ten in it.
  function ticks(low, high, n, log) {
    if (log) {
      const powers = [];
      for (let p = Math.ceil(Math.log10(low) - 1e-9); p <= Math.log10(high) + 1e-9; p++) powers.push(10 ** p);
      const each = Math.ceil(powers.length / n);
      return powers.filter((_, i) => i % each === 0);
    }
    return controls.ticks(low, high, n);
  }

  const raised = (exponent) => [...`${exponent}`].map((sign) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[sign] ?? "⁻").join("");
  const power = (value) => `10${raised(Math.round(Math.log10(value)))}`;
  const written = (value, log) => log && (value < 0.1 || value > 1000) ? power(value) : `${value}`;

  // Fill `holder`. lines: [{kind, points: [[x, y]]}], of kind 0, 1, 2 or "quiet"; the mark of a line stands at its
  // last point up to x = now. title stands above, and beside it legend: [[kind, text]]; label is what the picture
  // says; at are ticks of y, of which level is dotted; hidden, a text, stands in place of the lines.
  function chart(holder, content) {
    const {title, legend = [], label, lines, range, last, log, at, level, hidden, now, height} = content;
    const [low, high] = range;
    const width = Math.max(220, holder.clientWidth);
    const bottom = height - BOTTOM;
    const part = (value) =>
      log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    const x = (step) => LEFT + ((width - RIGHT - LEFT) * step) / last;
    const y = (value) => bottom - (bottom - TOP) * Math.min(1, Math.max(0, part(value)));
    const box = `0 0 ${width} ${height}`;
    const svg = draw("svg", {width, height, viewBox: box, role: "img", "aria-label": label});
    const text = (place, words) => svg.append(draw("text", place, words));
    const across = (value, kind) =>
      svg.append(draw("line", {x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value), class: kind}));
    text({x: 2, y: 13, class: "touch-title"}, title);
    let right = 20 + 7.5 * title.length;
    for (const [kind, words] of legend) {
      svg.append(mark(kind, right, 9, 4));
      text({x: right + 9, y: 13, class: "touch-title"}, words);
      right += 28 + 7 * words.length;
    }
    for (const value of hidden ? [] : at ?? ticks(low, high, 4, log)) {
      across(value, value === level ? "touch-level" : "touch-grid");
      text({x: LEFT - 6, y: y(value) + 4, class: "touch-tick", "text-anchor": "end"}, written(value, log));
    }
    for (const step of ticks(0, last, width < 300 ? 2 : 4)) {
      const anchor = step === last ? "end" : "middle";
      const place = {x: step === last ? width - 2 : x(step), y: bottom + 15};
      text({...place, class: "touch-tick", "text-anchor": anchor}, step);
    }
    text({x: width - 2, y: height - 4, class: "touch-tick", "text-anchor": "end"}, "steps");
    if (hidden) {
      svg.append(draw("rect", {
        x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: bottom - TOP, class: "touch-veil"}));
      text({x: (LEFT + width - RIGHT) / 2, y: (TOP + bottom) / 2 + 4, class: "touch-tick",
            "text-anchor": "middle"}, hidden);
    }
    if (now !== undefined)
      svg.append(draw("line", {x1: x(now), x2: x(now), y1: TOP, y2: bottom, class: "touch-now"}));
    for (const line of hidden ? [] : lines) {
      const points = line.points.filter(([, value]) => Number.isFinite(value));
      const path = points.map(([step, value]) => `${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
      if (points.length > 1) svg.append(draw("path", {d: `M${path}`, class: `touch-line touch-${line.kind}`}));
      const current = points.filter(([step]) => step <= (now ?? Infinity)).at(-1);
      if (current && line.kind !== "quiet") svg.append(mark(line.kind, x(current[0]), y(current[1]), 4));
    }
    holder.replaceChildren(svg);
  }

  return {chart, raised};
})();
