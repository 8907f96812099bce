// Draws the heat maps: one canvas each, the head chosen above it, one cell at a time read out below it.
"use strict";
const { weights, read, next, seen, offset } = JSON.parse(document.getElementById("maps").textContent);
const rows = read.length, columns = seen.length;
const size = columns > 80 ? 14 : columns > 40 ? 18 : 22; // of a cell, in CSS pixels
const largest = 2 ** 23; // pixels of a canvas; some phones draw none of more than 2 ** 24, and hold all maps at once
const sharp = size * Math.min(2, Math.ceil(window.devicePixelRatio || 1));
const dots = Math.min(sharp, Math.floor(Math.sqrt(largest / (rows * columns)))); // of a cell, in pixels of the canvas
const gap = Math.max(1, Math.round(dots / size)); // between cells

const shade = (weight) => Math.pow(weight, 0.7); // small weights can be told from none; the legend has the same scale
const colours = () => {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(["accent", "cell", "focus"].map((name) => [name, style.getPropertyValue("--" + name)]));
};

function paint(context, x, y, width, height, weight, { accent, cell }) {
  context.fillStyle = cell;
  context.fillRect(x, y, width, height);
  context.globalAlpha = shade(weight);
  context.fillStyle = accent;
  context.fillRect(x, y, width, height);
  context.globalAlpha = 1;
}

function drawLegend() {
  for (const canvas of document.querySelectorAll(".legend")) {
    const context = canvas.getContext("2d");
    for (let x = 0; x < canvas.width; x++) paint(context, x, 0, 1, canvas.height, x / canvas.width, colours());
  }
}

const redraws = [drawLegend];

for (const figure of document.querySelectorAll(".map")) {
  const bytes = Uint8Array.from(atob(weights[figure.dataset.map]), (letter) => letter.charCodeAt(0));
  const canvas = figure.querySelector(".grid canvas"), output = figure.querySelector("output");
  const rowLabels = figure.querySelectorAll(".rows span"), columnLabels = figure.querySelectorAll(".columns span");
  let head = 0, cursor = null;
  figure.querySelector(".grid").style.setProperty("--size", size + "px");
  canvas.width = columns * dots;
  canvas.height = rows * dots;
  canvas.style.width = columns * size + "px";
  canvas.style.height = rows * size + "px";

  const weight = (row, column) => bytes[(head * rows + row) * columns + column] / 255;

  const context = canvas.getContext("2d");
  const drawCell = (row, column, palette) =>
    paint(context, column * dots, row * dots, dots - gap, dots - gap, weight(row, column), palette);

  function drawCursor({ focus }) {
    context.strokeStyle = focus;
    context.lineWidth = 2 * gap;
    const inner = dots - 3 * gap; // the line stays inside the cell
    context.strokeRect(cursor.column * dots + gap, cursor.row * dots + gap, inner, inner);
  }

  function draw() {
    const palette = colours();
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (let row = 0; row < rows; row++)
      for (let column = 0; column <= row + offset; column++) drawCell(row, column, palette);
    if (cursor) drawCursor(palette);
  }

  function goTo(row, column) {
    row = Math.max(0, Math.min(rows - 1, row));
    column = Math.max(0, Math.min(row + offset, column));
    const palette = colours();
    if (cursor) drawCell(cursor.row, cursor.column, palette); // this cell alone: a long map takes long to draw
    rowLabels.forEach((label, index) => label.classList.toggle("here", index === row));
    columnLabels.forEach((label, index) => label.classList.toggle("here", index === column));
    cursor = { row, column };
    const expects = next[row] === null ? "" : `, to produce “${next[row]}”,`;
    output.textContent =
      `After “${read[row]}”${expects} it looks at “${seen[column]}” (position ${column}) with weight ` +
      `${weight(row, column).toFixed(2)}${head ? ` in head ${head - 1}` : ", the mean of all heads"}.`;
    drawCursor(palette);
  }

  const point = (event) => {
    const box = canvas.getBoundingClientRect();
    goTo(Math.floor((event.clientY - box.top) / size), Math.floor((event.clientX - box.left) / size));
  };
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("focus", () => cursor || goTo(rows - 1, rows - 1 + offset));
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    goTo(cursor.row + step[0], cursor.column + step[1]);
    rowLabels[cursor.row].scrollIntoView({ block: "nearest", inline: "nearest" });
    columnLabels[cursor.column].scrollIntoView({ block: "nearest", inline: "nearest" });
  });
  figure.querySelector("fieldset").addEventListener("change", (event) => {
    head = Number(event.target.value);
    draw();
    if (cursor) goTo(cursor.row, cursor.column); // reads out the weight
  });
  redraws.push(draw);
}

for (const box of document.querySelectorAll(".scroll:has(.strip, .grid)"))
  box.scrollTo(box.scrollWidth, box.scrollHeight); // to what was produced

const redraw = () => redraws.forEach((draw) => draw());
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
redraw();
