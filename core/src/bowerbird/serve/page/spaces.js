// Which queries reach which vectors: the spaces of the gallery, the matrix of every pair, and the relations behind it.

import { el, failure, fill, icon, number, percent } from "./dom.js";
import { spaceNames } from "./names.js";

const KINDS = {
  own: { word: "same space", sign: "check" },
  transform: { word: "by a transform", sign: "right" },
  compatible: { word: "as they are", sign: "compare" },
  both: { word: "over several", sign: "upgrade" },
  none: { word: "not comparable", sign: "close" },
};
const AGAIN = 30_000; // milliseconds between looks at the measured shares while items move

export function mount(root, context) {
  const { api } = context;
  const list = el("ul", { class: "space-list", data: { testid: "spaces" } });
  const table = el("table", { class: "matrix", data: { testid: "matrix" } });
  const about = el("div", { class: "matrix-about", "aria-live": "polite", data: { testid: "matrix-about" } });
  const relations = el("div", { class: "stack", data: { testid: "relations" } });
  const matrix = el(
    "section",
    { class: "panel stack", "aria-labelledby": "matrix-title" },
    el(
      "div",
      { class: "stack tight" },
      el("h2", { id: "matrix-title" }, "What can search what"),
      el("p", { class: "muted small-text" }, "Rows are the encoder of the query, columns the space of the stored vectors. Vectors of unrelated encoders are never compared."),
    ),
    el("div", { class: "table-scroll" }, table),
    about,
  );
  const waiting = el("div", { class: "panel row" }, el("span", { class: "spinner", "aria-hidden": "true" }), el("span", { class: "grow" }, "Measuring which spaces reach which\u2026"));
  fill(
    root,
    el(
      "div",
      { class: "stack" },
      el("h1", {}, "Spaces"),
      list,
      waiting,
      matrix,
      el("section", { class: "panel stack", "aria-label": "Relations" }, el("h2", {}, "Relations"), relations),
    ),
  );
  matrix.hidden = true;
  relations.parentNode.hidden = true;

  let view = null;
  let chosen = null; // "source target" of the cell that is explained
  let asked = 0;
  let structure = "";
  const stop = new AbortController();

  async function load() {
    asked = Date.now();
    try {
      view = await api.get("/v1/spaces", { signal: stop.signal });
    } catch (error) {
      if (error.name === "AbortError") return;
      if (view === null) fill(waiting, failure(error, load));
      return;
    }
    waiting.remove();
    matrix.hidden = false;
    relations.parentNode.hidden = false;
    showList(view.spaces);
    showMatrix();
    showRelations();
  }

  function showList(spaces) {
    const { gallery } = context;
    const names = spaceNames(spaces);
    const all = spaces.reduce((sum, space) => sum + space.items, 0) || 1;
    const upgrade = gallery.upgrade;
    fill(
      list,
      spaces.map((space) =>
        el(
          "li",
          { class: "panel space" },
          el(
            "div",
            { class: "row between" },
            el("h2", { class: roleOf(space) }, names.get(space.fingerprint)),
            el(
              "span",
              { class: "row" },
              space.fingerprint === gallery.serving && el("span", { class: upgrade ? "badge old" : "badge" }, upgrade ? "old" : "serves"),
              upgrade && space.fingerprint === upgrade.new && el("span", { class: "badge new" }, "new"),
              space.lifted && el("span", { class: "badge" }, "lifted"),
            ),
          ),
          el("div", { class: "space-share", "aria-hidden": "true" }, share(space.items / all, roleOf(space))),
          el(
            "dl",
            { class: "facts" },
            el("dt", {}, "Searched"),
            el("dd", { class: "number" }, space.items > 0 ? `${number(space.items)} items, ${percent(space.items / all)}` : "no items now"),
            space.encoder !== names.get(space.fingerprint) && [el("dt", {}, "Encoder"), el("dd", {}, space.encoder)],
            el("dt", {}, "Dimensions"),
            el("dd", { class: "number" }, number(space.dim)),
            el("dt", {}, "Fingerprint"),
            el("dd", { class: "mono", title: space.fingerprint }, space.fingerprint.slice(0, 12)),
          ),
        ),
      ),
    );
  }

  function roleOf(space) {
    const { upgrade, serving } = context.gallery;
    if (upgrade && space.fingerprint === upgrade.new) return "name-new";
    return upgrade && space.fingerprint === serving ? "name-old" : "";
  }

  function share(part, role) {
    const inner = el("div", { class: role });
    inner.style.inlineSize = `${100 * part}%`;
    return inner;
  }

  function showMatrix() {
    const { spaces, cells } = view;
    const names = spaceNames(spaces);
    const cellOf = (source, target) => cells.find((cell) => cell.source === source.fingerprint && cell.target === target.fingerprint);
    const focused = table.contains(document.activeElement) ? document.activeElement.dataset.cell : null;
    fill(
      table,
      el("caption", { class: "hidden-text" }, "Which queries reach which stored vectors, how, and how many first results are right"),
      el(
        "thead",
        {},
        el(
          "tr",
          {},
          el("td", { class: "matrix-corner" }, el("span", {}, "vectors of \u2192"), el("span", {}, "queries of \u2193")),
          spaces.map((space) => el("th", { scope: "col" }, names.get(space.fingerprint), el("span", { class: "matrix-sub" }, `${number(space.dim)}-d, ${number(space.items)} items`))),
        ),
      ),
      el(
        "tbody",
        {},
        spaces.map((source) =>
          el(
            "tr",
            {},
            el("th", { scope: "row" }, names.get(source.fingerprint)),
            spaces.map((target) => {
              const cell = cellOf(source, target);
              return el("td", {}, cell ? cellButton(cell) : "");
            }),
          ),
        ),
      ),
    );
    if (focused) table.querySelector(`[data-cell="${CSS.escape(focused)}"]`)?.focus();
    explain();
  }

  function cellButton(cell) {
    const kind = KINDS[cell.kind];
    const key = `${cell.source} ${cell.target}`;
    const measured = cell.quality === null ? null : el("span", { class: "matrix-bar", "aria-hidden": "true" }, share(cell.quality, ""));
    return el(
      "button",
      {
        type: "button",
        class: `matrix-cell ${cell.kind}`,
        "aria-pressed": String(key === chosen),
        data: { cell: key, testid: `cell-${cell.kind}` },
        on: {
          click: () => {
            chosen = key === chosen ? null : key;
            for (const one of table.querySelectorAll("[data-cell]")) one.setAttribute("aria-pressed", String(one.dataset.cell === chosen));
            explain();
          },
        },
      },
      el("span", { class: "matrix-kind" }, icon(kind.sign), kind.word),
      cell.quality !== null && el("strong", { class: "number" }, percent(cell.quality)),
      cell.quality !== null && el("span", { class: "matrix-sub" }, "first results right"),
      measured,
    );
  }

  table.addEventListener("keydown", (event) => {
    const all = [...table.querySelectorAll("[data-cell]")];
    const here = all.indexOf(event.target);
    const wide = view?.spaces.length ?? 0;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -wide, ArrowDown: wide }[event.key];
    if (here < 0 || step === undefined) return;
    event.preventDefault();
    all[here + step]?.focus();
  });

  function explain() {
    const cell = view.cells.find((one) => `${one.source} ${one.target}` === chosen);
    if (!cell) {
      fill(about, el("p", { class: "muted small-text" }, "Choose a cell to read how its number came about."));
      return;
    }
    const names = spaceNames(view.spaces);
    fill(
      about,
      el("p", {}, el("strong", {}, `Queries of ${names.get(cell.source)} on vectors of ${names.get(cell.target)}. `), cell.note),
    );
  }

  function showRelations() {
    const names = spaceNames(view.spaces);
    if (view.relations.length === 0) {
      fill(relations, el("p", { class: "muted" }, "None is registered: each space is searched by queries of its own encoder only."));
      return;
    }
    fill(
      relations,
      view.relations.map((relation) =>
        el(
          "article",
          { class: "relation" },
          el(
            "h3",
            { class: "row" },
            el("span", {}, `Queries of ${names.get(relation.new) ?? relation.new.slice(0, 12)}`),
            icon("right"),
            el("span", {}, `vectors of ${names.get(relation.old) ?? relation.old.slice(0, 12)}`),
            el("span", { class: `badge kind ${relation.kind}` }, relation.kind),
          ),
          evidence(relation.evidence),
        ),
      ),
    );
  }

  structure = structureOf(context.gallery);
  showList(context.gallery.spaces);
  load();
  context.on("gallery", (gallery) => {
    const next = structureOf(gallery);
    const moved = gallery.upgrade !== null && Date.now() - asked > AGAIN;
    if (view) showList(view.spaces.map((space) => gallery.spaces.find((one) => one.fingerprint === space.fingerprint) ?? space));
    if (next !== structure || moved) {
      structure = next;
      load();
    }
  });
  return () => stop.abort();
}

/** What makes the matrix another one. */
const structureOf = (gallery) => JSON.stringify([gallery.serving, gallery.upgrade?.id, gallery.spaces.map((space) => space.fingerprint).sort()]);

/** Whatever was measured when the relation was registered: nested objects become "outer inner". */
function evidence(values) {
  const rows = [];
  const walk = (value, name) => {
    if (value !== null && typeof value === "object" && !Array.isArray(value)) {
      for (const [key, inner] of Object.entries(value)) walk(inner, name ? `${name} ${key}` : key);
    } else if (value !== null) rows.push([name, textOf(value)]);
  };
  const { sentence, ...rest } = values; // transforms say in words how good they are
  walk(rest, "");
  if (rows.length === 0 && !sentence) return el("p", { class: "muted small-text" }, "Registered without a measurement.");
  return [
    sentence && el("p", {}, textOf(sentence)),
    el("dl", { class: "facts number" }, rows.map(([name, text]) => el("div", {}, el("dt", {}, name.replaceAll("_", " ")), el("dd", {}, text)))),
  ];
}

function textOf(value) {
  if (Array.isArray(value)) return value.map(textOf).join(", ");
  if (typeof value === "number") return Number.isInteger(value) ? number(value) : String(Number(value.toPrecision(4)));
  if (typeof value === "string" && /^[0-9a-f]{40,}$/.test(value)) return value.slice(0, 12);
  return String(value);
}
