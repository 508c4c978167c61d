// The options of the search, as the server explains them; only changed ones are sent.

import { build, html, withCode } from "./elements.js";

const isEqual = (a, b) => JSON.stringify(a) === JSON.stringify(b);

/** Read an input as the type of the option: `auto` and other words stay words. */
function readInput(input, { default: standard, type }) {
  if (input.type === "checkbox") return input.checked;
  if (Array.isArray(standard)) return input.value.split(",").flatMap((text) => text.trim() || []);
  const isNumber = input.value.trim() !== "" && Number.isFinite(Number(input.value));
  if (input.tagName === "SELECT" && typeof standard === "string") return input.value;
  return isNumber && !(typeof standard === "string" && type === "string") ? Number(input.value) : input.value;
}

function inputOf(option, id) {
  const { default: standard, choices, maximum } = option;
  const described = { id, "aria-describedby": `${id}-help` };
  if (choices?.length) return html("select", described, ...choices.map((choice) => html("option", {}, String(choice))));
  if (typeof standard === "boolean") return html("input", { ...described, type: "checkbox" });
  const range = { min: 0, ...(maximum !== undefined && { max: maximum }), step: "any" };
  if (typeof standard === "number") return html("input", { ...described, type: "number", ...range });
  const placeholder = Array.isArray(standard) ? "words, separated by commas" : "";
  return html("input", { ...described, type: "text", placeholder, spellcheck: "false" });
}

export class SearchOptions {
  /** @param onChange is called after each change by the user */
  constructor(onChange) {
    this.box = document.getElementById("search");
    this.tab = document.getElementById("tab-search");
    this.onChange = onChange;
    this.changes = {};
    this.options = [];
    this.presets = {};
  }

  /** Show the answer of /v1/search. */
  load({ options, presets }) {
    this.options = options;
    this.presets = presets;
    this.rows = new Map(options.map((option) => [option.name, this.row(option)]));
    const names = Object.keys(presets);
    this.buttons = names.map((name) => html("button", { type: "button", onclick: () => this.usePreset(name) }, name));
    const reset = html("button", { type: "button", id: "reset", onclick: () => this.change({}) }, "Reset");
    this.box.replaceChildren(
      html("p", { class: "small soft" }, "A preset sets all options; every change translates again."),
      html("div", { class: "tools", role: "group", "aria-label": "Presets" }, ...this.buttons, reset),
      html("div", { class: "options" }, ...[...this.rows.values()].map(({ node }) => node)),
    );
    this.show();
  }

  row(option) {
    const id = `search-${option.name}`;
    const input = build(inputOf(option, id), { onchange: () => this.set(option, readInput(input, option)) }, []);
    const note = html("span", { class: "small changed-note" });
    const head = html("div", { class: "head" }, html("label", { for: id }, option.name.replaceAll("_", " ")), note);
    const help = html("p", { class: "small soft", id: `${id}-help` }, ...withCode(option.help));
    return { input, note, node: html("div", { class: "option" }, head, input, help) };
  }

  set(option, value) {
    this.change({ ...this.changes, [option.name]: value });
  }

  /** Replace all changes; a value equal to the server's is none. */
  change(changes) {
    const differing = this.options.filter(
      ({ name, default: standard }) => name in changes && !isEqual(changes[name], standard),
    );
    this.changes = Object.fromEntries(differing.map(({ name }) => [name, changes[name]]));
    this.show();
    this.onChange();
  }

  /** Return the changes that make the options equal to a preset. */
  changesOf(name) {
    const preset = this.presets[name];
    const differing = this.options.filter(
      ({ name: key, default: standard }) => key in preset && !isEqual(preset[key], standard),
    );
    return Object.fromEntries(differing.map(({ name: key }) => [key, preset[key]]));
  }

  usePreset(name) {
    this.change(this.changesOf(name));
  }

  value(option) {
    return this.changes[option.name] ?? option.default;
  }

  /** Return the present value of an option by its name. */
  valueOf(name) {
    return this.value(this.options.find((option) => option.name === name));
  }

  show() {
    const count = Object.keys(this.changes).length;
    this.tab.textContent = count ? `Search options · ${count} changed` : "Search options";
    for (const [i, name] of Object.keys(this.presets).entries()) {
      this.buttons[i].setAttribute("aria-pressed", String(isEqual(sorted(this.changesOf(name)), sorted(this.changes))));
    }
    for (const option of this.options) {
      const { input, note, node } = this.rows.get(option.name);
      const [value, isChanged] = [this.value(option), option.name in this.changes];
      const isTyped = input === document.activeElement && input.tagName === "INPUT" && !isChanged;
      if (input.type === "checkbox") input.checked = value;
      else if (!isTyped) input.value = Array.isArray(value) ? value.join(", ") : value;
      node.classList.toggle("changed", isChanged);
      note.textContent = isChanged ? `changed from ${formatValue(option.default)}` : "";
    }
  }
}

const sorted = (changes) => Object.fromEntries(Object.entries(changes).sort());
const formatValue = (value) => (Array.isArray(value) ? value.join(", ") || "none" : String(value));
