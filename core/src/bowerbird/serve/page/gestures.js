// Pointers, wheel and keys on a canvas that is moved and enlarged.

/** `pan(dx, dy)`, `zoom(factor, x, y)`, `fit()`, `hover([x, y] | null)`, `tap([x, y], touched)`; by keys also `choose()`
 *  and `leave()`, which says whether there was something to leave. `by(keys)`: what is used now. CSS pixels. */
export function gestures(canvas, { pan, zoom, fit, hover, tap, choose, leave, by }) {
  const pointers = new Map(); // pointer -> where it is
  let dragged = 0; // pixels since the first pointer went down

  function placeOf(event) {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.setPointerCapture(event.pointerId);
    if (pointers.size === 0) dragged = 0;
    pointers.set(event.pointerId, placeOf(event));
    by(false);
  });

  canvas.addEventListener("pointermove", (event) => {
    const here = placeOf(event);
    const before = pointers.get(event.pointerId);
    if (!before) {
      if (event.pointerType !== "touch") hover(here);
      return;
    }
    dragged += Math.hypot(here[0] - before[0], here[1] - before[1]);
    pointers.set(event.pointerId, here);
    const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) pinch(before, here, other);
    else if (dragged > 3) {
      canvas.classList.add("dragging");
      pan(here[0] - before[0], here[1] - before[1]);
    }
  });

  function pinch(before, here, other) {
    const middle = (place) => [(place[0] + other[0]) / 2, (place[1] + other[1]) / 2];
    const spread = (place) => Math.max(12, Math.hypot(place[0] - other[0], place[1] - other[1]));
    const [from, to] = [middle(before), middle(here)];
    pan(to[0] - from[0], to[1] - from[1]);
    zoom(spread(here) / spread(before), ...to);
  }

  function lift(event) {
    const held = pointers.delete(event.pointerId);
    if (pointers.size === 0) canvas.classList.remove("dragging");
    if (held && pointers.size === 0 && dragged <= 6 && event.type === "pointerup") tap(placeOf(event), event.pointerType === "touch");
  }
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("pointerleave", () => pointers.size === 0 && hover(null));
  canvas.addEventListener("dblclick", (event) => zoom(2, ...placeOf(event)));
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const pixels = event.deltaY * (event.deltaMode === 1 ? 16 : 1); // some mice count lines
      zoom(Math.exp(-pixels * (event.ctrlKey ? 0.01 : 0.0016)), ...placeOf(event)); // with Ctrl: a pinch on a touch pad
    },
    { passive: false },
  );

  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const far = event.shiftKey ? 240 : 60;
    const move = { ArrowLeft: [far, 0], ArrowRight: [-far, 0], ArrowUp: [0, far], ArrowDown: [0, -far] }[event.key];
    by(true);
    if (move) pan(...move);
    else if (["+", "="].includes(event.key)) zoom(1.35);
    else if (["-", "_"].includes(event.key)) zoom(1 / 1.35);
    else if (["0", "Home"].includes(event.key)) fit();
    else if (["Enter", " "].includes(event.key)) choose();
    else if (event.key !== "Escape" || leave() === false) return;
    event.preventDefault();
    event.stopPropagation();
  });
}
