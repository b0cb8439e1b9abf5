// Histograms of the whole set: pale for all samples, solid for those that the filters leave.

const CHART = { width: 330, height: 118, left: 34, bottom: 22, top: 8 };
const drawn = [];
const FOLLOWS_LOSS = ["learn", "preserve"];

function drawCharts() {
  const place = byId("charts");
  place.replaceChildren();
  drawn.length = 0;
  for (const chart of page.charts) {
    const readout = el("p", { class: "readout", "aria-hidden": "true", text: chart.note });
    const plot = chart.name === "bucket" ? rows(chart) : columns(chart);
    const one = { chart, readout, ...plot };
    one.bars.forEach((bar, bin) => connect(one, bar, bin));
    const title = el("figcaption", { text: chart.title });
    const kind = FOLLOWS_LOSS.includes(chart.name) && !allHere ? "as-made" : "";
    place.append(el("figure", { class: `chart ${chart.name} ${kind}` }, title, readout, one.box));
    drawn.push(one);
  }
}

/** Height of a count in [0, 1]. */
function scaled(chart, value, most) {
  if (chart.scale !== "log") return most ? value / most : 0;
  return value <= 0 ? 0 : Math.max(0.02, 1 + Math.log10(value) / 3); // 0.001 to 1
}

function columns(chart) {
  const { width, height, left, bottom, top } = CHART;
  const inner = height - bottom - top;
  const step = (width - left - 2) / chart.labels.length;
  const most = Math.max(...chart.counts);
  const lines = chart.scale === "log" ? [[1, "100 %"], [2 / 3, "10 %"], [1 / 3, "1 %"]] : linear(most);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": chart.title });
  for (const [share, text] of lines) {
    const y = top + inner * (1 - share);
    root.append(svg("line", { x1: left, x2: width, y1: y, y2: y, class: "rule" }));
    root.append(svg("text", { x: left - 4, y: y + 3, class: "tick end", text }));
  }
  const bars = chart.labels.map((label, bin) => {
    const x = left + bin * step;
    const tall = scaled(chart, chart.counts[bin], most) * inner;
    const rest = { x: x + 1, width: Math.max(1, step - 2) };
    const bar = svg(
      "g", { class: "bar" },
      svg("rect", { x, y: top, width: step, height: inner, class: "hit" }),
      svg("rect", { ...rest, y: top + inner - tall, height: tall, class: "all", rx: 1.5 }),
      svg("rect", { ...rest, y: top + inner, height: 0, class: "part", rx: 1.5 }),
      svg("title"),
    );
    root.append(bar);
    return bar;
  });
  root.append(svg("line", { x1: left, x2: width, y1: top + inner, y2: top + inner, class: "axis" }));
  for (const [bin, text] of chart.ticks) {
    root.append(svg("text", { x: left + bin * step, y: height - 7, class: "tick middle", text }));
  }
  const mark = markOf(chart);
  if (mark) {
    const x = left + mark.bin * step;
    root.append(svg("line", { x1: x, x2: x, y1: top - 4, y2: top + inner, class: "mark" }));
    root.append(svg("text", { x: x + 4, y: top + 3, class: "tick mark-text", text: mark.text }));
  }
  const size = (value) => scaled(chart, value, most) * inner;
  const update = (bar, value) => {
    bar.setAttribute("height", size(value));
    bar.setAttribute("y", top + inner - size(value));
  };
  return { box: root, bars, update };
}

/** Where the threshold stands among the mask values. */
function markOf(chart) {
  const { prior_weight: weight, prior_threshold: threshold } = loss;
  if (chart.name !== "values" || weight === 0 || threshold === null) return null;
  return { bin: 1 + (chart.labels.length - 2) * threshold, text: `threshold ${threshold}` };
}

/** One line at a round number. */
function linear(most) {
  if (!most) return [];
  const power = 10 ** Math.floor(Math.log10(most));
  const line = power * Math.max(...[1, 2, 5].filter((part) => part * power <= most));
  return [[line / most, number.format(line)]];
}

function rows(chart) {
  const longest = Math.max(...chart.labels.map((label) => label.length));
  const [width, tall, left, right] = [330, 22, Math.min(170, 8 + 6 * longest), 40];
  const most = Math.max(...chart.counts);
  const root = svg("svg", {
    viewBox: `0 0 ${width} ${tall * chart.labels.length}`, role: "group", "aria-label": chart.title,
  });
  const bars = chart.labels.map((label, row) => {
    const long = (chart.counts[row] / most) * (width - left - right);
    const bar = svg(
      "g", { class: "bar" },
      svg("rect", { x: 0, y: row * tall, width, height: tall, class: "hit" }),
      svg("text", { x: 0, y: row * tall + 15, class: "tick label", text: label }),
      svg("rect", { x: left, y: row * tall + 4, width: long, height: tall - 8, class: "all", rx: 2 }),
      svg("rect", { x: left, y: row * tall + 4, width: 0, height: tall - 8, class: "part", rx: 2 }),
      svg("text", { x: left + long + 5, y: row * tall + 15, class: "tick", text: number.format(chart.counts[row]) }),
      svg("title"),
    );
    root.append(bar);
    return bar;
  });
  const update = (bar, value) => bar.setAttribute("width", (value / most) * (width - left - right));
  return { box: el("div", { class: "scroll" }, root), bars, update };
}

/** A bar is a button: one of a chart takes part in the tab order, arrows go on to the others. */
function connect(one, bar, bin) {
  bar.setAttribute("role", "button");
  bar.setAttribute("tabindex", bin === 0 ? "0" : "-1");
  const say = () => { one.readout.textContent = one.said[bin]; };
  const unsay = () => { one.readout.textContent = one.chart.note; };
  bar.addEventListener("pointerenter", say);
  bar.addEventListener("pointerleave", unsay);
  bar.addEventListener("focus", say);
  bar.addEventListener("blur", unsay);
  bar.addEventListener("click", () => toggleBin(one.chart, bin));
  bar.addEventListener("keydown", (event) => {
    const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
    if (event.key === "Enter" || event.key === " ") toggleBin(one.chart, bin);
    else if (moves[event.key]) focusBar(one, (bin + moves[event.key] + one.bars.length) % one.bars.length);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
}

function focusBar(one, bin) {
  one.bars.forEach((bar, place) => bar.setAttribute("tabindex", place === bin ? "0" : "-1"));
  one.bars[bin].focus();
}

function toggleBin(chart, bin) {
  const value = chart.name === "bucket" ? chart.labels[bin] : String(bin);
  change({ [chart.name]: state[chart.name] === value ? "" : value });
}

/** What of each bin the filters leave. */
function updateCharts(shown) {
  for (const one of drawn) {
    const { chart } = one;
    const counts = chart.labels.map(() => 0);
    const masked = shown.filter((sample) => sample.values.length);
    if (chart.name === "values") {
      for (const sample of masked) for (const [bin, share] of sample.values) counts[bin] += share / masked.length;
    } else {
      for (const sample of shown) if (sample.bins[chart.name] !== null) counts[sample.bins[chart.name]] += 1;
    }
    one.said = chart.labels.map((label, bin) => sentence(chart, bin, counts[bin]));
    one.bars.forEach((bar, bin) => {
      const pressed = state[chart.name] === (chart.name === "bucket" ? chart.labels[bin] : String(bin));
      press(bar, pressed);
      bar.setAttribute("aria-label", one.said[bin]);
      bar.querySelector("title").textContent = one.said[bin];
      one.update(bar.querySelector(".part"), counts[bin]);
    });
    one.box.classList.toggle("filtered", state[chart.name] !== "");
  }
}

function sentence(chart, bin, shown) {
  const all = chart.counts[bin];
  if (chart.name === "values") {
    const rest = share(all) === share(shown) ? "" : `, ${share(shown)} in what is shown`;
    return `${chart.labels[bin]}: ${share(all)} of the cells${rest}`;
  }
  const part = shown === all ? "" : `, ${number.format(shown)} shown`;
  return `${chart.labels[bin]}: ${plural(all, "sample")}${part}`;
}

function share(value) {
  return value > 0 && value < 0.001 ? "< 0.1 %" : `${(100 * value).toFixed(1)} %`;
}
