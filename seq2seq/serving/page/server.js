// Requests to the server: JSON and event streams, the API key, waiting where the server is busy.

/** A failure in one line; status 0: the server cannot be reached. */
export class Problem extends Error {
  constructor(message, status, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const KEY = "seq2seq-api-key";
const ATTEMPTS = 6; // of a server that is starting or stopping
let asking = null; // one question for all requests that wait for a key

function storedKey() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function storeKey(key) {
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // Without storage every request asks.
  }
}

/** Wait; an aborted wait fails as an aborted request does. */
export function pause(seconds, signal) {
  return new Promise((done, fail) => {
    const timer = setTimeout(done, 1000 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      fail(signal.reason);
    });
  });
}

function askKey(message) {
  const dialog = document.getElementById("key");
  const input = document.getElementById("key-value");
  document.getElementById("key-problem").textContent = message;
  input.value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((done) => {
    dialog.querySelector("form").onsubmit = (event) => {
      event.preventDefault(); // nothing is sent as a form
      dialog.close(input.value);
    };
    dialog.onclose = () => done(dialog.returnValue || null);
  });
}

async function problemOf(response) {
  let message = `the server answered ${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error ?? message;
  } catch (error) {
    if (error.name === "AbortError") throw error; // of any other, the status has to do
  }
  const after = Number.parseFloat(response.headers.get("Retry-After"));
  return new Problem(message, response.status, Number.isFinite(after) ? after : null);
}

async function send(path, body, signal) {
  const key = storedKey();
  const headers = {
    ...(body && { "Content-Type": "application/json" }),
    ...(key && { Authorization: `Bearer ${key}` }),
  };
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  try {
    return await fetch(path, { ...options, headers, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Problem("The server does not answer. Is `seq2seq serve` running?", 0);
  }
}

/** Ask for a key after a refusal; return whether there is a new one. */
async function newKey(message, refusedKey) {
  if (storedKey() !== refusedKey) return true; // another request has asked in the meantime
  asking ??= askKey(message).finally(() => {
    asking = null;
  });
  const key = await asking;
  if (key) storeKey(key);
  return Boolean(key);
}

/** Return the response; wait as long as the server asks, which `onWait` shows. */
async function respond(path, body, { signal, onWait } = {}) {
  for (let attempt = 1; ; attempt++) {
    const key = storedKey();
    const response = await send(path, body, signal);
    if (response.ok) return response;
    const problem = await problemOf(response);
    const mayWait = problem.status === 429 || (problem.status === 503 && attempt < ATTEMPTS);
    if (problem.status === 403 && (await newKey(problem.message, key))) continue;
    if (!mayWait) throw problem;
    const seconds = problem.retryAfter ?? 1;
    onWait?.(seconds);
    await pause(seconds, signal);
  }
}

export async function request(path, body = null, options = {}) {
  const response = await respond(path, body, options);
  return response.json();
}

/** Split a growing text into events; return them and the rest. */
export function readEvents(text) {
  const blocks = text.replaceAll("\r\n", "\n").split("\n\n");
  const rest = blocks.pop();
  const field = (block, name) =>
    block
      .split("\n")
      .filter((line) => line.startsWith(`${name}:`))
      .map((line) => line.slice(name.length + 1).trimStart())
      .join("\n");
  const events = blocks.map((block) => ({ name: field(block, "event"), data: field(block, "data") }));
  return [events.filter((event) => event.data), rest];
}

/** Call `handlers[event](data)` for each event of a stream; an `error` event is a Problem. */
export async function stream(path, body, handlers, options) {
  const response = await respond(path, body, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let [buffer, isDone] = ["", false];
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const [events, rest] = readEvents(buffer + part.value);
      buffer = rest;
      for (const { name, data } of events) {
        const value = JSON.parse(data);
        if (name === "error") throw new Problem(value.error, 500);
        isDone ||= name === "done";
        handlers[name]?.(value);
      }
    }
  } catch (error) {
    if (error instanceof Problem || options.signal?.aborted) throw error;
    throw new Problem("The connection to the server broke.", 0);
  }
  if (!isDone) throw new Problem("The server ended the translation early.", 0);
}
