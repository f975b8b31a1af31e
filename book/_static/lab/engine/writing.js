// A text that a model writes, character by character.
//
// What is seen of a text longer than the context of T characters: its last T/2 to T. A full context is cut to
// its later half, which is one pass over T/2 characters, and grows again: a character more is one row, which
// reads the keys and values that are kept. It is window "halves" of localgpt_core's sampling, and at four layers
// of width 128 three times as fast as T rows for each character (Node 20, 342 against 110 a second): a product
// with a single row is what the kernels are worst at.
"use strict";

lab.define("writing", (need) => {
  const {Random} = need("random");

  // The logits of one more character behind the T of the last pass over one sequence, in their first row.
  function append(model, id) {
    const {kept, kernel, config, parameters, T} = model;
    const {n_embd: C, block_size} = config;
    if (model.B !== 1 || T >= block_size) throw new RangeError(`${model.B} x ${T}: no room for a character`);
    const row = ({at}) => ({at: at + 4 * T * C});
    model.N = 1;
    kept.ids.data[0] = id;
    const [token, position] = [parameters["tok_emb.weight"], row(parameters["pos_emb.weight"])];
    kernel.embed(kept.x.at, kept.ids.at, token.at, position.at, 1, 1, C);
    kept.blocks.forEach((block, i) => {
      model.norm(`blocks.${i}.ln1`, block.ln1);
      for (const [name, y] of Object.entries({q: block.q, k: row(block.k), v: row(block.v)}))
        model.linear(`blocks.${i}.attn.${name}_proj`, block.ln1.y, y);
      attend(block, T + 1, config);
      model.finish(block, i);
    });
    model.norm("ln_f", kept.lnF);
    model.linear("head", kept.lnF.y, kept.logits);
    model.T = T + 1;
  }

  // What the query in the first row takes from the first n values.
  function attend({q, k, v, mixed}, n, {n_embd: C, n_head: H, block_size}) {
    const [d, bias] = [C / H, -Math.log(block_size)];
    mixed.data.fill(0, 0, C);
    for (let start = 0; start < C; start += d)
      for (let key = 0; key < n; key++) {
        let score = 0;
        for (let c = start; c < start + d; c++) score += q.data[c] * k.data[key * C + c];
        const weight = 1 / (1 + Math.exp(-(score / Math.sqrt(d) + bias)));
        for (let c = start; c < start + d; c++) mixed.data[c] += weight * v.data[key * C + c];
      }
  }

  // How many of n characters are seen with a context of T.
  function seen(n, T) {
    const half = Math.ceil(T / 2);
    return n <= T ? n : half + (n - T - 1) % (T - half + 1);
  }

  class Writer {
    // prompt: ids, at least one.
    constructor(model, prompt, temperature, seed) {
      Object.assign(this, {model, temperature, random: new Random(seed, "sample"), text: [...prompt]});
      this.read();
    }

    read() {
      const ids = this.text.slice(-seen(this.text.length, this.model.config.block_size));
      this.model.forward(ids, null, 1, ids.length);
      this.last = ids.length - 1;
    }

    // The logits of the character that comes next.
    get logits() {
      const V = this.model.config.vocab_size;
      return this.model.kept.logits.data.subarray(this.last * V, (this.last + 1) * V);
    }

    // Draw a character, add it to the text and return it.
    next() {
      const largest = Math.max(...this.logits);
      const shares = Array.from(this.logits, (logit) => Math.exp((logit - largest) / this.temperature));
      let rest = this.random.uniform() * shares.reduce((a, b) => a + b, 0);
      const id = Math.max(0, shares.findIndex((share) => (rest -= share) < 0));
      this.add(id);
      return id;
    }

    add(id) {
      this.text.push(id);
      if (this.model.T === this.model.config.block_size) return this.read();
      append(this.model, id);
      this.last = 0;
      return undefined;
    }
  }

  return {Writer};
});
