// The toolbar: search, filters, order, overlay, and the chips of what is chosen.

const SELECTS = ["finding", "bucket", "mask", "split", "sort"];

function drawControls() {
  const counted = (text, count) => `${text} (${number.format(count)})`;
  const kinds = page.findings.filter((finding) => !finding.lines.length);
  fill("finding", "All findings", [
    ["any", "Any finding"], ["none", "Nothing found"], ...kinds.map((one) => [one.kind, counted(one.title, one.count)]),
  ]);
  const { labels, counts } = charts.bucket;
  fill("bucket", "All buckets", labels.map((label, bin) => [label, counted(label, counts[bin])]));
  const masks = Object.entries(page.masks);
  fill("mask", "All masks", masks.map(([kind, count]) => [kind, counted(kind === "none" ? "no mask" : kind, count)]));
  const { train, val } = page.splits;
  fill("split", "Both splits", [["train", counted("training", train)], ["val", counted("validation", val)]]);
  byId("sort").append(...Object.entries(SORTS).map(optionOf));
  segments("overlays", "overlay", OVERLAYS);
  segments("sizes", "size", SIZES, { s: "Small images", m: "Medium images", l: "Large images" });
  connectControls();
}

const optionOf = ([value, text]) => el("option", { value, text });

function fill(id, all, pairs) {
  byId(id).append(optionOf(["", all]), ...pairs.map(optionOf));
}

/** Buttons of which one is pressed. */
function segments(id, name, values, labels = {}) {
  const buttons = Object.entries(values).map(([value, text]) => el("button", {
    type: "button", "data-value": value, "aria-label": labels[value] ?? text, text,
    onclick: () => change({ [name]: value }),
  }));
  byId(id).append(...buttons);
}

function connectControls() {
  for (const id of SELECTS) byId(id).addEventListener("change", (event) => change({ [id]: event.target.value }));
  for (const id of ["q", "opacity"]) {
    byId(id).addEventListener("input", (event) => change({ [id]: event.target.value }));
  }
  byId("down").addEventListener("click", () => change({ down: state.down ? "" : "1" }));
  byId("copy").addEventListener("click", copyNames);
  byId("nothing-clear").addEventListener("click", clearFilters);
  for (const id of ["skip", "jump"]) byId(id).addEventListener("click", toGrid);
  byId("help-open").addEventListener("click", () => byId("help").showModal());
}

/** Bring controls in line with the state. */
function showState() {
  for (const id of ["q", "opacity", ...SELECTS]) {
    if (byId(id).value !== state[id]) byId(id).value = state[id];
  }
  document.documentElement.style.setProperty("--opacity", Number(state.opacity) / 100);
  grid.dataset.size = state.size;
  for (const button of byId("overlays").children) press(button, button.dataset.value === state.overlay);
  for (const button of byId("sizes").children) press(button, button.dataset.value === state.size);
  for (const button of document.querySelectorAll("button.finding")) {
    press(button, button.dataset.kind === state.finding);
  }
  byId("down").textContent = state.down ? "↓" : "↑";
  press(byId("down"), state.down !== "");
  const all = plural(samples.length, "sample");
  byId("count").textContent = shown.length === samples.length ? all : `${number.format(shown.length)} of ${all}`;
  byId("chips").replaceChildren(...chipsOf());
}

const CHIPS = {
  q: (value) => `“${value}”`,
  split: (value) => (value === "val" ? "validation" : "training"),
  bucket: (value) => value,
  mask: (value) => (value === "none" ? "no mask" : `mask: ${value}`),
  finding: (value) => findingName(value),
  learn: (bin) => `learns ${charts.learn.labels[bin]}`,
  preserve: (bin) => `preserves ${charts.preserve.labels[bin]}`,
  values: (bin) => `mask has ${charts.values.labels[bin]}`,
};

function chipsOf() {
  const active = FILTERS.filter((name) => state[name] !== "");
  const chips = active.map((name) => {
    const text = CHIPS[name](state[name]);
    const says = { class: "chip", "aria-label": `Remove the filter ${text}` };
    const cross = el("span", { "aria-hidden": "true", text: "✕" });
    return el("button", { type: "button", ...says, onclick: () => change({ [name]: "" }) }, span(text), cross);
  });
  const clear = el("button", { type: "button", class: "link", id: "clear", text: "Clear all", onclick: clearFilters });
  return active.length ? [...chips, clear] : [];
}

function clearFilters() {
  change(Object.fromEntries(FILTERS.map((name) => [name, ""])));
}

/** Without the address, which keeps the state. */
function toGrid(event) {
  event.preventDefault();
  byId("toolbar-place").scrollIntoView();
  focusCard(current);
}

/** The names of what is shown, one a line, for other tools. */
function copyNames() {
  copyText(shown.map((sample) => sample.key).join("\n"), `${plural(shown.length, "name")} copied`);
}

async function copyText(text, said) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = el("textarea", { class: "sr", "aria-hidden": "true" });
    area.value = text;
    (document.querySelector("dialog[open]") ?? document.body).append(area); // nothing outside a dialog has the focus
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  toast(said);
}

function toast(text) {
  const place = byId("toast");
  (document.querySelector("dialog[open]") ?? document.body).append(place);
  place.textContent = text;
  place.classList.add("on");
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => place.classList.remove("on"), 1800);
}
