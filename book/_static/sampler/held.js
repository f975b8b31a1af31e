// A recorded model, as tools/sampler_models.py has written it, in the engine.
//
// { config, parameters }: a matrix is { bytes, scales }, row i of it scales[i] times integers of 8 bits; a
// vector is { floats }. All are base64 of little-endian numbers.
"use strict";

lab.define("held", (need) => {
  const {Model} = need("model");

  const buffer = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)).buffer;

  function fill({shape, data}, {floats, bytes, scales}) {
    if (floats !== undefined) return data.set(new Float32Array(buffer(floats)));
    const [whole, scale] = [new Int8Array(buffer(bytes)), new Float32Array(buffer(scales))];
    const [rows, width] = shape;
    if (whole.length !== data.length || scale.length !== rows)
      throw new RangeError(`${whole.length} numbers and ${scale.length} scales for ${shape}`);
    for (let i = 0; i < whole.length; i++) data[i] = scale[Math.floor(i / width)] * whole[i];
    return undefined;
  }

  // The model that `held` describes, for one sequence at a time.
  function restored({config, parameters}) {
    const model = new Model({...config, batch_size: 1}, "bp");
    const names = Object.keys(model.parameters);
    if (names.some((name) => !(name in parameters))) throw new Error(`a parameter is missing of ${names}`);
    for (const name of names) fill(model.parameters[name], parameters[name]);
    return model;
  }

  return {restored};
});
