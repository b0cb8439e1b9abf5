// Samples' masks and images, with their regions over them.

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

/** Draw one plane by itself on black, one pixel per cell; CSS enlarges it without smoothing. */
function paintPlane(canvas, sample, values, plane) {
  const colour = { mask: [255, 255, 255], target: LEARNED, prior: PRESERVED }[plane];
  [canvas.height, canvas.width] = sample.cells;
  paintCells(canvas, sample.cells, (cell) => {
    const share = values ? values[cell] : 0;
    return pixel(...colour.map((level) => Math.round(level * share)), 255);
  });
}

function drawLegend() {
  showLegend(byId("legend"), (values) => weightsUnder({ ...loss, mask_blur: 0 }, values, 1, values.length));
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
