// Chapter 02: three recorded runs. Who wins, by the cosine? Then the losses are shown.
// Their numbers, `touch.recorded`, are written at the build from the records (book/_ext/touch.py).
"use strict";

touch.place("runs", (holder) => {
  const {make, number, slider, button, buttons, Said, table, named} = touch;
  const {chart, raised} = touch.charts;
  const {steps, runs} = touch.recorded;
  const NAMES = ["A", "B", "C"];
  const QUANTITIES = {
    cosine: {title: "Cosine to the exact gradient", range: [0, 1], digits: 2},
    stream: {title: "Size of the stream", log: true, digits: 1},
    gradient: {title: "Size of the exact gradient", log: true},
    loss: {title: "Validation loss (nats)", digits: 2},
  };
  let [now, guess, open] = [steps.at(-1), null, false];

  const written = (quantity, value) => {
    const {digits} = QUANTITIES[quantity];
    if (digits !== undefined) return number(value, digits);
    const [first, exponent] = value.toExponential(0).split("e");
    return `${first}·10${raised(Number(exponent))}`;
  };
  const until = (points) => points.filter(([step]) => step <= now).at(-1);
  const best = (of) => runs.map((_, i) => i).sort((i, j) => of(runs[i]) - of(runs[j]));
  const end = (name) => (run) => run[name].at(-1)[1];
  for (const [name, quantity] of Object.entries(QUANTITIES)) {
    const values = runs.flatMap((run) => run[name].map(([, value]) => value));
    const [low, high] = [Math.min(...values), Math.max(...values)];
    quantity.range ??= quantity.log ? [low / 1.5, high * 1.5] : [low - 0.1, 3];
  }

  const said = new Said();
  const numbers = make("div", {class: "touch-numbers"});
  const charts = Object.keys(QUANTITIES).map(() => make("div", {class: "touch-chart"}));
  const reveal = button("Show the losses", () => {
    open = !open;
    reveal.textContent = open ? "Hide the losses" : "Show the losses";
    show();
  }, "main");

  function sentence() {
    if (!open) {
      const found = runs.map((run, i) => `${NAMES[i]} ${number(until(run.cosine)[1])}`);
      return `Step ${now}. Cosine: ${found.join(", ")}. Which run will end with the lowest loss?`;
    }
    const [first, ...others] = best(end("loss"));
    const ended = (i) => `${NAMES[i]} (${runs[i].label}) ends at ${number(end("loss")(runs[i]), 3)}`;
    const verdict = guess === null ? "" : guess === first ? "You were right. " : `You said ${NAMES[guess]}. `;
    // Said only where it is so.
    const order = [first, ...others].join();
    const sizes = best(end("stream")).join() === order && best((run) => -end("cosine")(run)).join() !== order;
    return `${verdict}${ended(first)}, the lowest; ${others.map(ended).join("; ")}.` +
      (sizes ? " The smaller the stream at the end, the lower the loss; the cosine has another order." : "");
  }

  function show() {
    const text = sentence();
    Object.entries(QUANTITIES).forEach(([name, {title, range, log}], i) => {
      const lines = runs.map((run, kind) => ({kind, points: run[name]}));
      const hidden = name === "loss" && !open ? "hidden: guess first" : "";
      const found = runs.map((run, j) => `${NAMES[j]} ${written(name, until(run[name])[1])}`).join(", ");
      const label = hidden ? `${title}: ${hidden}.` : `${title} over training. At step ${now}: ${found}.`;
      chart(charts[i], {title, label, range, log, lines, hidden, now, last: steps.at(-1), height: 170});
    });
    const rows = runs.map((run, i) => [
      named(i, NAMES[i]),
      ...Object.keys(QUANTITIES).map(
        (name) => name === "loss" && !open ? "?" : written(name, until(run[name])[1])),
    ]);
    const heads = ["Run", "cosine", "stream", "gradient", "loss"];
    numbers.replaceChildren(table("The three runs at this step", heads, rows));
    said.say(text);
  }

  const choices = NAMES.map((name, i) => {
    const field = make("input", {type: "radio", name: "touch-guess", value: name});
    field.addEventListener("change", () => {
      guess = i;
      show();
    });
    return make("label", {}, field, named(i, name));
  });
  holder.append(
    make("p", {class: "touch-do"}, "Move through three trainings. Guess by the cosine who wins, then look."),
    slider("Training step", steps, now, (step) => {
      now = step;
      show();
    }),
    make("div", {class: "touch-charts"}, ...charts),
    make("fieldset", {class: "touch-radios"}, make("legend", {}, "Ends lowest:"), ...choices, reveal),
    said.element, numbers);
  show();
  return show;
});
