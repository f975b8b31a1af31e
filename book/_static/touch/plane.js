// A plane with a point that is dragged, or moved by the arrow keys, and three that start from it and walk, each
// by a backward pass of its own: their trails, the direction of their next steps, and their numbers.
"use strict";

touch.plane = (() => {
  const {make, draw, number, slider, button, buttons, Said, table, mark, named} = touch;
  const SIZE = 360; // of the drawing, in its own units
  const NEAREST = 0.3; // to the origin, where there is no direction
  const ARROW = 60; // length for a gradient of one
  const LONGEST = 110;
  const KEYS = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1]};

  const far = ([p, q]) => Math.hypot(p, q);

  // The point at a distance to the origin that is allowed, to hundredths.
  function allowed(point, farthest) {
    const [p, q] = far(point) > 0 ? point : [NEAREST, 0];
    const factor = Math.min(farthest, Math.max(NEAREST, far([p, q]))) / far([p, q]);
    return [p, q].map((value) => Math.round(100 * factor * value) / 100);
  }

  // problem: {does, kinds, start, rates, rate, drawn: "x", reach, step(kind, point, rate), gradient(kind, point),
  // numbers(kind, point): {size, cosine, loss}, ground(to, scale, start): elements below,
  // says(rows, steps, start)}; points and gradients are pairs, and reach is half the width of the plane, as long
  // as nothing has run further.
  class Walk {
    constructor(holder, problem, ...controls) {
      Object.assign(this, {problem, rate: problem.rate, start: problem.start});
      this.svg = draw("svg", {viewBox: `0 0 ${SIZE} ${SIZE}`, class: "touch-plane", role: "group"});
      this.svg.setAttribute("aria-label", `A plane with the point ${problem.drawn}`);
      this.below = draw("g", {"aria-hidden": "true"});
      this.handle = draw(
        "g", {
          class: "touch-handle", tabindex: 0, role: "slider",
          "aria-valuemin": -problem.reach, "aria-valuemax": problem.reach,
          "aria-label": `${problem.drawn}, moved by the arrow keys in both directions`,
        },
        draw("circle", {r: 24, class: "touch-grip"}), draw("circle", {r: 9, class: "touch-point"}),
        draw("text", {x: 0, y: -15, "text-anchor": "middle"}, problem.drawn));
      this.svg.append(this.below, this.handle);
      this.said = new Said();
      this.numbers = make("div", {class: "touch-numbers"});
      holder.append(
        make("p", {class: "touch-do"}, problem.does), make("div", {class: "touch-columns"}, this.svg, make(
          "div", {}, ...controls,
          slider("Step size", problem.rates, problem.rate, (rate) => this.rate = rate),
          buttons(button("Step", () => this.walk(1), "main"), button("10 steps", () => this.walk(10)),
                  button("Back", () => this.reset())),
          this.numbers)),
        this.said.element);
      this.listen();
      this.reset();
    }

    listen() {
      const {handle, svg} = this;
      let held = false;
      handle.addEventListener("pointerdown", (event) => {
        if (event.button !== 0) return;
        held = true;
        handle.setPointerCapture(event.pointerId);
        handle.focus();
        event.preventDefault();
      });
      handle.addEventListener("pointermove", (event) => {
        if (!held) return;
        const box = svg.getBoundingClientRect();
        const [right, down] = [
          (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
        this.move([2 * right - 1, 1 - 2 * down].map((share) => share * this.problem.reach), true);
      });
      for (const name of ["pointerup", "pointercancel"]) {
        handle.addEventListener(name, () => {
          if (held) this.tell();
          held = false;
        });
      }
      handle.addEventListener("keydown", (event) => {
        if (!(event.key in KEYS)) return;
        event.preventDefault();
        const by = event.shiftKey ? 0.5 : 0.1;
        this.move(this.start.map((value, i) => value + by * KEYS[event.key][i]));
      });
    }

    move(point, dragged) {
      this.start = allowed(point, 0.88 * this.problem.reach);
      this.reset(dragged);
    }

    reset(dragged = false) {
      this.steps = 0;
      this.trails = this.problem.kinds.map(() => [this.start]);
      this.show();
      this.tell(dragged);
    }

    walk(steps) {
      this.steps += steps;
      this.trails.forEach((trail, i) => {
        for (let n = 0; n < steps; n++)
          trail.push(this.problem.step(this.problem.kinds[i], trail.at(-1), this.rate));
      });
      this.show();
      this.tell();
    }

    show() {
      const {problem, trails} = this;
      // Everything that has been walked is in sight: the plane grows with the points that run away.
      const walked = this.steps ? trails.flat() : [];
      const reach = Math.max(problem.reach, ...walked.map((point) => 1.25 * far(point)));
      const scale = SIZE / 2 / reach;
      const to = ([p, q]) => [SIZE / 2 + scale * p, SIZE / 2 - scale * q];
      const drawn = [...problem.ground(to, scale, this.start)];
      trails.forEach((trail, i) => {
        const path = trail.map((point) => to(point).map((value) => value.toFixed(1)).join(" ")).join("L");
        drawn.push(draw("path", {d: `M${path}`, class: `touch-line touch-${i}`}));
      });
      trails.forEach((trail, i) => {
        drawn.push(arrow(to(trail.at(-1)), problem.gradient(problem.kinds[i], trail.at(-1)), `touch-${i}`));
      });
      if (this.steps) trails.forEach((trail, i) => drawn.push(mark(i, ...to(trail.at(-1)), 6)));
      this.below.replaceChildren(...drawn);
      this.handle.setAttribute("transform", `translate(${to(this.start).join(" ")})`);
      const rows = problem.kinds.map((kind, i) => {
        const {size, cosine, loss} = problem.numbers(kind, trails[i].at(-1));
        return [named(i, kind), number(size), number(cosine), number(loss)];
      });
      const heads = ["Backward pass", `|${problem.drawn}|`, "cosine", "loss"];
      this.numbers.replaceChildren(table("The three backward passes, now", heads, rows));
    }

    tell(quietly = false) {
      const [p, q] = this.start.map((value) => number(value));
      this.handle.setAttribute("aria-valuenow", this.start[0]);
      this.handle.setAttribute("aria-valuetext", `${p} to the right, ${q} up`);
      const rows = this.problem.kinds.map((kind, i) => ({
        kind, ...this.problem.numbers(kind, this.trails[i].at(-1))}));
      this.said.say(this.problem.says(rows, this.steps, this.start), quietly);
    }
  }

  // Where the next step goes from a place of the drawing: against the gradient, the longer the larger it is.
  function arrow([x, y], gradient, kind) {
    const size = far(gradient);
    if (size < 1e-3) return draw("g");
    const length = Math.min(LONGEST, ARROW * size);
    const turned = (Math.atan2(gradient[1], -gradient[0]) * 180) / Math.PI;
    return draw(
      "g", {class: `touch-arrow ${kind}`, transform: `translate(${x} ${y}) rotate(${turned})`},
      draw("line", {x1: 0, y1: 0, x2: Math.max(0, length - 8), y2: 0}),
      draw("path", {d: `M${length} 0L${length - 10} -4.5V4.5Z`}));
  }

  // What several planes have on their ground.
  const circle = (to, radius, scale, kind) => {
    const [cx, cy] = to([0, 0]);
    return draw("circle", {cx, cy, r: radius * scale, class: kind});
  };
  const line = (to, from, end, kind) => {
    const [[x1, y1], [x2, y2]] = [to(from), to(end)];
    return draw("line", {x1, y1, x2, y2, class: kind});
  };
  function star(to, point) {
    const corners = Array.from({length: 10}, (_, i) => {
      const [radius, angle] = [i % 2 ? 4.5 : 11, (Math.PI * i) / 5];
      return `${(radius * Math.sin(angle)).toFixed(1)} ${(-radius * Math.cos(angle)).toFixed(1)}`;
    });
    return draw("path", {
      d: `M${corners.join("L")}Z`, class: "touch-star", transform: `translate(${to(point).join(" ")})`});
  }

  // How far each has run, as a sentence.
  function went(rows, steps, size) {
    const now = rows.map((row) => `${number(row.size)} (${row.kind})`);
    return `After ${steps} step${steps > 1 ? "s" : ""} the length has gone from ${size} to ${now.join(", ")}.`;
  }

  return {Walk, arrow, circle, line, star, went};
})();
