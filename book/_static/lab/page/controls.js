// The form: a rule, a learning rate and a scale for each model, sizes and seed for both, and the buttons.
"use strict";

lab.define("controls", (need) => {
  const {RULES, isDrawn} = need("rules");
  const {CHOICES, LARGEST_SEED} = need("settings");

  const {make, labelled, select, slider} = controls;

  function modelFields(model, i, changed) {
    const rules = Object.entries(RULES).map(([key, {name}]) => [key, name]);
    const scale = slider("Size of the random feedback", CHOICES.scale, model.scale, (value) => {
      model.scale = value;
      changed();
    }, (value) => `× ${value}`);
    const [input] = scale.getElementsByTagName("input");
    const allow = () => {
      input.disabled = !isDrawn(model.rule);
      scale.classList.toggle("lab-off", input.disabled);
    };
    allow();
    const rule = select("Learning rule", rules, model.rule, (value) => {
      model.rule = value;
      allow();
      changed();
    });
    const rate = slider("Learning rate", CHOICES.lr, model.lr, (value) => {
      model.lr = value;
      changed();
    });
    const legend =
      make("legend", {}, make("span", {class: `lab-swatch lab-${i}`}), ["First model", "Second model"][i]);
    return make("fieldset", {class: `lab-model lab-${i}`}, legend, rule, rate, scale);
  }

  // Return the form for `settings`, which it changes in place; changed() is called after each change.
  function form(settings, changed) {
    const set = (name) => (value) => {
      settings[name] = Number(value);
      changed();
    };
    const seed = make("input", {type: "number", min: 0, max: LARGEST_SEED, step: 1, inputmode: "numeric"});
    seed.value = settings.seed;
    seed.addEventListener("change", () => {
      const value = Number(seed.value);
      if (Number.isInteger(value) && value >= 0 && value <= LARGEST_SEED)
        set("seed")(value);
      else
        seed.value = settings.seed;
    });
    const both = make(
      "fieldset", {class: "lab-model"}, make("legend", {}, "Both"),
      select("Width", CHOICES.n_embd.map((n) => [n, `${n} units`]), settings.n_embd, set("n_embd")),
      slider("Blocks", CHOICES.n_layer, settings.n_layer, set("n_layer")),
      labelled("Seed of weights and batches", seed));
    const fields = [...settings.models.map((model, i) => modelFields(model, i, changed)), both];
    const made = make("form", {class: "lab-form", "aria-label": "Settings of the two models"}, ...fields);
    made.addEventListener("submit", (event) => event.preventDefault());
    return made;
  }

  return {form};
});
