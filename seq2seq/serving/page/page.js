// The page of `seq2seq serve`: joins the text, its translation and the panels below.

import { closeAlternatives, openAlternatives, startAlternatives } from "./alternatives.js";
import { AttentionPanel } from "./attention-panel.js";
import { Compare } from "./compare.js";
import { formatCount, html } from "./elements.js";
import { FileJob } from "./file.js";
import { History } from "./history.js";
import { Others } from "./others.js";
import { Output, shownWords } from "./output.js";
import { SearchOptions } from "./search.js";
import { Problem, pause, request } from "./server.js";
import { Tabs } from "./tabs.js";
import { startTheme } from "./theme.js";
import { Translation } from "./translation.js";
import { textBefore } from "./words.js";

const DEBOUNCE = 250; // milliseconds without a key before a text is translated
const RETRY = 3; // seconds between attempts to reach the server

const $ = (id) => document.getElementById(id);
const source = $("source");
let models = [];
let timer = 0;

// ---------------------------------------------------------------------------------------------------- settings

const model = () => models.find(({ name }) => name === $("model").value) ?? models[0];

function settings() {
  const { changes } = search;
  return { model: model()?.name, ...(Object.keys(changes).length && { search: changes }) };
}

function languageName(code) {
  try {
    return new Intl.DisplayNames(["en"], { type: "language" }).of(code);
  } catch {
    return code; // no language tag
  }
}

function familyName({ family }) {
  return { lstm: "attentional LSTM", transformer: "Transformer" }[family] ?? family;
}

function scoreTexts({ scores }) {
  const names = { bleu: "BLEU", chrf: "chrF" };
  return Object.keys(names)
    .filter((key) => Number.isFinite(scores[key]))
    .map((key) => `${names[key]} ${scores[key].toFixed(1)}`);
}

function showModel() {
  const chosen = model();
  const [from, into] = [languageName(chosen.source), languageName(chosen.target)];
  const update = chosen.update === null ? [] : [`update ${formatCount(chosen.update)}`];
  const scores = scoreTexts(chosen);
  const parameters = `${(chosen.parameters / 1e6).toFixed(1)} M parameters`;
  const heads = `${chosen.layers} × ${chosen.heads} attention heads`;
  document.title = `${from} → ${into} · seq2seq`;
  $("title").textContent = `${from} → ${into}`;
  $("description").textContent = [chosen.name, familyName(chosen), parameters].join(" · ");
  $("source-label").textContent = from;
  $("target-label").textContent = into;
  source.lang = chosen.source;
  $("output").lang = chosen.target;
  const validation = scores.length ? `${scores.join(", ")} on the validation set` : "validation scores unknown";
  const facts = [`${chosen.name}: ${familyName(chosen)}`, parameters, heads, ...update, validation, chosen.engine];
  $("facts").textContent = facts.join(" · ");
}

// ---------------------------------------------------------------------------------------------------- problems

function showProblem(error) {
  if (error?.name === "AbortError") return;
  const [label, onclick] = error instanceof Problem ? ["Try again", () => translate(true)] : ["Close", hideProblem];
  const button = html("button", { type: "button", onclick }, label);
  $("problem").replaceChildren(html("span", {}, error.message), button);
  $("progress").textContent = "";
  $("output").setAttribute("aria-busy", "false");
  if (error.status === 0) waitForServer();
}

const hideProblem = () => $("problem").replaceChildren();

/** Translate again as soon as a lost server answers. */
async function waitForServer() {
  const shown = $("problem").firstChild;
  while ($("problem").firstChild === shown) {
    await pause(RETRY);
    try {
      await request("health");
    } catch {
      continue;
    }
    if ($("problem").firstChild === shown) await translate(true);
  }
}

// ------------------------------------------------------------------------------------------------- translation

const output = new Output({ select: selectSentence, choose: showAlternatives, undo: (i) => translation.undo(i) });
const translation = new Translation({
  settings,
  started: showStart,
  partial: (i, text) => output.partial(i, text),
  sentence: showSentence,
  finished: showEnd,
  waiting: (seconds) => showProgress(`the server is busy; goes on in ${Math.ceil(seconds)} s`),
});
const search = new SearchOptions(() => translate());
const history = new History(openEntry);
const file = new FileJob({
  settings,
  languages: model,
  choose: () => $("chooser").click(),
  open: () => tabs.open("file"),
  onProblem: showProblem,
});
const attention = new AttentionPanel(translation, { settings, select: selectSentence, onProblem: showProblem });
const others = new Others(translation, {
  choose: (i) => translation.choose(translation.selected, i),
  more: showMore,
});
const compare = new Compare(translation, () => models, search, { settings, onProblem: showProblem });
const tabs = new Tabs(document.querySelector("[role=tablist]"), updatePanels);

/** Ask for an n-best list, from a beam or samples that hold it. */
function showMore(count) {
  const key = search.valueOf("samples") ? "samples" : "beam";
  search.change({ ...search.changes, [key]: Math.max(count, search.valueOf(key)), n_best: count });
}

const showProgress = (text) => {
  $("progress").textContent = text;
};

async function translate(again = false) {
  clearTimeout(timer);
  closeAlternatives();
  hideProblem();
  try {
    if (!models.length) await load();
    await translation.start(source.value, again);
  } catch (error) {
    showProblem(error);
  }
}

function showStart() {
  const count = [...source.value].length;
  $("size").textContent = count ? `${formatCount(count)} characters` : "";
  showProgress(count ? "translating…" : "");
  $("output").setAttribute("aria-busy", "true");
}

function showSentence(index) {
  const { sentences, gaps } = translation;
  output.gap(index, index ? (gaps[index] ?? " ") : (gaps[0] ?? ""));
  output.sentence(index, sentences[index]);
}

function showEnd() {
  const { sentences, gaps } = translation;
  output.truncate(sentences.length);
  for (const index of sentences.keys()) output.gap(index, gaps[index]);
  $("output").setAttribute("aria-busy", "false");
  const shortened = sentences.some((sentence) => sentence.truncated);
  const count = sentences.length;
  const text = count > 1 ? `${formatCount(count)} sentences` : "";
  showProgress(shortened ? "a sentence was too long for the model and was cut" : text);
  $("announcer").textContent = translation.output.slice(0, 500);
  showFixed();
  updatePanels();
  if (count) history.add({ text: translation.text, translation: translation.output, model: model().name });
}

function showFixed() {
  const rows = translation.sentences.flatMap(({ prefix }, i) => {
    if (!prefix) return [];
    const undo = html("button", { type: "button", onclick: () => translation.undo(i) }, "Undo");
    const release = html("button", { type: "button", onclick: () => translation.undo(i, true) }, "Release");
    const text = html("span", {}, "Fixed beginning: ", html("b", { dir: "auto" }, prefix));
    return html("div", { class: "tools fixed" }, text, html("div", {}, undo, release));
  });
  $("fixed").replaceChildren(...rows);
}

function updatePanels() {
  attention?.update();
  others?.update();
  compare?.update();
}

function selectSentence(index) {
  if (translation.selected === index) return;
  translation.selected = index;
  attention.update();
  others.update();
}

async function showAlternatives(index, wordIndex, word) {
  const sentence = translation.sentences[index];
  const words = shownWords(sentence);
  const choose = async (prefix) => {
    try {
      await translation.fix(index, prefix);
      output.node(index).querySelectorAll(".word")[wordIndex]?.focus();
    } catch (error) {
      showProblem(error);
    }
  };
  try {
    const body = { text: sentence.source, ...settings() };
    const prefix = textBefore(words, wordIndex);
    await openAlternatives({ word, label: words[wordIndex].text, prefix, body, choose });
  } catch (error) {
    showProblem(error);
  }
}

// ------------------------------------------------------------------------------------------------ text and link

function fitSource() {
  source.style.height = "auto";
  source.style.height = `${source.scrollHeight + 2}px`;
}

function setText(text) {
  source.value = text;
  fitSource();
  return translate();
}

function openEntry(entry) {
  if (models.some(({ name }) => name === entry.model)) $("model").value = entry.model;
  showModel();
  scrollTo({ top: 0 });
  setText(entry.text);
}

/** The fragment of an address never leaves the browser. */
function linkToThis() {
  const { model: name, search: changes } = settings();
  const fragment = new URLSearchParams({ text: source.value, model: name });
  if (changes) fragment.set("search", JSON.stringify(changes));
  return `${location.origin}${location.pathname}#${fragment}`;
}

async function openLink() {
  const fragment = new URLSearchParams(location.hash.slice(1));
  if (!fragment.has("text")) return;
  const name = fragment.get("model");
  if (models.some((known) => known.name === name)) $("model").value = name;
  try {
    const given = JSON.parse(fragment.get("search") ?? "{}");
    const known = search.options.filter((option) => Object.hasOwn(given, option.name));
    search.changes = Object.fromEntries(known.map((option) => [option.name, given[option.name]]));
  } catch {
    search.changes = {}; // a link that was cut
  }
  search.show();
  showModel();
  await setText(fragment.get("text"));
}

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copySelection(text); // only secure pages have a clipboard
  }
  const label = button.textContent;
  button.textContent = "Copied";
  $("announcer").textContent = "Copied";
  await pause(1.5);
  button.textContent = label === "Copied" ? button.dataset.label : label;
}

function copySelection(text) {
  const area = html("textarea", { class: "unseen" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// ------------------------------------------------------------------------------------------------------ events

function listenToText() {
  source.addEventListener("input", () => {
    fitSource();
    clearTimeout(timer);
    timer = setTimeout(() => translate(), DEBOUNCE);
  });
  source.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
    event.preventDefault();
    translate();
  });
  addEventListener("resize", fitSource);
  $("clear").addEventListener("click", () => {
    history.isContinued = false;
    setText("");
    source.focus();
  });
}

function listenToButtons() {
  $("model").addEventListener("change", () => {
    showModel();
    translate();
  });
  for (const [id, text] of Object.entries({ copy: () => translation.output, "copy-link": linkToThis })) {
    $(id).dataset.label = $(id).textContent;
    $(id).addEventListener("click", () => copy(text(), $(id)));
  }
  $("help-button").addEventListener("click", () => $("help").showModal());
  for (const button of document.querySelectorAll("dialog .close")) {
    button.addEventListener("click", () => button.closest("dialog").close());
  }
  addEventListener("hashchange", openLink);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.("input, textarea, select, dialog[open]")) return;
    if (event.key === "?") $("help").showModal();
    else if (event.key === "/") source.focus();
    else return;
    event.preventDefault();
  });
}

function listenToFiles() {
  $("open").addEventListener("click", () => $("chooser").click());
  $("chooser").addEventListener("change", ({ target }) => {
    if (target.files[0]) file.start(target.files[0]);
    target.value = ""; // the same file can be chosen again
  });
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!hasFiles(event)) return;
    event.preventDefault();
    file.start(event.dataTransfer.files[0]);
  });
}

async function load() {
  const [known, options] = await Promise.all([request("v1/models"), request("v1/search")]);
  models = known.models;
  $("model").replaceChildren(...models.map(({ name }) => html("option", {}, name)));
  $("model").value = known.default;
  $("model-choice").hidden = models.length < 2;
  search.load(options);
  compare.load();
  showModel();
  await openLink();
}

startTheme();
startAlternatives();
listenToText();
listenToButtons();
listenToFiles();
load().catch(showProblem);
