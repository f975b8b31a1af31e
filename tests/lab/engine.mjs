// The lab's engine in Node: load its scripts as the page does, and hand over `lab`.
import {readFileSync} from "node:fs";
import {runInThisContext} from "node:vm";

const folder = new URL("../../book/_static/lab/", import.meta.url);
export const ENGINE =
  ["kernel", "random", "tensors", "rules", "model", "optimizer", "batches", "writing", "run", "pair"];

export function load() {
  for (const file of ["lab", ...ENGINE.map((name) => `engine/${name}`)]) {
    const url = new URL(`${file}.js`, folder);
    runInThisContext(readFileSync(url, "utf8"), {filename: url.pathname});
  }
  return globalThis.lab;
}
