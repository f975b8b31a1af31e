// Take the steps of a file that test_lab_parity.py writes, and print what came out: see there.
import {readFileSync} from "node:fs";

import {load} from "./engine.mjs";

const numbers = ({kind, base64}) => {
  const bytes = Uint8Array.from(Buffer.from(base64, "base64"));
  return new (kind === "ints" ? Int32Array : Float32Array)(bytes.buffer);
};
const packed = (data) => ({
  kind: data instanceof Int32Array ? "ints" : "floats",
  base64: Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64"),
});

const given = JSON.parse(readFileSync(process.argv[2], "utf8"));
const lab = load();
const {Run} = lab.need("run");
const run = new Run({config: given.config, rule: given.rule, train: given.train});
const {model} = run;

// Every tensor of a state, by the name that it has in Python.
function* tensors() {
  for (const {name, data} of Object.values(model.parameters)) yield [name, data];
  const kind = given.rule === "sign_sym" ? "scale" : "weight";
  for (const {name, feedback} of model.layers) {
    if (feedback.data.length) yield [`${name}.feedback_${kind}`, feedback.data];
  }
}
const state = () => Object.fromEntries([...tensors()].map(([name, data]) => [name, packed(data)]));
const gradients = (from) => Object.fromEntries(Object.values(model.parameters).map(({name, start, n}) => {
  return [name, packed(from.data.slice(start, start + n))];
}));

const names = [...tensors()].map(([name]) => name).sort();
if (names.join() !== Object.keys(given.state).sort().join()) throw new Error(`the states differ: ${names}`);
for (const [name, data] of tensors()) data.set(numbers(given.state[name]));
const draws = given.probes.map(numbers);
run.probes = () => ({fill: (array) => array.set(draws.shift())});

const batches = given.batches.map(([ids, targets]) => ({ids: numbers(ids), targets: numbers(targets)}));
const losses = [run.step(batches[0])];
const first = gradients(model.grads);
for (const batch of batches.slice(1)) losses.push(run.step(batch));
const after = state();
const cosine = run.cosine(batches[0]);
console.log(JSON.stringify({
  losses,
  gradients: first,
  state: after,
  cosine,
  angles: run.angles(),
  exact: gradients(run.exact),
}));
