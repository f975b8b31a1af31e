// AdamW (Loshchilov and Hutter 2019) with global clipping and nanoGPT's constants, as
// localgpt_core/training/step.py:
//
//     lr(s) = lr (s + 1) / (warmup + 1)                                               for s < warmup
//             lr (m + (1 - m) (1 + cos(pi (s - warmup) / (steps - warmup))) / 2)     after, m = min_lr_ratio
//
// Matrices decay, norms do not. Feedback that mirrors (Kolen-Pollack) is held beside the weights and is
// handed their clipped gradient, with moments of its own; its gradient does not count for the clipping.
"use strict";

lab.define("optimizer", (need) => {
  const {part} = need("tensors");
  const DEFAULTS = {
    lr: 1e-3,
    min_lr_ratio: 0.1,
    warmup: 30,
    steps: 300,
    beta1: 0.9,
    beta2: 0.99,
    weight_decay: 0.1,
    grad_clip: 1,
  };
  const EPS = 1e-8;

  function learningRate(step, {lr, warmup, steps, min_lr_ratio: least}) {
    if (step < warmup) return (lr * (step + 1)) / (warmup + 1);
    const share = Math.min((step - warmup) / Math.max(1, steps - warmup), 1);
    return lr * (least + (1 - least) * 0.5 * (1 + Math.cos(Math.PI * share)));
  }

  class AdamW {
    constructor(model, options) {
      this.model = model;
      this.options = {...DEFAULTS, ...options};
      this.steps = 0;
      const {values, grads, decaying, space} = model;
      const whole = (tensor, start, end) => part(tensor, start, end - start);
      const count = values.data.length;
      this.groups = [
        {values: whole(values, 0, decaying), grads: whole(grads, 0, decaying), decays: true},
        {values: whole(values, decaying, count), grads: whole(grads, decaying, count), decays: false},
      ];
      if (model.rule.mirrors) {
        const first = model.layers[0].weight.start;
        this.groups.push({values: model.feedback, grads: whole(grads, first, decaying), decays: true});
      }
      for (const group of this.groups) {
        group.moments = [space.floats(group.values.data.length), space.floats(group.values.data.length)];
      }
    }

    // Take the step of the gradients that lie in model.grads; its number counts from 0 for the schedule.
    step() {
      const {kernel, grads} = this.model;
      const {beta1, beta2, weight_decay: decay, grad_clip: most} = this.options;
      const lr = learningRate(this.steps, this.options);
      this.steps += 1;
      const norm = Math.sqrt(kernel.dot(grads.at, grads.at, grads.data.length));
      const clip = most > 0 ? Math.min(1, most / (norm + 1e-6)) : 1;
      const [correction1, correction2] = [beta1, beta2].map((beta) => 1 - beta ** this.steps);
      for (const {values, grads: g, moments, decays} of this.groups) {
        const [first, second] = moments.map((tensor) => tensor.at);
        const constants = [lr, beta1, beta2, EPS, decays ? decay : 0, correction1, correction2, clip];
        kernel.adamw(values.at, g.at, first, second, values.data.length, ...constants);
      }
    }
  }

  return {AdamW, learningRate};
});
