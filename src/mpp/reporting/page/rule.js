// The mask rule of `mpp.core.masks`: raw masks of latent cells to the weights of both terms of a loss.

const NEGLIGIBLE = 1e-6; // a smaller prior weight is rounding

/**
 * Weights of one frame: `{ target, prior }`, each with one share in [0, 1] for each cell of `raw`.
 * `loss` has the settings of `loss.*`, by their names.
 */
function weightsUnder(loss, raw, rows, columns) {
  const { mask_gamma: gamma, mask_min_weight: floor, prior_threshold: threshold } = loss;
  const soft = blurred(raw, rows, columns, loss.mask_blur);
  const target = new Float32Array(raw.length);
  const prior = new Float32Array(raw.length);
  for (let cell = 0; cell < raw.length; cell += 1) {
    const value = soft[cell];
    const processed = value === 0 || value === 1 ? value : value ** gamma;
    target[cell] = processed * (1 - floor) + floor;
  }
  if (loss.prior_weight === 0) return { target, prior };
  const below = Math.fround(threshold); // masks are float32, and so they compare
  for (let cell = 0; cell < raw.length; cell += 1) {
    if (threshold === null) prior[cell] = 1 - target[cell] < NEGLIGIBLE ? 0 : 1 - target[cell];
    else if (raw[cell] < below) [prior[cell], target[cell]] = [1, 0];
  }
  return { target, prior };
}

/** Gaussian over the cells of one frame, edges replicated. Rounded once at the end, so that a constant stays what it is. */
function blurred(raw, rows, columns, size) {
  if (size === 0) return raw;
  const sigma = 0.3 * ((size - 1) / 2 - 1) + 0.8;
  const bell = Float64Array.from({ length: size }, (_, at) => Math.exp(-((at - (size - 1) / 2) ** 2) / (2 * sigma ** 2)));
  const sum = bell.reduce((total, part) => total + part);
  const kernel = bell.map((part) => part / sum);
  const across = smoothedRows(Float64Array.from(raw), rows, columns, kernel); // turned, so that rows are columns
  return Float32Array.from(smoothedRows(across, columns, rows, kernel));
}

/** Each row smoothed, and the whole turned: rows become columns. */
function smoothedRows(cells, rows, columns, kernel) {
  const reach = kernel.length >> 1;
  const padded = new Float64Array(columns + 2 * reach);
  const turned = new Float64Array(cells.length);
  for (let row = 0; row < rows; row += 1) {
    const own = cells.subarray(row * columns, (row + 1) * columns);
    padded.fill(own[0], 0, reach);
    padded.set(own, reach);
    padded.fill(own[columns - 1], reach + columns);
    for (let column = 0; column < columns; column += 1) {
      let total = 0;
      for (let at = 0; at < kernel.length; at += 1) total += kernel[at] * padded[column + at];
      turned[column * rows + row] = total;
    }
  }
  return turned;
}

/** Mean target and prior weight of each frame, of all together, and whether the teacher runs: of a mask's frames. */
function coverageUnder(loss, raw, rows, columns) {
  const cells = rows * columns;
  const frames = [];
  let taught = false;
  for (let start = 0; start < raw.length; start += cells) {
    const { target, prior } = weightsUnder(loss, raw.subarray(start, start + cells), rows, columns);
    let [learn, preserve] = [0, 0];
    for (let cell = 0; cell < cells; cell += 1) {
      learn += target[cell];
      preserve += prior[cell];
    }
    frames.push([learn / cells, preserve / cells]);
    taught = taught || preserve > 0;
  }
  const [learn, preserve] = [0, 1].map((plane) => frames.reduce((sum, pair) => sum + pair[plane], 0) / frames.length);
  return { frames, learn, preserve, taught };
}
