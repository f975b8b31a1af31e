// Restore a model that test_sampler.py packs, let it read a text, and print the logits after every character.
import {readFileSync} from "node:fs";
import {runInThisContext} from "node:vm";

import {load} from "./engine.mjs";

const lab = load();
runInThisContext(readFileSync(new URL("../../book/_static/sampler/held.js", import.meta.url), "utf8"));
const {restored} = lab.need("held");
const {Writer} = lab.need("writing");
const {held, prompt, added} = JSON.parse(readFileSync(process.argv[2], "utf8"));

const writer = new Writer(restored(held), prompt, 1, 1);
const logits = [Array.from(writer.logits)];
for (const id of added) {
  writer.add(id);
  logits.push(Array.from(writer.logits));
}
console.log(JSON.stringify({logits}));
