// What is said about the whole set: head, totals, findings.

function drawHead() {
  const name = page.cache.split(/[\\/]/).filter(Boolean).pop() ?? page.cache;
  document.title = `${name}: mpp report`;
  byId("cache-name").textContent = name;
  byId("cache-path").textContent = page.cache;
  byId("made").textContent = `${page.family} · made ${page.made} · mpp ${page.version}`;
  const settings = Object.entries(page.loss.settings).map(settingOf);
  byId("loss").append(
    el("summary", {}, el("b", { text: page.loss.name ? `loss=${page.loss.name}` : "loss" }), `: ${page.loss.mode}`),
    el("ul", { class: "settings" }, ...settings),
  );
  drawTiles();
  drawNotice();
}

const settingOf = ([name, value]) => el("li", {}, span(name), el("b", { text: String(value ?? "none") }));

function drawTiles() {
  const { splits } = page;
  const { learn, preserve, taught } = totals;
  const kind = allHere ? "" : "as-made";
  const tile = (figure, text, kind = "") => el("div", { class: `tile ${kind}` }, el("b", { text: figure }), span(text));
  const validated = splits.val ? `, ${number.format(splits.val)} of them for validation` : "";
  const masked = page.scanned - (page.masks.none ?? 0);
  const cost = tile(percent(taught), "of the training visits run the teacher", `wide ${kind}`);
  cost.append(span(costOf(taught), "small"));
  byId("tiles").replaceChildren(
    tile(number.format(page.total), `samples${validated}`),
    tile(percent(masked / page.scanned), "have a mask"),
    tile(percent(learn), "of the area learns", `learn ${kind}`),
    tile(percent(preserve), "of the area is preserved", `keep ${kind}`),
    cost,
  );
}

/** How much longer steps take where the teacher runs for a share of the visits. */
function costOf(share) {
  if (share === null) return "no training sample could be measured";
  if (share === 0) return "it costs nothing";
  const { checkpointed, kept: without } = page.teacher.costs;
  const [long, small, bareLong, bareSmall] = [...checkpointed, ...without].map((all) => `${(1 + share * (all - 1)).toFixed(2)}x`);
  return `steps take about ${long} (long videos) to ${small} (small images) as long; ${bareLong} to ${bareSmall} without `
    + "gradient checkpointing";
}

/** Say openly what is not all. */
function drawNotice() {
  const [total, scanned, here] = [page.total, page.scanned, samples.length].map((count) => number.format(count));
  const measured = page.scanned < page.total ? `Measured on ${scanned} of ${total} samples, evenly spread. ` : "";
  byId("charts-note").textContent = `${measured}Click a bar to see its samples.`;
  byId("charts-panel").open = matchMedia("(min-width: 981px)").matches;
  const notices = [];
  if (samples.length < page.total) {
    notices.push(`${here} of ${total} samples are on this page: some with each finding, the others evenly spread.`);
    notices.push("The figures beside them count all that were measured.");
  }
  if (!canInflate) notices.push("This browser is too old to show the weights; one from 2023 or later shows them.");
  byId("notice").hidden = !notices.length;
  byId("notice").textContent = notices.join(" ");
}

function drawFindings() {
  const list = byId("findings");
  if (!page.findings.length) list.append(el("li", { class: "fine", text: "✓ Nothing looks wrong." }));
  list.append(...page.findings.map(findingOf));
}

function findingOf({ severity, kind, title, remedy, count, lines, hidden }) {
  const words = [
    span(SEVERITY_NAMES[severity], `pill ${severity}`), span(title, "title"), span(number.format(count), "number"),
  ];
  const toggle = () => change({ finding: state.finding === kind ? "" : kind });
  const head = lines.length ? el("div", { class: "finding" }, ...words)
    : el("button", { type: "button", class: "finding", "data-kind": kind, onclick: toggle }, ...words);
  const missing = hidden ? `${plural(hidden, "sample")} of these not on this page.` : "";
  const said = el("p", { class: "remedy", text: `${remedy} ${missing}`.trim() });
  return el("li", {}, head, said, lines.length ? linesOf(lines) : null);
}

function linesOf(lines) {
  const items = lines.map((text) => el("li", { text }));
  return el("details", {}, el("summary", { text: plural(lines.length, "line") }), el("ul", {}, ...items));
}

function findingName(kind) {
  if (kind === "any") return "any finding";
  if (kind === "none") return "nothing found";
  return page.findings.find((finding) => finding.kind === kind)?.title ?? kind;
}
