// A text file, translated line by line in several requests.

import { formatCount, html, range } from "./elements.js";
import { request } from "./server.js";

const CHUNK = { lines: 32, characters: 8000 };
const PARALLEL = 3; // requests at a time
const LARGEST = 20e6; // bytes

/** Divide the indices of lines into chunks; empty lines need no request. */
export function chunksOf(lines) {
  const chunks = [];
  let size = 0;
  for (const [i, line] of lines.entries()) {
    if (!line.trim()) continue;
    const last = chunks.at(-1);
    if (last && last.length < CHUNK.lines && size + line.length <= CHUNK.characters) last.push(i);
    else {
      chunks.push([i]);
      size = 0;
    }
    size += line.length;
  }
  return chunks;
}

async function readText(file) {
  if (file.size > LARGEST) {
    throw new Error(`${file.name} has over ${LARGEST / 1e6} MB; translate it with \`seq2seq translate input=…\`.`);
  }
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} is not UTF-8 text; convert it first.`);
  }
}

export class FileJob {
  /** @param handlers `settings()`, `languages()`, `choose()`, `open()` shows this panel, `onProblem(error)` */
  constructor(handlers) {
    this.handlers = handlers;
    this.box = document.getElementById("file");
    this.status = html("p", { role: "status", class: "number" });
    this.bar = html("progress", { "aria-label": "Translated lines" });
    this.actions = html("div", { class: "tools" });
    this.controller = new AbortController();
    this.showEmpty();
  }

  button(label, onclick) {
    return html("button", { type: "button", onclick }, label);
  }

  showEmpty() {
    this.box.replaceChildren(
      html(
        "p",
        { class: "soft" },
        "Drop a UTF-8 text file anywhere on this page, or choose one. Its lines stay lines.",
      ),
      html("div", { class: "tools" }, this.button("Choose a file…", this.handlers.choose)),
    );
  }

  async start(file) {
    this.controller.abort();
    this.handlers.open();
    try {
      const text = await readText(file);
      this.name = file.name;
      this.ends = [...text.matchAll(/\r\n|\n|\r/g)].map(([end]) => end);
      this.lines = text.split(/\r\n|\n|\r/);
      this.results = this.lines.map((line) => (line.trim() ? null : line));
      this.box.replaceChildren(html("h3", { dir: "auto" }, file.name), this.bar, this.status, this.actions);
      await this.run();
    } catch (error) {
      this.handlers.onProblem(error);
    }
  }

  /** Translate the lines that have no translation yet. */
  async run() {
    this.controller = new AbortController();
    this.refused = new Set(); // chunks that wait until the server has room
    const { signal } = this.controller;
    const waiting = this.lines.map((line, i) => (this.results[i] === null ? line : ""));
    const chunks = chunksOf(waiting);
    const settings = this.handlers.settings(); // as they are now, for the whole file
    const work = async () => {
      while (chunks.length && !signal.aborted) await this.translate(chunks.shift(), settings, signal);
    };
    this.actions.replaceChildren(this.button("Cancel", () => this.controller.abort()));
    this.showProgress();
    try {
      await Promise.all(range(PARALLEL).map(work));
      this.finish();
    } catch (error) {
      this.stop(error, signal.aborted);
    }
  }

  async translate(indices, settings, signal) {
    const onWait = () => {
      this.refused.add(indices);
      this.showProgress();
    };
    const body = { text: indices.map((i) => this.lines[i]), ...settings };
    const { results } = await request("v1/translate", body, { signal, onWait });
    for (const [k, i] of indices.entries()) this.results[i] = results[k].text;
    this.refused.delete(indices);
    this.showProgress();
  }

  showProgress(note = this.refused.size ? "; the server is busy, waiting" : "") {
    const done = this.results.filter((result) => result !== null).length;
    this.bar.max = this.lines.length;
    this.bar.value = done;
    this.status.textContent = `${formatCount(done)} of ${formatCount(this.lines.length)} lines${note}`;
  }

  finish() {
    this.showProgress(" translated");
    const choose = this.button("Another file…", this.handlers.choose);
    this.actions.replaceChildren(this.download(), choose);
  }

  /** After a failure or a cancellation, what is translated remains, and the rest can follow. */
  stop(error, isCancelled) {
    this.controller.abort();
    this.showProgress(isCancelled ? "; cancelled" : "; stopped");
    this.actions.replaceChildren(
      this.button("Go on", () => this.run()),
      this.button("Another file…", this.handlers.choose),
    );
    if (!isCancelled) this.handlers.onProblem(error);
  }

  download() {
    const text = this.results.map((result, i) => result + (this.ends[i] ?? "")).join("");
    const url = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
    const { target } = this.handlers.languages();
    const name = `${this.name.replace(/\.[^.]*$/, "")}.${target}.txt`;
    return html("a", { class: "button", href: url, download: name }, `Download ${name}`);
  }
}
