// Regions over images: learned and preserved in the colours of `region_colours.py`, whose rule this is too.

const { learned: LEARNED, preserved: PRESERVED, hatching: HATCHING } = page.colours;
const HATCH = { period: 7, line: 2 }; // CSS pixels
const decoded = new Map();
const KEPT = 16e6; // cells of all masks that are kept decoded
let kept = 0;
const canInflate = typeof DecompressionStream === "function";

/** A sample's raw masks as floats `[frame][row][column]`; null where it has none. */
function rawOf(sample) {
  if (sample.raw === null || !canInflate) return Promise.resolve(null);
  if (!decoded.has(sample.place)) {
    const cells = sample.held.length * sample.cells[0] * sample.cells[1];
    for (const [place, one] of decoded) {
      if (kept + cells <= KEPT) break;
      kept -= one.cells;
      decoded.delete(place);
    }
    kept += cells;
    decoded.set(sample.place, { cells, raw: inflate(packed[sample.raw]).then(floats) });
  }
  return decoded.get(sample.place).raw;
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Floats of which first the lowest bytes of all lie there, then the second, ... */
function floats(bytes) {
  const count = bytes.length / 4;
  const own = new Uint8Array(bytes.length);
  for (let plane = 0; plane < 4; plane += 1) {
    for (let at = 0; at < count; at += 1) own[4 * at + plane] = bytes[plane * count + at];
  }
  return new Float32Array(own.buffer); // little-endian, as all machines with browsers are
}

/** Raw mask and weights of one view, shares in [0, 1]; null where the model is given that frame, or with a problem. */
function fieldsOf(sample, raw, view) {
  const place = sample.held.indexOf(sample.views[view].frame);
  if (!raw || place < 0) return null;
  const [rows, columns] = sample.cells;
  const mask = raw.subarray(place * rows * columns, (place + 1) * rows * columns);
  return { mask, ...weightsUnder(loss, mask, rows, columns) };
}

/** Draw a sample's overlay as large as it is shown: its regions, or its mask. */
function paintOverlay(canvas, sample, fields, overlay) {
  const regions = ["both", "target", "prior"].includes(overlay) && fields !== null;
  canvas.hidden = overlay === "none" || !fields;
  canvas.parentElement.classList.toggle("regions", regions);
  if (canvas.hidden) return;
  const { mask, target, prior } = fields;
  const none = new Float32Array(mask.length);
  sizeAsShown(canvas, sample.cells);
  if (!regions) paintCells(canvas, sample.cells, (cell) => grey(mask[cell]));
  else paintRegions(canvas, sample.cells, overlay === "prior" ? none : target, overlay === "target" ? none : prior);
}

const grey = (share) => { const level = Math.round(255 * share); return pixel(level, level, level, 255); };
const pixel = (red, green, blue, alpha) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0; // little-endian

/** One canvas pixel for each of the screen's; where nothing is shown yet, some for each cell. */
function sizeAsShown(canvas, [rows, columns]) {
  const { clientWidth: width, clientHeight: height } = canvas.parentElement;
  canvas.width = width ? Math.round(width * devicePixelRatio) : 4 * columns;
  canvas.height = height ? Math.round(height * devicePixelRatio) : 4 * rows;
}

/**
 * Paint regions for the eye: colours by the weights of both, the more opaque the more there is of them, and lines over
 * what is preserved. `learned` and `preserved` are shares in [0, 1] of `rows * columns` cells.
 */
function paintRegions(canvas, cells, learned, preserved) {
  const colours = [PRESERVED, HATCHING].map((keep) => Uint32Array.from(learned, (learn, cell) => {
    const sum = learn + preserved[cell];
    if (sum === 0) return 0;
    const mixed = LEARNED.map((level, at) => Math.round((level * learn + keep[at] * preserved[cell]) / sum));
    return pixel(...mixed, Math.round(255 * Math.min(1, sum)));
  }));
  const [period, line] = [HATCH.period, HATCH.line].map((length) => Math.round(length * devicePixelRatio));
  paintCells(canvas, cells, (cell, x, y) => colours[(x + y) % period < line ? 1 : 0][cell]);
}

/** Fill a canvas pixel by pixel, each by its cell and where it is. */
function paintCells(canvas, [rows, columns], colourOf) {
  const image = new ImageData(canvas.width, canvas.height);
  const out = new Uint32Array(image.data.buffer);
  const across = Array.from({ length: canvas.width }, (_, x) => Math.floor(((x + 0.5) * columns) / canvas.width));
  for (let y = 0; y < canvas.height; y += 1) {
    const row = columns * Math.floor(((y + 0.5) * rows) / canvas.height);
    for (let x = 0; x < canvas.width; x += 1) out[y * canvas.width + x] = colourOf(row + across[x], x, y);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Draw one plane by itself on black, one pixel per cell; CSS enlarges it without smoothing. */
function paintPlane(canvas, sample, values, plane) {
  const colour = { mask: [255, 255, 255], target: LEARNED, prior: PRESERVED }[plane];
  [canvas.height, canvas.width] = sample.cells;
  paintCells(canvas, sample.cells, (cell) => {
    const share = values ? values[cell] : 0;
    return pixel(...colour.map((level) => Math.round(level * share)), 255);
  });
}

/** What the colours mean: each word beside its colour, and between them what masks from white to black come to. */
function drawLegend() {
  const [learned, between, preserved] = page.colours.words;
  const values = Float32Array.from({ length: 64 }, (_, at) => 1 - at / 63);
  const ramp = weightsUnder({ ...loss, mask_blur: 0 }, values, 1, values.length);
  const items = [[learned, [1], [0]], [between, ramp.target, ramp.prior], [preserved, [0], [1]]];
  byId("legend").replaceChildren(...items.map(([word, target, prior]) => {
    const canvas = el("canvas", { class: target.length > 1 ? "ramp" : null, "aria-hidden": "true" });
    const item = el("li", {}, el("span", { class: "swatch" }, canvas), span(word));
    requestAnimationFrame(() => {
      sizeAsShown(canvas, [1, target.length]);
      paintRegions(canvas, [1, target.length], target, prior);
    });
    return item;
  }));
}

/** Put a view's image and overlay into a figure with `img` and `canvas`. */
async function showView(figure, sample, view) {
  const [image, canvas, note] = ["img", "canvas", ".absent"].map((name) => figure.querySelector(name));
  const one = sample.views[view];
  figure.dataset.view = view;
  image.hidden = one.image === null;
  note.hidden = one.image !== null;
  if (one.image !== null) image.src = `data:image/jpeg;base64,${images[one.image]}`;
  const raw = await rawOf(sample);
  const wanted = figure.dataset.live && figure.dataset.view === String(view);
  if (wanted) paintOverlay(canvas, sample, fieldsOf(sample, raw, view), state.overlay);
}

const ratioOf = (sample) => sample.size[0] / sample.size[1];
/** Width over height of the cards' images: that of the middle sample, within reason. */
const BOX = Math.min(1.6, Math.max(0.8, samples.map(ratioOf).sort((a, b) => a - b)[samples.length >> 1]));

/** The elements of an image with its overlay. */
function figureOf(sample) {
  const figure = el(
    "span", { class: "figure" },
    el("img", { alt: "", decoding: "async", draggable: "false", hidden: true }),
    el("canvas", { "aria-hidden": "true", hidden: true }),
    el("span", { class: "absent", text: "no preview", hidden: true }),
  );
  figure.style.aspectRatio = `${sample.size[0]} / ${sample.size[1]}`;
  const ratio = ratioOf(sample);
  figure.style.setProperty("--ratio", ratio);
  figure.classList.add(ratio >= BOX ? "wide" : "tall");
  return figure;
}

const coverText = (sample) => `learns ${percent(sample.learn)}, preserves ${percent(sample.preserve)}`;

/** Learned and preserved area as one bar. */
function coverageBar(sample) {
  const label = sample.problem ?? coverText(sample);
  const bar = el("span", { class: "cover", role: "img", "aria-label": label, title: label });
  for (const name of ["learn", "preserve"]) {
    const part = el("span", { class: name });
    part.style.width = `${100 * (sample[name] ?? 0)}%`;
    bar.append(part);
  }
  return bar;
}
