// Elements, icons and numbers. Data of strangers becomes text here, never markup: there is no innerHTML on this page.

/** An element. `props`: attributes; `class`, `on` ({event: listener}), `data` (data attributes); true is an empty
 *  attribute, false, null and undefined are left out. Children: elements, or anything else as text; null is left out. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "data") Object.assign(node.dataset, value);
    else if (name === "class") node.className = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  put(node, ...children);
  return node;
}

/** Append children as `el` does. */
export function put(node, ...children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : String(child));
  }
  return node;
}

/** Replace all children. */
export function fill(node, ...children) {
  node.replaceChildren();
  return put(node, ...children);
}

/** An icon of index.html (`<symbol id="i-NAME">`), hidden from screen readers. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button. `kind`: "", "primary", "danger" or "ghost"; `props` as of `el`. */
export function button(label, onClick, { kind = "", symbol = null, ...props } = {}) {
  return el(
    "button",
    { type: "button", ...props, class: `button ${kind} ${props.class ?? ""}`.trim(), on: { click: onClick } },
    symbol && icon(symbol),
    el("span", {}, label),
  );
}

/** What stands where nothing is: what to see here, and what to do next. */
export function empty({ symbol = "picture", title, text, actions = [] }) {
  return el(
    "div",
    { class: "empty", data: { testid: "empty" } },
    icon(symbol),
    el("h2", {}, title),
    text && el("p", {}, text),
    actions.length > 0 && el("div", { class: "row center" }, actions),
  );
}

const PROBLEMS = {
  401: "A token is needed",
  403: "You may not do this",
  404: "That is not there",
  409: "Not possible now",
  413: "That is too large",
  415: "That is of a type that is not taken",
  422: "That cannot be used",
  429: "Too many requests",
  500: "A bug of the service",
  503: "The service is busy",
};

// What the same request would only get again.
const FOR_GOOD = [400, 404, 413, 415, 422];

/** An error, as the service put it; `retry` is offered where it may help. */
export function failure(error, retry = null) {
  return el(
    "div",
    { class: "notice wrong", role: "alert", data: { testid: "error" } },
    icon("alert"),
    el("div", { class: "grow" }, el("strong", {}, PROBLEMS[error.status] ?? error.title ?? "That did not work"), el("p", {}, sentence(error.message))),
    retry && !FOR_GOOD.includes(error.status) && button("Try again", retry),
  );
}

/** The last part of an id that may be a path; all of it where it is none. */
export function shortId(id) {
  const parts = id.split("/").filter(Boolean);
  return parts.length > 0 ? parts[parts.length - 1] : id;
}

/** With a capital at its beginning and a full stop at its end. */
export const sentence = (text) => capital(text) + (/[\w'")\]%]$/.test(text) ? "." : "");
export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

const whole = new Intl.NumberFormat("en");
/** 12,345 */
export const number = (value) => whole.format(value);
/** 0.1234 -> 12.3 %; 1 -> 100 % */
export function percent(share, digits = 1) {
  const text = (100 * share).toFixed(digits);
  return `${text.includes(".") ? text.replace(/\.?0+$/, "") : text}\u00a0%`;
}
/** Cosines and the like. */
export const decimal = (value, digits = 3) => value.toFixed(digits).replace("-", "\u2212");
/** "1 item", "2 items" */
export const count = (n, noun, plural = `${noun}s`) => `${number(n)} ${n === 1 ? noun : plural}`;
/** 1.5 MiB */
export const mebibytes = (bytes) => `${decimal(bytes / 2 ** 20, 1)} MiB`;
/** What an answer took: 0.8 ms, 34 ms, 1.4 s */
export const took = (milliseconds) => (milliseconds < 1000 ? `${decimal(milliseconds, milliseconds < 10 ? 1 : 0)} ms` : `${decimal(milliseconds / 1000, 1)} s`);
/** Seconds in words: 45 s, 12 min, 3 h 20 min, 2 days 4 h */
export function duration(seconds) {
  if (seconds < 1) return "under a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} days ${Math.floor((minutes % 1440) / 60)} h`;
}
/** The value of a custom property such as "accent", for a canvas. Ask again after the event "theme". */
export const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
/** Whether things may move. */
export const animated = () => !matchMedia("(prefers-reduced-motion: reduce)").matches;
