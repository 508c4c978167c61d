// Attention weights as a heat map of subwords or words and as links between words, for every layer and head.

import { build, cardHead, clamp, html, range, soft, sum, svg, textWidth } from "./elements.js";

/**
 * @typedef {Object} Plot
 * @property {string[]} source_pieces
 * @property {string[]} target_pieces
 * @property {string[]} source_words
 * @property {string[]} target_words
 * @property {number[][]} source_fractions of each piece's letters in each word
 * @property {number[][]} target_fractions
 * @property {[number, number]} shape layers and heads
 * @property {(layer: ?number, head: ?number) => number[][]} grid target × source weights; null: the mean of all
 */

export const END_LABEL = "⏎";
const HEAT_STOPS = [0, 0.25, 0.6, 1]; // weights of the colours --heat-0 to --heat-3

// ------------------------------------------------------------------------------------------ weights and colours

/** Return a function of layer and head (null: the mean of all) from one that gives the weights of a single head. */
export function meansOf(grid, layers, heads) {
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

// ---------------------------------------------------------------------------------------------------- the view

/** The panels of one sentence's attention; the page arranges them. */
export class AttentionView {
  /** @param {(layer: ?number, head: ?number) => ?number} rate alignment error rate of a head or a mean, if known */
  constructor(rate = () => null) {
    this.rate = rate;
    this.chosen = { layer: null, head: null, byWord: false };
    this.plot = null;
    this.units = [
      html("button", { type: "button", onclick: () => this.choose({ byWord: false }) }, "Subwords"),
      html("button", { type: "button", onclick: () => this.choose({ byWord: true }) }, "Words"),
    ];
    this.heads = html("div", { class: "heads", role: "group", "aria-label": "Layers and heads" });
    this.weight = html("span", { class: "soft number", "aria-live": "polite" });
    this.heatMap = html("div", { class: "heat-map" });
    this.links = html("div", { class: "links" });
    this.scale = html("i");
    this.plots = html(
      "div",
      { class: "plots" },
      html("div", {}, cardHead("Weights", this.weight), this.heatMap, this.scaleBar()),
      html("div", {}, cardHead("Word alignment", soft("the strongest link is bold")), this.links),
    );
  }

  scaleBar() {
    return html("div", { class: "scale" }, "0", this.scale, "1");
  }

  /** @param {Plot} plot */
  show(plot) {
    this.plot = plot;
    this.paint();
  }

  choose(changes) {
    Object.assign(this.chosen, changes);
    this.paint();
  }

  paint() {
    const { plot, chosen } = this;
    if (!plot) return;
    const colour = heatColours();
    const pieceGrid = plot.grid(chosen.layer, chosen.head);
    const wordGrid = toWords(pieceGrid, plot);
    for (const [i, button] of this.units.entries()) {
      button.setAttribute("aria-pressed", String(chosen.byWord === Boolean(i)));
    }
    const stops = HEAT_STOPS.map((stop) => `${colour(stop)} ${100 * stop}%`);
    this.scale.style.background = `linear-gradient(90deg, ${stops})`;
    this.paintHeads(colour);
    if (chosen.byWord) paintHeatMap(this, wordGrid, plot.target_words, plot.source_words, colour);
    else paintHeatMap(this, pieceGrid, plot.target_pieces.map(pieceLabel), plot.source_pieces.map(pieceLabel), colour);
    paintLinks(this.links, wordGrid, plot);
  }

  paintHeads(colour) {
    const [layers, heads] = this.plot.shape;
    const focused = document.activeElement?.dataset ?? {};
    const button = (layer, head) => this.headButton(layer, head, colour);
    const rowName = (text) => html("span", { class: "row" }, text);
    const rows = range(layers).map((layer) => [
      rowName(`Layer ${layer + 1}`),
      ...range(heads).map((head) => button(layer, head)),
      heads > 1 ? button(layer, null) : html("span"),
    ]);
    const meanOfAll = layers > 1 ? [rowName("All"), button(null, null)] : [];
    const hadFocus = this.heads.contains(document.activeElement);
    this.heads.hidden = layers * heads === 1;
    this.heads.style.gridTemplateColumns = `auto repeat(${heads + 1}, auto)`;
    this.heads.replaceChildren(...rows.flat(), ...meanOfAll);
    const { layer, head } = focused;
    if (hadFocus) this.heads.querySelector(`[data-layer="${layer}"][data-head="${head}"]`)?.focus();
  }

  headButton(layer, head, colour) {
    const rate = this.rate(layer, head);
    const layerName = layer === null ? "all layers" : `layer ${layer + 1}`;
    const attributes = {
      type: "button",
      "aria-pressed": String(this.chosen.layer === layer && this.chosen.head === head),
      "aria-label": `${layerName}, ${head === null ? "mean of heads" : `head ${head + 1}`}`,
      "data-layer": layer ?? "mean",
      "data-head": head ?? "mean",
      onclick: () => this.choose({ layer, head }),
    };
    const rateText =
      rate !== null && html("span", { class: "soft number", title: "alignment error rate" }, rate.toFixed(2));
    const name = head === null ? "mean" : `${head + 1}`;
    return html("button", attributes, thumbnail(this.plot.grid(layer, head), colour), name, rateText || null);
  }
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

// ---------------------------------------------------------------------------------------------------- heat map

function heatMapLayout(box, rows, columns) {
  const longest = (labels) => Math.max(...labels.map((label) => textWidth(label, 13)));
  const [left, top] = [longest(rows) + 12, longest(columns) + 10];
  const available = box.clientWidth - left - 2;
  const cell = clamp(Math.floor(available / columns.length), 15, 34);
  const [width, height] = [cell * columns.length + 2, top + cell * rows.length + 2];
  return { left, top, cell, width, height, scrolls: left + width > box.clientWidth };
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

/** Return a function that names a cell's weight and fades all other labels; null: none. */
function pointer(note, grid, rows, columns, labels, hint) {
  return (t, s) => {
    for (const [texts, index] of [
      [labels[0], t],
      [labels[1], s],
    ]) {
      for (const [i, text] of texts.entries()) text.classList.toggle("faint", index !== null && i !== index);
    }
    note.textContent = t === null ? hint : `${rows[t]} → ${columns[s]}: ${grid[t][s].toFixed(3)}`;
  };
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

/** Arrow keys move a cursor over the cells. */
function addCellCursor(cells, grid, { top, cell }, point) {
  const cursor = svg("rect", { class: "cursor", width: cell, height: cell, visibility: "hidden" });
  let [t, s] = [0, 0];
  const move = (down, right) => {
    t = clamp(t + down, 0, grid.length - 1);
    s = clamp(s + right, 0, grid[0].length - 1);
    build(cursor, { x: cell * s, y: top + cell * t, visibility: "visible" }, []);
    point(t, s);
  };
  cells.append(cursor);
  cells.addEventListener("focus", () => cells.matches(":focus-visible") && move(0, 0));
  cells.addEventListener("blur", () => {
    cursor.setAttribute("visibility", "hidden");
    point(null, null);
  });
  cells.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS)) return;
    event.preventDefault();
    move(...ARROWS[event.key]);
  });
}

function paintHeatMap({ heatMap: box, weight: note }, grid, rows, columns, colour) {
  const layout = heatMapLayout(box, rows, columns);
  const labels = heatMapLabels(rows, columns, layout);
  const hint = `rows: output, columns: source${layout.scrolls ? " · scroll →" : ""}`;
  const point = pointer(note, grid, rows, columns, labels, hint);
  const size = { class: "heat", width: layout.width, height: layout.height, style: "max-width:none" };
  const label = "Attention weights: rows are the output, columns the source; arrow keys read single weights";
  const role = { role: "img", tabindex: 0, "aria-label": label };
  const cells = svg("svg", { ...size, ...role }, ...labels[1], ...heatMapCells(grid, layout, colour, point));
  addCellCursor(cells, grid, layout, point);
  // A lifted finger also leaves; the weight it touched stays readable.
  cells.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && point(null, null));
  box.replaceChildren(
    svg("svg", { class: "heat", width: layout.left, height: layout.height, style: "flex:none" }, ...labels[0]),
    html("div", { class: "scroll" }, cells),
  );
  point(null, null);
}

// ----------------------------------------------------------------------------------------------- links of words

const LINK_STEP = 27; // pixels between words
const LINK_MINIMUM = 0.12; // weaker links are not drawn, except the strongest of a word

function linksLayout(box, sources, targets) {
  const width = Math.max(230, box.clientWidth);
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
      const text = `${targets[t]} → ${sources[s]}: ${row[s].toFixed(2)}`;
      path.append(svg("title", {}, text));
      return { source: s, target: t, path, text };
    });
  });
}

/** Tab reaches the first word of a side, arrow keys its other ones. */
function moveFocus(event) {
  const next = { ArrowUp: "previousSibling", ArrowDown: "nextSibling" }[event.key];
  if (!next) return;
  event.preventDefault();
  event.target[next]?.focus();
}

function linkWords(side, words, links, { left, right, wordWidth, y }) {
  const position = side === "source" ? { x: left - 8, "text-anchor": "end" } : { x: right + 8, "text-anchor": "start" };
  const highlight = (index) => {
    for (const link of links) {
      link.path.classList.toggle("faint", index !== null && link[side] !== index);
      link.path.classList.toggle("hot", link[side] === index);
    }
  };
  const texts = words.map((word, i) => {
    const [on, off] = [() => highlight(i), () => highlight(null)];
    const events = { onpointerenter: on, onpointerleave: off, onfocus: on, onblur: off, onkeydown: moveFocus };
    const own = links.filter((link) => link[side] === i).map((link) => link.text);
    const label = { role: "img", "aria-label": own.join(", ") || word, tabindex: i ? -1 : 0 };
    const text = shortened(word, wordWidth);
    return svg("text", { ...position, y: y(words, i) + 5, ...label, ...events }, text, svg("title", {}, word));
  });
  return svg("g", {}, ...texts);
}

function paintLinks(box, grid, { source_words: sources, target_words: targets }) {
  const layout = linksLayout(box, sources, targets);
  const links = linksOf(grid, sources, targets, layout);
  const style = "fill:var(--soft);font-size:12px";
  const label = { role: "group", "aria-label": "Links between the words of source and output" };
  box.replaceChildren(
    svg(
      "svg",
      { width: layout.width, height: layout.height, ...label },
      svg("text", { x: layout.left - 8, y: 12, "text-anchor": "end", style }, "source"),
      svg("text", { x: layout.right + 8, y: 12, style }, "output"),
      ...links.map((link) => link.path),
      linkWords("source", sources, links, layout),
      linkWords("target", targets, links, layout),
    ),
  );
}
