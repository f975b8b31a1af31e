// The modules of the lab without a build step and without requests: a page that is opened from a disk may
// neither fetch files nor import modules. Each file is an ordinary script that calls
//
//     lab.define(name, (need) => ({ ...what it offers }))
//
// and is made at the first need(name). The engine has no access to the page. `lab.source` returns the text of
// all modules that are defined, from which the page starts a worker (page/remote.js) in a Blob.
"use strict";

globalThis.makeLab = function makeLab() {
  const makers = {};
  const made = {};
  const need = (name) => {
    if (!(name in makers)) throw new Error(`module ${name}: not loaded; there are ${Object.keys(makers)}`);
    if (!(name in made)) made[name] = makers[name](need);
    return made[name];
  };
  return {
    define(name, make) { makers[name] = make; },
    need,
    source() {
      const modules = Object.entries(makers).map(([name, make]) => `lab.define("${name}", ${make});`);
      return [`"use strict"; const lab = (${makeLab})();`, ...modules].join("\n");
    },
  };
};

globalThis.lab = globalThis.makeLab();
