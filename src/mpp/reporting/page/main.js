// Changes of the state, the keyboard, and the start.

/** Change the state and show what follows from it. */
function change(values, { keepGrid = false } = {}) {
  const before = { ...state };
  Object.assign(state, values);
  writeAddress();
  const differs = (names) => names.some((name) => before[name] !== state[name]);
  if (!keepGrid && differs([...FILTERS, "sort", "down"])) updateGrid();
  if (!keepGrid) showState();
  if (differs(SETTINGS)) trySettings();
  if (differs(["overlay", "size"])) {
    repaint();
    repaintDetail();
  }
}

const KEYS = [
  ["← → ↑ ↓", "go through the samples"],
  ["j  k", "next, previous sample"],
  ["Enter", "open the sample"],
  ["Esc", "close, or leave the search"],
  ["/", "search"],
  ["o  Shift+o", "next, previous overlay"],
  [",  .", "previous, next frame or layer of an open sample"],
  ["p", "play an open clip"],
  ["x", "clear the filters"],
  ["?", "this list"],
];

function drawHelp() {
  const help = byId("help");
  const list = el("dl", { class: "keys" });
  for (const [keys, text] of KEYS) {
    list.append(el("dt", {}, ...keys.split("  ").map((key) => el("kbd", { text: key }))), el("dd", { text }));
  }
  const shut = { class: "ghost", "aria-label": "Close", text: "✕", onclick: () => help.close() };
  const head = [el("h2", { id: "help-title", text: "Keyboard" }), el("button", { type: "button", ...shut })];
  const more = "Clips play their key frames while the mouse is over them. Bars and findings filter; the address keeps "
    + "what is chosen.";
  help.append(el("header", { class: "detail-head" }, ...head), list, el("p", { class: "soft", text: more }));
}

function cycleOverlay(by) {
  const names = Object.keys(OVERLAYS);
  change({ overlay: names[(names.indexOf(state.overlay) + by + names.length) % names.length] });
}

function toSearch() {
  byId("q").focus();
  byId("q").select();
}

/** What a key does; undefined where it has its usual meaning. */
function actionOf(event) {
  const anywhere = { o: () => cycleOverlay(1), O: () => cycleOverlay(-1), "?": () => byId("help").showModal() };
  if (opened) {
    const moves = {
      ArrowLeft: () => stepSample(-1), k: () => stepSample(-1), ArrowRight: () => stepSample(1), j: () => stepSample(1),
      ",": () => stepView(-1), ".": () => stepView(1), p: () => opened.clip && togglePlay(),
    };
    return { ...anywhere, ...moves }[event.key];
  }
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columnsOfGrid(), ArrowUp: -columnsOfGrid(), j: 1, k: -1 };
  const inGrid = grid.contains(document.activeElement);
  if (steps[event.key]) return () => focusCard(inGrid ? current + steps[event.key] : current);
  const others = {
    "/": toSearch, x: clearFilters, Home: () => focusCard(0), End: () => focusCard(shown.length - 1),
  };
  return { ...anywhere, ...others }[event.key];
}

/** Whether a control does something with a key itself. */
function hasOwnUse(control, key) {
  if (control.type === "range") return key.startsWith("Arrow") || ["Home", "End"].includes(key);
  return control.tagName !== "SELECT" || !["/", "?"].includes(key);
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || byId("help").open) return;
  if (typing?.id === "q" && event.key === "Escape") {
    change({ q: "" });
    typing.blur();
  }
  if (typing && hasOwnUse(typing, event.key)) return;
  const inGrid = document.activeElement === document.body || grid.contains(document.activeElement);
  if (["Home", "End"].includes(event.key) && !opened && !inGrid) return;
  if (event.key.startsWith("Arrow") && !opened && !inGrid) return;
  const action = actionOf(event);
  if (!action) return;
  event.preventDefault();
  action();
});

function start() {
  readAddress();
  loss = triedLoss();
  drawHead();
  drawSettings();
  drawFindings();
  drawControls();
  drawCharts();
  drawHelp();
  drawLegend();
  updateGrid();
  showState();
  if (isTried()) trySettings();
  if (state.open) openDetail(byKey.get(state.open));
  window.addEventListener("hashchange", () => {
    readAddress();
    updateGrid();
    showState();
    repaint();
    trySettings();
    const wanted = byKey.get(state.open) ?? null;
    if (wanted && wanted !== opened) openDetail(wanted);
    if (!wanted && opened) closeDetail();
  });
  window.addEventListener("resize", () => {
    cancelAnimationFrame(start.resized);
    start.resized = requestAnimationFrame(() => { repaint(); repaintDetail(); });
  });
  document.documentElement.dataset.ready = "1";
}

start();
