// The kernels (kernel/*.c, compiled into kernel.js) and the memory that their tensors lie in.
//
// A tensor is { at, data }: its address for a kernel, and its numbers as a typed array. A space has a fixed
// size, because growing would cut every array off from its numbers; tensors begin at multiples of 16 bytes,
// and are never freed: a model's space goes with the model.
"use strict";

lab.define("tensors", (need) => {
  const PAGE = 65536;
  let compiled = null;

  // The kernels once, for all spaces.
  function kernels() {
    if (compiled === null) {
      const bytes = Uint8Array.from(atob(need("kernel").base64), (letter) => letter.charCodeAt(0));
      compiled = new WebAssembly.Module(bytes);
    }
    return compiled;
  }

  class Space {
    constructor(bytes) {
      this.kernel = new WebAssembly.Instance(kernels()).exports;
      const memory = this.kernel.memory;
      this.next = (this.kernel.__heap_base.value + 15) & ~15;
      const missing = this.next + bytes - memory.buffer.byteLength;
      if (missing > 0) memory.grow(Math.ceil(missing / PAGE));
      this.buffer = memory.buffer;
    }

    take(Kind, n) {
      const at = this.next;
      this.next = (at + 4 * n + 15) & ~15;
      if (this.next > this.buffer.byteLength) throw new RangeError(`a space is full at ${at} bytes`);
      return {at, data: new Kind(this.buffer, at, n)};
    }

    floats(n) { return this.take(Float32Array, n); }

    ints(n) { return this.take(Int32Array, n); }
  }

  // The numbers start ... start + n of a tensor.
  function part(tensor, start, n) {
    return {at: tensor.at + 4 * start, data: tensor.data.subarray(start, start + n)};
  }

  return {Space, part};
});
