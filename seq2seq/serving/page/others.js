// The n-best list of the selected sentence.

import { html } from "./elements.js";

const WANTED = 5; // translations that the button asks for

const formatScore = (value) => (value === null ? "–" : value.toFixed(3).replace("-", "−"));

export class Others {
  /** @param handlers `choose(i)` shows a translation, `more(count)` asks for several */
  constructor(translation, handlers) {
    this.translation = translation;
    this.handlers = handlers;
    this.box = document.getElementById("others");
  }

  row(translation, i, sentence) {
    const isShown = sentence.chosen === i;
    const show = () => {
      this.handlers.choose(i);
      this.box.querySelectorAll("tbody button")[i]?.focus();
    };
    const button = html(
      "button",
      { type: "button", class: "text-button", "aria-pressed": String(isShown), onclick: show, dir: "auto" },
      translation.text || "nothing",
    );
    return html(
      "tr",
      {},
      html("td", { class: "number soft" }, String(i + 1)),
      html("td", { class: "full" }, button),
      html("td", { class: "number" }, formatScore(translation.score)),
      html("td", { class: "number soft" }, formatScore(translation.log_probability)),
    );
  }

  table(sentence) {
    const titles = ["", "translation", "score", "log probability"].map((title) => html("th", { scope: "col" }, title));
    const rows = sentence.translations.map((translation, i) => this.row(translation, i, sentence));
    return html("table", { class: "n-best" }, html("thead", {}, html("tr", {}, ...titles)), html("tbody", {}, ...rows));
  }

  update() {
    const sentence = this.translation.shown;
    if (!sentence) {
      this.box.replaceChildren(html("p", { class: "soft" }, "Translate something to see its other translations."));
      return;
    }
    const more = html(
      "button",
      { type: "button", onclick: () => this.handlers.more(WANTED) },
      `Show the ${WANTED} best`,
    );
    const note =
      "Translations are ranked by score: the log probability divided by the length penalty. A less negative one is better.";
    this.box.replaceChildren(
      html("p", { class: "soft small", dir: "auto" }, sentence.source),
      this.table(sentence),
      sentence.translations.length < 2 ? html("div", { class: "tools" }, more) : html("span"),
      html("p", { class: "small soft note" }, note),
    );
  }
}
