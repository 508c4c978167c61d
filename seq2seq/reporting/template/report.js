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

// ---------------------------------------------------------------------------------------------------- elements

function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null));
  return node;
}

const html = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

const card = (...children) => html("div", { class: "card" }, ...children);
const cardHead = (title, note) => html("div", { class: "head" }, html("h3", {}, title), note);
const soft = (...children) => html("span", { class: "soft" }, ...children);
const numberCell = (...children) => html("td", { class: "number" }, ...children);
const legendKey = (colour, text) => html("span", { class: "key" }, html("i", { style: `background:${colour}` }), text);

function section(title, id, ...children) {
  document.querySelector("nav").append(html("a", { href: `#${id}` }, title));
  document
    .querySelector("main")
    .append(html("section", { id, "aria-label": title }, html("h2", {}, title), ...children));
}

const ruler = html("canvas").getContext("2d");

function textWidth(text, size) {
  ruler.font = `${size}px system-ui, sans-serif`;
  return ruler.measureText(text).width;
}

// ----------------------------------------------------------------------------------------------------- numbers

const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
const range = (count) => [...Array(count).keys()];
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

const formatCount = (number) => Math.round(number).toLocaleString("en-US");
const formatScientific = (value) => value.toExponential(1).replace("e-", "e−");
const formatRate = (value) => (value ? formatScientific(value) : "0");
const formatPercent = (fraction) => `${(100 * fraction).toFixed(1)} %`;
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

// ------------------------------------------------------------------------------------------------------- theme

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };
const STORAGE_KEY = "seq2seq-theme";
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const painters = []; // draw what depends on widths or colours
let theme = storedTheme();

function storedTheme() {
  try {
    const stored = localStorage.getItem(STORAGE_KEY);
    return stored in THEMES ? stored : "auto";
  } catch {
    return "auto"; // a page from a file may have no storage
  }
}

function storeTheme() {
  try {
    localStorage.setItem(STORAGE_KEY, theme);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
}

function applyTheme() {
  const automatic = prefersDark.matches ? "dark" : "light";
  document.documentElement.dataset.theme = theme === "auto" ? automatic : theme;
  document.getElementById("theme").textContent = THEMES[theme];
  repaint();
}

function nextTheme() {
  const names = Object.keys(THEMES);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  storeTheme();
  applyTheme();
}

function repaint() {
  for (const paint of painters) paint();
}

/** Paint when the page has a layout, and again whenever its width or theme changes. */
function keepPainted(paint) {
  painters.push(paint);
  requestAnimationFrame(paint);
}

function repaintOnNewWidth() {
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone changes only the height while it scrolls
    width = innerWidth;
    repaint();
  });
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

// ------------------------------------------------------------------------------ attention: weights and colours

const END_LABEL = "⏎";
const HEAT_STOPS = [0, 0.25, 0.6, 1]; // weights of the colours --heat-0 to --heat-3

/** Return a function of layer and head (null: the mean of all) that gives target × source weights. */
function unpackWeights({ weights, shape: [layers, heads, rows, columns] }) {
  const bytes = Uint8Array.from(atob(weights), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const weightAt = (i) => view.getUint16(2 * i, true) / 65535;
  const grid = (layer, head) =>
    range(rows).map((row) => {
      const first = ((layer * heads + head) * rows + row) * columns;
      return range(columns).map((column) => weightAt(first + column));
    });
  return (layer, head) => {
    const chosenLayers = layer === null ? range(layers) : [layer];
    const chosenHeads = head === null ? range(heads) : [head];
    return meanGrid(chosenLayers.flatMap((l) => chosenHeads.map((h) => grid(l, h))));
  };
}

function meanGrid(grids) {
  return grids[0].map((row, t) => row.map((_, s) => sum(grids.map((grid) => grid[t][s])) / grids.length));
}

/** Sum weights over the subwords of a source word and average them over those of a target word. */
function toWords(grid, plot) {
  const sourceSums = (row) =>
    plot.source_words.map((_, word) => sum(plot.source_fractions.map((fractions, s) => fractions[word] * row[s])));
  const sums = plot.target_fractions.map((_, t) => sourceSums(grid[t]));
  return plot.target_words.map((_, target) => {
    const fractions = plot.target_fractions.map((row) => row[target]);
    const total = sum(fractions) || 1;
    return plot.source_words.map((_, source) => sum(fractions.map((f, t) => f * sums[t][source])) / total);
  });
}

/** Return a function from a weight to a colour of the current theme. */
function heatColours() {
  const style = getComputedStyle(document.documentElement);
  const colours = HEAT_STOPS.map((_, i) => style.getPropertyValue(`--heat-${i}`).split(",").map(Number));
  return (weight) => {
    const value = clamp(weight, 0, 1);
    const i = 1 + HEAT_STOPS.slice(1).findIndex((stop) => value <= stop);
    const fraction = (value - HEAT_STOPS[i - 1]) / (HEAT_STOPS[i] - HEAT_STOPS[i - 1]);
    const mix = (low, high) => Math.round(low + fraction * (high - low));
    return `rgb(${colours[i].map((high, channel) => mix(colours[i - 1][channel], high))})`;
  };
}

function pieceLabel(piece) {
  if (piece === END_LABEL) return piece;
  return piece.startsWith("▁") ? piece.slice(1) || "␣" : `·${piece}`;
}

// ----------------------------------------------------------------------------------------- attention: the view

const view = { plot: 0, layer: null, head: null, byWord: false };
const panels = {
  picker: html("select", { "aria-label": "Sentence", onchange: (event) => showPlot(Number(event.target.value)) }),
  units: [
    html("button", { onclick: () => show({ byWord: false }) }, "Subwords"),
    html("button", { onclick: () => show({ byWord: true }) }, "Words"),
  ],
  heads: html("div", { class: "heads", role: "group", "aria-label": "Layers and heads" }),
  heatMap: html("div", { class: "heat-map" }),
  weight: html("span", { class: "soft number" }),
  links: html("div", { class: "links" }),
  texts: html("dl", { class: "text" }),
  scale: html("i"),
};

function show(changes) {
  Object.assign(view, changes);
  paintAttention();
}

function showPlot(index) {
  panels.picker.value = index;
  show({ plot: index });
}

function showNeighbour(offset) {
  showPlot((view.plot + offset + DATA.attention.length) % DATA.attention.length);
}

function paintAttention() {
  const plot = DATA.attention[view.plot];
  const weights = unpackWeights(plot);
  const colour = heatColours();
  const pieceGrid = weights(view.layer, view.head);
  const wordGrid = toWords(pieceGrid, plot);
  for (const [i, button] of panels.units.entries()) {
    button.setAttribute("aria-pressed", String(view.byWord === Boolean(i)));
  }
  const stops = HEAT_STOPS.map((stop) => `${colour(stop)} ${100 * stop}%`);
  panels.scale.style.background = `linear-gradient(90deg, ${stops})`;
  paintHeads(plot, weights, colour);
  if (view.byWord) paintHeatMap(wordGrid, plot.target_words, plot.source_words, colour);
  else paintHeatMap(pieceGrid, plot.target_pieces.map(pieceLabel), plot.source_pieces.map(pieceLabel), colour);
  paintLinks(wordGrid, plot);
  panels.texts.replaceChildren(...attentionTexts(plot.example));
}

function attentionTexts({ source, output, references }) {
  return [...textRow("source", source), ...textRow("output", output), ...textRow("reference", references[0])];
}

function textRow(name, text) {
  return [html("dt", {}, name), html("dd", { dir: "auto" }, text.length ? text : soft("nothing"))];
}

// --------------------------------------------------------------------------------- attention: layers and heads

function errorRate(layer, head) {
  const { alignment } = DATA;
  if (!alignment || (layer === null && head !== null)) return null;
  if (layer === null) return alignment.mean;
  return head === null ? alignment.layers[layer] : alignment.heads[layer][head];
}

function thumbnail(grid, colour) {
  const canvas = html("canvas", { width: grid[0].length, height: grid.length });
  const context = canvas.getContext("2d");
  grid.forEach((row, t) => {
    row.forEach((weight, s) => {
      context.fillStyle = colour(weight);
      context.fillRect(s, t, 1, 1);
    });
  });
  return canvas;
}

function headButton(layer, head, grid, colour) {
  const rate = errorRate(layer, head);
  const layerName = layer === null ? "all layers" : `layer ${layer + 1}`;
  const attributes = {
    "aria-pressed": String(view.layer === layer && view.head === head),
    "aria-label": `${layerName}, ${head === null ? "mean of heads" : `head ${head + 1}`}`,
    "data-layer": layer ?? "mean",
    "data-head": head ?? "mean",
    onclick: () => show({ layer, head }),
  };
  const rateText =
    rate !== null && html("span", { class: "soft number", title: "alignment error rate" }, rate.toFixed(2));
  const name = head === null ? "mean" : `${head + 1}`;
  return html("button", attributes, thumbnail(grid, colour), name, rateText || null);
}

function paintHeads({ shape: [layers, heads] }, weights, colour) {
  const button = (layer, head) => headButton(layer, head, weights(layer, head), colour);
  const rowName = (text) => html("span", { class: "row" }, text);
  const rows = range(layers).map((layer) => [
    rowName(`Layer ${layer + 1}`),
    ...range(heads).map((head) => button(layer, head)),
    heads > 1 ? button(layer, null) : html("span"),
  ]);
  const meanOfAll = layers > 1 ? [rowName("All"), button(null, null)] : [];
  panels.heads.hidden = layers * heads === 1;
  panels.heads.style.gridTemplateColumns = `auto repeat(${heads + 1}, auto)`;
  panels.heads.replaceChildren(...rows.flat(), ...meanOfAll);
}

// ----------------------------------------------------------------------------------------- attention: heat map

function heatMapLayout(rows, columns) {
  const longest = (labels) => Math.max(...labels.map((label) => textWidth(label, 13)));
  const [left, top] = [longest(rows) + 12, longest(columns) + 10];
  const available = panels.heatMap.clientWidth - left - 2;
  const cell = clamp(Math.floor(available / columns.length), 15, 34);
  const [width, height] = [cell * columns.length + 2, top + cell * rows.length + 2];
  return { left, top, cell, width, height, scrolls: left + width > panels.heatMap.clientWidth };
}

function heatMapLabels(rows, columns, { left, top, cell }) {
  const y = (t) => top + cell * (t + 0.5) + 4;
  const turned = (s) => `translate(${cell * (s + 0.5) + 4},${top - 7}) rotate(-90)`;
  return [
    rows.map((label, t) => svg("text", { x: left - 7, y: y(t), "text-anchor": "end" }, label)),
    columns.map((label, s) => svg("text", { transform: turned(s) }, label)),
  ];
}

function heatMapCells(grid, { top, cell }, colour, point) {
  return grid.flatMap((row, t) =>
    row.map((weight, s) => {
      const box = { x: cell * s, y: top + cell * t, width: cell, height: cell };
      return svg("rect", { class: "cell", ...box, fill: colour(weight), onpointerenter: () => point(t, s) });
    }),
  );
}

function paintHeatMap(grid, rows, columns, colour) {
  const layout = heatMapLayout(rows, columns);
  const [rowLabels, columnLabels] = heatMapLabels(rows, columns, layout);
  const hint = `rows: output, columns: source${layout.scrolls ? " · scroll →" : ""}`;
  const point = (t, s) => {
    for (const [labels, index] of [
      [rowLabels, t],
      [columnLabels, s],
    ]) {
      for (const [i, label] of labels.entries()) label.classList.toggle("faint", index !== null && i !== index);
    }
    panels.weight.textContent = t === null ? hint : `${rows[t]} → ${columns[s]}: ${grid[t][s].toFixed(3)}`;
  };
  const size = { class: "heat", width: layout.width, height: layout.height, style: "max-width:none" };
  const label = { role: "img", "aria-label": "Attention weights: rows are the output, columns the source" };
  const cells = svg("svg", { ...size, ...label }, ...columnLabels, ...heatMapCells(grid, layout, colour, point));
  // A lifted finger also leaves; the weight it touched stays readable.
  cells.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  panels.heatMap.replaceChildren(
    svg("svg", { class: "heat", width: layout.left, height: layout.height, style: "flex:none" }, ...rowLabels),
    html("div", { class: "scroll" }, cells),
  );
  point(null, null);
}

// ----------------------------------------------------------------------------------- attention: links of words

const LINK_STEP = 27; // pixels between words
const LINK_MINIMUM = 0.12; // weaker links are not drawn, except the strongest of a word

function linksLayout(sources, targets) {
  const width = Math.max(230, panels.links.clientWidth);
  const [least, most] = [width * 0.36, width * 0.43]; // of a side's words
  const side = (words) => clamp(Math.max(...words.map((word) => textWidth(word, 14)), 0) + 12, least, most);
  const longest = Math.max(sources.length, targets.length);
  return {
    width,
    height: 30 + LINK_STEP * Math.max(longest, 1),
    left: side(sources),
    right: width - side(targets),
    wordWidth: most - 10,
    y: (words, i) => 38 + LINK_STEP * (i + (longest - words.length) / 2),
  };
}

function shortened(word, width) {
  if (textWidth(word, 14) <= width) return word;
  let kept = word.slice(0, -1);
  while (textWidth(`${kept}…`, 14) > width) kept = kept.slice(0, -1);
  return `${kept}…`;
}

function linkPath(weight, isStrongest, { left, right }, sourceY, targetY) {
  const middle = (left + right) / 2;
  return svg("path", {
    d: `M${left},${sourceY}C${middle},${sourceY} ${middle},${targetY} ${right},${targetY}`,
    "stroke-width": isStrongest ? 1.5 + 3 * weight : 0.8 + 2 * weight,
    "stroke-opacity": isStrongest ? 0.35 + 0.65 * weight : 0.15 + 0.5 * weight,
  });
}

function linksOf(grid, sources, targets, layout) {
  return grid.flatMap((row, t) => {
    const strongest = row.indexOf(Math.max(...row));
    const shown = range(row.length).filter((s) => row[s] >= LINK_MINIMUM || s === strongest);
    return shown.map((s) => {
      const path = linkPath(row[s], s === strongest, layout, layout.y(sources, s), layout.y(targets, t));
      path.append(svg("title", {}, `${targets[t]} → ${sources[s]}: ${row[s].toFixed(2)}`));
      return { source: s, target: t, path };
    });
  });
}

function linkWords(side, words, links, { left, right, wordWidth, y }) {
  const position = side === "source" ? { x: left - 8, "text-anchor": "end" } : { x: right + 8, "text-anchor": "start" };
  const highlight = (index) => {
    for (const link of links) {
      link.path.classList.toggle("faint", index !== null && link[side] !== index);
      link.path.classList.toggle("hot", link[side] === index);
    }
  };
  return words.map((word, i) => {
    const events = { onpointerenter: () => highlight(i), onpointerleave: () => highlight(null) };
    const title = svg("title", {}, word);
    return svg("text", { ...position, y: y(words, i) + 5, ...events }, shortened(word, wordWidth), title);
  });
}

function paintLinks(grid, { source_words: sources, target_words: targets }) {
  const layout = linksLayout(sources, targets);
  const links = linksOf(grid, sources, targets, layout);
  const style = "fill:var(--soft);font-size:12px";
  const label = { role: "img", "aria-label": "Links between the words of source and output" };
  panels.links.replaceChildren(
    svg(
      "svg",
      { width: layout.width, height: layout.height, ...label },
      svg("text", { x: layout.left - 8, y: 12, "text-anchor": "end", style }, "source"),
      svg("text", { x: layout.right + 8, y: 12, style }, "output"),
      ...links.map((link) => link.path),
      ...linkWords("source", sources, links, layout),
      ...linkWords("target", targets, links, layout),
    ),
  );
}

// -------------------------------------------------------------------------------------- attention: the section

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
  panels.picker.append(
    ...DATA.attention.map(({ example, source_words: words }, i) =>
      html("option", { value: i }, `${example.index + 1} · chrF ${example.score.toFixed(0)} · ${words.join(" ")}`),
    ),
  );
  return html(
    "div",
    { class: "tools" },
    html("div", {}, arrow("Previous sentence", -1, "‹"), panels.picker, arrow("Next sentence", 1, "›")),
    html("div", {}, ...panels.units),
  );
}

function addAttention() {
  if (!DATA.attention.length) return;
  const [layers, heads] = DATA.attention[0].shape;
  const isSingle = layers * heads === 1;
  const scale = html("div", { class: "scale" }, "0", panels.scale, "1");
  const plots = [
    html("div", {}, cardHead("Weights", panels.weight), panels.heatMap, scale),
    html("div", {}, cardHead("Word alignment", soft("the strongest link is bold")), panels.links),
  ];
  section(
    "Attention",
    "attention",
    card(
      attentionNote(isSingle),
      alignmentNote(isSingle),
      attentionTools(),
      html("div", { class: "choose" }, panels.heads, panels.texts),
      html("div", { class: "plots" }, ...plots),
    ),
  );
  keepPainted(paintAttention);
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

document.getElementById("theme").addEventListener("click", nextTheme);
prefersDark.addEventListener("change", applyTheme);
applyTheme();
repaintOnNewWidth();
addHeader();
addScores();
addCurves();
addAttention();
addSentences();
addTime();
addRun();
addFooter();
