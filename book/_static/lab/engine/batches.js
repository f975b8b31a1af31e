// Text as integers, training batches that are functions of (seed, step), and windows for an exact evaluation.
//
// A batch has `batch_size` windows of `block_size` characters that begin anywhere in the text; targets are
// the same windows one character later. An evaluation cuts a text into windows that do not overlap, and
// leaves out the rest.
"use strict";

lab.define("batches", (need) => {
  const {Random} = need("random");

  function encode(text, vocabulary) {
    const places = new Map([...vocabulary].map((letter, i) => [letter, i]));
    return Uint8Array.from(text, (letter) => {
      if (!places.has(letter)) throw new RangeError(`${JSON.stringify(letter)} is not in the vocabulary`);
      return places.get(letter);
    });
  }

  // Windows of T characters from each start: { ids, targets }, one row after the other.
  function windows(text, starts, T) {
    const ids = new Int32Array(starts.length * T);
    const targets = new Int32Array(starts.length * T);
    starts.forEach((start, row) => {
      ids.set(text.subarray(start, start + T), row * T);
      targets.set(text.subarray(start + 1, start + T + 1), row * T);
    });
    return {ids, targets};
  }

  function batch(text, {batch_size: B, block_size: T}, seed, step) {
    const random = new Random(seed, "batch", step);
    return windows(text, Array.from({length: B}, () => random.below(text.length - T)), T);
  }

  // All batches of an evaluation; of the windows that do not fill a batch nothing is measured.
  function* evaluation(text, {batch_size: B, block_size: T}) {
    const rows = Math.floor((text.length - 1) / T);
    for (let row = 0; row + B <= rows; row += B) {
      yield windows(text, Array.from({length: B}, (_, i) => (row + i) * T), T);
    }
  }

  return {encode, batch, evaluation};
});
