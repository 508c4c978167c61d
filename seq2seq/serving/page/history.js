// Former translations, kept in this browser only.

import { html } from "./elements.js";

const ENTRIES = "seq2seq-history";
const KEEP = "seq2seq-history-keep";
const MOST = 50; // entries
const LONGEST = 5000; // characters of an entry

function read(key, standard) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? standard;
  } catch {
    return standard; // no storage, or not what this page wrote
  }
}

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // Without storage, or with a full one, the history lasts as long as the page.
  }
}

const isEntry = (entry) => typeof entry?.text === "string" && typeof entry?.translation === "string";

export class History {
  /** @param onOpen receives the entry that the user opens */
  constructor(onOpen) {
    const stored = read(ENTRIES, []);
    this.entries = Array.isArray(stored) ? stored.filter(isEntry) : [];
    this.isKept = read(KEEP, true) !== false;
    this.onOpen = onOpen;
    this.box = document.getElementById("history");
    this.isContinued = false; // whether the newest entry may be replaced by what the user types on
    this.show();
  }

  /** Add a translation; a text that is typed on replaces its beginning. */
  add(entry) {
    const text = entry.text.trim();
    if (!this.isKept || !text || text.length > LONGEST) return;
    const newest = this.entries[0]?.text.trim();
    const isTypedOn = this.isContinued && newest && (text.startsWith(newest) || newest.startsWith(text));
    const others = this.entries.slice(isTypedOn ? 1 : 0).filter((other) => other.text.trim() !== text);
    this.isContinued = true;
    this.store([{ ...entry, time: Date.now() }, ...others].slice(0, MOST));
  }

  store(entries) {
    this.entries = entries;
    if (this.isKept) write(ENTRIES, entries);
    this.show();
  }

  /** Opting out also removes what is stored. */
  keep(isKept) {
    this.isKept = isKept;
    write(KEEP, isKept);
    if (!isKept) write(ENTRIES, []);
    this.store(isKept ? this.entries : []);
  }

  item(entry) {
    const open = () => {
      this.isContinued = false;
      this.onOpen(entry);
    };
    const time = new Date(entry.time).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
    return html(
      "li",
      { class: "item" },
      html("button", { type: "button", class: "text-button", dir: "auto", onclick: open }, entry.text),
      html("div", { dir: "auto" }, entry.translation),
      html("div", { class: "soft small" }, `${entry.model} · ${time}`),
    );
  }

  show() {
    const toggle = { type: "checkbox", onchange: (event) => this.keep(event.target.checked) };
    const input = html("input", { ...toggle, ...(this.isKept && { checked: "" }) });
    const clear = html("button", { type: "button", onclick: () => this.store([]) }, "Clear the history");
    const empty = html("p", { class: "soft" }, this.isKept ? "No translations yet." : "The history is switched off.");
    this.box.replaceChildren(
      html("div", { class: "tools" }, html("label", {}, input, " Keep the history in this browser"), clear),
      this.entries.length ? html("ul", { class: "plain" }, ...this.entries.map((entry) => this.item(entry))) : empty,
    );
  }
}
