// Curves over the share of moved items, drawn by hand as SVG: panels below each other on one axis. What is drawn is also
// there as a table, and the arrow keys read it point by point.

import { el, fill, percent, put } from "./dom.js";

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 48;
const RIGHT = 14;
const TOP = 30;
const BOTTOM = 20;

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  return put(node, ...children);
}

const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

/** Round numbers that span the values: {low, high, ticks}. */
export function scaleOf(values, { zero = false, least = 0.01, wanted = 4 } = {}) {
  const real = values.filter(known);
  let low = Math.min(...real);
  let high = Math.max(...real);
  if (real.length === 0) [low, high] = [0, 1];
  if (zero) low = Math.min(0, low);
  const missing = least - (high - low);
  if (missing > 0) [low, high] = zero ? [low, low + least] : [low - missing / 2, high + missing / 2];
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const from = Math.floor(low / step + 1e-6);
  const to = Math.ceil(high / step - 1e-6);
  const ticks = Array.from({ length: to - from + 1 }, (_, place) => (from + place) * step);
  return { low: ticks[0], high: ticks[ticks.length - 1], ticks };
}

/** The value of a line at x, between its points; null outside them. */
export function valueAt(points, x) {
  const place = points.findIndex((point) => point.x >= x - 1e-9);
  if (place < 0) return null;
  const after = points[place];
  if (place === 0 || Math.abs(after.x - x) < 1e-9) return Math.abs(after.x - x) < 1e-9 ? after.y : null;
  const before = points[place - 1];
  const part = (x - before.x) / (after.x - before.x);
  return known(before.y) && known(after.y) ? before.y + part * (after.y - before.y) : null;
}

/**
 * `root` gets the chart. `draw(model)`:
 *   {label, now: share|null, panels: [{title, height, zero, least, format(value),
 *     lines: [{name, tone, dashed, dots, points: [{x, y}], band: [{x, low, high}]|null}], levels: [{name, tone, y}]}]}
 * Shares are 0 to 1. `tone` is a class of live.css. Returns {draw, close}.
 */
export function chart(root) {
  const legend = el("ul", { class: "chart-legend" });
  const picture = svg("svg", { class: "chart-picture", "aria-hidden": "true" });
  const reading = el("div", { class: "chart-reading", hidden: true });
  const spoken = el("p", { class: "hidden-text", "aria-live": "polite" });
  const stage = el(
    "div",
    { class: "chart-stage", tabindex: "0", role: "img", data: { testid: "chart" } },
    picture,
    reading,
  );
  const table = el("table", { class: "table number chart-table", data: { testid: "chart-table" } });
  const details = el(
    "details",
    { class: "chart-details" },
    el("summary", {}, "The numbers as a table"),
    el("div", { class: "table-scroll" }, table),
  );
  const box = el("div", { class: "chart" }, legend, stage, spoken, details);
  root.append(box);
  let model = null;
  let width = 0;
  let pointed = null; // the share that is read
  let marks = svg("g");
  let tabled = "";

  const acrossOf = (share) => LEFT + share * (width - LEFT - RIGHT);

  function draw(next) {
    model = next;
    stage.setAttribute("aria-label", `${model.label} ${summary()} Arrow keys read it point by point; a table follows.`);
    paint();
    if (details.open) drawTable();
  }

  function summary() {
    return model.panels
      .flatMap((panel) =>
        panel.lines.map((line) => {
          const last = line.points.filter((point) => known(point.y)).at(-1);
          return last ? `${line.name}: ${panel.format(last.y)} at ${percent(last.x, 0)} moved.` : "";
        }),
      )
      .filter(Boolean)
      .join(" ");
  }

  function paint() {
    if (!model || width < 80) return;
    let top = 0;
    const drawn = [];
    for (const panel of model.panels) {
      panel.top = top + TOP;
      panel.bottom = panel.top + panel.height;
      top = panel.bottom + BOTTOM;
      const values = panel.lines.flatMap((line) => [
        ...line.points.map((point) => point.y),
        ...(line.band ?? []).flatMap((point) => [point.low, point.high]),
      ]);
      panel.scale = scaleOf([...values, ...panel.levels.map((level) => level.y)], { zero: panel.zero, least: panel.least });
      const span = panel.scale.high - panel.scale.low;
      panel.down = (value) => panel.bottom - ((value - panel.scale.low) / span) * panel.height;
      drawn.push(drawPanel(panel));
    }
    const last = model.panels.at(-1);
    const steps = width < 560 ? [0, 0.5, 1] : [0, 0.25, 0.5, 0.75, 1];
    const axis = steps.map((share) =>
      svg(
        "text",
        {
          class: "chart-tick",
          x: acrossOf(share),
          y: last.bottom + 16,
          "text-anchor": share === 0 ? "start" : share === 1 ? "end" : "middle",
        },
        share === 1 ? "100 % moved" : percent(share, 0),
      ),
    );
    marks = svg("g");
    fill(picture, drawn, axis, drawNow(), marks);
    picture.setAttribute("viewBox", `0 0 ${width} ${top + 4}`);
    picture.setAttribute("height", top + 4);
    drawLegend();
    if (pointed !== null) read(pointed, false);
  }

  function drawPanel(panel) {
    const right = width - RIGHT;
    const parts = [svg("text", { class: "chart-title", x: 0, y: panel.top - 13 }, panel.title)];
    for (const tick of panel.scale.ticks) {
      const y = panel.down(tick);
      parts.push(
        svg("line", { class: "chart-grid", x1: LEFT, x2: right, y1: y, y2: y }),
        svg("text", { class: "chart-tick", x: LEFT - 8, y: y + 4, "text-anchor": "end" }, panel.format(tick)),
      );
    }
    for (const { band, tone } of panel.lines) {
      if (!band?.length) continue;
      const upper = band.map((point) => `${acrossOf(point.x)},${panel.down(point.high)}`);
      const lower = band.map((point) => `${acrossOf(point.x)},${panel.down(point.low)}`).reverse();
      parts.push(svg("polygon", { class: `chart-band ${tone}`, points: [...upper, ...lower].join(" ") }));
    }
    for (const level of panel.levels) {
      const y = panel.down(level.y);
      parts.push(svg("line", { class: `chart-level ${level.tone}`, x1: LEFT, x2: right, y1: y, y2: y }));
    }
    for (const line of panel.lines) {
      const points = line.points.filter((point) => known(point.y));
      const path = points.map(({ x, y }) => `${acrossOf(x).toFixed(1)},${panel.down(y).toFixed(1)}`).join(" ");
      if (points.length > 1) {
        parts.push(svg("polyline", { class: `chart-line ${line.tone} ${line.dashed ? "dashed" : ""}`, points: path }));
      }
      if (!line.dots) continue;
      const radius = points.length > 40 ? 0 : points.length > 20 ? 2.2 : 3.2;
      for (const [place, { x, y }] of points.entries()) {
        const size = place === points.length - 1 ? Math.max(radius, 4) : radius;
        if (size) parts.push(svg("circle", { class: `chart-dot ${line.tone}`, cx: acrossOf(x), cy: panel.down(y), r: size }));
      }
    }
    return svg("g", {}, parts);
  }

  function drawNow() {
    if (!known(model.now)) return null;
    const x = acrossOf(model.now);
    const first = model.panels[0];
    const flip = model.now > 0.8;
    return svg(
      "g",
      {},
      model.panels.map((panel) => svg("line", { class: "chart-now", x1: x, x2: x, y1: panel.top, y2: panel.bottom })),
      svg(
        "text",
        { class: "chart-now-text", x: flip ? x - 6 : x + 6, y: first.top + 15, "text-anchor": flip ? "end" : "start" },
        `now ${percent(model.now, 0)}`,
      ),
    );
  }

  function drawLegend() {
    const entries = model.panels.flatMap((panel) => [
      ...panel.lines.map((line) => ({ name: line.name, tone: line.tone, kind: line.dashed ? "dashed" : "solid", band: line.band?.length })),
      ...panel.levels.map((level) => ({ name: level.name, tone: level.tone, kind: "dotted" })),
    ]);
    fill(
      legend,
      entries.map(({ name, tone, kind, band }) =>
        el(
          "li",
          {},
          svg(
            "svg",
            { class: "chart-swatch", viewBox: "0 0 26 12", "aria-hidden": "true" },
            band ? svg("rect", { class: `chart-band ${tone}`, x: 0, y: 0, width: 26, height: 12 }) : null,
            svg("line", { class: `${kind === "dotted" ? "chart-level" : "chart-line"} ${tone} ${kind}`, x1: 1, x2: 25, y1: 6, y2: 6 }),
          ),
          name,
        ),
      ),
    );
  }

  /** Shares at which something can be read: those that were measured, else those of the forecast. */
  function shares() {
    const lines = model.panels.flatMap((panel) => panel.lines);
    const measured = lines.filter((line) => line.dots && line.points.length);
    const all = (measured.length ? measured : lines).flatMap((line) => line.points.map((point) => point.x));
    return [...new Set(all)].sort((a, b) => a - b);
  }

  function read(share, aloud) {
    pointed = share;
    const x = acrossOf(share);
    const rows = [];
    const dots = [];
    for (const panel of model.panels) {
      for (const line of panel.lines) {
        const value = valueAt(line.points, share);
        if (!known(value)) continue;
        rows.push({ name: line.name, tone: line.tone, text: panel.format(value) });
        dots.push(svg("circle", { class: `chart-dot ${line.tone}`, cx: x, cy: panel.down(value), r: 4.5 }));
      }
    }
    fill(marks, model.panels.map((panel) => svg("line", { class: "chart-hair", x1: x, x2: x, y1: panel.top, y2: panel.bottom })), dots);
    fill(
      reading,
      el("strong", {}, `${percent(share)} moved`),
      rows.map((row) => el("div", {}, el("span", { class: `chart-key ${row.tone}` }), el("span", { class: "grow" }, row.name), el("span", { class: "number" }, row.text))),
    );
    reading.hidden = false;
    const room = stage.clientWidth;
    const side = Math.min(reading.offsetWidth, room);
    reading.style.left = `${Math.max(0, x + 14 + side > room ? x - 14 - side : x + 14)}px`;
    if (aloud) spoken.textContent = `${percent(share)} moved. ${rows.map((row) => `${row.name} ${row.text}`).join(". ")}.`;
  }

  function forget() {
    pointed = null;
    reading.hidden = true;
    marks.replaceChildren();
  }

  stage.addEventListener("pointermove", (event) => {
    if (!model) return;
    const share = (event.clientX - stage.getBoundingClientRect().left - LEFT) / (width - LEFT - RIGHT);
    const near = shares().reduce((best, x) => (best === null || Math.abs(x - share) < Math.abs(best - share) ? x : best), null);
    if (near !== null) read(near, false);
  });
  stage.addEventListener("pointerleave", forget);
  stage.addEventListener("blur", forget);
  stage.addEventListener("keydown", (event) => {
    const all = model ? shares() : [];
    if (all.length === 0) return;
    const here = all.indexOf(pointed);
    const place = { ArrowLeft: Math.max(0, (here < 0 ? all.length : here) - 1), ArrowRight: Math.min(all.length - 1, here + 1), Home: 0, End: all.length - 1 }[event.key];
    if (place !== undefined) read(all[place], true);
    else if (event.key === "Escape") forget();
    else return;
    event.preventDefault();
  });

  function drawTable() {
    const columns = model.panels.flatMap((panel) => panel.lines.map((line) => ({ ...line, format: panel.format })));
    const all = columns.flatMap((line) => line.points.map((point) => point.x)).sort((a, b) => a - b);
    const rows = [...new Set(all.map((x) => percent(x)))].map((share) => [
      share,
      ...columns.map((line) => {
        const point = line.points.find((found) => percent(found.x) === share);
        const inside = line.band?.find((found) => percent(found.x) === share);
        if (!point || !known(point.y)) return "";
        return inside ? `${line.format(point.y)} (${line.format(inside.low)} to ${line.format(inside.high)})` : line.format(point.y);
      }),
    ]);
    const content = JSON.stringify(rows);
    if (content === tabled) return;
    tabled = content;
    fill(
      table,
      el("thead", {}, el("tr", {}, ["Moved", ...columns.map((line) => line.name)].map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rows.map(([first, ...rest]) => el("tr", {}, el("th", { scope: "row" }, first), rest.map((text) => el("td", {}, text))))),
    );
  }
  details.addEventListener("toggle", () => model && drawTable());

  const observer = new ResizeObserver(([entry]) => {
    width = Math.floor(entry.contentRect.width);
    paint();
  });
  observer.observe(stage);
  return {
    draw,
    close: () => {
      observer.disconnect();
      box.remove();
    },
  };
}
