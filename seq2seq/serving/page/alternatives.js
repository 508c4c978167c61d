// A list box below a word: what else the model would say after the words before it.

import { html } from "./elements.js";
import { positionBelow } from "./output.js";
import { request } from "./server.js";

const COUNT = 6;
const box = () => document.getElementById("alternatives");
let origin = null; // the word that the list belongs to
let controller = null;

/** Return the first word of a continuation, its mark excluded unless it is one. */
function firstWord(continuation) {
  return /^\s*(?:[\p{L}\p{N}\p{M}'’-]+|\S)/u.exec(continuation)?.[0] ?? "";
}

/** Split a whole translation into what it becomes fixed to and the rest. */
export function splitAlternative({ text }, prefix) {
  const word = firstWord(text.slice(prefix.length));
  const isPart = /[\p{L}\p{N}]$/u.test(prefix) && /^[\p{L}\p{N}]/u.test(word); // it lengthens the word before it
  return { fixed: prefix + word, word: word.trim(), rest: text.slice(prefix.length + word.length), isPart };
}

export function closeAlternatives() {
  if (!origin) return;
  const word = origin;
  origin = null;
  controller.abort();
  const hadFocus = box().contains(document.activeElement);
  box().hidden = true;
  word.removeAttribute("aria-expanded");
  if (hadFocus && word.isConnected) word.focus();
}

function formatProbability(value) {
  if (value === null) return "–";
  return value < 0.005 ? "< .01" : value.toFixed(2);
}

function option(alternative, prefix, choose) {
  const { fixed, word, rest, isPart } = splitAlternative(alternative, prefix);
  const { probability, piece } = alternative;
  const filled = `inset-inline-start:0;width:${100 * (probability ?? 0)}%;background:var(--blue)`;
  const pick = () => {
    closeAlternatives();
    choose(fixed);
  };
  return html(
    "div",
    {
      ...{ role: "option", tabindex: -1, "aria-selected": "false", title: `next subword: ${piece}` },
      onfocus: (event) => event.currentTarget.setAttribute("aria-selected", "true"),
      onblur: (event) => event.currentTarget.setAttribute("aria-selected", "false"),
      ...(word ? { onclick: pick } : { "aria-disabled": "true" }), // an end cannot be gone on from
    },
    html("b", { dir: "auto" }, word ? (isPart ? `…${word}` : word) : "the end"),
    html("span", { class: "track" }, html("i", { style: filled })),
    html("span", { class: "number soft" }, formatProbability(probability)),
    html("span", { class: "rest soft", dir: "auto" }, rest.trim()),
  );
}

function moveInList(event) {
  const options = [...box().querySelectorAll("[role=option]")];
  const at = options.indexOf(document.activeElement);
  const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: options.length - 1 }[event.key];
  if (next !== undefined) options.at(next % options.length)?.focus();
  else if (event.key === "Enter" || event.key === " ") document.activeElement.click();
  else if (event.key === "Escape" || event.key === "Tab") closeAlternatives();
  else return;
  event.preventDefault();
}

/** Fetch and show the alternatives of a word; `choose` receives the text that the translation then begins with. */
export async function openAlternatives({ word, label, prefix, body, choose }) {
  closeAlternatives();
  origin = word;
  controller = new AbortController();
  const { signal } = controller;
  word.setAttribute("aria-expanded", "true");
  box().replaceChildren(html("p", { class: "soft small", role: "status" }, "One moment…"));
  box().hidden = false;
  positionBelow(box(), word);
  try {
    const { alternatives } = await request("v1/alternatives", { ...body, prefix, count: COUNT }, { signal });
    const list = html("div", { role: "listbox", "aria-label": `Alternatives to ${label}` });
    list.append(...alternatives.map((alternative) => option(alternative, prefix, choose)));
    box().replaceChildren(
      list,
      html(
        "p",
        { class: "soft small" },
        "The number is the probability of the next subword; the model goes on from the word you choose.",
      ),
    );
    positionBelow(box(), word);
    list.firstChild?.focus();
  } catch (error) {
    if (signal.aborted) return;
    closeAlternatives();
    throw error;
  }
}

export function startAlternatives() {
  box().addEventListener("keydown", moveInList);
  document.addEventListener("pointerdown", (event) => {
    if (!box().contains(event.target)) closeAlternatives();
  });
  addEventListener("resize", closeAlternatives);
}
