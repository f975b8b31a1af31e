// The worker's side: it keeps the models that were loaded and writes in slices, each model that is at it in
// turn, so that it hears the page in between.
//
// Orders: { order: "load", name, held }, { order: "write", name, round, prompt, characters, temperature, seed }
// with `prompt` as ids. Reports: { name, round, ids, left, rate }, the ids that are new, how many are left and
// how many this model writes in a second of its own.
"use strict";

lab.define("writers", (need) => {
  const {restored} = need("held");
  const {Writer} = need("writing");
  const SLICE_MS = 40;

  function serve(port) {
    const models = {};
    const tasks = new Map();

    function slice() {
      for (const [name, task] of tasks) {
        const [start, ids] = [performance.now(), []];
        while (task.left > 0 && performance.now() - start < SLICE_MS) {
          ids.push(task.writer.next());
          task.left -= 1;
        }
        task.ms += performance.now() - start;
        task.written += ids.length;
        if (task.left === 0) tasks.delete(name);
        port.postMessage({name, round: task.round, ids, left: task.left, rate: 1000 * task.written / task.ms});
      }
      if (tasks.size > 0) setTimeout(slice, 0);
    }

    const orders = {
      load({name, held}) { models[name] = restored(held); },
      write({name, round, prompt, characters, temperature, seed}) {
        const idle = tasks.size === 0;
        const writer = new Writer(models[name], prompt, temperature, seed);
        tasks.set(name, {writer, round, left: characters, written: 0, ms: 0});
        if (idle) setTimeout(slice, 0);
      },
    };

    port.onmessage = ({data}) => {
      try {
        orders[data.order](data);
      } catch (error) {
        tasks.delete(data.name);
        port.postMessage({name: data.name, error: String(error)});
      }
    };
  }

  return {serve};
});
