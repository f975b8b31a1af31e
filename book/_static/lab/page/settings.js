// What a reader can set, its default, and its form in the address:
// #a=fa,0.003,1&b=bp,0.003,1&width=32&blocks=2&seed=1.
//
// A model is rule, learning rate, scale of the feedback's start. What an address says and is not allowed is
// replaced by the default, so that every address opens a lab that runs. With &start=1 training begins by
// itself.
"use strict";

lab.define("settings", (need) => {
  const {RULES} = need("rules");
  const CHOICES = {
    rule: Object.keys(RULES),
    lr: [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2],
    scale: [0, 0.1, 0.3, 1, 3, 10, 30],
    n_embd: [32, 64],
    n_layer: [1, 2, 3, 4],
  };
  const DEFAULTS = {
    models: [{rule: "bp", lr: 3e-3, scale: 1}, {rule: "fa", lr: 3e-3, scale: 1}],
    n_embd: 32,
    n_layer: 2,
    seed: 1,
  };
  const LARGEST_SEED = 9999;

  const chosen = (name, value, otherwise) => (CHOICES[name].includes(value) ? value : otherwise);

  function model(text, otherwise) {
    const [rule, lr, scale] = (text ?? "").split(",");
    return {
      rule: chosen("rule", rule, otherwise.rule),
      lr: chosen("lr", Number(lr), otherwise.lr),
      scale: chosen("scale", scale === undefined ? NaN : Number(scale), otherwise.scale),
    };
  }

  function parse(hash) {
    const given = new URLSearchParams(hash.replace(/^#/, ""));
    const seed = Number(given.get("seed") ?? NaN);
    return {
      models: DEFAULTS.models.map((otherwise, i) => model(given.get("ab"[i]), otherwise)),
      n_embd: chosen("n_embd", Number(given.get("width")), DEFAULTS.n_embd),
      n_layer: chosen("n_layer", Number(given.get("blocks")), DEFAULTS.n_layer),
      seed: Number.isInteger(seed) && seed >= 0 && seed <= LARGEST_SEED ? seed : DEFAULTS.seed,
      start: given.get("start") === "1",
    };
  }

  function format({models, n_embd, n_layer, seed}) {
    const [a, b] = models.map(({rule, lr, scale}) => `${rule},${lr},${scale}`);
    return `#a=${a}&b=${b}&width=${n_embd}&blocks=${n_layer}&seed=${seed}`;
  }

  return {CHOICES, LARGEST_SEED, parse, format};
});
