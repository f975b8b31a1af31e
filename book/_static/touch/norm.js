// Chapter 08: an input of LayerNorm descends by three backward passes; two of them lengthen it for nothing.
"use strict";

touch.place("norm", (holder) => {
  const {BACKWARDS, normalise, loss, gradient, step, cosine, length, toPlane, fromPlane} = touchMath.norm;
  const {Walk, circle, line, star, went} = touch.plane;
  const {draw, number} = touch;
  const GOAL = [0.93, 0.37]; // nearly the direction of the figure of fields
  const RADIUS = Math.sqrt(3); // of the circle on which all outputs lie
  const a = fromPlane(GOAL.map((value) => value / Math.hypot(...GOAL)));

  const numbers = (kind, point) => {
    const x = fromPlane(point);
    const grad = gradient(kind, x, a);
    return {size: length(x), cosine: cosine(grad, gradient("exact", x, a)), loss: loss(x, a)};
  };

  function ground(to, scale, start) {
    const z = toPlane(normalise(fromPlane(start)).z);
    const [cx, cy] = to(z);
    const [x, y] = to(z.map((value) => 1.16 * value));
    return [
      circle(to, RADIUS, scale, "touch-ring"), line(to, [0, 0], start, "touch-ray"),
      line(to, start, z, "touch-ray"), star(to, toPlane(a).map((value) => RADIUS * value)),
      draw("circle", {cx, cy, r: 4, class: "touch-output"}),
      draw("text", {x, y: y + 4, class: "touch-tick", "text-anchor": "middle"}, "LN(x)"),
    ];
  }

  function says(rows, steps, start) {
    const size = number(Math.hypot(...start));
    if (steps === 0) {
      const cosines = rows.slice(1).map((row) => `${number(row.cosine)} for ${row.kind}`);
      return `x has length ${size}. Cosine to the exact gradient: ${cosines.join(", ")}. Now take steps.`;
    }
    return went(rows, steps, size);
  }

  new Walk(holder, {
    does: "Drag x, then take steps of descent towards the star.",
    kinds: Object.keys(BACKWARDS),
    start: [-0.7, 0.7],
    rates: [0.05, 0.1, 0.2, 0.4, 0.8],
    rate: 0.2,
    drawn: "x",
    reach: 2.6,
    step: (kind, point, rate) => toPlane(step(kind, fromPlane(point), a, rate)),
    gradient: (kind, point) => toPlane(gradient(kind, fromPlane(point), a)),
    numbers,
    ground,
    says,
  });
});
