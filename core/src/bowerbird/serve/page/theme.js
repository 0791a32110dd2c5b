// Loaded before the style sheet is used, so that nobody sees a flash of the other theme. Not a module: those run late.
// `data-theme` of the root is always "light" or "dark"; `data-theme-choice` says what was chosen: auto, light or dark.
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => {
    try {
      return localStorage.getItem("bowerbird-theme");
    } catch {
      return null; // storage is switched off; the choice lasts as long as the page
    }
  };
  const apply = (choice) => {
    root.dataset.themeChoice = choice;
    root.dataset.theme = choice === "auto" ? (dark.matches ? "dark" : "light") : choice;
    window.dispatchEvent(new CustomEvent("bowerbird-theme"));
  };
  apply(["light", "dark"].includes(stored()) ? stored() : "auto");
  dark.addEventListener("change", () => apply(root.dataset.themeChoice));
  window.addEventListener("bowerbird-theme-next", () => {
    const order = ["auto", "light", "dark"];
    const next = order[(order.indexOf(root.dataset.themeChoice) + 1) % order.length];
    try {
      localStorage.setItem("bowerbird-theme", next);
    } catch {
      // as above
    }
    apply(next);
  });
})();
