// LocalGPT in float32: its parameters, forward pass and backward pass.
//
//     x = tok_emb[ids] + pos_emb
//     per block:  x = x + o_proj(attend(q_proj, k_proj, v_proj of ln1(x)))   sigmoid attention, bias -ln T
//                 x = x + proj(gelu(fc(ln2(x))))   exact GELU, hidden width 4 C
//     logits = head(ln_f(x))                                                 not tied to tok_emb, no biases
//
// with B sequences of T characters, N = B T tokens, width C and V characters. It is the architecture of
// localgpt_core at its defaults without dropout; names of sizes and of parameters are those of LocalGPTConfig
// and the state_dict.
"use strict";

lab.define("model", (need) => {
  const {Space, part} = need("tensors");
  const {Random} = need("random");
  const {RULES, PROBES} = need("rules");
  const INIT_STD = 0.02;

  // All parameters in their order in memory: matrices first, which decay, the layers' weights in one piece.
  function shapes({vocab_size: V, block_size: T, n_layer: L, n_embd: C}) {
    const layers = [];
    for (let i = 0; i < L; i++) {
      for (const name of ["q_proj", "k_proj", "v_proj", "o_proj"])
        layers.push([`blocks.${i}.attn.${name}`, C, C]);
      layers.push([`blocks.${i}.mlp.fc`, 4 * C, C], [`blocks.${i}.mlp.proj`, C, 4 * C]);
    }
    const norms = ["ln_f"];
    for (let i = 0; i < L; i++) norms.push(`blocks.${i}.ln1`, `blocks.${i}.ln2`);
    return {
      matrices: [["tok_emb", V, C], ["pos_emb", T, C], ...layers, ["head", V, C]],
      vectors: norms.flatMap((name) => [[`${name}.weight`, C], [`${name}.bias`, C]]),
    };
  }

  class Model {
    // config: vocab_size, block_size, n_layer, n_head, n_embd, batch_size; rule: a name of RULES.
    constructor(config, rule, {seed = 1, scale = 1} = {}) {
      const {vocab_size: V, n_embd: C, n_layer: L, n_head: H} = config;
      if (C % 4 || C % H) throw new RangeError(`n_embd ${C}: allowed are multiples of 4 and of n_head ${H}`);
      if (!(rule in RULES))
        throw new RangeError(`rule ${rule}: allowed are ${Object.keys(RULES).join(", ")}`);
      this.config = config;
      this.rule = RULES[rule];
      this.weights = 12 * C * C * L + V * C;
      const tokens = config.batch_size * config.block_size;
      this.space = new Space(4 * (9 * this.weights + (L + 2) * tokens * (20 * C + 4 * V)) + (8 << 20));
      this.kernel = this.space.kernel;
      this.layOut();
      this.draw(seed, scale);
      this.activations(tokens);
    }

    layOut() {
      const {matrices, vectors} = shapes(this.config);
      const V = this.config.vocab_size;
      const all = [...matrices.map(([name, ...shape]) => [`${name}.weight`, ...shape]), ...vectors];
      const size = (shape) => shape.reduce((a, b) => a * b, 1);
      const count = all.reduce((sum, [, ...shape]) => sum + size(shape), 0);
      this.values = this.space.floats(count);
      this.grads = this.space.floats(count);
      this.parameters = {};
      let start = 0;
      for (const [name, ...shape] of all) {
        const n = size(shape);
        this.parameters[name] = {name, start, n, shape, ...part(this.values, start, n)};
        if (shape.length === 2) this.decaying = start + n;
        start += n;
      }
      this.layers = matrices.slice(2).map(([name, outputs, inputs]) => {
        return {name, outputs, inputs, weight: this.parameters[`${name}.weight`], isHead: name === "head"};
      });
      this.byName = Object.fromEntries(this.layers.map((layer) => [layer.name, layer]));
      const sizes = this.layers.map((layer) => this.rule.size(layer, V));
      this.feedback = this.space.floats(sizes.reduce((sum, n) => sum + ((n + 3) & ~3), 0));
      start = 0;
      this.layers.forEach((layer, i) => {
        layer.feedback = part(this.feedback, start, sizes[i]);
        start += (sizes[i] + 3) & ~3;
      });
      const widest = 4 * this.config.n_embd;
      this.tools = {
        kernel: this.kernel,
        matrix: this.space.floats(Math.max(...this.layers.map((layer) => layer.weight.n))),
        probes: this.space.floats(PROBES * widest),
        response: this.space.floats(PROBES * Math.max(widest, V)),
        predicted: this.space.floats(PROBES * Math.max(widest, V)),
      };
    }

    // N(0, 0.02^2), smaller by sqrt(2 L) where a layer writes into the stream; norms start as the identity.
    draw(seed, scale) {
      const weights = new Random(seed, "weights");
      const feedback = new Random(seed, "feedback");
      for (const {name, shape, data} of Object.values(this.parameters)) {
        if (shape.length === 1)
          data.fill(name.endsWith(".weight") ? 1 : 0);
        else {
          const writes = /(o_proj|mlp\.proj)\.weight$/.test(name);
          weights.fill(data, writes ? INIT_STD / Math.sqrt(2 * this.config.n_layer) : INIT_STD);
        }
      }
      if (this.rule.start)
        for (const layer of this.layers) this.rule.start(layer, feedback, scale);
    }

    activations(N) {
      const {n_embd: C, n_head: H, vocab_size: V, block_size: T, n_layer: L, batch_size: B} = this.config;
      const floats = (n) => this.space.floats(n);
      const norm = () => ({y: floats(N * C), z: floats(N * C), inverse: floats(N)});
      const attention = B * H * T * ((T + 3) & ~3);
      const block = () => ({
        ln1: norm(),
        q: floats(N * C),
        k: floats(N * C),
        v: floats(N * C),
        weights: floats(attention),
        mixed: floats(N * C),
        ln2: norm(),
        hidden: floats(N * 4 * C),
        active: floats(N * 4 * C),
      });
      this.kept = {
        ids: this.space.ints(N),
        targets: this.space.ints(N),
        x: floats(N * C),
        lnF: norm(),
        logits: floats(N * V),
        error: floats(N * V),
        blocks: Array.from({length: L}, block),
      };
      this.flow = {
        stream: floats(N * C),
        input: floats(N * C),
        hidden: floats(N * 4 * C),
        mixed: floats(N * C),
        q: floats(N * C),
        k: floats(N * C),
        v: floats(N * C),
        scores: floats(attention),
      };
    }

    // y = beta y + x W^T.
    linear(name, x, y, beta = 0) {
      const {inputs, outputs, weight} = this.byName[name];
      this.kernel.gemm_nt(this.N, outputs, inputs, 1, x.at, inputs, weight.at, inputs, beta, y.at, outputs);
    }

    norm(name, {y, z, inverse}) {
      const [gain, shift] = [this.parameters[`${name}.weight`], this.parameters[`${name}.bias`]];
      const C = this.config.n_embd;
      this.kernel.layer_norm(y.at, z.at, inverse.at, this.kept.x.at, gain.at, shift.at, this.N, C);
    }

    // What block i does to the stream behind its attention.
    finish({mixed, ln2, hidden, active}, i) {
      this.linear(`blocks.${i}.attn.o_proj`, mixed, this.kept.x, 1);
      this.norm(`blocks.${i}.ln2`, ln2);
      this.linear(`blocks.${i}.mlp.fc`, ln2.y, hidden);
      this.kernel.gelu(active.at, hidden.at, this.N * 4 * this.config.n_embd);
      this.linear(`blocks.${i}.mlp.proj`, active, this.kept.x, 1);
    }

    // Leave the logits (N x V) of B sequences of T ids; with targets also e = dloss/dlogits, and return the
    // loss.
    forward(ids, targets, B, T) {
      const {kept, kernel, config, parameters} = this;
      const {n_embd: C, n_head: H, vocab_size: V} = config;
      this.N = B * T;
      Object.assign(this, {B, T});
      kept.ids.data.set(ids);
      const [token, position] = [parameters["tok_emb.weight"], parameters["pos_emb.weight"]];
      kernel.embed(kept.x.at, kept.ids.at, token.at, position.at, this.N, T, C);
      kept.blocks.forEach((block, i) => {
        const {ln1, q, k, v, weights, mixed} = block;
        this.norm(`blocks.${i}.ln1`, ln1);
        for (const [name, y] of Object.entries({q, k, v}))
          this.linear(`blocks.${i}.attn.${name}_proj`, ln1.y, y);
        const shift = -Math.log(config.block_size);
        kernel.attend(mixed.at, weights.at, q.at, k.at, v.at, B, T, H, C / H, shift);
        this.finish(block, i);
      });
      this.norm("ln_f", kept.lnF);
      this.linear("head", kept.lnF.y, kept.logits);
      if (targets === null) return null;
      kept.targets.data.set(targets);
      return kernel.cross_entropy(kept.error.at, kept.logits.at, kept.targets.at, this.N, V);
    }

    // Put the gradients of the last forward pass into `grads`, by this model's rule or another (RULES.bp:
    // exact).
    backward(grads = this.grads, rule = this.rule) {
      const {kept, flow, kernel, config} = this;
      const {n_embd: C, n_head: H} = config;
      const {stream, input, hidden, mixed, q, k, v, scores} = flow;
      grads.data.fill(0);
      stream.data.fill(0);
      this.linearBack(grads, rule, "head", kept.lnF.y, kept.error, input);
      this.normBack(grads, "ln_f", kept.lnF);
      for (let i = config.n_layer - 1; i >= 0; i--) {
        const block = kept.blocks[i];
        this.linearBack(grads, rule, `blocks.${i}.mlp.proj`, block.active, stream, hidden);
        kernel.gelu_backward(hidden.at, block.hidden.at, this.N * 4 * C);
        this.linearBack(grads, rule, `blocks.${i}.mlp.fc`, block.ln2.y, hidden, input);
        this.normBack(grads, `blocks.${i}.ln2`, block.ln2);
        this.linearBack(grads, rule, `blocks.${i}.attn.o_proj`, block.mixed, stream, mixed);
        const forward = [block.weights, block.q, block.k, block.v].map((tensor) => tensor.at);
        kernel.attend_backward(q.at, k.at, v.at, scores.at, mixed.at, ...forward, this.B, this.T, H, C / H);
        Object.entries({q, k, v}).forEach(([name, grad], place) => {
          const beta = place === 0 ? 0 : 1;
          this.linearBack(grads, rule, `blocks.${i}.attn.${name}_proj`, block.ln1.y, grad, input, beta);
        });
        this.normBack(grads, `blocks.${i}.ln1`, block.ln1);
      }
      const [token, position] = ["tok_emb.weight", "pos_emb.weight"].map((name) => this.gradAt(grads, name));
      kernel.embed_backward(token, position, kept.ids.at, stream.at, this.N, this.T, C);
    }

    gradAt(grads, name) { return grads.at + 4 * this.parameters[name].start; }

    // grad_W = g^T x, and grad_x = error F + beta grad_x: the one place where a rule acts.
    linearBack(grads, rule, name, x, g, gradX, beta = 0) {
      const layer = this.byName[name];
      const {inputs, outputs} = layer;
      const gradW = this.gradAt(grads, `${name}.weight`);
      this.kernel.gemm_tn(outputs, inputs, this.N, 1, g.at, outputs, x.at, inputs, 0, gradW, inputs);
      const [error, width] =
        rule.error === "output" ? [this.kept.error, this.config.vocab_size] : [g, outputs];
      const feedback = rule.feedback(layer, this.tools);
      this.kernel.gemm_nn(
        this.N, inputs, width, 1, error.at, width, feedback, inputs, beta, gradX.at, inputs);
    }

    // The gradient in flow.input goes back through a norm and is added to that of the stream.
    normBack(grads, name, {z, inverse}) {
      const gains = [this.gradAt(grads, `${name}.weight`), this.gradAt(grads, `${name}.bias`)];
      const {stream, input} = this.flow;
      const gain = this.parameters[`${name}.weight`].at;
      this.kernel.layer_norm_backward(
        stream.at, ...gains, input.at, z.at, inverse.at, gain, this.N, this.config.n_embd);
    }
  }

  return {Model};
});
