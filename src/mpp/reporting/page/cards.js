// The grid of samples. Cards are built once; images and weights are there only near the window.

const grid = byId("grid");
const cards = new Map();
const PLAY_MS = 280;
const calm = matchMedia("(prefers-reduced-motion: reduce)");
let shown = [];
let current = 0;
grid.style.setProperty("--box", BOX);

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const card = entry.target;
    if (entry.isIntersecting) wake(card);
    else rest(card);
  }
}, { rootMargin: "500px" });

function wake(card) {
  const figure = card.querySelector(".figure");
  if (figure.dataset.live) return;
  figure.dataset.live = "1";
  showView(figure, samples[card.dataset.place], Number(figure.dataset.view || 0));
}

/** Let go of the decoded image. */
function rest(card) {
  const figure = card.querySelector(".figure");
  delete figure.dataset.live;
  figure.querySelector("img").removeAttribute("src");
  figure.querySelector("canvas").width = 0;
}

function cardOf(sample) {
  if (!cards.has(sample.place)) cards.set(sample.place, buildCard(sample));
  return cards.get(sample.place);
}

function buildCard(sample) {
  const figure = figureOf(sample);
  const clip = sample.clip;
  const says = { class: "open", tabindex: "-1", "aria-label": describe(sample) };
  const open = el(
    "button", { type: "button", ...says, onclick: () => openDetail(sample) },
    figure,
    clip ? span(`▶ ${sample.views.length} key frames`, "badge") : null,
    clip ? el("span", { class: "progress", "aria-hidden": "true" }) : null,
  );
  const card = el(
    "li", { class: "card", "data-place": sample.place, "data-key": sample.key },
    open,
    clip || sample.views.length === 1 ? null : tabsOf(sample, figure),
    el(
      "div", { class: "words" },
      nameOf(sample),
      el("p", { class: `figures ${asMade(sample)}` }, ...figuresOf(sample)),
      el("p", { class: "caption", title: sample.caption, text: sample.caption || "no caption" }),
      el("p", { class: "meta", text: metaOf(sample) }),
      flagsOf(sample),
    ),
  );
  if (!sample.caption) card.querySelector(".caption").classList.add("lacking");
  if (clip) connectPlay(open, figure, sample);
  watcher.observe(card);
  return card;
}

/** Where the name is too long, its folder gives way first. */
function nameOf(sample) {
  const cut = sample.key.lastIndexOf("/") + 1;
  return el(
    "p", { class: "name", title: sample.key },
    span(sample.key.slice(0, cut), "folder"), span(sample.key.slice(cut)),
  );
}

function describe(sample) {
  const flags = sample.findings.map(([finding]) => page.findings[finding].title);
  return [`Open ${sample.key}`, sample.problem ? "cannot be read" : coverText(sample), ...flags].join(", ");
}

const figuresOf = (sample) => [
  span(percent(sample.learn), "l"), coverageBar(sample), span(percent(sample.preserve), "p"),
];

function metaOf(sample) {
  const words = [charts.bucket.labels[sample.bins.bucket], sample.mask ? `mask: ${sample.mask}` : "no mask"];
  if (sample.split === "val") words.push("validation");
  if (sample.flip) words.push("mirrored");
  if (sample.repeats > 1) words.push(`${sample.repeats} visits`);
  return words.join(" · ");
}

function flagsOf(sample) {
  if (!sample.findings.length) return null;
  const flags = sample.findings.map(([finding, note]) => {
    const { severity, title } = page.findings[finding];
    return el("li", { class: `flag ${severity}`, title: note || null, text: title });
  });
  return el("ul", { class: "flags as-made" }, ...flags);
}

/** Buttons for the layers of a sample. */
function tabsOf(sample, figure) {
  const tabs = sample.views.map((view, place) => el("button", {
    type: "button", class: "tab", "aria-pressed": String(place === 0), text: view.name.replace("layer ", ""),
    "aria-label": `Show ${view.name}`, onclick: () => pickTab(tabs, figure, sample, place),
  }));
  return el("div", { class: "tabs", role: "group", "aria-label": "Layers" }, ...tabs);
}

function pickTab(tabs, figure, sample, place) {
  tabs.forEach((tab, other) => press(tab, other === place));
  showView(figure, sample, place);
}

/** Key frames run while the mouse is over the image. */
function connectPlay(button, figure, sample) {
  let timer = null;
  const progress = button.querySelector(".progress");
  const show = (view) => {
    progress.style.width = view === null ? "0" : `${(100 * (view + 1)) / sample.views.length}%`;
    showView(figure, sample, view ?? 0);
  };
  const stop = () => {
    if (timer === null) return;
    clearInterval(timer);
    timer = null;
    show(null);
  };
  button.addEventListener("pointerenter", (event) => {
    if (event.pointerType === "touch" || calm.matches || timer !== null) return;
    let view = 0;
    timer = setInterval(() => {
      if (!figure.isConnected) return stop();
      view = (view + 1) % sample.views.length;
      return show(view);
    }, PLAY_MS);
  });
  button.addEventListener("pointerleave", stop);
}

/** Show what the state asks for. */
function updateGrid() {
  const before = shown[current];
  shown = chosen();
  grid.replaceChildren(...shown.map(cardOf));
  current = Math.max(0, shown.indexOf(before));
  shown.forEach((sample, place) => {
    cardOf(sample).querySelector(".open").tabIndex = place === current ? 0 : -1;
  });
  byId("nothing").hidden = shown.length > 0;
  updateCharts(shown);
}

/** Figures of all cards that are there. */
function refreshCards() {
  for (const [place, card] of cards) {
    card.querySelector(".figures").replaceChildren(...figuresOf(samples[place]));
    card.querySelector(".open").setAttribute("aria-label", describe(samples[place]));
  }
}

function repaint() {
  for (const card of grid.children) {
    const figure = card.querySelector(".figure");
    if (figure.dataset.live) showView(figure, samples[card.dataset.place], Number(figure.dataset.view || 0));
  }
}

function columnsOfGrid() {
  return getComputedStyle(grid).gridTemplateColumns.split(" ").length;
}

/** Give the focus to the card at a place of the grid. */
function focusCard(place) {
  if (!shown.length) return;
  const next = Math.min(Math.max(place, 0), shown.length - 1);
  const button = (one) => cardOf(shown[one]).querySelector(".open");
  button(current).tabIndex = -1;
  current = next;
  button(next).tabIndex = 0;
  button(next).focus({ preventScroll: true });
  cardOf(shown[next]).scrollIntoView({ block: "nearest", behavior: calm.matches ? "auto" : "smooth" });
}

grid.addEventListener("focusin", (event) => {
  const card = event.target.closest(".card");
  const place = card ? shown.indexOf(samples[card.dataset.place]) : -1;
  if (place < 0 || place === current) return;
  cardOf(shown[current]).querySelector(".open").tabIndex = -1;
  current = place;
  card.querySelector(".open").tabIndex = 0;
});
