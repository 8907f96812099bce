// Ctrl+Enter generates; heat-map cells are read out as they are pointed at or walked to; exports are saved.
() => {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.closest("#prompt")) {
      event.preventDefault();
      document.querySelector("#generate").click();
    }
  });

  const cellOf = (event) => event.target.closest?.(".calm-looked tbody td");

  function read(cell) {
    const table = cell.closest("table"), row = cell.parentElement;
    const head = table.tHead.rows[0].cells[cell.cellIndex], produced = row.cells[0];
    for (const here of table.querySelectorAll(".here")) here.classList.remove("here");
    for (const here of [head, produced]) here.classList.add("here");
    table.closest(".calm-scroll").nextElementSibling.textContent =
      `To produce “${produced.textContent}” after “${produced.dataset.after}”, ` +
      `it looked at “${head.textContent}” with weight ${cell.textContent}.`;
  }

  document.addEventListener("pointerover", (event) => {
    const cell = cellOf(event);
    if (cell) read(cell);
  });
  document.addEventListener("click", (event) => {
    const cell = cellOf(event);
    if (cell) walkTo(cell);
  });

  function walkTo(cell) {
    for (const other of cell.closest("table").querySelectorAll("td[tabindex]")) other.removeAttribute("tabindex");
    cell.tabIndex = 0;
    cell.focus();
    cell.scrollIntoView({ block: "nearest", inline: "nearest" });
    read(cell);
  }

  document.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const table = event.target.closest?.(".calm-scroll")?.querySelector(".calm-looked");
    if (!step || !table) return;
    event.preventDefault();
    const cell = cellOf(event), rows = table.tBodies[0].rows;
    if (!cell) return walkTo(rows[0].cells[rows[0].cells.length - 1]);
    const row = rows[Math.max(0, Math.min(rows.length - 1, cell.parentElement.sectionRowIndex + step[0]))];
    walkTo(row.cells[Math.max(1, Math.min(row.cells.length - 1, cell.cellIndex + step[1]))]);
  });

  window.calmDownload = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: name.endsWith("json") ? "application/json" : "text/html" }));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  };
}
