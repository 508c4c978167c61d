// What is translated at present: its sentences, what of them is fixed, and the requests for it.

import { request, stream } from "./server.js";

/**
 * @typedef {Object} Sentence as the server sends it, and:
 * @property {number} chosen the index of the shown translation
 * @property {string} prefix what its translation must begin with
 */

const asSentence = (sent, prefix = "") => ({ ...sent, chosen: 0, prefix });

export class Translation {
  /** @param handlers `settings()`, `started()`, `partial(i, text)`, `sentence(i)`, `finished()`, `waiting(seconds)` */
  constructor(handlers) {
    this.handlers = handlers;
    this.text = "";
    this.sentences = [];
    this.gaps = [""];
    this.selected = 0;
    this.isFinished = true;
    this.undone = new Map(); // source sentence → its former states, as long as a prefix is fixed
    this.controller = new AbortController();
    this.asked = null; // the request on its way
  }

  get output() {
    const { sentences, gaps } = this;
    const texts = sentences.map((one, i) => one.translations[one.chosen].text + (gaps[i + 1] ?? ""));
    return (gaps[0] ?? "") + texts.join("");
  }

  get shown() {
    return this.sentences[this.selected] ?? null;
  }

  get options() {
    return { signal: this.controller.signal, onWait: this.handlers.waiting };
  }

  cancel() {
    this.controller.abort();
    this.controller = new AbortController();
  }

  /** Translate a text; the request for the former one is cancelled, unless it is the same and not tried `again`. */
  async start(text, again = false) {
    const asked = JSON.stringify([text, this.handlers.settings()]);
    if (asked === this.asked && !again) return;
    this.cancel();
    this.asked = asked;
    const { signal } = this.controller;
    try {
      await this.ask(text, signal);
    } finally {
      if (!signal.aborted) this.asked = null;
    }
  }

  async ask(text, signal) {
    this.text = text;
    this.isFinished = false;
    this.handlers.started();
    if (!text.trim()) return this.finish({ gaps: [text] }, 0);
    const [fixed, received] = [[], { count: 0, at: 0 }];
    const handlers = {
      partial: ({ sentence, text: begun }) => {
        if (!this.sentences[sentence]?.prefix) this.handlers.partial(sentence, begun);
      },
      sentence: ({ index, ...sent }) => {
        received.count = index + 1;
        this.gapBefore(index, sent.source, received);
        if (!this.undone.has(sent.source)) this.receive(index, asSentence(sent));
        else fixed.push(this.renew(index, sent));
      },
      done: (end) => {
        received.end = end;
      },
    };
    await stream("v1/stream", { text, ...this.handlers.settings() }, handlers, this.options);
    await Promise.all(fixed);
    if (!signal.aborted) this.finish(received.end, received.count);
  }

  /** Find what precedes a sentence in the text, until the server says it. */
  gapBefore(index, source, received) {
    const at = this.text.indexOf(source, received.at);
    if (at < 0) return;
    this.gaps[index] = this.text.slice(received.at, at);
    received.at = at + source.length;
  }

  receive(index, sentence) {
    this.sentences[index] = sentence;
    this.handlers.sentence(index);
  }

  finish({ gaps }, count) {
    this.sentences.length = count;
    this.gaps = gaps;
    this.selected = Math.min(this.selected, Math.max(0, count - 1));
    this.isFinished = true;
    const sources = new Set(this.sentences.map((sentence) => sentence.source));
    for (const source of this.undone.keys()) if (!sources.has(source)) this.undone.delete(source);
    this.handlers.finished();
  }

  // ---------------------------------------------------------------------------------------- fixed beginnings

  /** Translate a sentence again with its fixed beginning, under the present settings. */
  async renew(index, sent) {
    const { prefix } = this.undone.get(sent.source);
    this.receive(index, await this.forced(sent.source, prefix));
  }

  async forced(source, prefix) {
    const body = { text: [source], prefix: [prefix], split: false, ...this.handlers.settings() };
    const { results } = await request("v1/translate", body, this.options);
    return asSentence(results[0].sentences[0], prefix);
  }

  /** Fix how a sentence's translation begins, and translate the rest of it. */
  async fix(index, prefix) {
    const before = this.sentences[index];
    const { signal } = this.controller;
    const sentence = await this.forced(before.source, prefix);
    if (signal.aborted || this.sentences[index] !== before) return;
    const former = this.undone.get(before.source)?.former ?? [];
    this.undone.set(before.source, { prefix, former: [...former, before] });
    this.receive(index, sentence);
    this.handlers.finished();
  }

  /** Return to the state before the last choice, or before all choices. */
  undo(index, all = false) {
    const { source } = this.sentences[index];
    const former = this.undone.get(source)?.former;
    if (!former) return;
    const sentence = all ? former[0] : former.at(-1);
    if (sentence.prefix) this.undone.set(source, { prefix: sentence.prefix, former: former.slice(0, -1) });
    else this.undone.delete(source);
    this.receive(index, sentence);
    this.handlers.finished();
  }

  /** Show another translation of the n-best list. */
  choose(index, chosen) {
    this.sentences[index].chosen = chosen;
    this.handlers.sentence(index);
    this.handlers.finished();
  }
}
