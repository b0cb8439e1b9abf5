// Weights at latent resolution, drawn one pixel per cell; CSS enlarges them without smoothing.

const LEARN = [140, 224, 0];
const KEEP = [0, 120, 255];
const PLANES = { mask: 0, target: 1, prior: 2 };
const decoded = new Map();
const KEPT = 400;
const canInflate = typeof DecompressionStream === "function";

/** A sample's weights as bytes `[plane][view][row][column]`; null where it has none. */
function weightsOf(sample) {
  if (sample.weights === null || !canInflate) return Promise.resolve(null);
  if (!decoded.has(sample.place)) {
    if (decoded.size >= KEPT) decoded.delete(decoded.keys().next().value);
    decoded.set(sample.place, inflate(packed[sample.weights]));
  }
  return decoded.get(sample.place);
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** One plane of one view, or null where the model is given that frame. */
function planeOf(sample, bytes, view, plane) {
  const own = sample.views.filter((one) => !one.given);
  const place = own.indexOf(sample.views[view]);
  if (!bytes || place < 0) return null;
  const cells = sample.cells[0] * sample.cells[1];
  const start = (PLANES[plane] * own.length + place) * cells;
  return bytes.subarray(start, start + cells);
}

/** Draw an overlay for the eye on top of the image: colour by region, strength by weight. */
function paintOverlay(canvas, sample, bytes, view, overlay) {
  const [height, width] = sample.cells;
  const planes = ["mask", "target", "prior"].map((plane) => planeOf(sample, bytes, view, plane));
  canvas.width = width;
  canvas.height = height;
  canvas.hidden = overlay === "none" || !planes[0];
  if (canvas.hidden) return;
  const [mask, target, prior] = planes;
  const image = new ImageData(width, height);
  for (let cell = 0; cell < mask.length; cell += 1) {
    if (overlay === "mask") image.data.set([mask[cell], mask[cell], mask[cell], 255], 4 * cell);
    else {
      const learn = overlay === "prior" ? 0 : target[cell];
      const keep = overlay === "target" ? 0 : prior[cell];
      image.data.set(mixed(learn, keep), 4 * cell);
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function mixed(learn, keep) {
  const sum = learn + keep;
  if (sum === 0) return [0, 0, 0, 0];
  const colour = LEARN.map((value, channel) => (value * learn + KEEP[channel] * keep) / sum);
  return [...colour, Math.min(255, sum)];
}

/** Draw one plane by itself on black. */
function paintPlane(canvas, sample, bytes, view, plane) {
  const values = planeOf(sample, bytes, view, plane);
  [canvas.height, canvas.width] = sample.cells;
  const colour = { mask: [255, 255, 255], target: LEARN, prior: KEEP }[plane];
  const image = new ImageData(canvas.width, canvas.height);
  for (let cell = 0; cell < canvas.width * canvas.height; cell += 1) {
    const share = values ? values[cell] / 255 : 0;
    image.data.set([...colour.map((value) => value * share), 255], 4 * cell);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return values;
}

/** Put a view's image and overlay into a figure with `img` and `canvas`. */
async function showView(figure, sample, view) {
  const [image, canvas, note] = ["img", "canvas", ".absent"].map((name) => figure.querySelector(name));
  const one = sample.views[view];
  figure.dataset.view = view;
  image.hidden = one.image === null;
  note.hidden = one.image !== null;
  if (one.image !== null) image.src = `data:image/jpeg;base64,${images[one.image]}`;
  const bytes = await weightsOf(sample);
  const wanted = figure.dataset.live && figure.dataset.view === String(view);
  if (wanted) paintOverlay(canvas, sample, bytes, view, state.overlay);
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
