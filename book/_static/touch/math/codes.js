// A token h of two numbers takes the direction of its nearest code and keeps its length: q = |h| c. A norm
// follows, so that only the direction counts: loss = -<q, a> / |q| for a direction a.
"use strict";

(globalThis.touchMath ??= {}).codes = (() => {
  const inner = (a, b) => a[0] * b[0] + a[1] * b[1];
  const length = (v) => Math.hypot(...v);
  const scaled = (v, factor) => v.map((value) => factor * value);
  const plus = (a, b) => a.map((value, i) => value + b[i]);
  const unit = (v) => scaled(v, 1 / Math.max(length(v), 1e-12));
  const without = (v, part) => plus(v, scaled(part, -inner(v, part)));

  // K unit codes whose angles are uneven, as those of drawn ones are: multiples of the golden section.
  function codebook(K) {
    const angles = Array.from({length: K}, (_, k) => 2 * Math.PI * ((0.2 + k * 0.6180339887) % 1));
    return angles.map((angle) => [Math.cos(angle), Math.sin(angle)]);
  }

  function nearest(h, codes) {
    const products = codes.map((code) => inner(h, code));
    return products.indexOf(Math.max(...products));
  }

  const quantised = (h, codes) => scaled(codes[nearest(h, codes)], length(h));

  // What h gets for the gradient g of q: u is the direction of h, c its code.
  const BACKWARDS = {
    identity: (g) => g,
    tangent: (g, u) => without(g, u),
    rotation: (g, u, c) => {
      const w = unit(plus(u, c));
      return plus(g, plus(scaled(w, -2 * inner(g, w)), scaled(u, 2 * inner(g, c))));
    },
  };

  const loss = (h, codes, a) => -inner(codes[nearest(h, codes)], a);
  const atCode = (h, codes, a) => scaled(without(a, codes[nearest(h, codes)]), -1 / length(h));
  const gradient = (kind, h, codes, a) =>
    BACKWARDS[kind](atCode(h, codes, a), unit(h), codes[nearest(h, codes)]);
  const step = (kind, h, codes, a, rate) => plus(h, scaled(gradient(kind, h, codes, a), -rate));

  function cosine(a, b) {
    const sizes = length(a) * length(b);
    return sizes > 1e-9 ? inner(a, b) / sizes : NaN;
  }

  return {BACKWARDS, codebook, nearest, quantised, loss, atCode, gradient, step, cosine, length};
})();
