// Without this script the page shows all it has; with it tables sort, and images of one seed are enlarged and compared.
"use strict";
const PREFIX = { k: 1e3, M: 1e6, G: 1e9, T: 1e12 };
const read = cell => {
  const text = (cell?.querySelector("b") ?? cell)?.firstChild?.textContent.replace(/\u202f/g, "").replace("\u2212", "-").trim() ?? "";
  const found = text.match(/^([+-]?[\d.]+(?:e-?\d+)?)(?:\u00a0([kMGT]))?/);
  return found ? found[1] * (PREFIX[found[2]] ?? 1) : text;
};
const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
for (const head of document.querySelectorAll("table.sortable thead th:not(.plot)")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.onclick = () => {
    const table = head.closest("table"), place = head.cellIndex, sign = head.ariaSort === "ascending" ? -1 : 1;
    for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
    head.ariaSort = sign > 0 ? "ascending" : "descending";
    const lines = [...table.tBodies[0].rows];
    lines.sort((a, b) => sign * order(read(a.cells[place]), read(b.cells[place])));
    table.tBodies[0].append(...lines);
  };
}

const dialog = document.querySelector("dialog"), canvas = dialog?.querySelector("canvas");
let group = [], row = 0, seed = 0;
const cellsOf = sheet => [...sheet.querySelectorAll("svg > g")];
const show = at => {
  const cells = cellsOf(group[at]), cell = cells[seed], image = group[at].querySelector("img");
  if (!cell) return;
  const [x, y, w, h] = ["x", "y", "width", "height"].map(name => +cell.querySelector("rect").getAttribute(name));
  [canvas.width, canvas.height] = [w, h];
  canvas.classList.toggle("pixelated", image.classList.contains("pixelated"));
  canvas.getContext("2d").drawImage(image, x, y, w, h, 0, 0, w, h);
  canvas.ariaLabel = `${group[at].dataset.name}, image ${seed}`;
  dialog.querySelector("p").textContent = `Image ${seed}: ${cell.querySelector("title").textContent}`;
  [...dialog.querySelectorAll("nav button")].forEach((button, i) => { button.ariaPressed = i === at; });
};
const settle = (nextRow, nextSeed) => {
  const count = Math.min(...group.map(sheet => cellsOf(sheet).length));
  row = (nextRow + group.length) % group.length;
  seed = (nextSeed + count) % count;
  dialog.querySelectorAll("nav button")[row].focus();
  show(row);
};
for (const sheet of document.querySelectorAll(".sheet")) {
  cellsOf(sheet).forEach((cell, number) => {
    cell.onclick = async () => {
      group = [...document.querySelectorAll(`.sheet[data-group="${sheet.dataset.group}"]`)];
      await Promise.all(group.map(other => { const image = other.querySelector("img"); image.loading = "eager"; return image.decode(); }));
      dialog.querySelector("nav").replaceChildren(...group.map((other, at) => {
        const button = document.createElement("button");
        button.textContent = other.dataset.name;
        button.onmouseenter = () => show(at);
        button.onmouseleave = () => show(row);
        button.onclick = () => settle(at, seed);
        return button;
      }));
      dialog.showModal();
      settle(group.indexOf(sheet), number);
    };
  });
}
if (dialog) {
  dialog.onclick = event => { if (event.target === dialog) dialog.close(); };
  dialog.onkeydown = event => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (move) settle(row + move[0], seed + move[1]);
    else if (event.key >= 1 && event.key <= group.length) settle(event.key - 1, seed);
    else if (event.key === "b" && !event.repeat) show(0);
    else return;
    event.preventDefault();
  };
  dialog.onkeyup = event => { if (event.key === "b") show(row); };
}
