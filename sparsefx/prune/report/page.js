// A layer is chosen by its row or its column in a plot; a panel then shows what is left of it.
const SVG = "http://www.w3.org/2000/svg";
const layers = [...rows].sort((a, b) => a.dataset.at - b.dataset.at);
const plots = [...document.querySelectorAll(".plot svg")];
const panel = document.createElement("aside");
let chosen = -1, opener = null;

function make(kind, parent, text) {
  const node = document.createElement(kind);
  if (text !== undefined) node.textContent = text;
  parent.append(node);
  return node;
}

function draw(kind, parent, attributes) {
  const node = document.createElementNS(SVG, kind);
  for (const [label, value] of Object.entries(attributes)) node.setAttribute(label, value);
  parent.append(node);
  return node;
}

const percent = share => Math.round(share * 1000) / 10 + "%";

function heat(row) {
  const cells = row.dataset.heat.split(" ").map(line => (line.match(/../g) || []).map(two => parseInt(two, 16) / 200));
  const box = document.createElement("div"), all = cells.flat();
  if (!all.length) return box;
  const least = Math.min(...all), most = Math.max(...all);
  // The scale ends at whole tenths: noise does not look like structure, and layers can be compared.
  const low = Math.max(Math.floor(least * 10 - 1e-6) / 10, 0), high = Math.min(Math.ceil(most * 10 + 1e-6) / 10, 1);
  const svg = draw("svg", box, {
    viewBox: `0 0 ${cells[0].length} ${cells.length}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `Share of weights kept: ${percent(least)} to ${percent(most)}`,
  });
  cells.forEach((line, y) => line.forEach((share, x) => {
    const opacity = ((share - low) / (high - low)).toFixed(3);
    const cell = draw("rect", svg, {x, y, width: 1, height: 1, "fill-opacity": opacity});
    draw("title", cell, {}).textContent = percent(share) + " kept";
  }));
  const scale = make("p", box);
  scale.className = "scale";
  make("span", scale, percent(low) + " kept");
  make("i", scale);
  make("span", scale, percent(high));
  const [height, width] = row.dataset.shape.split("x");
  const [down, across] = [Math.round(height / cells.length), Math.round(width / cells[0].length)];
  make("p", box, `Down: ${height} outputs, across: ${width} inputs; a cell is about ${down} x ${across} weights.`);
  return box;
}

function control(parent, sign, label, action) {
  const node = make("button", parent, sign);
  node.type = "button";
  node.title = label;
  node.setAttribute("aria-label", label);
  node.addEventListener("click", action);
  return node;
}

function fill(row) {
  const focused = panel.contains(document.activeElement) ? document.activeElement.title : "";
  panel.replaceChildren();
  const head = make("header", panel);
  const title = make("h2", head);
  title.id = "chosen";
  title.append(...row.querySelector("th button").cloneNode(true).childNodes);
  control(head, "\u2039", "Layer before", () => choose(chosen - 1)).disabled = chosen === 0;
  control(head, "\u203a", "Layer after", () => choose(chosen + 1)).disabled = chosen === layers.length - 1;
  control(head, "\u00d7", "Close", close);
  panel.append(heat(row));
  const list = make("dl", panel);
  for (const cell of row.querySelectorAll("td:not(.empty):not(.order)")) {
    const pair = make("div", list);
    make("dt", pair, cell.dataset.label);
    make("dd", pair, cell.textContent);
  }
  if (focused) (panel.querySelector(`[title="${focused}"]:enabled`) || panel).focus();
}

function choose(at, from) {
  layers[chosen]?.removeAttribute("aria-current");
  chosen = Math.min(Math.max(at, 0), layers.length - 1);
  const row = layers[chosen];
  row.setAttribute("aria-current", "true");
  opener = from || opener;
  // Beside the column that was chosen in a plot, not over it.
  if (from) panel.classList.toggle("left", plots.includes(from) && chosen > layers.length / 2);
  panel.hidden = false;
  document.body.classList.add("open");
  fill(row);
  // On a phone the panel lies over what it was opened from.
  const narrow = matchMedia("(max-width: 860px)").matches;
  if (from && narrow && from.getBoundingClientRect().bottom > panel.getBoundingClientRect().top) {
    (from.closest("section") || row).scrollIntoView();
  }
  const step = 1000 / layers.length;
  for (const svg of plots) {
    svg.querySelector(".cursor")?.remove();
    draw("rect", svg, {class: "cursor", x: chosen * step, y: 0, width: step, height: 200});
    svg.setAttribute("aria-valuenow", chosen + 1);
    const bar = svg.querySelector(`[data-at="${chosen}"] title`);
    svg.setAttribute("aria-valuetext", bar ? bar.textContent : row.querySelector("th").textContent);
  }
}

function close() {
  if (chosen < 0) return;
  layers[chosen].removeAttribute("aria-current");
  for (const svg of plots) svg.querySelector(".cursor")?.remove();
  panel.hidden = true;
  document.body.classList.remove("open");
  chosen = -1;
  opener?.focus();
}

for (const svg of plots) {
  svg.classList.add("pick");
  svg.tabIndex = 0;
  for (const [label, value] of Object.entries({role: "slider", "aria-valuemin": 1, "aria-valuemax": layers.length, "aria-valuenow": 1})) svg.setAttribute(label, value);
  svg.addEventListener("click", event => {
    const box = svg.getBoundingClientRect();
    choose(Math.floor((event.clientX - box.left) / box.width * layers.length), svg);
  });
  svg.addEventListener("keydown", event => {
    const last = layers.length - 1;
    const to = {ArrowLeft: chosen - 1, ArrowRight: chosen + 1, Home: 0, End: last, Enter: Math.max(chosen, 0)}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(to, svg);
  });
}
for (const row of layers) {
  const head = row.querySelector("th"), button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  row.classList.add("pick");
  row.addEventListener("click", event => {
    choose(Number(row.dataset.at), button);
    if (event.detail === 0) panel.focus();  // by key: what is new is read out, Escape goes back
  });
}
panel.className = "card panel";
panel.tabIndex = -1;
panel.hidden = true;
panel.setAttribute("aria-labelledby", "chosen");
document.body.append(panel);
document.addEventListener("keydown", event => event.key === "Escape" && close());
