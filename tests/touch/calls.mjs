// Answer calls to what the interactives of the pages compute with: a file of [module, function, ...arguments]
// in, the JSON of the results out. NaN is null there.
import {readFileSync} from "node:fs";
import {runInThisContext} from "node:vm";

const folder = new URL("../../book/_static/touch/math/", import.meta.url);
for (const file of ["feedback", "norm", "codes"]) {
  const url = new URL(`${file}.js`, folder);
  runInThisContext(readFileSync(url, "utf8"), {filename: url.pathname});
}
const calls = JSON.parse(readFileSync(process.argv[2], "utf8"));
const results = calls.map(([module, name, ...given]) => {
  const found = name.split(".").reduce((holder, part) => holder[part], globalThis.touchMath[module]);
  return typeof found === "function" ? found(...given) : found;
});
console.log(JSON.stringify(results));
