// What the model attended to, for the selected sentence.

import { AttentionView, END_LABEL, meansOf } from "./attention.js";
import { html } from "./elements.js";
import { shownText } from "./output.js";
import { request } from "./server.js";
import { keepPainted } from "./theme.js";
import { wordsOf } from "./words.js";

const HOW_TO_READ =
  "A row of the map shows where the model read while it wrote that subword: the stronger the colour, the more weight " +
  "that source subword had. Each row adds up to 1; ⏎ is the end of the sentence.";
const HEADS_DIFFER = "Heads differ: choose one, or a layer's mean. ";
const CAUTION = "Attention shows what was read, not why a word was chosen.";

function fractionsOf(pieces) {
  const words = wordsOf(pieces);
  const fractions = pieces.map((_, p) => words.map(({ pieces: own }) => Number(own.includes(p))));
  return [words.map((word) => word.text), fractions];
}

/** Return the plot of a translation with weights. */
function plotOf({ source_pieces: sources, pieces, attention: { weights } }) {
  const [sourceWords, sourceFractions] = fractionsOf(sources.slice(0, -1));
  const [targetWords, targetFractions] = fractionsOf(pieces);
  const [layers, heads] = [weights.length, weights[0].length];
  return {
    source_pieces: [...sources.slice(0, -1), END_LABEL],
    target_pieces: [...pieces, END_LABEL],
    source_words: sourceWords,
    target_words: targetWords,
    source_fractions: sourceFractions,
    target_fractions: targetFractions,
    shape: [layers, heads],
    grid: meansOf((layer, head) => weights[layer][head], layers, heads),
  };
}

function textRow(name, text) {
  return [html("dt", {}, name), html("dd", { dir: "auto" }, text)];
}

export class AttentionPanel {
  constructor(translation, { settings, select, onProblem }) {
    this.translation = translation;
    this.settings = settings;
    this.onProblem = onProblem;
    this.box = document.getElementById("attention");
    this.view = new AttentionView();
    this.picker = html("select", {
      "aria-label": "Sentence",
      onchange: (event) => select(Number(event.target.value)),
    });
    this.tools = html("div", { class: "tools" }, html("div", {}, this.picker), html("div", {}, ...this.view.units));
    this.caution = html("p", { class: "small soft note" });
    this.texts = html("dl", { class: "text" });
    this.body = html(
      "div",
      {},
      this.tools,
      html("div", { class: "choose" }, this.view.heads, this.texts),
      this.view.plots,
      html("p", { class: "small soft note" }, HOW_TO_READ),
      this.caution,
    );
    this.empty = html("p", { class: "soft" }, "Translate something to see what the model reads while it writes.");
    this.box.replaceChildren(this.empty, this.body);
    this.body.hidden = true;
    keepPainted(() => this.box.hidden || this.view.paint());
  }

  /** Fetch the weights of the selected sentence if the panel is open and does not show them yet. */
  async update() {
    const { shown: sentence, sentences } = this.translation;
    this.body.hidden = !sentence?.source.trim();
    this.empty.hidden = !this.body.hidden;
    if (this.box.hidden || this.body.hidden) return;
    const options = sentences.map(({ source }, i) => html("option", { value: i }, `${i + 1} · ${source}`));
    this.picker.replaceChildren(...options);
    this.picker.value = this.translation.selected;
    this.picker.hidden = sentences.length < 2;
    try {
      const plot = await this.plot(sentence);
      if (this.translation.shown !== sentence) return;
      this.texts.replaceChildren(...textRow("source", sentence.source), ...textRow("output", shownText(sentence)));
      const [layers, heads] = plot.shape;
      this.caution.textContent = layers * heads > 1 ? HEADS_DIFFER + CAUTION : CAUTION;
      this.view.show(plot);
    } catch (error) {
      this.onProblem(error);
    }
  }

  async plot(sentence) {
    const translation = sentence.translations[sentence.chosen];
    if (!translation.plot) {
      const { model } = this.settings();
      const body = { source: [sentence.source], target: [shownText(sentence)], attention: true, model };
      const { results } = await request("v1/score", body, this.translation.options);
      translation.plot = plotOf({ source_pieces: sentence.source_pieces, ...results[0] });
    }
    return translation.plot;
  }
}
