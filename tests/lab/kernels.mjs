// Play the kernels on the cases of test_lab_kernels.py, and print what they give.
import {readFileSync} from "node:fs";

import {load} from "./engine.mjs";

const lab = load();
const {Space} = lab.need("tensors");
const given = JSON.parse(readFileSync(process.argv[2], "utf8"));
const numbers = ({base64}) => new Float32Array(Uint8Array.from(Buffer.from(base64, "base64")).buffer);
const packed = (data) => ({
  kind: "floats",
  base64: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64"),
});
const space = new Space(16 << 20);
const {kernel} = space;

function put(entry) {
  const data = numbers(entry);
  const tensor = space.floats((data.length + 3) & ~3);
  tensor.data.set(data);
  return {at: tensor.at, data: tensor.data.subarray(0, data.length)};
}

const products = given.products.map(({layout, m, n, k, lda, ldb, ldc, alpha, beta, a, b, c}) => {
  const [left, right, out] = [a, b, c].map(put);
  kernel[`gemm_${layout}`](m, n, k, alpha, left.at, lda, right.at, ldb, beta, out.at, ldc);
  return packed(out.data);
});
const x = put(given.x);
const y = put(given.x);
kernel.gelu(y.at, x.at, x.data.length);
const slope = put(given.x);
slope.data.fill(1);
kernel.gelu_backward(slope.at, x.at, x.data.length);
console.log(JSON.stringify({products, gelu: packed(y.data), slope: packed(slope.data)}));
