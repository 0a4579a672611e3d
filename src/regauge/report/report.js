"use strict";
// Tooltips, tables that sort, controls of plots. Texts go in as text, never as markup.

const tip = document.getElementById("tip"), aloudBox = document.getElementById("aloud");

function showTip(title, note, metric, rows, x, y, aloud) {
  const lines = rows.map(({ key, label, value }) =>
    html("div", { class: "tip-row" }, html("i", { class: `swatch s-${key}` }), html("span", {}, label),
      html("b", {}, exact(value))));
  tip.replaceChildren(html("div", { class: "tip-title" }, title),
    html("div", { class: "tip-note" }, [note, metric].filter(Boolean).join(" · ")), ...lines);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect(), edge = 8;
  const room = document.documentElement.clientWidth;
  const left = Math.max(edge, Math.min(room - width - edge, x + 14 + width > room - edge ? x - width - 14 : x + 14));
  const above = y - height - 12;
  tip.style.left = `${left}px`;
  tip.style.top = `${above < edge ? y + 16 : above}px`;
  if (aloud) aloudBox.textContent = [title, note, ...rows.map((r) => `${r.label} ${exact(r.value)}`)].join(", ");
}

function hideTip() {
  tip.hidden = true;
}

// What has a tooltip beside it moves away when the page scrolls.
function scrolled() {
  if (Chart.current) Chart.current.select(-1);
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    const numeric = head.classList.contains("n");
    const key = (row) => {
      const cell = row.cells[column];
      if (!numeric) return cell.textContent.trim();
      return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
    };
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const order = now ? (now === "ascending" ? "descending" : "ascending") : numeric ? "descending" : "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const keyed = [...body.rows].map((row) => [key(row), row]);
      keyed.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
      });
      body.append(...keyed.map(([, row]) => row));
    });
  });
}

function toggle(label, pressed, act, ...inside) {
  const button = html("button", { type: "button", "aria-pressed": pressed }, ...inside, label);
  button.addEventListener("click", () => act(button));
  return button;
}

// One of several: a row of buttons of which one is pressed.
function choice(name, labels, chosen, act) {
  const group = html("div", { class: "choice", role: "group", "aria-label": name });
  labels.forEach((label, i) =>
    group.append(toggle(label, i === chosen, (button) => {
      for (const other of group.children) other.setAttribute("aria-pressed", other === button);
      act(i);
    })));
  return group;
}

function controls(spec, state) {
  const bar = html("div", { class: "bar" });
  if (spec.metrics.length > 1)
    bar.append(choice("figure", spec.metrics.map(({ short }) => short), 0, (i) => state.set("metric", i)));
  bar.append(choice("scale", ["log", "linear"], 0, (i) => state.set("log", i === 0)));
  const roles = [...new Set(spec.roles || [])];
  if (roles.length > 2) {
    const select = html("select", { "aria-label": "which" }, html("option", { value: "" }, "all"),
      ...roles.map((role) => html("option", { value: role }, role)));
    select.addEventListener("change", () => state.set("role", select.value));
    bar.append(select);
  }
  const legend = html("div", { class: "legend", role: "group", "aria-label": "series" });
  for (const { key, label } of spec.series)
    legend.append(toggle(label, true, (button) => {
      const hide = !state.hidden.has(key);
      state.hidden[hide ? "add" : "delete"](key);
      button.setAttribute("aria-pressed", !hide);
      state.redraw();
    }, html("i", { class: `swatch s-${key}${spec.series.length > 1 && key === spec.series[0].key ? " ring" : ""}` })));
  if (spec.series.length > 1) bar.append(legend);
  return bar;
}

function freshState() {
  return {
    hidden: new Set(), log: true, metric: 0, role: "", charts: [],
    set(key, value) {
      this[key] = value;
      this.redraw();
    },
    redraw() {
      hideTip();
      for (const chart of this.charts) chart.draw();
    },
  };
}

function start() {
  const specs = JSON.parse(document.getElementById("data").textContent), groups = new Map(), drawn = [];
  for (const box of document.querySelectorAll("[data-chart]")) {
    const spec = specs[box.dataset.chart], shared = box.dataset.group;
    if (spec.kind === "strip") {
      drawn.push(new Strip(box, spec));
      continue;
    }
    const known = groups.get(shared), state = known || freshState();
    if (!known) {
      const bar = controls(spec, state);
      if (shared) document.querySelector(`[data-controls="${shared}"]`).append(bar);
      else box.append(bar);
      if (shared) groups.set(shared, state);
    }
    const chart = new Chart(box, spec, state);
    state.charts.push(chart);
    drawn.push(chart);
  }
  let width = 0;
  const redraw = () => {
    if (document.documentElement.clientWidth === width) return;
    width = document.documentElement.clientWidth;
    hideTip();
    for (const chart of drawn) chart.draw();
  };
  redraw();
  window.addEventListener("resize", redraw);
  window.addEventListener("scroll", scrolled, { passive: true });
  document.querySelectorAll("table").forEach(sortable);
}

start();
