// The page of a run: curves that can be read off, samples to compare, what it was made with.

const run = JSON.parse(byId("data").textContent);
const images = byId("images").textContent.split("\n");
const SIZE = { width: 360, height: 170, left: 46, right: 8, top: 8, bottom: 22 };
const TRAIN = "train";
const VAL = "val";
const PLOTS = [
  ["Loss", ["loss"]], ["Target: what is learned", ["target_loss"]], ["Prior: what is kept", ["prior_loss"]],
  ["Drift from the base", ["drift"]],
];
const short = (value) => (value === undefined || value === null ? "–" : Number(value.toPrecision(4)).toString());
const jpeg = (line) => `data:image/jpeg;base64,${images[line]}`;

/** The values of a name over the steps; what was not measured is left out. */
function seriesOf(rows, name) {
  return rows.filter(([, values]) => typeof values[name] === "number").map(([step, values]) => [step, values[name]]);
}

function plotsOf() {
  const found = PLOTS.map(([title, names]) => [
    title,
    names.flatMap((name) => [
      { name: "training", kind: TRAIN, rows: seriesOf(run.points, `train/${name}`) },
      { name: "validation", kind: VAL, rows: seriesOf(run.validations, `val/${name}`) },
    ]),
  ]);
  const bands = [...new Set(run.points.flatMap(([, values]) => Object.keys(values)))]
    .map((name) => /^train_sigma_([\d.]+-[\d.]+)\/target_loss$/.exec(name)).filter(Boolean).sort((a, b) => (a[1] < b[1] ? -1 : 1));
  found.push(["Target by noise level", bands.map((match) => ({ name: match[1], kind: TRAIN, rows: seriesOf(run.points, match[0]) }))]);
  for (const [title, name] of [["Learning rate", "train/lr"], ["Gradient norm", "train/grad_norm"], ["Seconds per step", "perf/seconds_per_step"]]) {
    found.push([title, [{ name: "training", kind: TRAIN, rows: seriesOf(run.points, name) }]]);
  }
  return found.map(([title, lines]) => [title, lines.filter((line) => line.rows.length)]).filter(([, lines]) => lines.length);
}

/** Round numbers from low to high. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((part) => part * power >= rough);
  const first = Math.ceil(low / step - 1e-9);
  const all = [];
  for (let at = first; at * step <= high + 1e-9 * step; at += 1) all.push(Number((at * step).toPrecision(12)));
  return all;
}

function plot(title, lines) {
  const { width, height, left, right, top, bottom } = SIZE;
  const rows = lines.flatMap((line) => line.rows);
  const end = Math.max(run.total ?? 0, ...rows.map(([step]) => step), 1);
  let [low, high] = [Math.min(...rows.map((row) => row[1])), Math.max(...rows.map((row) => row[1]))];
  if (low > 0 && low < 0.6 * high) low = 0;
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const x = (step) => left + ((width - left - right) * step) / end;
  const y = (value) => top + (height - top - bottom) * (1 - (value - low) / (high - low));
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, tabindex: "0", role: "img", "aria-label": `${title}; arrow keys read points off` });
  for (const value of ticks(low, high, 4)) {
    root.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "rule" }));
    root.append(svg("text", { x: left - 5, y: y(value) + 3.5, class: "tick end", text: short(value) }));
  }
  for (const step of ticks(0, end, 4).filter(Number.isInteger)) {
    root.append(svg("text", { x: x(step), y: height - 6, class: "tick middle", text: number.format(step) }));
  }
  const cursor = svg("line", { y1: top, y2: height - bottom, class: "cursor", visibility: "hidden" });
  root.append(cursor);
  lines.forEach((line, at) => {
    const kind = `c${at % 4}`;
    if (line.kind === TRAIN) {
      root.append(svg("polyline", { class: `curve ${kind}`, points: line.rows.map(([step, value]) => `${x(step)},${y(value)}`).join(" ") }));
    }
    if (line.kind === VAL || line.rows.length === 1) {
      for (const [step, value] of line.rows) root.append(svg("circle", { class: `dot ${kind}`, cx: x(step), cy: y(value), r: 3.2 }));
    }
  });
  const keys = el("ul", { class: "keys", "aria-live": "polite" });
  const steps = [...new Set(rows.map(([step]) => step))].sort((a, b) => a - b);
  let chosen = null;
  const show = (step) => {
    chosen = step;
    cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    if (step !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(step));
    keys.replaceChildren(...lines.map((line, at) => {
      const row = step === null ? line.rows.at(-1) : line.rows.find(([one]) => one === step);
      return el("li", { class: `c${at % 4} ${line.kind}`, text: `${line.name} ${row ? short(row[1]) : "–"}` });
    }), el("li", { class: "at", text: step === null ? "newest" : `step ${number.format(step)}` }));
  };
  const nearest = (event) => {
    const box = root.getBoundingClientRect();
    const step = (((event.clientX - box.left) / box.width) * width - left) * (end / (width - left - right));
    show(steps.reduce((best, one) => (Math.abs(one - step) < Math.abs(best - step) ? one : best)));
  };
  root.addEventListener("pointermove", nearest);
  root.addEventListener("pointerleave", () => show(null));
  root.addEventListener("blur", () => show(null));
  root.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const at = chosen === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(chosen);
    show(steps[Math.min(steps.length - 1, Math.max(0, at + move))]);
  });
  show(null);
  return el("figure", { class: "panel plot" }, el("figcaption", { text: title }), root, keys, numbers(lines, steps));
}

/** All points of a plot as a table, made when it is asked for. */
function numbers(lines, steps) {
  const box = el("div", { class: "numbers" });
  const fill = () => {
    if (box.firstChild) return;
    const values = lines.map((line) => new Map(line.rows));
    const head = el("tr", {}, el("th", { text: "step" }), ...lines.map((line) => el("th", { text: line.name })));
    const rows = steps.map((step) => el("tr", {}, el("td", { text: String(step) }), ...values.map((one) => el("td", { text: one.has(step) ? String(one.get(step)) : "" }))));
    box.append(el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
  };
  return el("details", { ontoggle: fill }, el("summary", { text: "numbers" }), box);
}

/** One prompt: base and LoRA over each other with an edge that moves, and a slider over the steps. */
function promptOf(sample, at) {
  const lora = el("img", { alt: `LoRA: ${sample.prompt}` });
  const box = el("div", { class: "compare" });
  box.style.aspectRatio = `${sample.size[0]} / ${sample.size[1]}`;
  const edge = el("div", { class: "edge" });
  const stepped = el("output", { id: `step-${at}` });
  const pick = (place) => {
    const [step, line] = sample.steps[place];
    lora.src = jpeg(line);
    stepped.textContent = `step ${number.format(step)}`;
  };
  const cut = (share) => {
    lora.style.clipPath = `inset(0 0 0 ${share}%)`;
    edge.style.left = `${share}%`;
    edge.hidden = share <= 0 || share >= 100;
  };
  const steps = el("input", { type: "range", min: 0, max: sample.steps.length - 1, value: sample.steps.length - 1, "aria-label": "Step", oninput: () => pick(Number(steps.value)) });
  const shares = el("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": "Base to LoRA", oninput: () => cut(Number(shares.value)) });
  const parts = [el("blockquote", { text: sample.prompt || "(empty prompt)" }), box];
  if (sample.base !== null) {
    box.append(el("img", { src: jpeg(sample.base), alt: `base: ${sample.prompt}` }), lora, edge, el("span", { class: "left", text: "base" }), el("span", { class: "right", text: "LoRA" }));
    parts.push(el("label", {}, "base | LoRA", shares, el("output", { text: `seed ${sample.seed}` })));
    box.addEventListener("pointermove", (event) => {
      if (event.pointerType !== "mouse" && !event.buttons) return;
      const area = box.getBoundingClientRect();
      shares.value = String((100 * (event.clientX - area.left)) / area.width);
      cut(Number(shares.value));
    });
    cut(50);
  } else {
    box.append(lora);
  }
  parts.push(el("label", {}, "step", steps, stepped));
  pick(sample.steps.length - 1);
  return el("article", { class: "panel prompt" }, ...parts);
}

function tile(value, name) {
  return el("p", { class: "tile" }, el("b", { text: value }), span(name));
}

function newest(rows, name) {
  const row = rows.filter(([, values]) => typeof values[name] === "number").at(-1);
  return row ? row[1][name] : null;
}

function begin() {
  document.title = `${run.name}: mpp run`;
  byId("name").textContent = run.name;
  byId("folder").textContent = run.folder;
  byId("made").textContent = `${run.status} at step ${number.format(run.step)}, ${run.made}, mpp ${run.version}`;
  const tiles = [[run.total === null ? number.format(run.step) : `${number.format(run.step)} / ${number.format(run.total)}`, "steps"], [run.time, "since this start"]];
  for (const [name, said] of [["loss", "loss"], ["target_loss", "target"], ["prior_loss", "prior"], ["drift", "drift"]]) {
    const [train, val] = [newest(run.points, `train/${name}`), newest(run.validations, `val/${name}`)];
    if (train !== null || val !== null) tiles.push([short(val ?? train), `${said}, ${val === null ? "training" : "validation"}`]);
  }
  byId("tiles").append(...tiles.map(([value, name]) => tile(value, name)));
  byId("plots").append(...plotsOf().map(([title, lines]) => plot(title, lines)));
  byId("samples").append(...run.samples.map(promptOf));
  byId("samples-section").hidden = run.samples.length === 0;
  byId("regions-section").hidden = run.regions === null;
  if (run.regions !== null) byId("regions").append(el("img", { src: jpeg(run.regions), alt: "image, mask and regions of some samples" }));
  for (const part of ["facts", "settings"]) {
    byId(part).append(...run[part].flatMap(([name, value]) => [el("dt", { text: name }), el("dd", { text: value })]));
  }
  byId("command").textContent = run.command;
  document.documentElement.dataset.ready = "1";
}

begin();
