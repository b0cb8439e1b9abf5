// The page's data, what is chosen, and the address that keeps it.

const page = JSON.parse(byId("data").textContent);
const images = byId("images").textContent.split("\n");
const packed = byId("masks").textContent.split("\n");

const SEVERITIES = ["error", "warning", "info"];
const SEVERITY_NAMES = { error: "error", warning: "warning", info: "hint" };
const OVERLAYS = { both: "Both", target: "Learned", prior: "Preserved", mask: "Mask", none: "None" };
const SORTS = {
  key: "name", learn: "learned area", preserve: "preserved area", bucket: "bucket", findings: "findings",
};
const SIZES = { s: "S", m: "M", l: "L" };
const CHART_FILTERS = ["learn", "preserve", "values"];
const FILTERS = ["q", "split", "bucket", "mask", "finding", ...CHART_FILTERS];
const SETTINGS = ["prior_threshold", "mask_gamma", "mask_min_weight", "mask_blur"]; // of the loss; "": the page's
const DEFAULTS = {
  ...Object.fromEntries(SETTINGS.map((name) => [name, ""])),
  q: "", split: "", bucket: "", mask: "", finding: "", learn: "", preserve: "", values: "",
  sort: "key", down: "", overlay: "both", opacity: String(100 * page.colours.opacity), size: "m", open: "",
};

const samples = page.samples.map((sample, place) => ({
  ...sample,
  place,
  text: [sample.key, sample.caption, ...sample.variants].join("\n").toLowerCase(),
  weight: sample.findings.reduce((sum, [finding]) => sum + severityWeight(page.findings[finding].severity), 0),
}));
const byKey = new Map(samples.map((sample) => [sample.key, sample]));
const charts = Object.fromEntries(page.charts.map((chart) => [chart.name, chart]));

const state = { ...DEFAULTS };
/** The settings under which regions are shown: the page's, or those that are tried. */
let loss = page.loss.settings;

function severityWeight(severity) {
  return [10000, 100, 1][SEVERITIES.indexOf(severity)];
}

/** Whether a sample passes all filters. */
function matches(sample) {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.every((word) => sample.text.includes(word))) return false;
  if (state.split && sample.split !== state.split) return false;
  if (state.bucket && charts.bucket.labels[sample.bins.bucket] !== state.bucket) return false;
  if (state.mask && (sample.mask ?? "none") !== state.mask) return false;
  if (!matchesFinding(sample)) return false;
  for (const name of ["learn", "preserve"]) {
    if (state[name] !== "" && sample.bins[name] !== Number(state[name])) return false;
  }
  return state.values === "" || sample.bins.values.includes(Number(state.values));
}

function matchesFinding(sample) {
  if (!state.finding) return true;
  if (state.finding === "any") return sample.findings.length > 0;
  if (state.finding === "none") return sample.findings.length === 0;
  return sample.findings.some(([finding]) => page.findings[finding].kind === state.finding);
}

/** Samples that pass the filters, in the chosen order. */
function chosen() {
  const orders = {
    key: () => 0,
    learn: (a, b) => missingLast(a.learn, b.learn),
    preserve: (a, b) => missingLast(a.preserve, b.preserve),
    bucket: (a, b) => a.bins.bucket - b.bins.bucket,
    findings: (a, b) => b.weight - a.weight,
  };
  const order = state.finding === "duplicate" && state.sort === "key" ? together : orders[state.sort];
  const found = samples.filter(matches).sort((a, b) => order(a, b) || collator.compare(a.key, b.key));
  return state.down ? found.reverse() : found;
}

/** What looks alike stays together. */
function together(a, b) {
  const rank = (sample) => sample.findings.find(([finding]) => page.findings[finding].kind === "duplicate")[2];
  return rank(a) - rank(b);
}

function missingLast(a, b) {
  return (a ?? Infinity) === (b ?? Infinity) ? 0 : (a ?? Infinity) - (b ?? Infinity);
}

const ALLOWED = {
  sort: Object.keys(SORTS), overlay: Object.keys(OVERLAYS), size: Object.keys(SIZES), down: ["", "1"],
};

/** Take the state from the address; what it does not name, or names wrongly, is as at first. */
function readAddress() {
  const words = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(DEFAULTS)) {
    const value = words.get(name) ?? DEFAULTS[name];
    state[name] = !ALLOWED[name] || ALLOWED[name].includes(value) ? value : DEFAULTS[name];
  }
  for (const name of SETTINGS) if (!isSetting(name, state[name])) state[name] = "";
  if (!(Number(state.opacity) >= 0 && Number(state.opacity) <= 100)) state.opacity = DEFAULTS.opacity;
  if (!byKey.has(state.open)) state.open = "";
}

/** Write what differs from the first state into the address. */
function writeAddress() {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== DEFAULTS[name]) words.set(name, value);
  }
  const text = words.toString();
  if (text !== location.hash.slice(1)) history.replaceState(null, "", text ? `#${text}` : "#");
}
