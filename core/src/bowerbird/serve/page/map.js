// The map: every item a point, similar ones near each other. Drag, pinch and wheel; near enough, points become pictures.

import { animated, button, color, el, empty, failure, fill, icon, number, percent, shortId } from "./dom.js";
import { gestures } from "./gestures.js";
import { spaceNames } from "./names.js";
import { rgb, scatter } from "./scatter.js";

const PICTURES = 60; // with so few points in view they are shown as pictures
const PICTURE = 58; // CSS pixels
const AGAIN = 10_000; // milliseconds between looks at what has moved
const METHODS = { pca: "PCA", umap: "UMAP" };

export function mount(root, context) {
  const { api } = context;
  const canvas = el("canvas", {
    class: "map-canvas",
    tabindex: "0",
    role: "application",
    "aria-label": "Map of the items",
    "aria-describedby": "map-keys",
    data: { testid: "map-canvas" },
  });
  const card = el("div", { class: "map-card", hidden: true, data: { testid: "map-card" } });
  const veil = el("div", { class: "map-veil" });
  const tools = el(
    "div",
    { class: "map-tools" },
    tool("plus", "Zoom in (+)", () => plot.zoom(1.6)),
    tool("minus", "Zoom out (\u2212)", () => plot.zoom(1 / 1.6)),
    tool("fit", "Show all (0)", () => plot.fit(!animated())),
  );
  const stage = el("div", { class: "map-stage" }, canvas, card, tools, veil);
  const legend = el("ul", { class: "map-legend", "aria-label": "Colours; choose one to see it alone", data: { testid: "map-legend" } });
  const note = el("p", { class: "muted small-text", data: { testid: "map-note" } });
  const side = el("aside", { class: "panel map-side", "aria-label": "Colours", hidden: true }, legend, note);
  const spoken = el("p", { class: "hidden-text", "aria-live": "polite" });
  const methods = el("fieldset", { class: "segmented", "aria-label": "Method", data: { testid: "map-methods" } });
  const colorings = el("fieldset", { class: "segmented", "aria-label": "Colours", data: { testid: "map-colours" } });
  const spaces = el("select", { class: "input map-spaces", "aria-label": "Space", hidden: true, data: { testid: "map-space" } });
  fill(
    root,
    el(
      "div",
      { class: "stack map" },
      el("div", { class: "row between" }, el("h1", {}, "Map"), el("div", { class: "row" }, spaces, colorings, methods)),
      el("div", { class: "map-body" }, stage, side),
      el("p", { id: "map-keys", class: "muted small-text" }, "Drag to move, scroll or pinch to zoom; arrows, ", el("kbd", {}, "+"), " ", el("kbd", {}, "\u2212"), " and ", el("kbd", {}, "0"), " do the same, ", el("kbd", {}, "Enter"), " chooses the point in the middle."),
      spoken,
    ),
  );

  let data = null;
  let method = "pca";
  let space = "";
  let coloring = null; // "label" or "side"
  let alone = new Set(); // groups of the legend that are shown alone; none: all
  let groups = []; // of the legend: {name, color, count}
  let hovered = -1;
  let chosen = -1;
  let byKeys = false;
  let pictured = false; // whether the points in view are shown as pictures
  let asked = 0;
  let turn = 0;
  let stop = new AbortController();
  const plot = scatter(canvas, { over, changed: placeCard });

  // ----------------------------------------------------------------------------------------------------- data

  async function load({ quietly = false } = {}) {
    turn += 1;
    const mine = turn;
    stop.abort();
    stop = new AbortController();
    asked = Date.now();
    if (!quietly) wait();
    try {
      const query = new URLSearchParams(space ? { method, space } : { method });
      const next = await api.get(`/v1/map?${query}`, { signal: stop.signal });
      if (mine === turn) take(next);
    } catch (error) {
      if (error.name === "AbortError" || mine !== turn || quietly) return;
      if (method !== "pca") {
        context.toast(error.message, "wrong");
        method = "pca";
        showControls();
        load();
        return;
      }
      fill(veil, failure(error, () => load()));
      veil.hidden = false;
    }
  }

  function wait() {
    const long = method === "umap" ? "UMAP takes minutes where PCA takes seconds; the map appears when it is done." : "";
    fill(veil, el("div", { class: "map-wait" }, el("span", { class: "spinner", "aria-hidden": "true" }), el("span", {}, `Placing ${number(context.gallery?.items ?? 0)} items\u2026`), el("span", { class: "muted small-text" }, long)));
    veil.hidden = false;
  }

  function take(next) {
    const same = data !== null && data.space === next.space && data.method === next.method;
    data = next;
    veil.hidden = next.ids.length > 0;
    if (!veil.hidden) fill(veil, empty({ symbol: "map", title: "Nothing to show yet", text: "No item has a vector in this space." }));
    if (coloring === null) coloring = context.gallery.upgrade || next.groups.length === 0 ? "side" : "label";
    const kept = chosen >= 0 && same ? data.ids.indexOf(card.dataset.id) : -1;
    plot.show({ x: Float32Array.from(next.x), y: Float32Array.from(next.y) });
    if (!same) plot.fit(true);
    hovered = -1;
    choose(kept, { aloud: false });
    showControls();
    showColors();
    canvas.setAttribute("aria-label", `Map of ${number(next.ids.length)} items by ${METHODS[next.method]}`);
  }

  // ------------------------------------------------------------------------------------------------- controls

  function tool(symbol, label, onClick) {
    return el("button", { type: "button", class: "icon-button", "aria-label": label, title: label, on: { click: onClick } }, icon(symbol));
  }

  function choice(name, value, label, checked, change) {
    return el("label", {}, el("input", { type: "radio", name, value, checked, on: { change }, data: { testid: `${name}-${value}` } }), label);
  }

  function showControls() {
    const offered = data?.methods ?? ["pca"];
    if (!methods.contains(document.activeElement)) {
      fill(
        methods,
        offered.map((key) =>
          choice("map-method", key, METHODS[key], method === key, () => {
            method = key;
            load();
          }),
        ),
      );
    }
    methods.hidden = offered.length < 2;
    colorings.hidden = !data || data.groups.length === 0 || !context.gallery.upgrade;
    if (!colorings.contains(document.activeElement)) {
      const pick = (key) => () => {
        coloring = key;
        alone = new Set();
        showColors();
      };
      fill(
        colorings,
        choice("map-colour", "label", data?.group_key ?? "label", coloring === "label", pick("label")),
        choice("map-colour", "side", "old / new", coloring === "side", pick("side")),
      );
    }
    const { upgrade } = context.gallery;
    spaces.hidden = !upgrade || !data;
    if (!spaces.hidden && document.activeElement !== spaces) {
      const all = context.gallery.spaces.filter((one) => one.items > 0 || [upgrade.old, upgrade.new].includes(one.fingerprint));
      const names = spaceNames(all);
      fill(spaces, all.map((one) => el("option", { value: one.fingerprint, selected: one.fingerprint === data.space }, `as ${names.get(one.fingerprint)} sees it`)));
    }
  }

  spaces.addEventListener("change", () => {
    space = spaces.value;
    load();
  });

  // --------------------------------------------------------------------------------------------------- colours

  function groupsOf() {
    const rest = { name: "other", color: color("line-strong"), places: [] };
    if (coloring === "label") {
      const named = data.groups.map((name, place) => ({ name, color: color(`g${place}`) }));
      return { groups: [...named, rest], of: Uint8Array.from(data.group, (place) => (place < 0 ? named.length : place)) };
    }
    const upgrade = context.gallery.upgrade;
    return {
      groups: upgrade ? [{ name: "old", color: color("old") }, { name: "new", color: color("new") }] : [{ name: "all items", color: color("new") }],
      of: Uint8Array.from(data.moved, (moved) => (upgrade && moved ? 1 : 0)),
    };
  }

  function showColors() {
    side.hidden = !data || data.ids.length === 0;
    if (side.hidden) return;
    const made = groupsOf();
    groups = made.groups.map((group) => ({ ...group, count: 0 }));
    for (const place of made.of) groups[place].count += 1;
    const other = groups.findIndex((group) => group.name === "other" && coloring === "label");
    const faint = new Set(groups.keys());
    for (const place of alone.size > 0 ? alone : groups.keys()) faint.delete(place);
    if (alone.size === 0 && other >= 0) faint.delete(other);
    plot.paint({
      colors: groups.map((group, place) => (faint.has(place) ? rgb(color("line-strong")) : rgb(group.color))),
      of: made.of,
      faint,
      background: rgb(color("surface")),
    });
    if (chosen >= 0 || hovered >= 0) placeCard();
    drawLegend();
    const names = spaceNames(context.gallery.spaces);
    const shown = data.ids.length;
    const where = names.get(data.space) ?? data.space.slice(0, 12);
    const by = coloring === "label" ? `, coloured by ${data.group_key}` : "";
    fill(note, shown < data.total ? `A sample of ${number(shown)} of ${number(data.total)} items` : `${number(shown)} items`, ` as ${where} sees them${by}.`);
  }

  function drawLegend() {
    const focused = legend.contains(document.activeElement) ? document.activeElement.dataset.place : null;
    fill(
      legend,
      groups.map((group, place) => {
        if (group.count === 0 && group.name === "other") return null;
        const swatch = el("span", { class: "map-swatch", "aria-hidden": "true" });
        swatch.style.background = group.color;
        return el(
          "li",
          {},
          el(
            "button",
            {
              type: "button",
              class: "map-group",
              "aria-pressed": String(alone.has(place)),
              title: percent(group.count / Math.max(1, data.ids.length)),
              data: { place },
              on: {
                click: () => {
                  if (!alone.delete(place)) alone.add(place);
                  showColors();
                },
              },
            },
            swatch,
            el("span", { class: "grow ellipsis" }, group.name),
            el("span", { class: "number muted" }, number(group.count)),
          ),
        );
      }),
    );
    legend.classList.toggle("some", alone.size > 0);
    if (focused !== null) legend.querySelector(`[data-place="${focused}"]`)?.focus();
  }

  // -------------------------------------------------------------------------------------------------- pictures

  const pictures = new Map(); // id -> image; null: it has none; "asked"

  function pictureOf(id) {
    const found = pictures.get(id);
    if (found !== undefined) return found === "asked" ? null : found;
    pictures.set(id, "asked");
    api
      .picture(id, 128)
      .then(
        (url) =>
          new Promise((resolve, reject) => {
            const image = new Image();
            image.onload = () => resolve(image);
            image.onerror = reject;
            image.src = url;
          }),
      )
      .then(
        (image) => {
          pictures.set(id, image);
          if (pictures.size > 400) pictures.delete(pictures.keys().next().value);
          plot.redraw();
        },
        () => pictures.set(id, null),
      );
    return null;
  }

  function over(drawing, camera) {
    if (!data) return;
    const few = camera.scale > 1.5 * camera.fit || data.ids.length <= PICTURES ? plot.inside(PICTURES) : null;
    pictured = few !== null && few.length > 0;
    if (few) for (const place of few) drawPicture(drawing, place);
    for (const [place, width] of [[hovered, 2], [chosen, 3]]) {
      if (place < 0) continue;
      const [px, py] = plot.toCanvas(place);
      if (few) drawPicture(drawing, place);
      ring(drawing, px, py, few && pictures.get(data.ids[place]) instanceof Image ? 0 : plot.radius() + 3, width);
    }
    if (byKeys && chosen < 0 && document.activeElement === canvas) {
      const [px, py] = [camera.width / 2, camera.height / 2];
      drawing.strokeStyle = color("ink");
      drawing.lineWidth = 1.5;
      drawing.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        drawing.moveTo(px + 5 * dx, py + 5 * dy);
        drawing.lineTo(px + 13 * dx, py + 13 * dy);
      }
      drawing.stroke();
    }
  }

  function ring(drawing, px, py, radius, width) {
    drawing.beginPath();
    if (radius > 0) drawing.arc(px, py, radius, 0, 2 * Math.PI);
    else drawing.rect(px - PICTURE / 2 - 2, py - PICTURE / 2 - 2, PICTURE + 4, PICTURE + 4);
    drawing.strokeStyle = color("surface");
    drawing.lineWidth = width + 3;
    drawing.stroke();
    drawing.strokeStyle = color("ink");
    drawing.lineWidth = width;
    drawing.stroke();
  }

  function drawPicture(drawing, place) {
    const image = pictureOf(data.ids[place]);
    if (!image) return;
    const [px, py] = plot.toCanvas(place);
    const shrink = PICTURE / Math.max(image.naturalWidth, image.naturalHeight);
    const [width, height] = [image.naturalWidth * shrink, image.naturalHeight * shrink];
    drawing.fillStyle = groups[groupOf(place)]?.color ?? color("line");
    drawing.fillRect(px - width / 2 - 2, py - height / 2 - 2, width + 4, height + 4);
    drawing.drawImage(image, px - width / 2, py - height / 2, width, height);
  }

  /** The point under the pointer; pictures are larger than points. */
  function pointAt(px, py, touched = false) {
    return plot.at(px, py, pictured ? PICTURE / 2 : touched ? 22 : 12);
  }

  function groupOf(place) {
    if (coloring === "label") return data.group[place] < 0 ? data.groups.length : data.group[place];
    return context.gallery.upgrade && data.moved[place] ? 1 : 0;
  }

  // ------------------------------------------------------------------------------------------------------ card

  let cardTimer = 0;

  function hover(place) {
    if (place === hovered) return;
    hovered = place;
    canvas.classList.toggle("on-point", place >= 0);
    plot.redraw();
    if (chosen >= 0) return;
    showCard(place, false);
  }

  function choose(place, { aloud = true } = {}) {
    chosen = place;
    showCard(place, true);
    plot.redraw();
    if (aloud && place >= 0) {
      const group = data.group[place] >= 0 ? `, ${data.groups[data.group[place]]}` : "";
      const side = context.gallery.upgrade ? (data.moved[place] ? ", new" : ", old") : "";
      spoken.textContent = `${data.ids[place]}${group}${side}`;
    }
  }

  function showCard(place, pinned) {
    clearTimeout(cardTimer);
    card.hidden = place < 0;
    if (place < 0) return;
    const id = data.ids[place];
    card.dataset.id = id;
    card.classList.toggle("pinned", pinned);
    const frame = el("div", { class: "map-picture" }, icon("picture"));
    const label = data.group[place] >= 0 ? data.groups[data.group[place]] : null;
    fill(
      card,
      frame,
      el(
        "div",
        { class: "map-text" },
        el("strong", { class: "ellipsis", title: id, data: { testid: "map-card-id" } }, shortId(id)),
        el("span", { class: "row" }, label !== null && el("span", { class: "muted small-text ellipsis" }, label), context.gallery.upgrade && el("span", { class: `badge ${data.moved[place] ? "new" : "old"}` }, data.moved[place] ? "new" : "old")),
        pinned && el("span", { class: "row" }, button("Search like this", () => context.navigate("search", { item: id }), { data: { testid: "map-search" } }), el("button", { type: "button", class: "icon-button", "aria-label": "Close", on: { click: () => (choose(-1), canvas.focus()) } }, icon("close"))),
      ),
    );
    placeCard();
    // A pointer that crosses a thousand points asks for the picture where it stays.
    cardTimer = setTimeout(() => {
      api.picture(id, 256).then(
        (url) => card.dataset.id === id && fill(frame, el("img", { src: url, alt: "" })),
        () => {},
      );
    }, pinned ? 0 : 50);
  }

  function placeCard() {
    const place = chosen >= 0 ? chosen : hovered;
    if (place < 0 || card.hidden || !data) return;
    const [px, py] = plot.toCanvas(place);
    card.classList.toggle("flat", plot.camera.width < 480);
    const [width, height] = [card.offsetWidth, card.offsetHeight];
    if (plot.camera.width < 480) {
      card.style.left = "8px";
      card.style.top = `${py > plot.camera.height / 2 ? 8 : plot.camera.height - height - 8}px`;
      return;
    }
    const gap = (pictured ? PICTURE / 2 : plot.radius()) + 12;
    const left = px + gap + width > plot.camera.width ? px - gap - width : px + gap;
    card.style.left = `${Math.max(8, Math.min(plot.camera.width - width - 8, left))}px`;
    card.style.top = `${Math.max(8, Math.min(plot.camera.height - height - 8, py - height / 2))}px`;
  }

  // ----------------------------------------------------------------------------------------------------- live

  gestures(canvas, {
    pan: plot.pan,
    zoom: plot.zoom,
    fit: () => plot.fit(!animated()),
    hover: (place) => data && hover(place ? pointAt(...place) : -1),
    tap: ([px, py], touched) => data && choose(pointAt(px, py, touched)),
    choose: () => data && choose(plot.at(plot.camera.width / 2, plot.camera.height / 2, 4000)),
    leave: () => chosen >= 0 && (choose(-1), true),
    by: (keys) => {
      byKeys = keys;
    },
  });
  canvas.addEventListener("blur", () => plot.redraw());
  const observer = new ResizeObserver(([entry]) => plot.resize(Math.floor(entry.contentRect.width), Math.floor(entry.contentRect.height)));
  observer.observe(stage);
  context.on("theme", showColors);
  let before = context.gallery.upgrade;
  context.on("gallery", ({ upgrade }) => {
    if (!data) return;
    showControls();
    const began = (before?.id ?? null) !== (upgrade?.id ?? null);
    const moved = upgrade && upgrade.share !== before?.share && Date.now() - asked > AGAIN && !document.hidden;
    if (began) {
      space = "";
      coloring = null;
      alone = new Set();
    }
    if (began || moved) {
      before = upgrade;
      load({ quietly: true });
    }
  });
  showControls();
  load();
  return () => {
    turn += 1;
    stop.abort();
    clearTimeout(cardTimer);
    observer.disconnect();
    plot.close();
  };
}
