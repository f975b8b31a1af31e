// What the scripts of all pages build with: elements, form controls, ticks of an axis. Their look is in
// localgpt.css. Plain scripts: a page that is opened from a disk may neither fetch files nor import modules.
"use strict";

globalThis.controls = (() => {
  function filled(made, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  // make("p", {class: "a"}, child, "text"), and the same for elements of an SVG
  const make = (tag, attributes = {}, ...children) =>
    filled(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) =>
    filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  const labelled = (label, ...children) =>
    make("label", {class: "control-field"}, make("span", {}, label), ...children);

  function select(label, entries, value, changed) {
    const field = make("select", {}, ...entries.map(([key, text]) => make("option", {value: key}, text)));
    field.value = value;
    field.addEventListener("change", () => changed(field.value));
    return labelled(label, field);
  }

  // A slider over the values of a list; changed(value) is called when it is let go or, at `when` = "input",
  // while it moves. The input itself is the `field` of what is returned.
  function slider(label, values, value, changed, show = String, when = "change") {
    const field = make("input", {type: "range", min: 0, max: values.length - 1, step: 1});
    const output = make("output");
    const update = () => {
      output.textContent = show(values[field.value]);
      field.setAttribute("aria-valuetext", output.textContent);
    };
    field.value = values.indexOf(value);
    update();
    field.addEventListener("input", update);
    field.addEventListener(when, () => changed(values[field.value]));
    return Object.assign(labelled(label, make("span", {class: "control-slide"}, field, output)), {field});
  }

  // A button; one of kind "main" stands out.
  function button(text, pressed, kind = "") {
    const look = kind ? `control-button control-${kind}` : "control-button";
    const made = make("button", {type: "button", class: look}, text);
    made.addEventListener("click", pressed);
    return made;
  }

  const buttons = (...children) => make("div", {class: "control-buttons"}, ...children);

  // About n round numbers that cover low ... high.
  function ticks(low, high, n) {
    const rough = (high - low) / n;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9; i++)
      found.push(Number((i * step).toFixed(10)));
    return found;
  }

  return {make, draw, labelled, select, slider, button, buttons, ticks};
})();
