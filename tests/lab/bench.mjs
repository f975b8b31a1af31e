// Steps a second of processor time of the lab's engine, and what share of the time each kernel takes:
//
//     node tests/lab/bench.mjs [n_embd] [n_layer] [seconds]
import {load} from "./engine.mjs";

const lab = load();
const {Run} = lab.need("run");
const {RULES} = lab.need("rules");
const {batch} = lab.need("batches");
const {Random} = lab.need("random");
const [n_embd, n_layer, seconds] = [32, 2, 2].map((value, i) => Number(process.argv[2 + i] ?? value));
const config = {
  vocab_size: 65,
  block_size: 32,
  n_layer,
  n_head: 2,
  n_embd,
  batch_size: 8
};
const random = new Random("text");
const text = Uint8Array.from({length: 20000}, () => random.below(65));

for (const rule of Object.keys(RULES)) {
  const run = new Run({config, rule});
  const spent = {};
  const take = () => run.step(batch(text, config, 1, run.steps));
  for (let i = 0; i < 20; i++) take();
  const start = process.cpuUsage();
  const used = () => process.cpuUsage(start).user / 1e6;
  let n = 0;
  for (; used() < seconds; n++) take();
  const rate = n / used();
  const kernel = run.model.kernel;
  const timed = Object.fromEntries(Object.entries(kernel).map(([name, work]) => {
    if (typeof work !== "function") return [name, work];
    return [
      name,
      (...args) => {
        const before = performance.now();
        const result = work(...args);
        spent[name] = (spent[name] ?? 0) + performance.now() - before;
        return result;
      }
    ];
  }));
  run.model.kernel = run.model.tools.kernel = timed;
  const before = performance.now();
  for (let i = 0; i < 50; i++) take();
  const whole = performance.now() - before;
  const shares = Object.entries(spent).sort((a, b) => b[1] - a[1]).slice(0, 7);
  const words = shares.map(([name, ms]) => `${name} ${Math.round((100 * ms) / whole)} %`);
  console.log(`${rule}: ${rate.toFixed(0)} steps/s of one core; ${words.join(", ")}`);
}
