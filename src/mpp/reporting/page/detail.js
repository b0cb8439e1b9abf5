// One sample at large: image with overlay, its regions side by side, all its frames or layers, and its facts.

const detail = byId("detail");
const WAYS = { target: "learned", prior: "preserved", mask: "raw mask" };
let opened = null;
let view = 0;
let running = null;

function openDetail(sample) {
  stopRunning();
  opened = sample;
  view = 0;
  detail.replaceChildren(...detailParts(sample));
  if (!detail.open) detail.showModal();
  showDetailView(0);
  change({ open: sample.key }, { keepGrid: true });
}

function closeDetail() {
  if (detail.open) detail.close();
}

detail.addEventListener("close", () => {
  stopRunning();
  byId("try").append(byId("settings"));
  const place = shown.indexOf(opened);
  opened = null;
  change({ open: "" }, { keepGrid: true });
  if (place >= 0) focusCard(place);
});
detail.addEventListener("click", (event) => { if (event.target === detail) closeDetail(); });

/** The next sample in the grid's order. */
function stepSample(by) {
  const place = shown.indexOf(opened);
  const next = shown[Math.min(Math.max(place + by, 0), shown.length - 1)];
  if (next && next !== opened) openDetail(next);
}

function stepView(by) {
  showDetailView((view + by + opened.views.length) % opened.views.length);
}

function detailParts(sample) {
  const place = shown.indexOf(sample);
  const button = (title, text, onclick) => el("button", { type: "button", "aria-label": title, title, text, onclick });
  const among = place < 0 ? "" : `${number.format(place + 1)} of ${number.format(shown.length)}`;
  const head = el(
    "header", { class: "detail-head" },
    el("h2", { id: "detail-key", text: sample.key }),
    span(among, "soft"),
    button("Previous sample (left arrow)", "←", () => stepSample(-1)),
    button("Next sample (right arrow)", "→", () => stepSample(1)),
    button("Close (Esc)", "✕", closeDetail),
  );
  return [head, el("div", { class: "detail-body" }, stageOf(sample), factsOf(sample))];
}

function stageOf(sample) {
  const figure = figureOf(sample);
  figure.dataset.live = "1";
  const readout = el("p", { class: "cell-readout", id: "cell-readout", text: hint(sample) });
  figure.addEventListener("pointermove", (event) => readCell(sample, figure, event, readout));
  figure.addEventListener("pointerleave", () => { readout.textContent = hint(sample); });
  const several = sample.views.length > 1;
  const given = el("span", { class: "given-note", text: "given to the model: neither region", hidden: true });
  return el(
    "div", { class: several ? "stage-side several" : "stage-side" },
    el("div", { class: "stage" }, figure, given),
    readout,
    several ? scrubberOf(sample) : null,
    several ? el("div", { class: "film", role: "group", "aria-label": sample.clip ? "Key frames" : "Layers" },
      ...sample.views.map((one, place) => filmOf(sample, one, place))) : null,
    el("div", { class: "panes" }, ...Object.keys(WAYS).map((plane) => paneOf(sample, plane))),
    several && sample.clip && sample.frames ? timelineOf(sample) : null,
  );
}

function hint(sample) {
  return sample.raw === null ? (sample.problem ?? "") : "Point at a cell to read its weights.";
}

async function readCell(sample, figure, event, readout) {
  const box = figure.getBoundingClientRect();
  const [height, width] = sample.cells;
  const row = Math.min(height - 1, Math.max(0, Math.floor(((event.clientY - box.top) / box.height) * height)));
  const column = Math.min(width - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * width)));
  const fields = fieldsOf(sample, await rawOf(sample), view);
  if (!fields || opened !== sample) return;
  const value = (plane) => fields[plane][row * width + column].toFixed(2);
  const said = `mask ${value("mask")}, learned ${value("target")}, preserved ${value("prior")}`;
  readout.textContent = `row ${row}, column ${column}: ${said}`;
}

function scrubberOf(sample) {
  const range = el("input", {
    type: "range", id: "scrubber", min: "0", max: String(sample.views.length - 1), step: "1", value: "0",
    "aria-label": sample.clip ? "Key frame" : "Layer",
    oninput: (event) => { stopRunning(); showDetailView(Number(event.target.value)); },
  });
  const play = el("button", { type: "button", id: "play", "aria-label": "Play (p)", text: "▶", onclick: togglePlay });
  return el("div", { class: "scrubber" }, sample.clip ? play : null, range, el("output", { id: "view-name" }));
}

function paneOf(sample, plane) {
  const canvas = el("canvas", { "data-plane": plane, "aria-hidden": "true" });
  canvas.style.aspectRatio = `${sample.size[0]} / ${sample.size[1]}`;
  canvas.style.setProperty("--ratio", ratioOf(sample));
  return el("figure", { class: `pane ${plane}` }, canvas, el("figcaption", {}, span(WAYS[plane]), el("b")));
}

function filmOf(sample, one, place) {
  const figure = figureOf(sample);
  figure.dataset.live = "1";
  showView(figure, sample, place);
  return el("button", {
    type: "button", "aria-label": `Show ${one.name}`, onclick: () => { stopRunning(); showDetailView(place); },
  }, figure, span(one.given ? `${one.name}, given` : one.name));
}

/** Learned and preserved area of every latent frame, those between the key frames too. */
function timelineOf(sample) {
  const [width, height] = [320, 46];
  const given = sample.clip - sample.frames.length;
  const x = (frame) => (width * frame) / Math.max(1, sample.clip - 1);
  const point = (share, n) => `${x(n + given)},${2 + (height - 4) * (1 - share)}`;
  const line = (plane) => sample.frames.map((pair, n) => point(pair[plane], n)).join(" ");
  const root = svg("svg", {
    viewBox: `-4 0 ${width + 8} ${height}`, preserveAspectRatio: "none", role: "img",
    "aria-label": "Learned and preserved area over the frames",
  });
  for (const { frame } of sample.views) {
    root.append(svg("line", { x1: x(frame), x2: x(frame), y1: 0, y2: height, class: "rule" }));
  }
  root.append(svg("polyline", { points: line(1), class: "line keep" }));
  root.append(svg("polyline", { points: line(0), class: "line learn" }));
  const caption = `area learned and preserved over ${sample.clip} latent frames`;
  return el("figure", { class: "timeline" }, root, el("figcaption", { text: caption }));
}

async function showDetailView(place) {
  view = place;
  const sample = opened;
  const one = sample.views[place];
  showView(detail.querySelector(".stage .figure"), sample, place);
  detail.querySelector(".given-note").hidden = !one.given;
  detail.querySelectorAll(".film button").forEach((button, other) => press(button, other === place));
  const range = detail.querySelector("#scrubber");
  if (range) {
    range.value = String(place);
    range.setAttribute("aria-valuetext", one.name);
    detail.querySelector("#view-name").textContent = one.name;
  }
  const fields = fieldsOf(sample, await rawOf(sample), place);
  if (opened !== sample || view !== place) return;
  for (const pane of detail.querySelectorAll(".pane")) {
    const canvas = pane.querySelector("canvas");
    const values = fields ? fields[canvas.dataset.plane] : null;
    paintPlane(canvas, sample, values, canvas.dataset.plane);
    const mean = values ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
    pane.querySelector("b").textContent = percent(mean);
  }
}

function repaintDetail() {
  if (!opened) return;
  showDetailView(view);
  detail.querySelectorAll(".film .figure").forEach((figure, place) => showView(figure, opened, place));
}

/** What of an open sample follows from the settings, besides its images. */
function refreshDetail() {
  if (!opened) return;
  detail.querySelector(".cover-large").replaceChildren(...areasOf(opened));
  detail.querySelector(".teacher").textContent = teacherOf(opened);
  detail.querySelector(".timeline")?.replaceWith(timelineOf(opened));
}

function togglePlay() {
  if (running !== null) return stopRunning();
  running = setInterval(() => stepView(1), PLAY_MS);
  return markPlay("❚❚", "Pause (p)");
}

function stopRunning() {
  clearInterval(running);
  running = null;
  markPlay("▶", "Play (p)");
}

function markPlay(text, label) {
  const play = detail.querySelector("#play");
  if (!play) return;
  play.textContent = text;
  play.setAttribute("aria-label", label);
}

function factsOf(sample) {
  const rows = [
    ["Bucket", charts.bucket.labels[sample.bins.bucket]],
    ["Latent cells", `${sample.cells[1]} x ${sample.cells[0]}${sample.clip ? `, ${sample.clip} frames` : ""}`],
    ["Mask", sample.mask ?? "none: learns everywhere"],
    ["Mask values", sample.range ? `${sample.range[0].toFixed(2)} to ${sample.range[1].toFixed(2)}` : "–"],
    ["Teacher", teacherOf(sample)],
    ["Split", sample.split === "val" ? "validation" : "training"],
    ["Visits per epoch", String(sample.repeats)],
    ["Made from", sample.origin === sample.key ? null : sample.origin],
    ["Mirrored", sample.flip ? "yes" : null],
  ];
  const list = el("dl");
  for (const [name, value] of rows.filter((row) => row[1] !== null)) {
    list.append(el("dt", { text: name }), el("dd", { class: name.toLowerCase(), text: value }));
  }
  return el(
    "div", { class: "facts" },
    el("div", { class: `cover-large ${asMade(sample)}` }, ...areasOf(sample)),
    sample.findings.length ? el("ul", { class: "said as-made" }, ...sample.findings.map(saidOf)) : null,
    el("p", { class: sample.caption ? "caption" : "caption lacking", text: sample.caption || "no caption" }),
    ...sample.variants.map((text) => el("p", { class: "caption variant", text })),
    list,
    byId("settings"),
  );
}

const teacherOf = ({ taught }) => (taught === null ? "–" : taught ? "runs for it" : "is skipped");

function areasOf(sample) {
  const figures = [span(`learns ${percent(sample.learn)}`, "l"), span(`preserves ${percent(sample.preserve)}`, "p")];
  return [coverageBar(sample), el("p", {}, ...figures)];
}

function saidOf([place, note]) {
  const { severity, title, remedy } = page.findings[place];
  return el("li", { class: severity }, el("b", { text: title }), note ? span(note, "note") : null, span(remedy));
}
