// A second model, or the same with another search, side by side; differing words are marked.

import { html } from "./elements.js";
import { shownText } from "./output.js";
import { request } from "./server.js";
import { commonWords } from "./words.js";

const SAME = "as above";

/** Return a text with the words marked that another one lacks. */
function marked(text, kept, className) {
  let word = 0;
  return text.split(/(\s+)/).map((part) => {
    if (!part.trim()) return part;
    return kept[word++] ? part : html("mark", { class: className }, part);
  });
}

const tokens = (text) => text.split(/\s+/).filter(Boolean);

export class Compare {
  /** @param handlers `settings()` of the translation above, `onProblem(error)` */
  constructor(translation, models, search, handlers) {
    this.translation = translation;
    this.models = models;
    this.search = search;
    this.handlers = handlers;
    this.box = document.getElementById("compare");
    this.controller = new AbortController();
    const onchange = () => this.update();
    this.model = html("select", { id: "compare-model", onchange });
    this.preset = html("select", { id: "compare-search", onchange });
    this.summary = html("p", { class: "soft small", role: "status" });
    this.columns = html("div", { class: "grid two" });
  }

  /** Offer the models and presets; begin with something that differs from the translation above. */
  load() {
    const names = this.models().map(({ name }) => name);
    const presets = Object.keys(this.search.presets);
    this.model.replaceChildren(...[SAME, ...names].map((name) => html("option", {}, name)));
    this.preset.replaceChildren(...[SAME, ...presets].map((name) => html("option", {}, name)));
    const other = names.find((name) => name !== this.handlers.settings().model);
    if (other) this.model.value = other;
    else this.preset.value = presets.includes("greedy") ? "greedy" : (presets[0] ?? SAME);
    this.box.replaceChildren(
      html(
        "div",
        { class: "tools" },
        html("label", {}, "Compare with model ", this.model),
        html("label", {}, "search ", this.preset),
      ),
      this.columns,
      this.summary,
    );
  }

  settings() {
    const above = this.handlers.settings();
    const model = this.model.value === SAME ? above.model : this.model.value;
    const search = this.preset.value === SAME ? above.search : this.search.changesOf(this.preset.value);
    return { model, search };
  }

  async update() {
    this.controller.abort();
    if (this.box.hidden || !this.translation.isFinished) return;
    const { text } = this.translation;
    if (!text.trim()) {
      this.columns.replaceChildren();
      this.summary.textContent = "Translate something to compare two translations of it.";
      return;
    }
    this.controller = new AbortController();
    const { signal } = this.controller;
    try {
      const { results } = await request("v1/translate", { text: [text], ...this.settings() }, { signal });
      this.show(results[0]);
    } catch (error) {
      if (!signal.aborted) this.handlers.onProblem(error);
    }
  }

  show({ sentences, gaps }) {
    const [above, below] = [[], []];
    const counts = { differing: 0, all: 0 };
    for (const [i, { translations }] of sentences.entries()) {
      const texts = [
        this.translation.sentences[i] ? shownText(this.translation.sentences[i]) : "",
        translations[0].text,
      ];
      const kept = commonWords(...texts.map(tokens));
      above.push(gaps[i], ...marked(texts[0], kept[0], "missed"));
      below.push(gaps[i], ...marked(texts[1], kept[1], "added"));
      counts.differing += kept.flat().filter((isKept) => !isKept).length;
      counts.all += kept.flat().length;
    }
    const { differing, all } = counts;
    this.columns.replaceChildren(this.column("above", above), this.column(this.title(), below));
    this.summary.textContent = differing
      ? `${differing} of ${all} words differ: shaded on one side, underlined on the other.`
      : "Both translations are the same.";
  }

  title() {
    const { model } = this.settings();
    return `${model}, ${this.preset.value === SAME ? "the same search" : `search ${this.preset.value}`}`;
  }

  column(title, parts) {
    const name = title === "above" ? `${this.handlers.settings().model}, as above` : title;
    return html("div", {}, html("h3", {}, name), html("p", { class: "compared", dir: "auto" }, ...parts));
  }
}
