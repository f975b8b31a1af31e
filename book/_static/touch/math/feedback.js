// A linear network of two layers learns from a linear teacher, by plain gradient descent with weight decay.
//
//     h = x W1^T,  y = h W2^T,  e = (y - t) / n,  loss = |y - t|^2 / 2n       n samples, rows of X and T
//     grad W2 = e^T h,  grad W1 = (e F)^T x                                   F: the feedback of the rule
//
// All matrices are arrays of rows.
"use strict";

(globalThis.touchMath ??= {}).feedback = (() => {
  const SIZES = {samples: 64, inputs: 20, hidden: 10, outputs: 8};
  const START = 0.1; // standard deviation of the weights, and of a feedback of scale 1
  const DECAY = 0.02;

  const map = (a, f) => a.map((row, i) => row.map((value, j) => f(value, i, j)));
  const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const transposed = (a) => a[0].map((_, j) => a.map((row) => row[j]));
  const times = (a, b) => {
    const columns = transposed(b);
    return a.map((row) => columns.map((column) => dot(row, column)));
  };
  const inner = (a, b) => a.reduce((sum, row, i) => sum + dot(row, b[i]), 0);
  const degrees = (a, b) => {
    const cosine = inner(a, b) / Math.sqrt(inner(a, a) * inner(b, b));
    return (180 / Math.PI) * Math.acos(Math.min(1, Math.max(-1, cosine)));
  };

  // What goes back through layer 2, and whether the feedback B takes the steps of W2.
  const RULES = {
    bp: {name: "backpropagation", feedback: ({w2}) => w2},
    fa: {name: "feedback alignment", feedback: ({b}) => b},
    sign_sym: {
      name: "sign symmetry",
      feedback: ({w2, magnitude}) => map(w2, (w) => magnitude * Math.sign(w)),
    },
    kp: {name: "Kolen-Pollack", feedback: ({b}) => b, mirrors: true},
  };

  // Uniform numbers in (0, 1), the same for the same seed on every machine (mulberry32), and normal ones.
  function uniform(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), state | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 4294967296;
    };
  }

  function normal(draw, rows, columns, deviation) {
    const one = () => deviation * Math.sqrt(-2 * Math.log(draw())) * Math.cos(2 * Math.PI * draw());
    return Array.from({length: rows}, () => Array.from({length: columns}, one));
  }

  // The network before the first step. The feedback's scale is in units of the weights' start.
  function start(seed, scale) {
    const draw = uniform(seed);
    const {samples, inputs, hidden, outputs} = SIZES;
    const x = normal(draw, samples, inputs, 1);
    const target = times(x, transposed(normal(draw, outputs, inputs, 1 / Math.sqrt(inputs))));
    const [w1, w2] = [normal(draw, hidden, inputs, START), normal(draw, outputs, hidden, START)];
    const b = normal(draw, outputs, hidden, scale * START);
    const mean = w2.flat().reduce((sum, w) => sum + Math.abs(w), 0) / (outputs * hidden);
    return {x, target, w1, w2, b, magnitude: scale * mean};
  }

  function gradients(state, rule) {
    const {x, target, w1, w2} = state;
    const h = times(x, transposed(w1));
    const miss = map(times(h, transposed(w2)), (y, i, j) => y - target[i][j]);
    const e = map(miss, (value) => value / x.length);
    const signal = times(e, RULES[rule].feedback(state)); // what the hidden layer is told
    return {
      loss: inner(miss, miss) / 2 / x.length,
      signal,
      exact: times(e, w2),
      w1: times(transposed(signal), x),
      w2: times(transposed(e), h),
    };
  }

  // What is shown: the loss, and in degrees W2 to the feedback and the hidden error to the exact one.
  function measure(state, rule) {
    const {loss, signal, exact} = gradients(state, rule);
    return {
      loss,
      weights: degrees(state.w2, RULES[rule].feedback(state)),
      errors: degrees(signal, exact),
    };
  }

  function step(state, rule, rate) {
    const grads = gradients(state, rule);
    const moved = (w, grad) => map(w, (value, i, j) => value - rate * (grad[i][j] + DECAY * value));
    return {
      ...state,
      w1: moved(state.w1, grads.w1),
      w2: moved(state.w2, grads.w2),
      b: RULES[rule].mirrors ? moved(state.b, grads.w2) : state.b,
    };
  }

  return {RULES, DECAY, start, gradients, measure, step};
})();
