// Recorded runs as lines: points of a curve over steps, tokens, FLOPs or seconds, by seed and as their mean.
"use strict";

explorer.runs = (() => {
  const AXES = {
    steps: ["Steps", "training step"],
    tokens: ["Tokens", "training tokens (characters)"],
    tflops: ["FLOPs", "matmul work of training (10¹² FLOPs)"],
    seconds: ["Seconds", "time of the training steps (s)"],
  };
  const LOSSES = {val_loss: "Validation loss", train_loss: "Training loss"};

  const mean = (numbers) => numbers.reduce((sum, number) => sum + number, 0) / numbers.length;
  const perStep = (run, axis) => (axis === "steps" ? 1 : run.per_step[axis]);

  // The steps and values of a curve of `suite`.
  function curve(suite, [list, values]) { return {steps: suite.steps[list].slice(0, values.length), values}; }

  // The mean of curves, at every step at which one of them has a value.
  function average(curves) {
    const found = new Map();
    for (const {steps, values} of curves) {
      steps.forEach((step, i) => {
        if (values[i] !== null) found.set(step, [...(found.get(step) ?? []), values[i]]);
      });
    }
    const steps = [...found.keys()].sort((a, b) => a - b);
    return {steps, values: steps.map((step) => mean(found.get(step)))};
  }

  // The points of a curve, of which a step takes `each`; a logarithmic axis has no place for the start.
  function points({steps, values}, each, log) {
    const kept = steps.map((step, i) => [step * each, values[i], step]).filter(([x]) => !log || x > 0);
    return {xs: kept.map(([x]) => x), ys: kept.map(([, y]) => y), steps: kept.map(([, , step]) => step)};
  }

  // A line for each run of `arm`, and before them their mean if there are several: [{ arm, run, xs, ys }].
  function lines(suite, arm, {axis, loss, log}) {
    const runs = arm.runs.filter((run) => perStep(run, axis) !== null);
    const curves = runs.map((run) => curve(suite, run[loss]));
    const own = runs.map((run, i) => ({arm, run, ...points(curves[i], perStep(run, axis), log)}));
    if (own.length < 2) return own;
    const each = mean(runs.map((run) => perStep(run, axis)));
    return [{arm, run: null, ...points(average(curves), each, log)}, ...own];
  }

  return {AXES, LOSSES, curve, average, points, lines};
})();
