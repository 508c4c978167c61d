// Elements and numbers of the report and of the page of `seq2seq serve`.

/** Set attributes (`on…`: listeners) and append children; null is no child. */
export function build(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style")
      node.style.cssText = value; // a content security policy may forbid the attribute
    else node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null));
  return node;
}

export const html = (tag, attributes = {}, ...children) => build(document.createElement(tag), attributes, children);
export const svg = (tag, attributes = {}, ...children) =>
  build(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

export const card = (...children) => html("div", { class: "card" }, ...children);
export const cardHead = (title, note) => html("div", { class: "head" }, html("h3", {}, title), note);
export const soft = (...children) => html("span", { class: "soft" }, ...children);

/** Return the parts of a text, `code` as elements. */
export const withCode = (text) => text.split("`").map((part, i) => (i % 2 ? html("code", {}, part) : part));

const ruler = html("canvas").getContext("2d");

export function textWidth(text, size) {
  ruler.font = `${size}px system-ui, sans-serif`;
  return ruler.measureText(text).width;
}

// ----------------------------------------------------------------------------------------------------- numbers

export const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
export const range = (count) => [...Array(count).keys()];
export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

export const formatCount = (number) => Math.round(number).toLocaleString("en-US");
