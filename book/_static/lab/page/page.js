// The page: start the worker, pass orders to it and reports on, and keep the settings in the address.
"use strict";

lab.define("page", (need) => {
  const {parse, format} = need("settings");
  const {form} = need("controls");
  const {make, button, buttons} = controls;
  const {Results} = need("results");
  const SPOKEN_MS = 8000;
  const CALM_MS = 2000;

  // The engine in a worker of its own, from the text of the scripts that this page has loaded.
  function worker(heard, failed) {
    const text = `${lab.source()}\nlab.need("worker").serve(self);`;
    const made = new Worker(URL.createObjectURL(new Blob([text], {type: "text/javascript"})));
    made.onmessage = ({data}) => heard(data);
    made.onerror = (event) => failed(event.message);
    return made;
  }

  function open(holder) {
    const settings = parse(location.hash);
    const results = new Results(need("corpus").floors);
    const status = make("p", {class: "lab-status"});
    const spoken = make("p", {class: "lab-spoken", "aria-live": "polite"});
    const calm = matchMedia("(prefers-reduced-motion: reduce)");
    let round = 0;
    let running = false;
    let lastSpoken = 0;
    let lastDrawn = 0;

    function say(text) {
      spoken.textContent = text;
      lastSpoken = performance.now();
    }

    function fail(text) {
      running = false;
      status.textContent = `The lab stopped: ${text}`;
      say(status.textContent);
    }

    function draw() {
      lastDrawn = performance.now();
      results.draw();
    }

    function show(message) {
      if (message.round !== round) return;
      if (message.error) return fail(message.error);
      const stopped = !message.running;
      results.add(message);
      const speed = message.rate > 0 ? `, ${message.rate.toFixed(0)} steps a second` : "";
      status.textContent = `Step ${message.step}${speed}`;
      Object.assign(holder.dataset, {step: message.step, running: message.running});
      if (stopped || !calm.matches || performance.now() - lastDrawn > CALM_MS) draw();
      if (stopped || performance.now() - lastSpoken > SPOKEN_MS) say(results.summary());
      if (stopped && running && !message.finite.some(Boolean)) setRunning(false);
      return undefined;
    }

    const engine = worker(show, fail);
    const toggle = button("Start", () => setRunning(!running), "main");
    const single = button("One step", () => {
      setRunning(false);
      engine.postMessage({order: "step"});
    });
    const again = button("Reset", () => reset(false));

    function setRunning(value) {
      if (value !== running) engine.postMessage({order: value ? "start" : "pause"});
      running = value;
      toggle.textContent = running ? "Pause" : "Start";
    }

    function reset(goOn) {
      setRunning(false);
      round += 1;
      results.reset(settings);
      engine.postMessage({order: "reset", settings, round});
      if (goOn) setRunning(true);
    }

    function changed() {
      history.replaceState(null, "", format(settings));
      reset(running);
    }

    let fields = form(settings, changed);
    addEventListener("hashchange", () => {
      Object.assign(settings, parse(location.hash));
      const next = form(settings, changed);
      fields.replaceWith(next);
      fields = next;
      reset(settings.start || running);
    });
    const pressed = buttons(toggle, single, again, status);
    holder.replaceChildren(pressed, fields, spoken, results.element);
    new ResizeObserver(() => results.draw()).observe(holder);
    reset(settings.start);
  }

  return {open};
});

document.addEventListener("DOMContentLoaded", () => {
  const holder = document.getElementById("lab");
  const can = typeof Worker === "function" && typeof WebAssembly === "object";
  if (holder && can) lab.need("page").open(holder);
});
