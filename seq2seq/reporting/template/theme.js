// Light and dark, and what is painted again when the theme or the width changes.

const THEMES = { auto: "Auto", light: "Light", dark: "Dark" };
const STORAGE_KEY = "seq2seq-theme";
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const painters = []; // draw what depends on widths or colours
let theme = storedTheme();

function storedTheme() {
  try {
    const stored = localStorage.getItem(STORAGE_KEY);
    return stored in THEMES ? stored : "auto";
  } catch {
    return "auto"; // a page from a file may have no storage
  }
}

function storeTheme() {
  try {
    localStorage.setItem(STORAGE_KEY, theme);
  } catch {
    // Without storage the choice lasts as long as the page.
  }
}

function applyTheme() {
  const automatic = prefersDark.matches ? "dark" : "light";
  document.documentElement.dataset.theme = theme === "auto" ? automatic : theme;
  document.getElementById("theme").textContent = THEMES[theme];
  repaint();
}

function nextTheme() {
  const names = Object.keys(THEMES);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  storeTheme();
  applyTheme();
}

function repaint() {
  for (const paint of painters) paint();
}

/** Paint when the page has a layout, and again whenever its width or theme changes. */
export function keepPainted(paint) {
  painters.push(paint);
  requestAnimationFrame(paint);
}

function repaintOnNewWidth() {
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth === width) return; // a phone changes only the height while it scrolls
    width = innerWidth;
    repaint();
  });
}

/** Start with the stored theme; the button of the page changes it. */
export function startTheme() {
  document.getElementById("theme").addEventListener("click", nextTheme);
  prefersDark.addEventListener("change", applyTheme);
  applyTheme();
  repaintOnNewWidth();
}
