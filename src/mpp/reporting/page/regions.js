// Regions for the eye, on any page: in the colours of `region_colours.py`, whose rule this is too, and their legend.

const { learned: LEARNED, preserved: PRESERVED, hatching: HATCHING } = page.colours;
const HATCH = { period: 7, line: 2 }; // CSS pixels

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

/**
 * What the colours mean: each word beside its colour, and between them what masks from white to black come to, of which
 * `weightsOf` gives `{ target, prior }`.
 */
function showLegend(list, weightsOf) {
  const [learned, between, preserved] = page.colours.words;
  const ramp = weightsOf(Float32Array.from({ length: 64 }, (_, at) => 1 - at / 63));
  const items = [[learned, [1], [0]], [between, ramp.target, ramp.prior], [preserved, [0], [1]]];
  list.replaceChildren(...items.map(([word, target, prior]) => {
    const canvas = el("canvas", { class: target.length > 1 ? "ramp" : null, "aria-hidden": "true" });
    requestAnimationFrame(() => {
      sizeAsShown(canvas, [1, target.length]);
      paintRegions(canvas, [1, target.length], target, prior);
    });
    return el("li", {}, el("span", { class: "swatch" }, canvas), span(word));
  }));
}
