// The wall of pictures, the arrows that walk it, and the dialog of one item.

import { button, decimal, el, failure, fill, icon, put, shortId } from "./dom.js";
import { filtersOf, paramsOf, whereParam } from "./query.js";

const THUMBNAIL = devicePixelRatio > 1.3 ? 384 : 256;

const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      entry.target.dispatchEvent(new Event("seen"));
    }
  },
  { rootMargin: "400px" },
);

/** A frame with the picture of an item, fetched when it comes near the window. */
export function frame(context, item, size = THUMBNAIL) {
  const box = el("span", { class: "frame" });
  const nothing = (text) => put(fill(box), icon("picture"), el("span", { class: "hidden-text" }, text));
  if (!item.has_picture) {
    nothing("No picture");
    return box;
  }
  box.classList.add("skeleton");
  const load = async () => {
    const picture = el("img", { alt: "", decoding: "async", draggable: "false" });
    try {
      picture.src = await context.api.picture(item.id, size);
      await picture.decode();
      if (picture.naturalWidth <= 32) picture.classList.add("pixels"); // a picture of 28 pixels is not blurred
      fill(box, picture);
    } catch (error) {
      nothing("The picture cannot be shown");
      box.title = error.message;
      if (error.status === 0) {
        const off = context.on("live", (live) => {
          if (!live) return;
          off();
          box.title = "";
          load();
        });
      }
    }
    box.classList.remove("skeleton");
  };
  box.addEventListener("seen", load, { once: true });
  seen.observe(box);
  return box;
}

const letters = (text) => String(text).toLowerCase().replace(/[^\p{L}\p{N}]/gu, "");

/** Some metadata as short texts, without what the label or the id beside them says already. A text speaks for itself; a
 *  number or true needs its key. */
function traits(context, item, first = 2) {
  const said = [labelOf(context, item) ?? "", ...item.id.split("/")].map(letters);
  return Object.entries(item.metadata)
    .filter(([key, value]) => key !== context.gallery.label_key && value !== null && value !== "" && !said.includes(letters(value)))
    .slice(0, first)
    .map(([key, value]) => (typeof value === "string" ? value : `${key} ${JSON.stringify(value)}`));
}

export function labelOf(context, item) {
  const key = context.gallery.label_key;
  const value = key === null ? null : (item.metadata[key] ?? null);
  return value === null ? null : String(value);
}

/** The id, as short as it says more than the label beside it. */
export const idBeside = (label, id) => (shortId(id) === label ? id : shortId(id));

/** "old" or "new" while an upgrade is under way; null otherwise. */
export const sideBadge = (context, item) =>
  context.gallery.upgrade &&
  el("span", { class: `badge ${item.side}`, title: `${item.score === undefined ? "Its vector is of" : "Found by"} the ${item.side} model`, data: { testid: "side" } }, item.side);

function card(context, item, open) {
  const label = labelOf(context, item);
  const lines = traits(context, item);
  const bar = el("span", { class: "score-bar", "aria-hidden": "true" });
  if (item.score !== undefined) bar.style.setProperty("--score", Math.max(0, item.score));
  return el(
    "li",
    {},
    el(
      "button",
      { type: "button", class: "card", tabindex: "-1", data: { testid: "hit", id: item.id }, on: { click: open } },
      el("span", { class: "card-picture" }, frame(context, item), el("span", { class: "card-badges" }, item.rank && el("span", { class: "badge rank" }, item.rank), sideBadge(context, item))),
      item.score !== undefined && bar,
      el(
        "span",
        { class: "card-text" },
        el(
          "span",
          { class: "card-line" },
          el("strong", { class: "ellipsis" }, label ?? shortId(item.id)),
          item.score !== undefined && el("span", { class: "number score", title: `Cosine; distance ${decimal(item.distance, 4)}`, data: { testid: "score" } }, decimal(item.score)),
        ),
        label !== null && el("span", { class: "muted ellipsis", title: item.id }, idBeside(label, item.id)),
        lines.length > 0 && el("span", { class: "muted ellipsis", data: { testid: "traits" } }, lines.join(" · ")),
      ),
    ),
  );
}

/** A wall. `label` names it for screen readers; `pick(item)` is called instead of opening an item where it is given;
 *  `deleted(epoch)` after an item was deleted here. Gives {element, show(items), append(items), loading(n), items(),
 *  stop()}. */
export function createWall(context, { label, pick = null, deleted = () => {} }) {
  let items = [];
  const element = el("ul", { class: "wall", "aria-label": label, data: { testid: "wall" } });
  const cards = () => [...element.querySelectorAll(".card")];

  element.addEventListener("focusin", (event) => {
    const focused = event.target.closest(".card");
    for (const each of cards()) each.tabIndex = each === focused ? 0 : -1;
  });
  element.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const all = cards();
    const at = all.indexOf(event.target.closest(".card"));
    if (at < 0) return;
    const columns = getComputedStyle(element).gridTemplateColumns.split(" ").length;
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + columns, ArrowUp: at - columns, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    all[Math.min(Math.max(to, 0), all.length - 1)].focus();
  });
  // The arrows lead into the wall from wherever nothing else uses them.
  const enter = (event) => {
    if (!["ArrowDown", "ArrowRight"].includes(event.key) || event.target !== document.body || document.querySelector("dialog[open]")) return;
    const [first] = cards();
    if (!first) return;
    event.preventDefault();
    first.focus();
  };
  document.addEventListener("keydown", enter);

  function append(more) {
    const start = items.length;
    items = [...items, ...more];
    put(
      element,
      more.map((item) => card(context, item, () => (pick ? pick(item) : openItem(context, items, items.indexOf(item), remove)))),
    );
    if (start === 0 && element.firstElementChild) element.querySelector(".card").tabIndex = 0;
  }

  function remove(item, epoch) {
    deleted(epoch);
    const at = items.indexOf(item);
    if (at < 0) return;
    items = items.filter((each) => each !== item);
    element.children[at].remove();
    const [first] = cards();
    if (first) first.tabIndex = 0;
  }

  function show(those) {
    items = [];
    element.removeAttribute("aria-busy");
    fill(element);
    append(those);
  }

  function loading(n) {
    items = [];
    element.setAttribute("aria-busy", "true");
    fill(
      element,
      Array.from({ length: n }, () => el("li", { class: "card ghost", "aria-hidden": "true" }, el("span", { class: "frame skeleton" }), el("span", { class: "line skeleton" }))),
    );
  }

  return { element, show, append, loading, items: () => items, stop: () => document.removeEventListener("keydown", enter) };
}

// -------------------------------------------------------------------------------------------------------- item

/** The dialog of `items[index]`, with those before and after it by the arrows. `removed(item, epoch)` is called when it
 *  has been deleted. Resolves when the dialog is closed. */
export function openItem(context, items, index, removed = () => {}) {
  const body = el("div", { class: "item" });
  const dialog = el("dialog", { class: "dialog", "aria-label": "Item", tabindex: "-1", data: { testid: "item-dialog" } }, body);
  const opener = document.activeElement;
  let at = index;

  const leave = (view, params) => {
    dialog.close();
    context.navigate(view, params);
  };

  function step(by) {
    if (at + by < 0 || at + by >= items.length) return;
    at += by;
    const held = document.activeElement?.getAttribute("aria-label");
    draw();
    // What had the focus is gone: without one in the dialog, the next arrow would reach nobody.
    if (!dialog.contains(document.activeElement)) (body.querySelector(`[aria-label="${held}"]:enabled`) ?? dialog).focus();
  }

  async function erase(item) {
    const sure = await context.confirm({
      title: "Delete this item?",
      text: `${item.id}\n\nSearches will not find it any more. This cannot be taken back.`,
      action: "Delete",
      danger: true,
    });
    if (!sure) return;
    let answer;
    try {
      answer = await context.api.post("/v1/items/delete", { ids: [item.id] });
    } catch (error) {
      context.toast(error.message, "wrong");
      return;
    }
    context.api.forget([item.id]);
    context.toast(`Deleted ${shortId(item.id)}.`);
    removed(item, answer.epoch);
    dialog.close();
  }

  function draw() {
    const item = items[at];
    const { gallery } = context;
    const writer = gallery.role !== "read" && !gallery.read_only;
    const more = el("dl", { class: "facts" });
    const close = el("button", { type: "button", class: "icon-button", "aria-label": "Close", title: "Close (Esc)", data: { testid: "item-close" }, on: { click: () => dialog.close() } }, icon("close"));
    const previous = el("button", { type: "button", class: "icon-button", "aria-label": "Previous", disabled: at === 0, on: { click: () => step(-1) } }, icon("left"));
    const following = el("button", { type: "button", class: "icon-button next", "aria-label": "Next", disabled: at === items.length - 1, on: { click: () => step(1) } }, icon("right"));
    fill(
      body,
      el("div", { class: "item-picture" }, frame(context, item, 512), items.length > 1 && [previous, following, el("span", { class: "badge number", data: { testid: "item-place" } }, `${at + 1} of ${items.length}`)]),
      el(
        "div",
        { class: "item-text" },
        el("div", { class: "item-head" }, el("h2", { data: { testid: "item-id" } }, item.id), close),
        item.score !== undefined &&
          el(
            "div",
            { class: "row" },
            el("span", { class: "item-score number" }, decimal(item.score)),
            el("span", { class: "muted" }, "cosine"),
            el("span", { class: "badge" }, `rank ${item.rank}`),
            sideBadge(context, item),
          ),
        metadata(item),
        more,
        el(
          "div",
          { class: "row item-actions" },
          button("Find similar", () => leave("search", { item: item.id, where: context.params.where }), { kind: "primary", symbol: "search", "data-testid": "find-similar" }),
          gallery.upgrade && button("Compare", () => leave("compare", { item: item.id, where: context.params.where }), { symbol: "compare", "data-testid": "item-compare" }),
          writer && button("Delete", () => erase(item), { kind: "ghost", symbol: "trash", class: "erase", "aria-label": "Delete", title: "Delete", "data-testid": "delete" }),
        ),
      ),
    );
    facts(item, more);
  }

  function metadata(item) {
    const entries = Object.entries(item.metadata);
    if (entries.length === 0) return el("p", { class: "muted small-text" }, "No metadata.");
    return el(
      "dl",
      { class: "facts", data: { testid: "metadata" } },
      entries.map(([key, value]) => {
        const filterable = ["string", "number", "boolean"].includes(typeof value);
        const text = typeof value === "string" ? value : JSON.stringify(value);
        const narrow = () => {
          const subject = paramsOf(context.params);
          const query = subject.text || subject.picture || subject.item ? subject : { item: item.id };
          leave("search", { ...query, where: whereParam({ ...filtersOf(context.params), [key]: value }) });
        };
        return [
          el("dt", {}, key),
          el("dd", {}, filterable ? el("button", { type: "button", class: "value", title: `Only items with this ${key}`, on: { click: narrow } }, text) : text),
        ];
      }),
    );
  }

  /** What only the item itself tells; the dialog is there before it. */
  async function facts(item, list) {
    let info;
    try {
      info = await context.api.get(`/v1/item?${new URLSearchParams({ id: item.id })}`);
    } catch (error) {
      list.replaceWith(failure(error));
      return;
    }
    const names = info.spaces.map((fingerprint) => context.gallery.spaces.find((space) => space.fingerprint === fingerprint)?.encoder ?? fingerprint.slice(0, 12));
    fill(
      list,
      item.distance !== undefined && [el("dt", {}, "distance"), el("dd", { class: "number" }, decimal(item.distance, 5))],
      [el("dt", {}, names.length > 1 ? "spaces" : "space"), el("dd", {}, names.join(", ") || "none: searches do not find it")],
      info.content_hash && [el("dt", {}, "content"), el("dd", { class: "mono", title: info.content_hash }, info.content_hash.slice(0, 16))],
    );
  }

  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      event.preventDefault();
      step(event.key === "ArrowLeft" ? -1 : 1);
    }
  });
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  const left = () => dialog.close(); // by the browser's back button
  window.addEventListener("hashchange", left);
  draw();
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      window.removeEventListener("hashchange", left);
      dialog.remove();
      // Back to where one was; after a walk, to the card of the item that was open last.
      const card = [...document.querySelectorAll(".card")].find((each) => each.dataset.id === items[at]?.id);
      (card ?? opener)?.focus?.();
      resolve();
    });
  });
}
