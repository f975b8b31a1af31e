// Chapter 11: a token takes the direction of its nearest code; three ways to hand the gradient back to it.
"use strict";

touch.place("codes", (holder) => {
  const {BACKWARDS, codebook, nearest, quantised, atCode, gradient, cosine, length, ...math} = touchMath.codes;
  const {Walk, arrow, circle, line, star, went} = touch.plane;
  const {draw, number, select} = touch;
  const ANGLE = 0.63; // of the star, in radians: between two codes, whatever their number
  const a = [Math.cos(ANGLE), Math.sin(ANGLE)];
  let codes = codebook(8);

  const turn = (u, v) => (180 / Math.PI) * Math.acos(Math.min(1, cosine(u, v)));

  function ground(to, scale, h) {
    const angles = codes.map(([x, y]) => Math.atan2(y, x)).sort((one, other) => one - other);
    const borders = angles.map((angle, i) => {
      const next = angles[i + 1] ?? angles[0] + 2 * Math.PI;
      return [Math.cos((angle + next) / 2), Math.sin((angle + next) / 2)];
    });
    const dot = (point, r, kind) => {
      const [cx, cy] = to(point);
      return draw("circle", {cx, cy, r, class: kind});
    };
    const [q, code] = [quantised(h, codes), codes[nearest(h, codes)]];
    const [x, y] = to(q);
    return [
      ...borders.map((border) => line(to, [0, 0], border.map((value) => 99 * value), "touch-grid")),
      circle(to, 1, scale, "touch-ring"), line(to, [0, 0], q, "touch-ray"), line(to, h, q, "touch-ray"),
      ...codes.map((one) => dot(one, 3.5, "touch-code")), dot(code, 6, "touch-chosen"), star(to, a),
      arrow(to(q), atCode(h, codes, a), "touch-at-code"), dot(q, 4, "touch-output"),
      draw("text", {x: x + 7, y: y + 15, class: "touch-tick"}, "q"),
    ];
  }

  function says(rows, steps, h) {
    const size = number(length(h));
    if (steps === 0) {
      const angle = number(turn(h, codes[nearest(h, codes)]), 0);
      const cosines = rows.map((row) => `${row.kind} ${number(row.cosine)}`);
      return `h has length ${size} and is ${angle}° from its code, one of ${codes.length}: ` +
        `${Math.log2(codes.length)} bits. Cosine to the gradient at q: ${cosines.join(", ")}. Now take steps.`;
    }
    return went(rows, steps, size);
  }

  const problem = {
    does: "Drag h among the codes, then take steps of descent. At q: the way down there.",
    kinds: Object.keys(BACKWARDS),
    start: [-0.5, 0.7],
    rates: [0.1, 0.2, 0.4, 0.8],
    rate: 0.4,
    drawn: "h",
    reach: 1.8,
    step: (kind, h, rate) => math.step(kind, h, codes, a, rate),
    gradient: (kind, h) => gradient(kind, h, codes, a),
    numbers: (kind, h) => ({
      size: length(h),
      cosine: cosine(gradient(kind, h, codes, a), atCode(h, codes, a)),
      loss: math.loss(h, codes, a),
    }),
    ground,
    says,
  };
  const sizes = [4, 8, 16].map((K) => [K, `${K}, that is ${Math.log2(K)} bits`]);
  const walk = new Walk(holder, problem, select("Codes", sizes, 8, (K) => {
    codes = codebook(Number(K));
    walk.reset();
  }));
});
