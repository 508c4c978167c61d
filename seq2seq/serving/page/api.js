// The description of the API from openapi.json: its routes with their fields, answers and an example.

import { html, withCode } from "./elements.js";
import { startTheme } from "./theme.js";

const JSON_TYPE = "application/json";
const origin = new URL(".", document.baseURI).href.replace(/\/$/, "");
let schemas = {};

const resolved = (schema) => (schema?.$ref ? schemas[schema.$ref.split("/").pop()] : schema);

/** Return a schema's type in words: the names of objects, and what lists hold. */
function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "any value";
}

/** Return paragraphs and lists of a description. */
function prose(text) {
  return text
    .replace(/\[([^\]]+)\]\(([^)]+)\)/g, "$1 ($2)")
    .trim()
    .split(/\n\n+/)
    .map((block) =>
      block.startsWith("- ")
        ? html("ul", {}, ...block.split(/\n?^- /m).flatMap((item) => (item ? [html("li", {}, ...withCode(item))] : [])))
        : html("p", {}, ...withCode(block)),
    );
}

function fieldRow(name, field, isRequired) {
  const standard = isRequired ? "required" : field.default === undefined ? "" : JSON.stringify(field.default);
  return html(
    "tr",
    {},
    html("td", {}, html("code", {}, name)),
    html("td", {}, typeOf(field)),
    html("td", {}, standard),
    html("td", {}, ...withCode(field.description ?? "")),
  );
}

function fields(schema) {
  const object = resolved(schema);
  if (!object?.properties) return html("p", {}, typeOf(schema ?? {}));
  const isRequired = ([name]) => Boolean(object.required?.includes(name));
  const sorted = Object.entries(object.properties).sort((a, b) => isRequired(b) - isRequired(a));
  const rows = sorted.map(([name, field]) => fieldRow(name, field, isRequired([name])));
  const head = ["Field", "Type", "Default", ""].map((title) => html("th", { scope: "col" }, title));
  return html("div", { class: "scroll" }, html("table", {}, html("tr", {}, ...head), ...rows));
}

/** Return the command that sends the examples of a body. */
function example(path, schema) {
  const body = Object.fromEntries(
    Object.entries(resolved(schema)?.properties ?? {}).flatMap(([name, field]) =>
      field.examples && resolved(schema).required?.includes(name) ? [[name, field.examples[0]]] : [],
    ),
  );
  const data = JSON.stringify(body).replaceAll("'", "'\\''");
  return `curl ${origin}${path} -H 'Content-Type: ${JSON_TYPE}' -d '${data}'`;
}

function answerOf(operation) {
  const { content = {} } = operation.responses["200"] ?? {};
  const [[media, { schema = {} }] = ["", {}]] = Object.entries(content);
  if (media && media !== JSON_TYPE) return html("p", {}, media);
  const item = schema.type === "array" && schema.items?.$ref ? schema.items : schema;
  return [html("p", { class: "soft" }, typeOf(schema)), resolved(item)?.properties ? fields(item) : null];
}

function errorsOf(operation) {
  const errors = Object.entries(operation.responses).filter(([status]) => status !== "200");
  const rows = errors.map(([status, { description }]) =>
    html("tr", {}, html("td", {}, html("code", {}, status)), html("td", {}, description)),
  );
  return rows.length ? [html("h4", {}, "Errors"), html("table", {}, ...rows)] : [];
}

function route(path, method, operation) {
  const content = operation.requestBody?.content;
  const body = content?.[JSON_TYPE]?.schema;
  const parts = body ? [html("h4", {}, `Body: ${Object.keys(content).join(" or ")}`), fields(body)] : [];
  const command = body ? example(path, body) : `curl ${method === "post" ? "-X POST " : ""}${origin}${path}`;
  const summary = prose(operation.description)[0].textContent;
  return html(
    "details",
    { class: "card route", id: `${method}${path}` },
    html(
      "summary",
      {},
      html("span", { class: "method" }, method.toUpperCase()),
      html("code", {}, path),
      html("span", { class: "soft" }, summary),
    ),
    ...prose(operation.description).slice(1),
    html("h4", {}, "Example"),
    html("pre", {}, command),
    ...parts,
    html("h4", {}, "Answer"),
    answerOf(operation),
    ...errorsOf(operation),
  );
}

function show(description) {
  schemas = description.components.schemas;
  document.getElementById("title").textContent = `${description.info.title} ${description.info.version}: API`;
  document.getElementById("description").replaceChildren(...prose(description.info.description));
  const routes = Object.entries(description.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({ tag: operation.tags[0], path, method, operation })),
  );
  const sections = [...new Set(routes.map(({ tag }) => tag))].map((tag) => {
    const own = routes.filter((one) => one.tag === tag);
    return html("section", {}, html("h2", {}, tag), ...own.map((one) => route(one.path, one.method, one.operation)));
  });
  document.getElementById("routes").replaceChildren(...sections);
  document.getElementById(decodeURIComponent(location.hash.slice(1)))?.setAttribute("open", "");
}

startTheme();
const response = await fetch("openapi.json");
show(await response.json());
