import { AttentionView, meansOf } from "./attention.js";
import { build, card, cardHead, clamp, formatCount, html, range, soft, sum, svg } from "./elements.js";
import { keepPainted, startTheme } from "./theme.js";

// ------------------------------------------------------------------------------------ data, as in ../report.py

/**
 * @typedef {Object} Report
 * @property {RunFacts} run
 * @property {?TrainingTotals} totals
 * @property {MetricResult[]} scores
 * @property {Group[]} lengths
 * @property {Object<string, Object<string, Point[]>>} curves
 * @property {Object<string, number>} time
 * @property {Sentences} sentences
 * @property {AttentionPlot[]} attention
 * @property {?Alignment} alignment
 * @property {string} config
 * @property {?Object} environment
 * @property {string[]} commands
 * @property {string} version
 */

/**
 * @typedef {Object} RunFacts
 * @property {string} name
 * @property {string} checkpoint
 * @property {string} model
 * @property {string} family
 * @property {number} parameters
 * @property {string} corpus
 * @property {string} source_language
 * @property {string} target_language
 * @property {string} test_set
 * @property {number} pairs
 * @property {string} search
 */

/**
 * @typedef {Object} TrainingTotals
 * @property {number} update
 * @property {number} seconds
 */

/**
 * @typedef {Object} MetricResult
 * @property {string} name
 * @property {number} value
 * @property {string} signature
 * @property {number} mean
 * @property {number} interval
 */

/**
 * @typedef {Object} Group
 * @property {string} label
 * @property {number} count
 * @property {number} value
 */

/** @typedef {[number, number]} Point */

/**
 * @typedef {Object} Sentences
 * @property {ExampleGroup[]} groups
 * @property {ErrorCounts} errors
 * @property {number[]} histogram
 */

/**
 * @typedef {Object} ExampleGroup
 * @property {string} name
 * @property {?number} total
 * @property {Example[]} examples
 */

/**
 * @typedef {Object} Example
 * @property {number} index
 * @property {string} source
 * @property {string[]} references
 * @property {string} output
 * @property {number} score
 */

/**
 * @typedef {Object} ErrorCounts
 * @property {number} sentences
 * @property {number} repeating
 * @property {number} short
 * @property {number} ratio
 * @property {number} omitted
 * @property {number} added
 */

/**
 * @typedef {Object} AttentionPlot
 * @property {Example} example
 * @property {string[]} source_pieces
 * @property {string[]} target_pieces
 * @property {string[]} source_words
 * @property {string[]} target_words
 * @property {number[][]} source_fractions
 * @property {number[][]} target_fractions
 * @property {[number, number, number, number]} shape
 * @property {string} weights
 */

/**
 * @typedef {Object} Alignment
 * @property {number[][]} heads
 * @property {number[]} layers
 * @property {number} mean
 * @property {number} best_rate
 * @property {number} best_layer
 * @property {number} best_head
 */

/** @type {Report} */
const DATA = JSON.parse(document.getElementById("data").textContent);

const numberCell = (...children) => html("td", { class: "number" }, ...children);
const legendKey = (colour, text) => html("span", { class: "key" }, html("i", { style: `background:${colour}` }), text);

function section(title, id, ...children) {
  document.querySelector("nav").append(html("a", { href: `#${id}` }, title));
  document
    .querySelector("main")
    .append(html("section", { id, "aria-label": title }, html("h2", {}, title), ...children));
}

// ----------------------------------------------------------------------------------------------------- numbers

const formatScientific = (value) => value.toExponential(1).replace("e-", "e−");
const formatPercent = (fraction) => `${(100 * fraction).toFixed(1)} %`;
const formatRate = (value) => (value ? formatScientific(value) : "0");
const formatAxisPercent = (fraction) => `${(100 * fraction).toFixed(fraction && fraction < 0.1 ? 1 : 0)} %`;

function formatTime(seconds) {
  const total = Math.round(seconds);
  const [hours, minutes] = [Math.floor(total / 3600), Math.floor(total / 60)];
  const twoDigits = (n) => String(n).padStart(2, "0");
  return hours ? `${hours}:${twoDigits(minutes % 60)}:${twoDigits(total % 60)}` : `${minutes}:${twoDigits(total % 60)}`;
}

function formatShort(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 0.001) return formatScientific(value);
  if (size >= 10000) return `${formatCount(value / 1000)}k`;
  if (size >= 1000) return formatCount(value);
  return String(Number(value.toPrecision(3)));
}

// ------------------------------------------------------------------------------------------------------ header

function fact(value, label, interval = null) {
  const spread = interval === null ? null : html("small", {}, ` ± ${interval.toFixed(1)}`);
  return card(html("div", { class: "fact" }, html("b", {}, value, spread), html("span", {}, label)));
}

function scoreFact(name) {
  const score = DATA.scores.find((score) => score.name === name);
  return fact(score.value.toFixed(1), `${name}, 95 % interval`, score.interval);
}

function description() {
  const { run } = DATA;
  const preset = run.model === run.family ? "" : `${run.model}, `;
  const family = run.family === "lstm" ? "attentional LSTM" : "Transformer";
  const training = `${preset}${family}, ${run.source_language} → ${run.target_language}, trained on ${run.corpus}. `;
  const test = `Test set ${run.test_set}: ${formatCount(run.pairs)} sentences, ${run.search}, ${run.checkpoint}.`;
  return training + test;
}

function headerFacts() {
  const { run, totals, alignment } = DATA;
  const updates = totals && `training, ${formatCount(totals.update)} updates, excluding validation`;
  return [
    scoreFact("BLEU"),
    scoreFact("chrF"),
    fact(`${(run.parameters / 1e6).toFixed(1)} M`, "parameters"),
    totals && fact(formatTime(totals.seconds), updates),
    alignment && fact(alignment.best_rate.toFixed(3), "alignment error rate, best head"),
  ];
}

function addHeader() {
  document.title = `${DATA.run.name} · seq2seq report`;
  document
    .querySelector("header")
    .append(
      html("h1", {}, DATA.run.name),
      html("p", { class: "soft" }, description()),
      html("div", { class: "facts" }, headerFacts()),
    );
}

// ------------------------------------------------------------------------------------------------------ scores

const filledTo = (percent, more = "") => html("i", { style: `left:0;width:${percent}%;background:var(--blue)${more}` });

function scoreBar(score) {
  const low = clamp(score.mean - score.interval, 0, 100);
  const high = clamp(score.mean + score.interval, 0, 100);
  const interval = `left:${low}%;width:${Math.max(0.6, high - low)}%;background:var(--blue)`;
  return html(
    "div",
    { class: "track", title: `${low.toFixed(2)} to ${high.toFixed(2)}` },
    filledTo(clamp(score.value, 0, 100), ";opacity:.35"),
    html("i", { style: interval }),
  );
}

function scoreRow(score) {
  const direction = html("div", { class: "soft small", style: "white-space:nowrap" }, "lower is better");
  const signature = score.signature.split("|").flatMap((part, i) => (i ? [html("wbr"), `|${part}`] : [part]));
  return html(
    "tr",
    {},
    html("td", {}, score.name, score.name === "TER" ? direction : null),
    html(
      "td",
      { class: "number", style: "white-space:nowrap" },
      html("b", {}, score.value.toFixed(2)),
      soft(` ± ${score.interval.toFixed(2)}`),
    ),
    html("td", { class: "wide" }, scoreBar(score)),
    html("td", { class: "mono" }, signature),
  );
}

function lengthRow(group, highest) {
  return html(
    "tr",
    {},
    html("td", { class: "number", style: "white-space:nowrap" }, group.label),
    html(
      "td",
      { class: "wide", style: "width:60%" },
      html("div", { class: "track" }, filledTo((100 * group.value) / highest)),
    ),
    numberCell(group.value.toFixed(1)),
    html("td", { class: "number soft" }, formatCount(group.count)),
  );
}

function lengthTable(groups) {
  const highest = Math.max(...groups.map((group) => group.value), 1e-9);
  return html("table", {}, ...groups.map((group) => lengthRow(group, highest)));
}

function histogramBar(count, i, highest, step) {
  const height = count ? Math.max(2, (148 * count) / highest) : 0;
  const label = svg("title", {}, `chrF ${i * 5} to ${i * 5 + 5}: ${formatCount(count)} sentences`);
  const box = { x: 4 + i * step + 1, y: 162 - height, width: step - 2, height };
  return svg("rect", { ...box, rx: 2, fill: "var(--blue)" }, label);
}

function histogram(counts, width) {
  const [highest, step] = [Math.max(...counts), (width - 8) / counts.length];
  const label = "Number of sentences by chrF";
  const anchors = { 0: "start", 25: "middle", 50: "middle", 75: "middle", 100: "end" };
  const ticks = Object.entries(anchors).map(([tick, anchor]) =>
    svg("text", { x: 4 + ((width - 8) * tick) / 100, y: 181, "text-anchor": anchor }, tick),
  );
  return svg(
    "svg",
    { width, height: 190, role: "img", "aria-label": label },
    ...counts.map((count, i) => histogramBar(count, i, highest, step)),
    svg("line", { x1: 4, x2: width - 4, y1: 162.5, y2: 162.5, class: "gridline" }),
    ...ticks,
  );
}

function addScores() {
  const rows = DATA.scores.map(scoreRow);
  const box = html("div");
  const columns = soft("words · BLEU · sentences");
  const cards = [
    html("div", { class: "card", style: "grid-column: 1 / -1" }, html("table", {}, ...rows)),
    card(cardHead("BLEU by source length", columns), lengthTable(DATA.lengths)),
    card(cardHead("Sentences by chrF", null), box),
  ];
  section("Scores", "scores", html("div", { class: "grid two" }, ...cards));
  keepPainted(() => box.replaceChildren(histogram(DATA.sentences.histogram, Math.max(220, box.clientWidth))));
}

// ------------------------------------------------------------------------------------------------------ curves

/**
 * @typedef {Object} Series
 * @property {string} name
 * @property {Point[]} points
 */

const SERIES_COLOURS = ["var(--blue)", "var(--orange)", "var(--green)"];
const CHART = { height: 176, right: 10, top: 8, bottom: 152 }; // pixels; bottom: the y of the lowest value
const LAST_UPDATE = lastUpdate();

function lastUpdate() {
  const lines = Object.values(DATA.curves).flatMap((kinds) => Object.values(kinds));
  return Math.max(1, ...lines.map((points) => points.at(-1)[0]));
}

function roundTicks(low, high, count) {
  const least = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= least);
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) {
    ticks.push(Number(tick.toPrecision(12)));
  }
  return ticks;
}

function valueRange(values, fromZero) {
  let low = fromZero ? 0 : Math.min(...values);
  let high = Math.max(...values);
  if (high - low < 1e-12) {
    low -= Math.abs(low) * 0.1 || 1;
    high += Math.abs(high) * 0.1 || 1;
  }
  const margin = fromZero ? 0 : (high - low) * 0.06;
  return [low - margin, high + margin];
}

function chartScale(points, width, format, fromZero) {
  const values = points.map(([, value]) => value);
  const [low, high] = valueRange(values, fromZero);
  const ticks = roundTicks(low, high, 5);
  const left = 14 + 6.7 * Math.max(...ticks.map((tick) => format(tick).length));
  const span = width - CHART.right - left;
  return {
    ticks,
    left,
    right: width - CHART.right,
    x: (update) => left + (span * update) / LAST_UPDATE,
    y: (value) => CHART.top + (CHART.bottom - CHART.top) * (1 - (value - low) / (high - low)),
    updateAt: (x) => ((x - left) / span) * LAST_UPDATE,
  };
}

function chartGrid({ ticks, left, right, x, y }, width, format) {
  const lines = ticks.flatMap((tick) => [
    svg("line", { class: "gridline", x1: left, x2: right, y1: y(tick), y2: y(tick) }),
    svg("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, format(tick)),
  ]);
  const updates = roundTicks(0, LAST_UPDATE, width < 380 ? 4 : 5).map((tick) => {
    const position = { x: Math.min(x(tick), right - 8), y: CHART.height - 6 };
    return svg("text", { ...position, "text-anchor": "middle" }, formatCount(tick));
  });
  return [...lines, ...updates];
}

function chartLine(points, colour, { x, y }) {
  const path = points.map(([update, value]) => `${x(update).toFixed(1)},${y(value).toFixed(1)}`).join("L");
  const stroke = { fill: "none", stroke: colour, "stroke-width": 2, "stroke-linejoin": "round" };
  const dots = points.length < 24 ? points : [];
  return [
    svg("path", { d: `M${path}`, ...stroke }),
    ...dots.map(([update, value]) => svg("circle", { cx: x(update), cy: y(value), r: 2.6, fill: colour })),
  ];
}

function nearest(points, update) {
  return points.reduce((best, point) => (Math.abs(point[0] - update) < Math.abs(best[0] - update) ? point : best));
}

/** Show the values of all series at the update under the pointer. */
function addCursor(chart, scale, points, showAt, showLast) {
  const dash = { y1: CHART.top, y2: CHART.bottom, visibility: "hidden", "stroke-dasharray": "3 3" };
  const cursor = svg("line", { class: "gridline", ...dash });
  chart.append(cursor);
  chart.addEventListener("pointermove", (event) => {
    const x = event.clientX - chart.getBoundingClientRect().left;
    const [update] = nearest(points, scale.updateAt(x));
    build(cursor, { x1: scale.x(update), x2: scale.x(update), visibility: "visible" }, []);
    showAt(update);
  });
  chart.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    showLast();
  });
}

/** Draw a card with one line for each series; its heading shows their last values, or those under the pointer. */
function lineChart(title, series, { format = formatShort, fromZero = false, note = null }) {
  const [values, box] = [soft(), html("div")];
  const points = series.flatMap((line) => line.points);
  const label = (i, text) => (series.length > 1 ? legendKey(SERIES_COLOURS[i], text) : html("span", {}, text));
  const showLast = () =>
    values.replaceChildren(...series.map((line, i) => label(i, `${line.name} ${format(line.points.at(-1)[1])}`)));
  const showAt = (update) => {
    const numbers = series.map((line, i) => label(i, format(nearest(line.points, update)[1])));
    values.replaceChildren(`update ${formatCount(update)}  `, ...numbers);
  };
  keepPainted(() => {
    const width = Math.max(240, box.clientWidth);
    const scale = chartScale(points, width, format, fromZero);
    const lines = series.flatMap((line, i) => chartLine(line.points, SERIES_COLOURS[i], scale));
    const size = { width, height: CHART.height, role: "img", "aria-label": title };
    const chart = svg("svg", size, ...chartGrid(scale, width, format), ...lines);
    addCursor(chart, scale, points, showAt, showLast);
    box.replaceChildren(chart);
  });
  showLast();
  const footnote = note && html("p", { class: "small soft", style: "margin:4px 0 0" }, note);
  return card(cardHead(title, values), box, footnote);
}

const CHARTS = [
  {
    title: "Loss per token",
    lines: [
      ["loss", "train", "training"],
      ["loss", "validation", "validation"],
    ],
    note: "The training loss includes dropout and label smoothing, the validation loss neither.",
  },
  {
    title: "Scores on the validation set",
    lines: [
      ["bleu", "validation", "BLEU"],
      ["chrf", "validation", "chrF"],
    ],
    format: (value) => value.toFixed(1),
    fromZero: true,
  },
  { title: "Learning rate", lines: [["rate", "train", ""]], format: formatRate, fromZero: true },
  { title: "Gradient norm", lines: [["gradient_norm", "train", ""]] },
  { title: "Target tokens per second", lines: [["tokens_per_second", "train", ""]], fromZero: true },
  {
    title: "Padding and waiting for batches",
    lines: [
      ["padding", "train", "padding"],
      ["waiting", "train", "waiting"],
    ],
    format: formatAxisPercent,
    fromZero: true,
  },
  {
    title: "Memory",
    lines: [["memory_gb", "train", ""]],
    format: (value) => `${formatShort(value)} GB`,
    fromZero: true,
  },
  {
    title: "Processor utilisation",
    lines: [["utilisation", "train", ""]],
    format: formatAxisPercent,
    fromZero: true,
  },
];

/** Describe a plain chart for every logged number that no other chart shows. */
function remainingCharts() {
  const charted = new Set(CHARTS.flatMap((chart) => chart.lines.map(([name]) => name)));
  const names = Object.keys(DATA.curves).filter((name) => !charted.has(name));
  return names.map((name) => ({
    title: name.replaceAll("_", " "),
    lines: Object.keys(DATA.curves[name]).map((kind) => [name, kind, kind]),
  }));
}

function addCurves() {
  const charts = [...CHARTS, ...remainingCharts()].flatMap((chart) => {
    const logged = chart.lines.filter(([name, kind]) => DATA.curves[name]?.[kind]);
    const series = logged.map(([name, kind, label]) => ({ name: label, points: DATA.curves[name][kind] }));
    return series.length ? [lineChart(chart.title, series, chart)] : [];
  });
  if (charts.length) section("Curves", "curves", html("div", { class: "grid" }, ...charts));
}

// --------------------------------------------------------------------------------------------------- attention

const view = new AttentionView(errorRate);
const picker = html("select", { "aria-label": "Sentence", onchange: (event) => showPlot(Number(event.target.value)) });
const texts = html("dl", { class: "text" });
let shownPlot = 0;

/** Return a function of layer and head that gives target × source weights. */
function unpackWeights({ weights, shape: [layers, heads, rows, columns] }) {
  const bytes = Uint8Array.from(atob(weights), (character) => character.charCodeAt(0));
  const numbers = new DataView(bytes.buffer);
  const weightAt = (i) => numbers.getUint16(2 * i, true) / 65535;
  const grid = (layer, head) =>
    range(rows).map((row) => {
      const first = ((layer * heads + head) * rows + row) * columns;
      return range(columns).map((column) => weightAt(first + column));
    });
  return meansOf(grid, layers, heads);
}

function showPlot(index) {
  const plot = DATA.attention[index];
  shownPlot = index;
  picker.value = index;
  texts.replaceChildren(...attentionTexts(plot.example));
  view.show({ ...plot, grid: unpackWeights(plot) });
}

function showNeighbour(offset) {
  showPlot((shownPlot + offset + DATA.attention.length) % DATA.attention.length);
}

function attentionTexts({ source, output, references }) {
  return [...textRow("source", source), ...textRow("output", output), ...textRow("reference", references[0])];
}

function textRow(name, text) {
  return [html("dt", {}, name), html("dd", { dir: "auto" }, text.length ? text : soft("nothing"))];
}

function errorRate(layer, head) {
  const { alignment } = DATA;
  if (!alignment || (layer === null && head !== null)) return null;
  if (layer === null) return alignment.mean;
  return head === null ? alignment.layers[layer] : alignment.heads[layer][head];
}

function attentionNote(isSingle) {
  const choice = "Choose a layer and a head, or a mean; the mean of all heads is shown first. ";
  const rows =
    DATA.run.family === "lstm"
      ? "Each row holds the weights that the decoder state before an output subword gives to the source."
      : "Each row holds the weights that the decoder gives to the source while it predicts an output subword.";
  return html("p", { class: "small soft" }, (isSingle ? "" : choice) + rows);
}

function alignmentNote(isSingle) {
  const { alignment } = DATA;
  if (!alignment) return null;
  const truth = "against the true links of the grammar, under teacher forcing";
  const mean = alignment.mean.toFixed(3);
  const { best_rate: rate, best_layer: layer, best_head: head } = alignment;
  const best = `Best: ${rate.toFixed(3)}, layer ${layer + 1}, head ${head + 1}; the mean of all heads: ${mean}.`;
  const text = isSingle
    ? `Alignment error rate ${truth}: ${mean}; 0 is perfect.`
    : `The numbers below the heads are alignment error rates ${truth}; 0 is perfect. ${best}`;
  return html("p", { class: "small soft" }, text);
}

function attentionTools() {
  const arrow = (label, offset, sign) =>
    html("button", { "aria-label": label, onclick: () => showNeighbour(offset) }, sign);
  picker.append(
    ...DATA.attention.map(({ example, source_words: words }, i) =>
      html("option", { value: i }, `${example.index + 1} · chrF ${example.score.toFixed(0)} · ${words.join(" ")}`),
    ),
  );
  return html(
    "div",
    { class: "tools" },
    html("div", {}, arrow("Previous sentence", -1, "‹"), picker, arrow("Next sentence", 1, "›")),
    html("div", {}, ...view.units),
  );
}

function addAttention() {
  if (!DATA.attention.length) return;
  const [layers, heads] = DATA.attention[0].shape;
  const isSingle = layers * heads === 1;
  section(
    "Attention",
    "attention",
    card(
      attentionNote(isSingle),
      alignmentNote(isSingle),
      attentionTools(),
      html("div", { class: "choose" }, view.heads, texts),
      view.plots,
    ),
  );
  keepPainted(() => view.paint());
  requestAnimationFrame(() => showPlot(0));
}

// --------------------------------------------------------------------------------------------------- sentences

const splitWords = (text) => text.split(/(\s+)/);
const lettersOf = (word) => word.replace(/[^\p{L}\p{N}]+/gu, "");

/** Mark the words of a text that another one lacks; a repeated word needs as many partners. */
function markUnmatched(text, other, className) {
  const unmatched = new Map();
  for (const word of splitWords(other).map(lettersOf)) unmatched.set(word, (unmatched.get(word) ?? 0) + 1);
  return splitWords(text).map((word) => {
    const letters = lettersOf(word);
    const count = unmatched.get(letters) ?? 0;
    unmatched.set(letters, count - 1);
    return count > 0 || !letters ? word : html("span", { class: className }, word);
  });
}

function exampleItem({ index, source, references, output, score }) {
  return html(
    "div",
    { class: "item" },
    html("div", { class: "head" }, soft(`sentence ${index + 1}`), soft(`chrF ${score.toFixed(1)}`)),
    html(
      "dl",
      { class: "text" },
      textRow("source", source),
      references.flatMap((reference) => textRow("reference", markUnmatched(reference, output, "missed"))),
      textRow("output", output && markUnmatched(output, references[0], "added")),
    ),
  );
}

function errorFacts(errors) {
  const { repeating, short, sentences } = errors;
  return html(
    "div",
    { class: "facts", style: "margin:0 0 14px" },
    fact(formatPercent(repeating / sentences), `repeat themselves where no reference does: ${formatCount(repeating)}`),
    fact(formatPercent(short / sentences), `have under 70 % as many words as the reference: ${formatCount(short)}`),
    fact(formatPercent(errors.omitted), "of the reference words are missing from the output"),
    fact(formatPercent(errors.added), "of the output words are missing from the reference"),
    fact(errors.ratio.toFixed(3), "output words for each reference word"),
  );
}

function exampleTabs(groups, list) {
  const title = ({ name, total }) => (total === null ? name : `${name} (${formatCount(total)})`);
  const tabs = groups.map((group) => html("button", { role: "tab", onclick: () => select(group) }, title(group)));
  const select = (group) => {
    for (const [i, tab] of tabs.entries()) tab.setAttribute("aria-selected", String(groups[i] === group));
    list.replaceChildren(...group.examples.map(exampleItem));
  };
  select(groups[0]);
  return html("div", { class: "tabs", role: "tablist" }, ...tabs);
}

function addSentences() {
  const list = html("div", { class: "card", role: "tabpanel" });
  const legend = [
    html("span", { class: "missed" }, "Reference words missing from the output"),
    ", ",
    html("span", { class: "added" }, "output words missing from the reference"),
    "; the score of a sentence is its chrF.",
  ];
  const groups = DATA.sentences.groups.filter((group) => group.examples.length);
  section(
    "Sentences",
    "sentences",
    errorFacts(DATA.sentences.errors),
    exampleTabs(groups, list),
    html("p", { class: "small soft" }, ...legend),
    list,
  );
}

// -------------------------------------------------------------------------------------------------------- time

const TIME_COLOURS = ["var(--blue)", "var(--green)", "var(--orange)", "var(--soft)"];

function timeBar(activities) {
  const parts = activities.map(([name, seconds], i) => {
    const style = `flex:${seconds} 0 2px;background:${TIME_COLOURS[i]}`;
    return html("i", { title: `${name}: ${formatTime(seconds)}`, style });
  });
  return html("div", { class: "stack", role: "img", "aria-label": "Time by activity" }, ...parts);
}

function timeRow(name, seconds, colour, total) {
  return html(
    "tr",
    {},
    html("td", {}, legendKey(colour, name)),
    numberCell(formatTime(seconds)),
    html("td", { class: "number", style: "white-space:nowrap" }, formatPercent(seconds / total)),
  );
}

function addTime() {
  const activities = Object.entries(DATA.time);
  const total = sum(activities.map(([, seconds]) => seconds));
  if (!total) return;
  const rows = activities.map(([name, seconds], i) => timeRow(name, seconds, TIME_COLOURS[i], total));
  const head = cardHead("Time by activity", soft(`${formatTime(total)} in total`));
  section("Time", "time", card(head, timeBar(activities), html("table", {}, ...rows)));
}

// --------------------------------------------------------------------------------------------------------- run

/** Flatten a tree to pairs of a dotted key and a text. */
function flatten(tree, prefix = "") {
  return Object.entries(tree).flatMap(([name, value]) => {
    if (Array.isArray(value)) return [[prefix + name, value.join(", ")]];
    const isTree = value !== null && typeof value === "object";
    return isTree ? flatten(value, `${prefix}${name}.`) : [[prefix + name, String(value)]];
  });
}

function environmentCard(environment) {
  const rows = flatten(environment).map(([name, value]) =>
    html(
      "tr",
      {},
      html("td", { class: "soft small" }, name),
      html("td", { class: "small", style: "overflow-wrap:anywhere" }, value),
    ),
  );
  return card(html("h3", {}, "Environment"), html("table", { style: "margin-top:6px" }, ...rows));
}

function commandsCard(commands) {
  const note =
    "The first command trains it again from the stored config and checks that its score lies in the interval.";
  return card(
    html("h3", {}, "Reproduce this run"),
    html("p", { class: "small soft", style: "margin-top:4px" }, note),
    html("pre", {}, commands.join("\n")),
  );
}

function addRun() {
  const config = html("details", {}, html("summary", {}, "Config"), html("pre", {}, DATA.config));
  section(
    "Run",
    "run",
    html(
      "div",
      { class: "grid stacked" },
      commandsCard(DATA.commands),
      DATA.environment && environmentCard(DATA.environment),
      card(config),
    ),
  );
}

function addFooter() {
  const text = `Made by seq2seq ${DATA.version}. This page contains all its data and makes no network requests.`;
  document.querySelector("main").append(html("footer", {}, text));
}

// ---------------------------------------------------------------------------------------------------- the page

startTheme();
addHeader();
addScores();
addCurves();
addAttention();
addSentences();
addTime();
addRun();
addFooter();
