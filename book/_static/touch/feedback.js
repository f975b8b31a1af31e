// Chapter 03: a linear network of two layers learns by a rule, and its upper weight turns to the feedback.
"use strict";

touch.place("feedback", (holder) => {
  const {RULES, start, step, measure} = touchMath.feedback;
  const {make, number, slider, select, button, buttons, Said, still} = touch;
  const {chart} = touch.charts;
  const [SEED, LAST, DIVERGED] = [1, 300, 1e3];
  const LOSS = [1e-3, 10];
  const told = {rule: "fa", scale: 1, rate: 0.1};
  let runs; // of the rule, and of backpropagation from the same start: {state, rule, curve: [measures]}
  let running = false;

  const said = new Said();
  const charts = [make("div", {class: "touch-chart"}), make("div", {class: "touch-chart"})];
  const points = (run, name) => run.curve.map((measured, i) => [i, measured[name]]);
  const over = (run) => run.broken || run.curve.length > LAST;

  function reset() {
    pause();
    runs = [told.rule, "bp"].map((rule) => {
      const state = start(SEED, told.scale);
      return {state, rule, curve: [measure(state, rule)], broken: false};
    });
    show();
  }

  function advance(steps) {
    for (const run of runs) {
      for (let n = 0; n < steps && !over(run); n++) {
        run.state = step(run.state, run.rule, told.rate);
        const measured = measure(run.state, run.rule);
        // Also where it is not a number.
        if (!(measured.loss < DIVERGED)) run.broken = true;
        else run.curve.push(measured);
      }
    }
    if (over(runs[0])) pause();
    show();
  }

  function pause() {
    running = false;
    go.textContent = still ? "50 steps" : "Start";
  }

  function frame() {
    if (!running) return;
    advance(1);
    requestAnimationFrame(frame);
  }

  function pressed() {
    if (!still && running) {
      pause();
      show();
      return;
    }
    if (over(runs[0])) reset();
    if (still) return void advance(50);
    running = true;
    go.textContent = "Pause";
    requestAnimationFrame(frame);
  }

  function sentence() {
    const [run, exact] = runs;
    const {loss, weights, errors} = run.curve.at(-1);
    const steps = run.curve.length - 1;
    const name = RULES[run.rule].name;
    if (run.broken) return `Step ${steps + 1}: ${name} diverges. Take a smaller rate or smaller feedback.`;
    const other = exact.curve[Math.min(steps, exact.curve.length - 1)].loss;
    const compared = run.rule === "bp" ? "" : ` (backpropagation ${number(other, 3)})`;
    const turned = run.rule === "bp" ? "Its feedback is the weight itself." :
      `W₂ is ${number(weights, 0)}° from the feedback, ` +
      `the hidden error ${number(errors, 0)}° from the exact one.`;
    return `Step ${steps}: ${name} has loss ${number(loss, 3)}${compared}. ${turned}`;
  }

  function show() {
    const [run, exact] = runs;
    const size = {last: LAST, height: 210};
    const text = sentence();
    const quiet = run.rule === "bp" ? [] : [{kind: "quiet", points: points(exact, "loss")}];
    chart(charts[0], {
      ...size, title: "Loss (thin: backpropagation)", label: `Loss over steps. ${text}`,
      log: true, range: LOSS,
      lines: [...quiet, {kind: 0, points: points(run, "loss")}],
    });
    chart(charts[1], {
      ...size, title: "Angles", label: `Angles over steps. ${text}`,
      legend: [[1, "W₂ to B"], [2, "eB to eW₂"]], range: [0, 120], at: [0, 30, 60, 90, 120], level: 90,
      lines: [{kind: 1, points: points(run, "weights")}, {kind: 2, points: points(run, "errors")}],
    });
    said.say(text, running);
  }

  const go = button("Start", pressed, "main");
  const set = (name) => (value) => {
    told[name] = value;
    scale.field.disabled = told.rule === "bp";
    reset();
  };
  const rules = Object.entries(RULES).map(([key, {name}]) => [key, name]);
  const scales = [0.25, 0.5, 1, 2, 4, 8];
  const scale = slider("Size of the feedback", scales, told.scale, set("scale"), (value) => `× ${value}`);
  holder.append(
    make("p", {class: "touch-do"}, "Choose how the error goes back, then press the button."),
    make("div", {class: "touch-form"}, select("Learning rule", rules, told.rule, set("rule")), scale,
         slider("Learning rate", [0.02, 0.05, 0.1, 0.2, 0.3], told.rate, set("rate"))),
    buttons(go, button("Step", () => {
      pause();
      if (!over(runs[0])) advance(1);
    }), button("Reset", reset)),
    make("div", {class: "touch-charts"}, ...charts), said.element);
  reset();
  return show;
});
