// The worker's side: it keeps a pair of models, trains in slices so that it hears the page in between, and
// reports.
//
// Orders: { order: "reset", settings, round }, "start", "pause", "step". Reports carry the round of their
// reset, so that the page can drop one that is late; `rate` is steps of the pair in a second of training.
"use strict";

lab.define("worker", (need) => {
  const {Pair} = need("pair");
  const SLICE_MS = 50;
  const REPORT_MS = 250;

  function serve(port) {
    let pair = null;
    let round = 0;
    let running = false;
    let clock = {steps: 0, ms: 0};
    let reported = 0;

    function report(all = false) {
      reported = performance.now();
      const rate = clock.ms > 0 ? (1000 * clock.steps) / clock.ms : 0;
      clock = {steps: clock.steps / 2, ms: clock.ms / 2};
      port.postMessage({round, running, rate, ...pair.report(all)});
    }

    function slice() {
      if (!running) return;
      const start = performance.now();
      while (pair.canGoOn && performance.now() - start < SLICE_MS) {
        pair.advance();
        clock.steps += 1;
      }
      clock.ms += performance.now() - start;
      running = pair.canGoOn;
      if (!running || performance.now() - reported > REPORT_MS) report();
      setTimeout(slice, 0);
    }

    const orders = {
      reset(message) {
        running = false;
        round = message.round;
        clock = {steps: 0, ms: 0};
        pair = new Pair(message.settings, need("corpus"));
        report(true);
      },
      start() {
        if (running) return;
        running = true;
        slice();
      },
      pause() {
        running = false;
        report(true);
      },
      step() {
        if (pair.canGoOn) pair.advance();
        report(true);
      },
    };

    port.onmessage = ({data}) => {
      try {
        orders[data.order](data);
      } catch (error) {
        running = false;
        port.postMessage({round, error: String(error)});
      }
    };
  }

  return {serve};
});
