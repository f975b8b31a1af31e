// The learning rates of the first twelve steps of each run that test_lab_parity.py names.
import {readFileSync} from "node:fs";

import {load} from "./engine.mjs";

const {learningRate} = load().need("optimizer");
const {runs} = JSON.parse(readFileSync(process.argv[2], "utf8"));
const rates = runs.map((run) => Array.from({length: 12}, (_, step) => learningRate(step, run)));
console.log(JSON.stringify({rates}));
