// Tens of thousands of points on a canvas, fast enough to be dragged: pixels are written into one image per frame, and a
// grid finds the point under the pointer. Nothing here knows of the service.

const PAD = 32; // pixels around the picture, so that no point at its edge needs a look at every pixel
const CELLS = 128; // of the grid, along each side
const SIDE = 65_536; // positions are below
const SLOW = 12; // milliseconds for a frame above which movement is drawn at one pixel per CSS pixel

/** Which points are in which cell of a grid, for `nearest`. */
export function gridOf(x, y) {
  const cellOf = (place) => ((y[place] * CELLS) / SIDE | 0) * CELLS + ((x[place] * CELLS) / SIDE | 0);
  const start = new Int32Array(CELLS * CELLS + 1);
  for (let place = 0; place < x.length; place += 1) start[cellOf(place) + 1] += 1;
  for (let cell = 0; cell < CELLS * CELLS; cell += 1) start[cell + 1] += start[cell];
  const next = start.slice();
  const items = new Int32Array(x.length);
  for (let place = 0; place < x.length; place += 1) {
    const cell = cellOf(place);
    items[next[cell]] = place;
    next[cell] += 1;
  }
  return { start, items };
}

/** The point nearest to (px, py) within `radius`, all in the units of positions; -1 where there is none. */
export function nearest({ start, items }, x, y, px, py, radius, visible = null) {
  const clamp = (value) => Math.max(0, Math.min(CELLS - 1, Math.floor((value * CELLS) / SIDE)));
  const [left, right, top, bottom] = [clamp(px - radius), clamp(px + radius), clamp(py - radius), clamp(py + radius)];
  let best = -1;
  let least = radius * radius;
  for (let row = top; row <= bottom; row += 1) {
    for (let at = start[row * CELLS + left]; at < start[row * CELLS + right + 1]; at += 1) {
      const place = items[at];
      const far = (x[place] - px) ** 2 + (y[place] - py) ** 2;
      if (far <= least && (visible === null || visible(place))) [best, least] = [place, far];
    }
  }
  return best;
}

/** The middle and the size of what holds every point. */
function boxOf({ x, y }) {
  let [left, right, top, bottom] = [SIDE, 0, SIDE, 0];
  for (let place = 0; place < x.length; place += 1) {
    left = Math.min(left, x[place]);
    right = Math.max(right, x[place]);
    top = Math.min(top, y[place]);
    bottom = Math.max(bottom, y[place]);
  }
  if (left > right) return { x: SIDE / 2, y: SIDE / 2, width: SIDE, height: SIDE };
  const least = SIDE / 50;
  return { x: (left + right) / 2, y: (top + bottom) / 2, width: Math.max(least, right - left), height: Math.max(least, bottom - top) };
}

/** Pixels of a disc: offsets into the image and how much of each is covered, 0 to 256. */
function stampOf(radius, stride, opacity) {
  const offsets = [];
  const alphas = [];
  const reach = Math.ceil(radius);
  for (let dy = -reach; dy <= reach; dy += 1) {
    for (let dx = -reach; dx <= reach; dx += 1) {
      const covered = Math.max(0, Math.min(1, radius + 0.5 - Math.hypot(dx, dy)));
      if (covered === 0) continue;
      offsets.push(dy * stride + dx);
      alphas.push(Math.round(256 * covered * opacity));
    }
  }
  return { offsets: Int32Array.from(offsets), alphas: Int32Array.from(alphas) };
}

/** "#rrggbb" as [r, g, b] */
export function rgb(text) {
  const value = Number.parseInt(text.slice(1), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

/**
 * `canvas` becomes a picture of points. `show({x, y})` sets the points (Float32Array, 0 to 65535); `paint({colors, of,
 * faint, background})` their colours: `colors` [[r, g, b]], `of` Uint8Array with the place of each point's colour, `faint`
 * the places that are drawn weakly, below the others. `over(context, camera)` draws on top of each frame.
 */
export function scatter(canvas, { over = () => {}, changed = () => {} } = {}) {
  const context = canvas.getContext("2d", { alpha: false });
  const camera = { x: SIDE / 2, y: SIDE / 2, scale: 0, fit: 0, width: 0, height: 0 };
  let home = { x: SIDE / 2, y: SIDE / 2, width: SIDE, height: SIDE }; // what holds every point
  let points = { x: new Float32Array(0), y: new Float32Array(0) };
  let grid = gridOf(points.x, points.y);
  let look = { colors: [], of: new Uint8Array(0), faint: new Set(), background: [255, 255, 255] };
  let image = null;
  let pixels = null;
  let density = 1;
  let asked = 0;
  let cost = 0; // of a frame at full density, milliseconds
  let rest = 0;
  let flight = 0;

  const fullDensity = () => Math.min(2, globalThis.devicePixelRatio || 1);

  function sized(wanted) {
    const width = Math.max(1, Math.round(camera.width * wanted));
    const height = Math.max(1, Math.round(camera.height * wanted));
    if (image !== null && canvas.width === width && canvas.height === height) return;
    density = wanted;
    canvas.width = width;
    canvas.height = height;
    image = new ImageData(width + 2 * PAD, height + 2 * PAD);
    pixels = new Uint32Array(image.data.buffer);
  }

  /** Draw the next frame; `moving`: more of them follow. */
  function ask(moving = false) {
    clearTimeout(rest);
    const coarse = moving && cost > SLOW && fullDensity() > 1;
    if (moving) rest = setTimeout(() => ask(false), 160);
    if (asked) cancelAnimationFrame(asked);
    asked = requestAnimationFrame(() => {
      asked = 0;
      if (camera.width === 0) return;
      sized(coarse ? 1 : fullDensity());
      const begun = performance.now();
      draw();
      const took = performance.now() - begun;
      if (!coarse) cost = cost === 0 ? took : 0.7 * cost + 0.3 * took;
      context.setTransform(density, 0, 0, density, 0, 0);
      over(context, camera);
    });
  }

  function radius() {
    const many = points.x.length;
    const base = many > 20_000 ? 1.5 : many > 5000 ? 2 : many > 1000 ? 2.8 : 4;
    return Math.min(8, base * (camera.scale / camera.fit) ** 0.35);
  }

  function draw() {
    const stride = canvas.width + 2 * PAD;
    const [r, g, b] = look.background;
    pixels.fill((255 << 24) | (b << 16) | (g << 8) | r);
    const size = Math.min(PAD - 2, radius() * density);
    const solid = stampOf(size, stride, 0.85);
    const weak = stampOf(Math.max(0.8, size * 0.8), stride, 0.45);
    if (look.faint.size > 0) pass(stride, weak, true);
    pass(stride, solid, false);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.putImageData(image, -PAD, -PAD);
  }

  function pass(stride, { offsets, alphas }, weakly) {
    const { x, y } = points;
    const { colors, of, faint } = look;
    const isFaint = Uint8Array.from(colors, (_, place) => (faint.has(place) ? 1 : 0));
    const red = Int32Array.from(colors, (color) => color[0]);
    const green = Int32Array.from(colors, (color) => color[1]);
    const blue = Int32Array.from(colors, (color) => color[2]);
    const scale = camera.scale * density;
    const right = canvas.width + PAD - 2;
    const bottom = canvas.height + PAD - 2;
    const shiftX = canvas.width / 2 - camera.x * scale;
    const shiftY = canvas.height / 2 - camera.y * scale;
    const reach = PAD - 2;
    const wanted = weakly ? 1 : 0;
    const count = offsets.length;
    for (let place = 0; place < x.length; place += 1) {
      const color = of[place];
      if (isFaint[color] !== wanted) continue;
      const sx = Math.round(x[place] * scale + shiftX);
      const sy = Math.round(y[place] * scale + shiftY);
      // The disc of a point that is further outside than its radius is not in the picture; the rest fits into the margin.
      if (sx < -reach / 2 || sy < -reach / 2 || sx >= right - reach / 2 || sy >= bottom - reach / 2) continue;
      const middle = (sy + PAD) * stride + sx + PAD;
      const [r, g, b] = [red[color], green[color], blue[color]];
      for (let at = 0; at < count; at += 1) {
        const where = middle + offsets[at];
        const alpha = alphas[at];
        const under = pixels[where];
        const ur = under & 255;
        const ug = (under >> 8) & 255;
        const ub = (under >> 16) & 255;
        pixels[where] =
          0xff000000 | ((ub + (((b - ub) * alpha) >> 8)) << 16) | ((ug + (((g - ug) * alpha) >> 8)) << 8) | (ur + (((r - ur) * alpha) >> 8));
      }
    }
  }

  function resize(width, height) {
    if (width === 0 || height === 0) return;
    const before = camera.fit;
    camera.width = width;
    camera.height = height;
    camera.fit = fitOf();
    camera.scale = before === 0 ? camera.fit : camera.scale * (camera.fit / before);
    ask();
    changed();
  }

  const fitOf = () => 0.92 * Math.min(camera.width / home.width, camera.height / home.height);

  const clampScale = (scale) => Math.max(camera.fit * 0.6, Math.min(Math.max(2, camera.fit), scale));

  function keepNear() {
    camera.x = Math.max(0, Math.min(SIDE, camera.x));
    camera.y = Math.max(0, Math.min(SIDE, camera.y));
  }

  /** Move the picture by CSS pixels. */
  function pan(dx, dy) {
    land();
    camera.x -= dx / camera.scale;
    camera.y -= dy / camera.scale;
    keepNear();
    ask(true);
    changed();
  }

  /** Enlarge about a point of the canvas. */
  function zoom(factor, px = camera.width / 2, py = camera.height / 2) {
    land();
    const [x, y] = toData(px, py);
    camera.scale = clampScale(camera.scale * factor);
    camera.x = x - (px - camera.width / 2) / camera.scale;
    camera.y = y - (py - camera.height / 2) / camera.scale;
    keepNear();
    ask(true);
    changed();
  }

  function land() {
    if (flight) cancelAnimationFrame(flight);
    flight = 0;
  }

  /** Go there smoothly: {x, y, scale}; `instantly` for who does not want things to move. */
  function fly(to, instantly) {
    land();
    const from = { ...camera };
    const target = { x: to.x ?? camera.x, y: to.y ?? camera.y, scale: clampScale(to.scale ?? camera.scale) };
    const begun = performance.now();
    const step = (now) => {
      const part = instantly ? 1 : Math.min(1, Math.max(0, now - begun) / 280);
      const eased = 1 - (1 - part) ** 3;
      camera.scale = from.scale * (target.scale / from.scale) ** eased;
      camera.x = from.x + (target.x - from.x) * eased;
      camera.y = from.y + (target.y - from.y) * eased;
      keepNear();
      flight = part < 1 ? requestAnimationFrame(step) : 0;
      ask(part < 1);
      changed();
    };
    step(begun);
  }

  const toData = (px, py) => [(px - camera.width / 2) / camera.scale + camera.x, (py - camera.height / 2) / camera.scale + camera.y];
  const toCanvas = (place) => [
    (points.x[place] - camera.x) * camera.scale + camera.width / 2,
    (points.y[place] - camera.y) * camera.scale + camera.height / 2,
  ];

  /** The point at a place of the canvas, within `reach` CSS pixels; -1 without one. Faint points do not count. */
  function at(px, py, reach = 12) {
    const [x, y] = toData(px, py);
    return nearest(grid, points.x, points.y, x, y, (reach + radius()) / camera.scale, (place) => !look.faint.has(look.of[place]));
  }

  /** Up to `most` points that are in the picture; null where there are more. */
  function inside(most) {
    const [left, top] = toData(0, 0);
    const [right, bottom] = toData(camera.width, camera.height);
    const found = [];
    for (let place = 0; place < points.x.length; place += 1) {
      if (points.x[place] < left || points.x[place] > right || points.y[place] < top || points.y[place] > bottom) continue;
      if (look.faint.has(look.of[place])) continue;
      if (found.length === most) return null;
      found.push(place);
    }
    return found;
  }

  return {
    camera,
    show: (next) => {
      points = next;
      grid = gridOf(points.x, points.y);
      home = boxOf(points);
      if (camera.width > 0) camera.fit = fitOf();
      cost = 0;
      ask();
    },
    paint: (next) => {
      look = next;
      ask();
    },
    resize,
    pan,
    zoom,
    fly,
    fit: (instantly) => fly({ x: home.x, y: home.y, scale: camera.fit }, instantly),
    at,
    inside,
    toCanvas,
    radius,
    redraw: () => ask(),
    close: () => {
      land();
      cancelAnimationFrame(asked);
      clearTimeout(rest);
    },
  };
}
