// The learning rules: what error a layer y = x W^T uses, what matrix it goes back through, how that matrix
// moves.
//
// Under every rule a layer with input x (N x in) and gradient g (N x out) at its output has the same
//
//     grad_W = g^T x          grad_x = error F
//
// and a rule is one entry here:
//
//     error     "local": error = g;  "output": error = e = dloss/dlogits (N x V), the same for all layers
//     start     draws the feedback of a layer when a model is built; null if the rule keeps none
//     size      how many numbers that is
//     feedback  returns the address of F, (out x in) or (V x in)
//     before    moves the feedback before the forward pass of a step; null if nothing does
//     mirrors   whether the feedback takes the optimiser's steps for grad_W as W does
//     resembles whether F has the place and the shape of W, so that there is an angle between them
//
// A layer is { weight, feedback, inputs, outputs, isHead }; `tools` has the kernels, a stream of random
// numbers and room for what is not kept. The head's e is its g. Sources: localgpt_core/rules and
// matrices/grape.py, which the tests compare with, to the last formula.
"use strict";

lab.define("rules", () => {
  const FEEDBACK_STD = 0.02;
  const PROBES = 32;

  const asWeight = (layer) => layer.inputs * layer.outputs;
  const gaussian = (layer, random, scale) => random.fill(layer.feedback.data, FEEDBACK_STD * scale);
  const kept = (layer) => layer.feedback.at;
  const plain = {error: "local", size: () => 0, start: null, before: null, mirrors: false, resembles: true};

  // sign(W) times one number per layer, the mean of |W| when the model was built.
  function meanMagnitude(layer) {
    layer.feedback.data[0] = layer.weight.data.reduce((sum, w) => sum + Math.abs(w), 0) / asWeight(layer);
  }

  function signed(layer, {kernel, matrix}) {
    kernel.signs(matrix.at, layer.weight.at, layer.feedback.data[0], asWeight(layer));
    return matrix.at;
  }

  // GrAPE: n probes v ~ N(0, I) give y = v W^T, a forward pass, and v B^T of the feedback. With u the
  // directions of y, u_hat those of v B^T and c their cosines, one step on the mean of 1 - c,
  //
  //     B <- B |y| / |v B^T| + rate |y| / sqrt n / n (u - c u_hat)^T v,      rate = n / (n + in + 1).
  //
  // A layer that gives no response is left as it is.
  function align(layer, {kernel, random, probes, response, predicted}) {
    const {inputs, outputs, weight, feedback} = layer;
    const n = PROBES;
    random.fill(probes.data.subarray(0, n * inputs));
    for (const [result, matrix] of [[response, weight], [predicted, feedback]]) {
      kernel.gemm_nt(n, outputs, inputs, 1, probes.at, inputs, matrix.at, inputs, 0, result.at, outputs);
    }
    const y = response.data;
    const z = predicted.data;
    const normsY = new Float64Array(n);
    const normsZ = new Float64Array(n);
    const products = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      for (let j = i * outputs; j < (i + 1) * outputs; j++) {
        normsY[i] += y[j] * y[j];
        normsZ[i] += z[j] * z[j];
        products[i] += y[j] * z[j];
      }
    }
    const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
    const total = Math.sqrt(sum(normsY));
    const totalPredicted = Math.sqrt(sum(normsZ));
    if (!(total > 1e-30 && totalPredicted > 1e-30)) return;
    const step = (n / (n + inputs + 1)) * (total / Math.sqrt(n) / n);
    for (let i = 0; i < n; i++) {
      const a = Math.sqrt(normsY[i]) || 1;
      const b = Math.sqrt(normsZ[i]) || 1;
      const along = products[i] / (a * b * b);
      for (let j = i * outputs; j < (i + 1) * outputs; j++) y[j] = y[j] / a - along * z[j];
    }
    const scale = total / totalPredicted;
    for (let i = 0; i < feedback.data.length; i++) feedback.data[i] *= scale;
    kernel.gemm_tn(outputs, inputs, n, step, response.at, outputs, probes.at, inputs, 1, feedback.at, inputs);
  }

  const RULES = {
    bp: {...plain, name: "backpropagation", feedback: (layer) => layer.weight.at},
    fa: {...plain, name: "feedback alignment", size: asWeight, start: gaussian, feedback: kept},
    sign_sym: {...plain, name: "sign symmetry", size: () => 1, start: meanMagnitude, feedback: signed},
    dfa: {
      ...plain,
      name: "direct feedback alignment",
      error: "output",
      size: (layer, vocabSize) => vocabSize * layer.inputs,
      start: gaussian,
      feedback: kept,
      resembles: false,
    },
    kp: {...plain, name: "Kolen-Pollack", size: asWeight, start: gaussian, feedback: kept, mirrors: true},
    grape: {
      ...plain,
      name: "GrAPE, layer by layer",
      size: asWeight,
      start: gaussian,
      feedback: kept,
      before: align,
    },
  };

  // Whether the rule's feedback is drawn at random, at a size that can be chosen.
  const isDrawn = (rule) => RULES[rule].start === gaussian;

  return {RULES, PROBES, isDrawn};
});
