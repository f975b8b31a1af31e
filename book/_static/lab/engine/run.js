// One model in training: a step, and what the page shows of it.
//
// A step is that of localgpt_core/training/step.py: feedback that follows its weight moves first, then
// forward pass, the rule's backward pass, clipping, AdamW. Nothing that is measured changes the run.
//
// Measured with tests/lab/bench.mjs, Node 20, per second of processor time on a cloud machine's core: 220
// steps of the tiny preset under each rule (GrAPE 156), 40 of four layers of width 64 (GrAPE 30), about 13
// GFLOP/s in its products. These take about half the time, so that a faster kernel would gain little more.
"use strict";

lab.define("run", (need) => {
  const {Random} = need("random");
  const {RULES} = need("rules");
  const {Model} = need("model");
  const {AdamW} = need("optimizer");
  const {evaluation} = need("batches");
  const {Writer} = need("writing");

  const degrees = (cosine) => (180 / Math.PI) * Math.acos(Math.max(-1, Math.min(1, cosine)));

  class Run {
    // config as Model; rule, seed, scale of the feedback's start; train: fields of AdamW's options.
    constructor({config, rule, seed = 1, scale = 1, train = {}}) {
      this.seed = seed;
      this.rule = RULES[rule];
      this.model = new Model(config, rule, {seed, scale});
      this.optimizer = new AdamW(this.model, train);
      this.exact = this.model.space.floats(this.model.grads.data.length);
      this.isFinite = true;
      this.probes = () => new Random(this.seed, "probes", this.steps);
    }

    get steps() { return this.optimizer.steps; }

    // Move what the rule moves before a forward pass.
    align() {
      if (!this.rule.before) return;
      this.model.tools.random = this.probes();
      for (const layer of this.model.layers) this.rule.before(layer, this.model.tools);
    }

    // Take one step and return its loss.
    step({ids, targets}) {
      this.align();
      const loss = this.gradients({ids, targets});
      this.isFinite = Number.isFinite(loss);
      if (this.isFinite) this.optimizer.step();
      return loss;
    }

    gradients({ids, targets}) {
      const {batch_size: B, block_size: T} = this.model.config;
      const loss = this.model.forward(ids, targets, B, T);
      this.model.backward();
      return loss;
    }

    // The mean loss over the windows of a text.
    evaluate(text) {
      const {config} = this.model;
      let [total, count] = [0, 0];
      for (const {ids, targets} of evaluation(text, config)) {
        total += this.model.forward(ids, targets, config.batch_size, config.block_size);
        count += 1;
      }
      return total / count;
    }

    // The cosine between the rule's gradient of all weights inside the blocks and the exact one, on a batch.
    cosine(batch) {
      this.gradients(batch);
      const {model, exact} = this;
      model.backward(exact, RULES.bp);
      const first = model.layers[0].weight.start;
      const n = model.byName.head.weight.start - first;
      const [a, b] = [model.grads, exact].map((grads) => grads.at + 4 * first);
      const norms = model.kernel.dot(a, a, n) * model.kernel.dot(b, b, n);
      return norms > 0 ? model.kernel.dot(a, b, n) / Math.sqrt(norms) : NaN;
    }

    // The angle in degrees between the feedback of each layer and its weight; none where they have no common
    // shape.
    angles() {
      const {layers, kernel, tools} = this.model;
      const apart = this.rule.name !== RULES.bp.name;
      return layers.filter((layer) => apart && (this.rule.resembles || layer.isHead)).map((layer) => {
        const [a, b, n] = [this.rule.feedback(layer, tools), layer.weight.at, layer.weight.n];
        const norms = kernel.dot(a, a, n) * kernel.dot(b, b, n);
        return {name: layer.name, degrees: norms > 0 ? degrees(kernel.dot(a, b, n) / Math.sqrt(norms)) : NaN};
      });
    }

    // Continue `prompt` (ids) by n characters, drawn at a temperature.
    sample(prompt, n, temperature, seed) {
      const writer = new Writer(this.model, prompt, temperature, seed);
      for (let i = 0; i < n; i++) writer.next();
      return writer.text;
    }
  }

  return {Run};
});
