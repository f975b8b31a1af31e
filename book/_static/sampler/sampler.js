// Recorded models that write in the page: `<div class="sampler" data-models="NAME NAME ...">` asks for them
// (book/_ext/sampler.py). A model is a script of about a megabyte, which is added to the page when it is asked
// for: a page that is opened from a disk may fetch no file.
"use strict";

lab.define("sampler", (need) => {
  const {make, slider, button, buttons, labelled} = controls;
  const known = need("models");
  const CHARACTERS = 400;
  const TEMPERATURES = [0.4, 0.6, 0.8, 1, 1.2];
  const here = new URL(document.currentScript.src);

  const megabytes = (names) => (names.reduce((sum, name) => sum + known[name].bytes, 0) / 1e6).toFixed(1);

  // The engine in a worker of its own, from the scripts that the page has loaded before any model.
  function worker(heard) {
    const text = `${lab.source()}\nlab.need("writers").serve(self);`;
    const made = new Worker(URL.createObjectURL(new Blob([text], {type: "text/javascript"})));
    made.onmessage = ({data}) => heard(data);
    return made;
  }

  function script(name) {
    return new Promise((resolve, reject) => {
      const added = make("script", {src: new URL(`models/${name}.js`, here).href});
      added.addEventListener("load", resolve);
      added.addEventListener("error", () => reject(new Error(`${name} was not found`)));
      document.head.append(added);
    });
  }

  // One model: its name, what it has come to, a button, and what it writes.
  class Card {
    constructor(name, asked) {
      const {label, loss, seed} = known[name];
      Object.assign(this, {name, label, round: 0, loaded: null});
      this.press = button(`Load ${megabytes([name])} MB and write`, () => asked(this));
      this.status = make("span", {class: "sampler-status"});
      this.text = make("pre", {class: "sampler-text", role: "region", tabindex: 0, "aria-label": label});
      this.element = make(
        "section", {class: "sampler-card"}, make("p", {class: "sampler-name"}, make("strong", {}, label),
          ` ${loss.toFixed(3)} nats, seed ${seed}`), this.text, buttons(this.press, this.status));
    }

    // Have the model in the worker, once.
    load(engine) {
      this.loaded ??= script(this.name).then(() => {
        const held = need(`models/${this.name}`);
        engine.postMessage({order: "load", name: this.name, held});
        this.press.textContent = "Write";
      }).catch((error) => {
        this.loaded = null;  // the next press tries again
        throw error;
      });
      return this.loaded;
    }

    begin(prompt) {
      this.round += 1;
      this.written = document.createTextNode("");
      this.text.replaceChildren(make("strong", {}, prompt), this.written);
      this.status.textContent = "";
    }

    add(text, left, rate) {
      this.written.data += text;
      this.text.scrollTop = this.text.scrollHeight;
      this.status.textContent = left > 0 ? "" : `${rate.toFixed(0)} characters a second`;
    }
  }

  function open(holder) {
    const names = holder.dataset.models.split(" ");
    const said = make("p", {class: "sampler-said", role: "status"});
    let [temperature, seed] = [0.8, 0];
    const cards = Object.fromEntries(names.map((name) => [name, new Card(name, (card) => write([card]))]));
    const {vocabulary} = known[names[0]];
    const field = make("textarea", {rows: 2, spellcheck: false, class: "sampler-prompt"});
    field.value = "KING RICHARD II:\n";

    function heard({name, round, ids, left, rate, error}) {
      const card = cards[name];
      if (error) said.textContent = `${card.label} stopped: ${error}`;
      if (error || round !== card.round) return;
      card.add(ids.map((id) => vocabulary[id]).join(""), left, rate);
      if (left === 0) said.textContent = `${card.label} has written ${CHARACTERS} characters.`;
    }
    const engine = worker(heard);

    // The prompt as ids, or null where the models do not know a character of it.
    function asked() {
      const prompt = field.value || "\n";
      const foreign = [...new Set(prompt)].filter((letter) => !vocabulary.includes(letter));
      if (foreign.length === 0) return prompt;
      said.textContent = `The text that these models have read has no ${foreign.join(" ")}`;
      return null;
    }

    async function write(chosen) {
      const prompt = asked();
      if (prompt === null) return;
      seed += 1;
      const draw = seed;
      said.textContent = "";
      await Promise.all(chosen.map(async (card) => {
        try {
          await card.load(engine);
        } catch (error) {
          said.textContent = `${card.label}: ${error.message}`;
          return;
        }
        card.begin(prompt);
        const ids = [...prompt].map((letter) => vocabulary.indexOf(letter));
        engine.postMessage({order: "write", name: card.name, round: card.round, prompt: ids,
                            characters: CHARACTERS, temperature, seed: draw});
      }));
    }

    const bold = slider("Temperature", TEMPERATURES, temperature, (value) => { temperature = value; });
    const all = button(`Let all write (${megabytes(names)} MB)`, () => write(Object.values(cards)), "main");
    holder.replaceChildren(
      make("div", {class: "sampler-asked"}, labelled("What they continue", field), bold), buttons(all), said,
      make("div", {class: "sampler-cards"}, ...Object.values(cards).map((card) => card.element)));
  }

  return {open};
});

(() => {
  const can = typeof Worker === "function" && typeof WebAssembly === "object";
  const {open} = lab.need("sampler");
  document.addEventListener("DOMContentLoaded", () => {
    if (can) for (const holder of document.querySelectorAll("div.sampler")) open(holder);
  });
})();
