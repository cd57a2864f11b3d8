"use strict";

// Tables: a heading sorts by its column; the first click on numbers brings the largest to the top. Empty cells stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numeric = head.classList.contains("n");
      const was = head.getAttribute("aria-sort");
      const rising = was ? was === "descending" : !numeric;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const key = row => row.cells[column].dataset.key;
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        const by = numeric ? Number(x) - Number(y) : x.localeCompare(y, undefined, { numeric: true });
        return rising ? by : -by;
      };
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort(order));
    });
  });
}

// Charts: what the nearest point says, under the mouse, under a finger, or by the arrow keys.
for (const chart of document.querySelectorAll("svg.chart")) {
  const tip = chart.parentElement.querySelector(".tip");
  const points = [...chart.querySelectorAll("circle")].map(circle => {
    const title = circle.querySelector("title");
    title.remove(); // or else it would be shown besides
    return { circle, says: title.textContent, x: Number(circle.getAttribute("cx")), y: Number(circle.getAttribute("cy")) };
  });
  const series = [...new Set(points.map(p => p.circle.parentElement))];
  let at = null;

  const leave = () => {
    if (at) at.circle.classList.remove("on");
    at = null;
    tip.hidden = true;
  };
  const show = point => {
    if (!point || point === at) return;
    leave();
    at = point;
    at.circle.classList.add("on");
    tip.textContent = at.says;
    tip.hidden = false;
    const box = chart.parentElement.getBoundingClientRect();
    const dot = at.circle.getBoundingClientRect();
    const left = dot.left - box.left + dot.width / 2 - tip.offsetWidth / 2;
    const above = dot.top - box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(0, Math.min(left, box.width - tip.offsetWidth))}px`;
    tip.style.top = `${above < 0 ? dot.bottom - box.top + 8 : above}px`;
  };
  const nearest = (x, y, among) => {
    let best = null, least = Infinity;
    for (const p of among) {
      const away = Math.hypot(p.x - x, p.y - y);
      if (away < least) [best, least] = [p, away];
    }
    return best;
  };
  const pointed = event => {
    const corner = chart.getBoundingClientRect();
    const scale = chart.viewBox.baseVal.width / corner.width;
    show(nearest((event.clientX - corner.left) * scale, (event.clientY - corner.top) * scale, points));
  };
  chart.addEventListener("pointermove", pointed);
  chart.addEventListener("pointerdown", pointed);
  chart.addEventListener("pointerleave", leave);
  chart.addEventListener("blur", leave);
  chart.addEventListener("keydown", event => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (event.key === "Escape") leave();
    if (!step) return;
    event.preventDefault();
    if (!at) return show(points[0]);
    const own = points.filter(p => p.circle.parentElement === at.circle.parentElement);
    if (step[0]) return show(own[own.indexOf(at) + step[0]]);
    const next = (series.indexOf(at.circle.parentElement) + step[1] + series.length) % series.length;
    show(nearest(at.x, at.y, points.filter(p => p.circle.parentElement === series[next])));
  });
}

// Paper shows everything that can be opened.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open])")];
  for (const part of closed) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of closed) part.open = false;
});
