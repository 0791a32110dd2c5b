// The shell: views by the hash of the address, what they share, keys, dialogs, drops.

import { createApi } from "./api.js";
import { count, el, failure, fill, icon, percent, sentence } from "./dom.js";

const VIEWS = ["search", "compare", "upgrade", "spaces", "map"];
const $ = (id) => document.getElementById(id);

// ------------------------------------------------------------------------------------------------------ events

const listeners = new Map();

/** Listen to "gallery" (GalleryInfo), "upgrade" (UpgradeView), "live" (bool), "theme", "params" (the view's parameters
 *  changed, and it stays mounted because it listens), "pictures" (files dropped, pasted; return true to take them).
 *  Returns a function that stops listening; what a view has not stopped, ends with the view. */
function on(event, listener) {
  if (!listeners.has(event)) listeners.set(event, new Set());
  listeners.get(event).add(listener);
  return () => listeners.get(event).delete(listener);
}

function emit(event, value) {
  return [...(listeners.get(event) ?? [])].map((listener) => listener(value)).some((answer) => answer !== false);
}

// ----------------------------------------------------------------------------------------------------- dialogs

/** Show a dialog, wait until it is closed, and give its return value. */
function ask(dialog) {
  return new Promise((resolve) => {
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
    dialog.showModal();
  });
}

/** Ask before something that cannot be taken back. `text` states the consequence; `danger` colours the action. */
async function confirm({ title, text, action, danger = false }) {
  $("confirm-title").textContent = title;
  $("confirm-text").textContent = text;
  $("confirm-ok").textContent = action;
  $("confirm-ok").className = `button ${danger ? "danger" : "primary"}`;
  return (await ask($("confirm-dialog"))) === "ok";
}

/** `title`: why it is asked for. */
async function askToken(title) {
  const input = $("token-input");
  input.value = "";
  $("token-title").textContent = title;
  $("token-forget").hidden = api.token() === null;
  const answer = await ask($("token-dialog"));
  if (answer === "forget") api.setToken(null);
  return answer === "ok" ? input.value.trim() || null : null;
}

/** A short message at the edge of the window. `kind`: "", "right" or "wrong". */
function toast(text, kind = "") {
  const close = () => note.remove();
  const note = el(
    "div",
    { class: `toast ${kind}`.trim(), data: { testid: "toast" } },
    el("span", {}, sentence(text)),
    el("button", { type: "button", class: "icon-button", "aria-label": "Dismiss", on: { click: close } }, icon("close")),
  );
  $("toasts").append(note);
  setTimeout(close, Math.max(5000, 70 * text.length));
}

// ------------------------------------------------------------------------------------------------------ views

const api = createApi({ askToken: (refused) => askToken(refused ? "The service does not know this token" : "This gallery needs a token") });

/** What views get. `gallery` is the latest GalleryInfo (null until the service has answered once), `upgrade` the latest
 *  UpgradeView that an event brought (null before), `params` the parameters of the address. */
const context = { api, gallery: null, upgrade: null, params: {}, on, toast, confirm, navigate };

let current = { view: null, leave: () => {} };

function navigate(view, params = {}) {
  const given = Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const query = given.length > 0 ? `?${new URLSearchParams(given)}` : "";
  const hash = `#/${view}${query}`;
  if (location.hash === hash) route();
  else location.hash = hash;
}

function address() {
  const [view, query = ""] = location.hash.replace(/^#\//, "").split("?");
  return { view: VIEWS.includes(view) ? view : "search", params: Object.fromEntries(new URLSearchParams(query)) };
}

let turn = 0;

async function route() {
  const { view, params } = address();
  context.params = params;
  if (view === current.view && (listeners.get("params")?.size ?? 0) > 0) {
    emit("params", params);
    return;
  }
  turn += 1;
  const mine = turn;
  current.leave();
  current = { view, leave: () => {} };
  for (const link of document.querySelectorAll("[data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  titleOf();
  const root = el("div", { class: `view view-${view}` });
  $("view").replaceChildren(root);
  window.scrollTo(0, 0);
  try {
    const module = await import(`./${view}.js`);
    await known;
    if (mine !== turn) return;
    const own = [];
    const scoped = Object.create(context, {
      on: {
        value: (event, listener) => {
          const off = on(event, listener);
          own.push(off);
          return off;
        },
      },
    });
    let cleanup = null;
    current.leave = () => {
      own.forEach((off) => off());
      cleanup?.();
    };
    cleanup = module.mount(root, scoped);
  } catch (error) {
    console.error(error);
    if (mine === turn) fill(root, failure(error, () => location.reload()));
  }
}

function titleOf() {
  const name = current.view[0].toUpperCase() + current.view.slice(1);
  document.title = [name, context.gallery?.name, "Bowerbird"].filter(Boolean).join(" · ");
}

// ---------------------------------------------------------------------------------------------------- gallery

function learn(info) {
  // Events leave out what only the whole answer has, such as the keys of a sample.
  context.gallery = { ...context.gallery, ...info };
  const { name, items, upgrade } = context.gallery;
  const chip = $("gallery");
  chip.hidden = false;
  chip.href = upgrade ? "#/upgrade" : "#/spaces";
  fill(
    chip,
    el("span", { class: "dot", data: { testid: "live" } }),
    el("strong", { class: "ellipsis" }, name),
    el("span", { class: "muted" }, upgrade ? `${percent(upgrade.share, 0)} moved` : count(items, "item")),
  );
  titleOf();
  emit("gallery", context.gallery);
}

async function refresh() {
  learn(await api.get("/v1/gallery"));
}

function connect() {
  api.events({
    gallery: learn,
    upgrade: (view) => {
      context.upgrade = view;
      emit("upgrade", view);
    },
    live: (live) => {
      document.documentElement.dataset.live = String(live);
      $("gallery").title = live ? "What is shown is up to date" : "No connection to the service; trying again";
      emit("live", live);
    },
  });
}

// ------------------------------------------------------------------------------------------------- keys, drops

function typing(target) {
  return target instanceof HTMLElement && target.matches("input:not([type=radio], [type=checkbox]), select");
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
  if (document.querySelector("dialog[open]")) return;
  const view = VIEWS[Number(event.key) - 1];
  if (view) navigate(view);
  else if (event.key === "/") focusSearch();
  else if (event.key === "?") $("keys-dialog").showModal();
  else if (event.key === "t") nextTheme();
  else return;
  event.preventDefault();
});

function focusSearch() {
  const input = document.querySelector("[data-search-input]");
  if (input) {
    input.focus();
    input.select();
    return;
  }
  const seen = new MutationObserver(() => {
    const found = document.querySelector("[data-search-input]");
    if (!found) return;
    seen.disconnect();
    found.focus();
  });
  seen.observe($("view"), { childList: true, subtree: true });
  navigate("search");
}

function nextTheme() {
  window.dispatchEvent(new Event("bowerbird-theme-next"));
}

function nameTheme() {
  const choice = document.documentElement.dataset.themeChoice;
  const text = `Theme: ${{ auto: "as the system", light: "light", dark: "dark" }[choice]}`;
  $("theme-button").title = `${text} (t)`;
  $("theme-button").setAttribute("aria-label", text);
  emit("theme");
}

/** Pictures for the view; one that has no use for them leaves them to the search. */
async function give(files) {
  const pictures = files.filter((file) => file.type.startsWith("image/") || file.type === "");
  if (pictures.length === 0) {
    toast("That is not a picture file.", "wrong");
    return;
  }
  if ((listeners.get("pictures")?.size ?? 0) > 0) {
    emit("pictures", pictures);
    return;
  }
  const { remember } = await import("./query.js");
  navigate("search", { picture: remember(pictures[0]) });
}

const hasFiles = (event) => event.dataTransfer?.types.includes("Files") ?? false;

window.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  $("drop-text").textContent = document.querySelector("[data-drop-text]")?.dataset.dropText ?? "Drop a picture to search by it";
  $("drop").hidden = Boolean(document.querySelector("dialog[open]"));
});
window.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) $("drop").hidden = true;
});
window.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  $("drop").hidden = true;
  if (!document.querySelector("dialog[open]")) give([...event.dataTransfer.files]);
});
window.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length === 0 || document.querySelector("dialog[open]")) return;
  event.preventDefault();
  give(files);
});

// ------------------------------------------------------------------------------------------------------ start

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view
  $("view").focus();
});
$("keys-button").addEventListener("click", () => $("keys-dialog").showModal());
$("theme-button").addEventListener("click", nextTheme);
$("token-button").addEventListener("click", async () => {
  const before = api.token();
  const value = await askToken(before === null ? "Use a token" : "Use another token");
  if (value) api.setToken(value);
  if (api.token() !== before) location.reload();
});
for (const dialog of document.querySelectorAll("dialog")) {
  // A click beside a dialog closes it. The dialog itself has no padding: what is hit is the backdrop.
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close("cancel"));
}
// Not submit buttons: Enter in the field means the token.
$("token-cancel").addEventListener("click", () => $("token-dialog").close("cancel"));
$("token-forget").addEventListener("click", () => $("token-dialog").close("forget"));
window.addEventListener("bowerbird-theme", nameTheme);
window.addEventListener("hashchange", route);
nameTheme();
// A view is mounted when the gallery is known; until then it would not know what it may offer.
const known = refresh().then(connect);
route();
