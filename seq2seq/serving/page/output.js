// The translation as words to point at: shaded by probability, each with its alternatives.

import { html } from "./elements.js";
import { textBefore, wordsOf } from "./words.js";

const [SURE, UNSURE] = [0.9, 0.5]; // as in the legend

/** Return the words of a sentence's shown translation. */
export function shownWords(sentence) {
  const { pieces, probabilities } = sentence.translations[sentence.chosen];
  return wordsOf(pieces, probabilities);
}

export const shownText = (sentence) => sentence.translations[sentence.chosen].text;

const formatProbability = (value) => (value === null ? "unknown" : value.toFixed(2));

function shadeOf(probability) {
  if (probability === null || probability >= SURE) return "sure";
  return probability >= UNSURE ? "unsure" : "doubtful";
}

function tipText(word, { pieces, probabilities }) {
  const parts = word.pieces.map((i) => `${pieces[i]} ${formatProbability(probabilities[i] ?? null)}`);
  return `${formatProbability(word.probability)}${parts.length > 1 ? `  =  ${parts.join(" · ")}` : ""}`;
}

/** Position a floating element below a word, inside the page. */
export function positionBelow(node, word) {
  const { left, bottom } = word.getBoundingClientRect();
  const room = document.documentElement.clientWidth - node.offsetWidth - 8;
  node.style.left = `${Math.max(8, Math.min(left, room)) + scrollX}px`;
  node.style.top = `${bottom + 6 + scrollY}px`;
}

export class Output {
  /** @param handlers `select(sentence)`, `choose(sentence, word, node)`, `undo(sentence)` */
  constructor(handlers) {
    this.box = document.getElementById("output");
    this.tip = document.getElementById("tip");
    this.handlers = handlers;
    this.box.addEventListener("keydown", (event) => this.moveByKey(event));
    this.box.addEventListener("click", (event) => this.open(event.target.closest(".word")));
    this.box.addEventListener("pointerover", (event) => this.showTip(event.target.closest(".word")));
    this.box.addEventListener("pointerleave", () => this.showTip(null));
    this.box.addEventListener("focusin", (event) => this.focusOn(event.target.closest(".word")));
    this.box.addEventListener("focusout", () => this.showTip(null));
  }

  clear() {
    this.box.replaceChildren();
    this.showTip(null);
  }

  /** Show the first `count` sentences only. */
  truncate(count) {
    while (this.box.children.length > count) this.box.lastChild.remove();
  }

  node(index) {
    while (this.box.children.length <= index) {
      this.box.append(html("span", { class: "sentence" }, html("span", { class: "gap" }), html("span")));
    }
    return this.box.children[index];
  }

  /** Show what a sentence's translation begins with so far. */
  partial(index, text) {
    const node = this.node(index);
    if (node.textContent.trim().startsWith(text.trim())) return; // the former translation may remain
    if (index && !node.firstChild.textContent) this.gap(index, " ");
    node.lastChild.replaceChildren(html("span", { class: "growing" }, text));
  }

  gap(index, text) {
    this.node(index).firstChild.textContent = text;
  }

  sentence(index, sentence) {
    const node = this.node(index);
    const hadFocus = node.contains(document.activeElement) && document.activeElement.dataset.word;
    const translation = sentence.translations[sentence.chosen];
    const words = shownWords(sentence).map((word, i) => this.word(word, i, sentence, translation));
    node.dataset.sentence = index;
    node.lastChild.replaceChildren(...words.flat());
    this.keepOneTabStop();
    if (hadFocus) node.querySelectorAll(".word")[Math.min(hadFocus, words.length - 1)]?.focus();
  }

  word(word, index, sentence, translation) {
    const isFixed = Boolean(sentence.prefix) && textBefore(shownWords(sentence), index).length < sentence.prefix.length;
    const probability = formatProbability(word.probability);
    const attributes = {
      class: `word ${isFixed ? "chosen" : shadeOf(word.probability)}`,
      role: "button",
      tabindex: -1,
      "aria-haspopup": "listbox",
      "aria-label": `${word.text}, ${isFixed ? "fixed" : `probability ${probability}`}`,
      "data-word": index,
      "data-tip": isFixed ? `fixed · ${tipText(word, translation)}` : tipText(word, translation),
      style: `--doubt:${word.probability === null ? 0 : (1 - word.probability).toFixed(3)}`,
    };
    return [word.isSpaced ? " " : "", html("span", attributes, word.text)];
  }

  // --------------------------------------------------------------------------------------- pointer and keys

  words() {
    return [...this.box.querySelectorAll(".word")];
  }

  keepOneTabStop() {
    if (this.box.querySelector('.word[tabindex="0"]')) return;
    const first = this.box.querySelector(".word");
    if (first) first.tabIndex = 0;
  }

  sentenceOf(word) {
    return Number(word.closest(".sentence").dataset.sentence);
  }

  focusOn(word) {
    if (!word) return;
    for (const other of this.box.querySelectorAll('.word[tabindex="0"]')) other.tabIndex = -1;
    word.tabIndex = 0;
    this.showTip(word);
    this.handlers.select(this.sentenceOf(word));
  }

  open(word) {
    if (!word) return;
    word.focus();
    this.showTip(null);
    this.handlers.choose(this.sentenceOf(word), Number(word.dataset.word), word);
  }

  moveByKey(event) {
    const word = event.target.closest(".word");
    if (!word || event.ctrlKey || event.altKey || event.metaKey) return;
    const words = this.words();
    const isRightToLeft = getComputedStyle(this.box).direction === "rtl";
    const forward = isRightToLeft ? -1 : 1;
    const steps = { ArrowRight: forward, ArrowLeft: -forward, ArrowDown: 1, ArrowUp: -1 };
    const [at, last] = [words.indexOf(word), words.length - 1];
    const next = { Home: 0, End: last }[event.key] ?? (event.key in steps ? at + steps[event.key] : null);
    if (next !== null) words[next]?.focus();
    else if (event.key === "Enter" || event.key === " ") this.open(word);
    else if (event.key === "Backspace") this.handlers.undo(this.sentenceOf(word));
    else return;
    event.preventDefault();
  }

  showTip(word) {
    this.tip.hidden = !word;
    if (!word) return;
    this.tip.textContent = word.dataset.tip;
    positionBelow(this.tip, word);
  }
}
