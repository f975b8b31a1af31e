// Seeded random numbers: a stream is a function of its key, such as (seed, "batch", step), and of nothing
// else.
//
// The key is hashed (FNV-1a, four times with different starts) into the state of sfc32, Chris Doty-Humphrey's
// small fast counting generator. Normal numbers are Box and Muller's (1958). They are not torch's draws: that
// the engine computes what localgpt_core computes is tested on states and batches that Python exports.
"use strict";

lab.define("random", () => {
  function hash(text, start) {
    let h = start >>> 0;
    for (let i = 0; i < text.length; i++) h = Math.imul(h ^ text.charCodeAt(i), 16777619);
    return h >>> 0;
  }

  class Random {
    constructor(...key) {
      const text = key.join("\x1f");
      this.state = [2166136261, 0x9e3779b9, 0x85ebca6b, 0xc2b2ae35].map((start) => hash(text, start));
      this.spare = null;
      for (let i = 0; i < 16; i++) this.bits();
    }

    bits() {
      const s = this.state;
      const sum = (s[0] + s[1] + s[3]) | 0;
      s[3] = (s[3] + 1) | 0;
      s[0] = s[1] ^ (s[1] >>> 9);
      s[1] = (s[2] + (s[2] << 3)) | 0;
      s[2] = (((s[2] << 21) | (s[2] >>> 11)) + sum) | 0;
      return sum >>> 0;
    }

    // Uniform in [0, 1).
    uniform() { return this.bits() / 4294967296; }

    // An integer, 0 ... n - 1.
    below(n) { return Math.floor(this.uniform() * n); }

    // N(0, 1).
    normal() {
      if (this.spare !== null) {
        const spare = this.spare;
        this.spare = null;
        return spare;
      }
      const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
      const turn = 2 * Math.PI * this.uniform();
      this.spare = radius * Math.sin(turn);
      return radius * Math.cos(turn);
    }

    // Fill an array with N(0, std^2).
    fill(array, std = 1) {
      for (let i = 0; i < array.length; i++) array[i] = std * this.normal();
      return array;
    }
  }

  return {Random};
});
