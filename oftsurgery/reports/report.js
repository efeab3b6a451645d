"use strict";
// the page also works without this script: every cell is then a stop of the Tab key, and the worst module comes first

// each map is one stop of the Tab key, and arrow keys move inside the map; a cell's title is shown below the map
for (const map of document.querySelectorAll(".maps section")) {
  const links = [...map.querySelectorAll("td a")];
  const readout = map.querySelector(".readout");
  for (const table of map.querySelectorAll("table")) {
    const rows = [...table.tBodies[0].rows].map((row) => [...row.cells].map((cell) => cell.querySelector("a")));
    const own = rows.flat().filter(Boolean);
    own.forEach((link, i) => { link.tabIndex = i ? -1 : 0; });
    const go = (link) => {
      own.forEach((other) => { other.tabIndex = other === link ? 0 : -1; });
      link.focus();
    };
    table.addEventListener("keydown", (event) => {
      const y = rows.findIndex((row) => row.includes(event.target));
      if (y < 0 || event.altKey || event.ctrlKey || event.metaKey) return;
      const x = rows[y].indexOf(event.target);
      const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
      let next;
      if (event.key in steps) {
        const [dy, dx] = steps[event.key];
        for (let i = y + dy, j = x + dx; rows[i] && j >= 0 && j < rows[i].length; i += dy, j += dx) {
          if (rows[i][j]) { next = rows[i][j]; break; }
        }
      } else if (event.key === "Home") next = own[0];
      else if (event.key === "End") next = own[own.length - 1];
      else return;
      event.preventDefault();
      if (next) go(next);
    });
  }
  for (const link of links) {
    const show = () => { readout.textContent = link.title; };
    link.addEventListener("focus", show);
    link.addEventListener("mouseenter", show);
  }
}

for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const words = new Intl.Collator("en", { numeric: true });
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numbers = head.classList.contains("n");
      const was = head.getAttribute("aria-sort");
      const down = was ? was === "ascending" : numbers;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const body = table.tBodies[0];
      const key = (row) => {
        const cell = row.cells[column];
        if (!numbers) return cell.textContent;
        return "key" in cell.dataset ? Number(cell.dataset.key) : -Infinity;
      };
      const order = (a, b) => (numbers ? (a.key === b.key ? 0 : a.key < b.key ? -1 : 1) : words.compare(a.key, b.key));
      const rows = [...body.rows].map((row) => ({ row, key: key(row) }));
      rows.sort((a, b) => (down ? order(b, a) : order(a, b)));
      body.append(...rows.map((entry) => entry.row));
    });
  });
}
