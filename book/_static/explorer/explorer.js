// The explorer of recorded runs, in plain scripts: a page that is opened from a disk may neither fetch files
// nor import modules. Each script adds what it offers to `explorer`; this one is the first, the second, made
// at build (book/_ext/explorer.py), adds the suites of the page.
"use strict";

globalThis.explorer = {
  suites: {},

  make: controls.make,

  number(value, digits = 3) { return value === null ? "–" : value.toFixed(digits).replace("-", "−"); },

  // [mean, half-width, n] as text; `signed` puts a plus before what is not negative.
  spread([mean, half], signed = false) {
    if (mean === null) return "–";
    const sign = signed && mean >= 0 ? "+" : "";
    return sign + explorer.number(mean) + (half === null ? "" : ` ± ${explorer.number(half)}`);
  },
};
