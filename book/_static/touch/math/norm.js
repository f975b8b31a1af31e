// LayerNorm of three numbers and its backward pass with parts left out; the loss is -<z, a> behind it.
//
//     z = (x - mean x) / sigma,  sigma^2 = mean((x - mean x)^2) + eps,  v = -a the gradient that arrives at z
"use strict";

(globalThis.touchMath ??= {}).norm = (() => {
  const EPS = 1e-5;
  const mean = (x) => x.reduce((sum, value) => sum + value, 0) / x.length;
  const inner = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
  const length = (x) => Math.sqrt(inner(x, x));

  function normalise(x) {
    const centre = mean(x);
    const sigma = Math.sqrt(mean(x.map((value) => (value - centre) ** 2)) + EPS);
    return {z: x.map((value) => (value - centre) / sigma), sigma};
  }

  const centred = (v) => v.map((value) => value - mean(v));

  // By the name of the chapter: the gradient of x for the gradient v of z.
  const BACKWARDS = {
    exact: (v, {z, sigma}) => centred(v).map((value, i) => (value - (z[i] * inner(v, z)) / z.length) / sigma),
    "no radial term": (v, {sigma}) => centred(v).map((value) => value / sigma),
    identity: (v) => v,
  };

  const loss = (x, a) => -inner(normalise(x).z, a);
  const gradient = (kind, x, a) => BACKWARDS[kind](a.map((value) => -value), normalise(x));
  const step = (kind, x, a, rate) => {
    const grad = gradient(kind, x, a);
    return x.map((value, i) => value - rate * grad[i]);
  };

  function cosine(a, b) {
    const sizes = length(a) * length(b);
    return sizes > 1e-9 ? inner(a, b) / sizes : NaN;
  }

  // The plane of the vectors that sum to zero: coordinates in an orthonormal basis, and back.
  const BASIS = [[1, -1, 0], [1, 1, -2]].map((v) => v.map((value) => value / length(v)));
  const toPlane = (x) => BASIS.map((v) => inner(v, x));
  const fromPlane = ([p, q]) => BASIS[0].map((value, i) => p * value + q * BASIS[1][i]);

  return {BACKWARDS, normalise, loss, gradient, step, cosine, length, toPlane, fromPlane};
})();
