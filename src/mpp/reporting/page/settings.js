// Other settings of the loss: regions and areas under them, and the words of the commands that say the same.

const KNOBS = {
  prior_threshold: { label: "Threshold", min: 0, max: 0.99, step: 0.01, off: "none: continuous" },
  mask_gamma: { label: "Gamma", min: 0.05, max: 3, step: 0.05 },
  mask_min_weight: { label: "Floor", min: 0, max: 0.95, step: 0.01 },
  mask_blur: { label: "Blur", min: 0, max: 31, step: 2 },
};
const PAUSE_MS = 120; // after the last move, before all masks are measured
const root = document.documentElement;
const asMadeAreas = new Map(samples.map(({ place, learn, preserve, taught, frames, bins }) => [
  place, { learn, preserve, taught, frames, bins },
]));
const madeCounts = Object.fromEntries(FOLLOWS_LOSS.map((name) => [name, charts[name].counts]));
const madeTotals = {
  learn: page.coverage?.learn ?? null, preserve: page.coverage?.preserve ?? null, taught: page.teacher.share,
};
/** Whether every measured mask is on the page in full, so that the totals can follow. */
const allHere = page.scanned === samples.length && samples.every((sample) => sample.raw === null || sample.whole);
const asMade = (sample) => (sample.raw === null || sample.whole ? "" : "as-made");
let totals = madeTotals;
let measuring = 0;
let pause = null;

/** Whether a text is a value of a setting; "" is that of the page. */
function isSetting(name, text) {
  if (text === "" || (name === "prior_threshold" && text === "none")) return true;
  const value = Number(text);
  if (!Number.isFinite(value)) return false;
  return {
    prior_threshold: value > 0 && value < 1,
    mask_gamma: value > 0,
    mask_min_weight: value >= 0 && value < 1,
    mask_blur: value === 0 || (value > 0 && value % 2 === 1),
  }[name];
}

const valueOf = (name) => {
  if (state[name] === "") return page.loss.settings[name];
  return state[name] === "none" ? null : Number(state[name]);
};
const triedLoss = () => ({ ...page.loss.settings, ...Object.fromEntries(SETTINGS.map((name) => [name, valueOf(name)])) });
const isTried = () => SETTINGS.some((name) => valueOf(name) !== page.loss.settings[name]);

function drawSettings() {
  byId("try").open = matchMedia("(min-width: 981px)").matches;
  const reset = el("button", { type: "button", class: "ghost", id: "reset", text: "Reset", onclick: resetSettings });
  byId("settings").append(
    ...Object.entries(KNOBS).map(knobOf),
    el("p", { class: "soft small", id: "no-prior", text: "loss.prior_weight=0: nothing is preserved, at any threshold." }),
    commandOf("report", "The same page by a command"),
    commandOf("train", "For mpp.train, behind its other words"),
    reset,
  );
  showSettings();
}

function knobOf([name, { label, min, max, step, off }]) {
  const range = el("input", {
    type: "range", id: `range-${name}`, min, max, step, "aria-label": label,
    oninput: (event) => change({ [name]: fromRange(name, Number(event.target.value)) }),
  });
  const exact = el("input", {
    type: "number", id: `exact-${name}`, min, step: "any", "aria-label": `loss.${name}`, placeholder: off ? "none" : null,
    onchange: (event) => typed(name, event.target),
  });
  const words = el("label", { for: `range-${name}` }, span(label), el("code", { text: `loss.${name}` }));
  return el("div", { class: "knob" }, words, exact, range);
}

/** A slider's position as the setting's text: its left end has a meaning of its own for some. */
function fromRange(name, position) {
  if (name === "prior_threshold" && position === 0) return asState(name, null);
  if (name === "mask_blur") return asState(name, position === 0 ? 0 : position + 1);
  return asState(name, position);
}

const asState = (name, value) => (value === page.loss.settings[name] ? "" : String(value ?? "none"));

function typed(name, control) {
  const text = control.value.trim() === "" && name === "prior_threshold" ? "none" : control.value.trim();
  if (text !== "" && isSetting(name, text)) change({ [name]: asState(name, text === "none" ? null : Number(text)) });
  else toast(`loss.${name} has no such value`);
  showSettings();
}

function resetSettings() {
  change(Object.fromEntries(SETTINGS.map((name) => [name, ""])));
}

function commandOf(id, title) {
  const copy = () => copyText(byId(`command-${id}`).textContent, "Copied");
  return el(
    "div", { class: "command" },
    el("p", { class: "soft small", text: title }),
    el("code", { id: `command-${id}`, tabindex: "0" }),
    el("button", { type: "button", class: "ghost", "aria-label": `Copy: ${title}`, text: "Copy", onclick: copy }),
  );
}

/** Bring the controls in line with the settings. */
function showSettings() {
  for (const [name, { off }] of Object.entries(KNOBS)) {
    const value = loss[name];
    const [range, exact] = [byId(`range-${name}`), byId(`exact-${name}`)];
    range.value = String(name === "mask_blur" && value > 0 ? value - 1 : value ?? 0);
    range.setAttribute("aria-valuetext", String(value ?? off));
    exact.value = value === null ? "" : String(value);
    const useless = !canInflate || (name === "prior_threshold" && loss.prior_weight === 0);
    range.disabled = useless;
    exact.disabled = useless;
  }
  const words = lossWords();
  byId("no-prior").hidden = loss.prior_weight > 0;
  byId("command-report").textContent = ["python -m mpp.report", quoted(`data.cache_dir=${page.cache}`), ...words].join(" ");
  byId("command-train").textContent = words.join(" ");
  byId("reset").disabled = !isTried();
}

/** The preset, and what differs from it. */
function lossWords() {
  const { name, settings } = page.loss.preset;
  const others = Object.entries(loss).filter(([setting, value]) => value !== settings[setting]);
  return [`loss=${name}`, ...others.map(([setting, value]) => `loss.${setting}=${value ?? "null"}`)];
}

/** A word as shells take it. */
const quoted = (word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

/** Show what follows from other settings: images at once, areas of all samples after a pause. */
function trySettings() {
  loss = triedLoss();
  root.toggleAttribute("data-tried", isTried());
  showSettings();
  repaint();
  repaintDetail();
  drawLegend();
  clearTimeout(pause);
  measuring += 1;
  if (!isTried()) return showAreas(asMadeAreas, madeTotals, madeCounts);
  root.dataset.measuring = "1";
  pause = setTimeout(measure, PAUSE_MS, measuring);
}

/** The areas of all samples whose masks are here, without stopping the page for long. */
async function measure(own) {
  const found = new Map();
  let since = performance.now();
  for (const sample of samples) {
    if (sample.raw === null || !sample.whole) continue;
    const raw = await rawOf(sample);
    if (performance.now() - since > 30) {
      await new Promise((go) => { setTimeout(go); });
      since = performance.now();
    }
    if (own !== measuring) return;
    const areas = coverageUnder(loss, raw, ...sample.cells);
    const frames = sample.frames === null ? null : areas.frames;
    const bins = { ...sample.bins, learn: binOf(areas.learn), preserve: binOf(areas.preserve) };
    found.set(sample.place, { ...areas, frames, bins });
  }
  const counts = Object.fromEntries(FOLLOWS_LOSS.map((name) => [name, charts[name].labels.map(() => 0)]));
  for (const { bins } of found.values()) for (const name of FOLLOWS_LOSS) counts[name][bins[name]] += 1;
  showAreas(found, allHere ? totalsOf(found) : madeTotals, allHere ? counts : madeCounts);
}

/** Number of the bar of a share of the area: none at all, ten tenths, all of it. */
function binOf(share) {
  const last = charts.learn.labels.length - 1;
  if (share <= 1e-6) return 0;
  return share >= 1 - 1e-6 ? last : 1 + Math.min(Math.floor(share * (last - 1) + 1e-5), last - 2);
}

/** Means over the visits of an epoch, as of the page's own. */
function totalsOf(found) {
  const training = [...found].filter(([place]) => samples[place].split === "train");
  const visits = training.reduce((sum, [place]) => sum + samples[place].repeats, 0);
  const mean = (name) => training.reduce((sum, [place, areas]) => sum + samples[place].repeats * areas[name], 0) / visits;
  return visits ? { learn: mean("learn"), preserve: mean("preserve"), taught: mean("taught") } : madeTotals;
}

function showAreas(areas, newTotals, counts) {
  for (const [place, own] of areas) Object.assign(samples[place], own);
  totals = newTotals;
  for (const name of FOLLOWS_LOSS) charts[name].counts = counts[name];
  delete root.dataset.measuring;
  drawTiles();
  drawCharts();
  refreshCards();
  updateGrid();
  showState();
  refreshDetail();
}
