// Two models that learn side by side: the same first weights, the same batches, a learning rule and a rate
// each.
//
// Sizes are those of preset tiny of localgpt_core (block 32, batch 8, 2 heads); width and depth can be
// chosen. The learning rate stays where its warm-up ends, since nobody says how long a run will be. What is
// measured, and every how many steps: EVERY. A report holds what is new since the last one.
"use strict";

lab.define("pair", (need) => {
  const {Run} = need("run");
  const {encode, batch} = need("batches");
  const EVERY = {train: 10, cosine: 20, validation: 100, sample: 200};
  const SIZES = {block_size: 32, n_head: 2, batch_size: 8};
  const TRAIN = {warmup: 30, min_lr_ratio: 1};
  const PROMPT = "\n";
  const SAMPLE = {length: 160, temperature: 0.8};

  class Pair {
    // settings: { models: [{ rule, lr, scale } twice], n_embd, n_layer, seed }; corpus: the module of that
    // name.
    constructor({models, n_embd, n_layer, seed}, corpus) {
      this.seed = seed;
      this.vocabulary = corpus.vocabulary;
      this.train = encode(corpus.train, corpus.vocabulary);
      this.validation = encode(corpus.validation, corpus.vocabulary);
      const config = {...SIZES, n_embd, n_layer, vocab_size: corpus.vocabulary.length};
      this.config = config;
      this.runs =
        models.map(({rule, lr, scale}) => new Run({config, rule, seed, scale, train: {lr, ...TRAIN}}));
      this.step = 0;
      this.losses = [[], []];
      this.found = {train: [], cosine: [], validation: []};
    }

    // Measure what is due before the next step.
    measure(all = false) {
      const due = (kind) => all || this.step % EVERY[kind] === 0;
      const each = (work) => this.runs.map((run) => (run.isFinite ? work(run) : NaN));
      const next = batch(this.train, this.config, this.seed, this.step);
      if (due("cosine")) {
        this.found.cosine.push([this.step, ...each((run) => run.cosine(next))]);
        this.found.angles = this.runs.map((run) => run.angles());
      }
      if (due("validation")) {
        this.found.validation.push([this.step, ...each((run) => run.evaluate(this.validation))]);
      }
      if (due("sample")) this.found.samples = each((run) => (run.isFinite ? this.sample(run) : ""));
      return next;
    }

    sample(run) {
      const {length, temperature} = SAMPLE;
      const ids = run.sample(encode(PROMPT, this.vocabulary), length, temperature, this.seed);
      return ids.slice(PROMPT.length).map((id) => this.vocabulary[id]).join("");
    }

    // Take one step of both; one that has diverged stays where it is.
    advance() {
      const next = this.measure();
      this.runs.forEach((run, i) => this.losses[i].push(run.isFinite ? run.step(next) : NaN));
      this.step += 1;
      if (this.step % EVERY.train === 0) this.close();
    }

    // Put the mean of the training losses since the last point into the report.
    close() {
      if (!this.losses[0].length) return;
      const means = this.losses.map((losses) => losses.reduce((a, b) => a + b, 0) / losses.length);
      this.found.train.push([this.step, ...means]);
      this.losses = [[], []];
    }

    get canGoOn() { return this.runs.some((run) => run.isFinite); }

    // What is new; with `all` everything is measured now, whether or not it is due.
    report(all = false) {
      if (all) {
        this.close();
        this.measure(true);
      }
      const found = {step: this.step, finite: this.runs.map((run) => run.isFinite), ...this.found};
      this.found = {train: [], cosine: [], validation: []};
      return found;
    }
  }

  return {Pair};
});
