/* Predictions that can be made in the page, and the boxes that settle them.

   A list in <div class="prediction" id="…"> becomes choices; without a list, data-min and data-max
   make a slider. What the reader chose is kept in this browser, under the page and the id, and
   shown in <div class="settled" data-prediction="…" data-answer="…">: there data-answer is the
   number of the right choice, counted from 1, or the right value. Without this script both boxes
   are ordinary text. */

(() => {
  "use strict";

  const RIGHT = 0.05; // of a slider's length: how far off a value may be and still be called right
  const NEAR = 0.15;
  const VERDICTS = {
    right: ["✓", "right"],
    near: ["≈", "near"],
    wrong: ["✗", "wrong"],
  };

  // Where storage is forbidden or full, the choice lasts as long as the page.
  const memory = new Map();
  const recall = (key) => {
    if (memory.has(key)) return memory.get(key);
    try {
      return localStorage.getItem(key);
    } catch {
      return null;
    }
  };
  const remember = (key, value) => {
    memory.set(key, value);
    try {
      if (value === null) localStorage.removeItem(key);
      else localStorage.setItem(key, value);
    } catch {
      /* kept in memory */
    }
  };

  const make = (tag, attributes = {}, ...contents) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...contents);
    return element;
  };

  // Formulas in a copy made before MathJax came by are still source.
  const typeset = (element) =>
    window.MathJax?.startup?.promise?.then(() => window.MathJax.typesetPromise?.([element]));

  const withUnit = (value, unit) => {
    if (!unit) return String(value);
    return /^[%°]/.test(unit) ? `${value}${unit}` : `${value} ${unit}`;
  };

  /* What the controls of a prediction have in common: `value()` is null or a text, `set` shows it,
     `say` puts a value into words, `judge` compares it with the answer. */

  function choices(box, list, changed) {
    const items = [...list.children];
    list.classList.add("prediction__choices");
    const inputs = items.map((item, index) => {
      const input = make("input", {
        type: "radio",
        name: `prediction-${box.id}`,
        value: index + 1,
        autocomplete: "off",
      });
      const words = make("span");
      const only = item.children.length === 1 && item.firstElementChild.matches("p");
      words.append(...(only ? item.firstElementChild : item).childNodes);
      item.replaceChildren(make("label", {}, input, words));
      input.addEventListener("change", changed);
      return input;
    });
    const words = (value) => {
      const copy = inputs[value - 1].nextElementSibling.cloneNode(true);
      copy.querySelectorAll("[id]").forEach((element) => element.removeAttribute("id"));
      const end = copy.lastChild;
      if (end?.nodeType === Node.TEXT_NODE) end.data = end.data.replace(/[.,;\s]+$/, "");
      return copy;
    };
    return {
      value: () => inputs.find((input) => input.checked)?.value ?? null,
      set: (value) => inputs.forEach((input) => (input.checked = input.value === value)),
      valid: (value) => inputs.some((input) => input.value === value),
      say: words,
      judge: (value, answer) => (value === answer ? "right" : "wrong"),
    };
  }

  function number(box, named, changed) {
    const { min, max, step = "any", unit = "" } = box.dataset;
    const middle = (Number(min) + Number(max)) / 2;
    const input = make("input", { type: "range", min, max, step, autocomplete: "off" });
    input.setAttribute("aria-labelledby", named);
    const output = make("output");
    let chosen = false;
    const show = () => {
      const text = chosen ? withUnit(input.value, unit) : "nothing chosen yet";
      output.value = text;
      input.setAttribute("aria-valuetext", text);
      box.toggleAttribute("data-unset", !chosen);
    };
    const choose = () => {
      chosen = true;
      show();
      changed();
    };
    input.addEventListener("input", choose);
    // The middle, where the handle stands at first, can be chosen too.
    input.addEventListener("pointerup", choose);
    input.addEventListener("keyup", (event) => {
      if (event.key === "Enter" || event.key === " ") choose();
    });
    const ends = [min, max].map((end) =>
      make("span", { "aria-hidden": "true" }, withUnit(end, unit)),
    );
    const row = make("div", { class: "prediction__range" }, ends[0], input, ends[1]);
    box.append(row, make("p", { class: "prediction__value" }, output));
    return {
      value: () => (chosen ? input.value : null),
      set: (value) => {
        chosen = value !== null;
        input.value = chosen ? value : middle;
        show();
      },
      valid: (value) => Number(value) >= Number(min) && Number(value) <= Number(max),
      say: (value) => withUnit(value, unit),
      judge: (value, answer) => {
        const off = Math.abs(value - answer) / (max - min);
        return off <= RIGHT ? "right" : off <= NEAR ? "near" : "wrong";
      },
    };
  }

  function start(box) {
    const key = `sam-lab:${location.pathname}#${box.id}`;
    const list = box.querySelector(":scope > ol, :scope > ul");
    const ranged = Number(box.dataset.max) > Number(box.dataset.min);
    if (!box.id || (!list && !ranged)) return;
    const settled = [...document.querySelectorAll(".settled[data-prediction]")].filter(
      (place) => place.dataset.prediction === box.id,
    );

    const question = [...box.querySelectorAll(":scope > p")];
    question.forEach((paragraph, n) => (paragraph.id ||= `${box.id}-question-${n + 1}`));
    const named = question.map((paragraph) => paragraph.id).join(" ");
    box.setAttribute("role", "group");
    box.setAttribute("aria-labelledby", named);

    const changed = () => {
      remember(key, control.value());
      show();
    };
    const control = list ? choices(box, list, changed) : number(box, named, changed);
    const note = make("p", { role: "status" });
    const clear = make("button", { type: "button" }, "Clear");
    clear.addEventListener("click", () => {
      control.set(null);
      changed();
      box.querySelector("input").focus();
    });
    box.append(make("div", { class: "prediction__foot" }, note, clear));

    const lines = settled.map((place) => {
      const line = make("span", { class: "settled__said" });
      const first = place.querySelector("p");
      const says = /^\s*it was\b/i.test(first?.textContent ?? "");
      if (says) first.prepend(line);
      else place.prepend(make("p", {}, line));
      return { place, line, says };
    });

    function show() {
      const value = control.value();
      clear.hidden = value === null;
      note.textContent =
        value === null
          ? "Choose before you read on."
          : "Noted, in this browser only. The answer comes further down.";
      for (const { place, line, says } of lines) {
        const { answer } = place.dataset;
        if (value === null) {
          delete place.dataset.verdict;
          const back = make("a", { href: `#${box.id}` }, "go back");
          line.replaceChildren("You made no prediction: ", back, says ? ". " : ".");
          continue;
        }
        const verdict = control.judge(value, answer);
        const [sign, word] = VERDICTS[verdict];
        place.dataset.verdict = verdict;
        const mark = make("span", { class: "settled__verdict" });
        mark.append(make("span", { "aria-hidden": "true" }, `${sign} `), word);
        line.replaceChildren("You said: ", control.say(value), " (", mark, ") · ");
        if (!says) line.append("It was: ", control.valid(answer) ? control.say(answer) : answer);
        typeset(line);
      }
    }

    const before = recall(key);
    control.set(before !== null && control.valid(before) ? before : null);
    show();
  }

  const startAll = () => document.querySelectorAll("div.prediction").forEach(start);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", startAll);
  else startAll();
})();
