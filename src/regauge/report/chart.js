"use strict";
// Plots drawn by hand. A specification (see charts.py) has
//   kind      "dots" (one place for each name) or "lines" (one curve for each series)
//   names, shapes, roles, layers   of the places; or index, for lines
//   series    [{key, label}];  metrics [{key, label, values: {series key: [number or null]}}]

const SVG = "http://www.w3.org/2000/svg";

function build(make, name, attributes, children) {
  const element = make(name);
  for (const [key, value] of Object.entries(attributes || {})) element.setAttribute(key, value);
  for (const child of children) element.append(child);
  return element;
}
const svg = (name, attributes, ...children) =>
  build((tag) => document.createElementNS(SVG, tag), name, attributes, children);
const html = (name, attributes, ...children) =>
  build((tag) => document.createElement(tag), name, attributes, children);

const RAISED = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const power = (exponent) => "10" + [...String(exponent)].map((c) => RAISED[c]).join("");
const padded = (text) => text.replace(/e([+-])(\d)$/, "e$10$2");

// Every digit that the data hold; small and large numbers as in the tables.
function exact(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return value === 0 || (size >= 1e-3 && size < 1e7) ? String(value) : padded(value.toExponential());
}

function tickLabel(value, powers) {
  const exponent = Math.floor(Math.log10(Math.abs(value)) + 1e-9);
  if (value === 0 || value === 1 || (!powers && exponent >= -3 && exponent < 5)) return String(+value.toPrecision(6)).replace("-", "−");
  const factor = +(value / 10 ** exponent).toPrecision(3);
  return factor === 1 ? power(exponent) : `${factor}·${power(exponent)}`;
}

function logTicks(low, high) {
  const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), decades = last - first;
  const step = Math.max(1, Math.ceil(decades / 6));
  const span = Math.log10(high / low);
  const factors = span > 2.2 ? [1] : span > 0.9 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 7];
  const ticks = [];
  for (let e = Math.ceil(first / step) * step; e <= last; e += step)
    for (const factor of factors) ticks.push(+(factor * 10 ** e).toPrecision(6));
  const inside = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  return inside.length > 1 ? inside : linearTicks(low, high);
}

function linearTicks(low, high) {
  const raw = (high - low) / 4 || 1, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((size) => size >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
    ticks.push(+(i * step).toPrecision(10));
  return ticks;
}

// Values to pixels, with ticks. On a logarithmic axis zeros stand on a line of their own at the end.
function axis(values, log, from, to) {
  const known = values.filter((value) => value !== null && value !== undefined);
  const positive = known.filter((value) => value > 0), zeros = log && positive.length < known.length;
  if (log && positive.length) {
    const pad = Math.max(1.12, (Math.max(...positive) / Math.min(...positive)) ** 0.05);
    const low = Math.min(...positive) / pad, high = Math.max(...positive) * pad;
    const start = zeros ? from + Math.sign(to - from) * 20 : from;
    const unit = (to - start) / Math.log(high / low);
    const at = (value) => (value > 0 ? start + Math.log(value / low) * unit : from);
    return { at, ticks: [...(zeros ? [0] : []), ...logTicks(low, high)] };
  }
  let low = Math.min(...known), high = Math.max(...known);
  if (low > 0 && low < 0.6 * high) low = 0;
  if (low === high) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  const pad = (high - low) * 0.05;
  low -= low === 0 ? 0 : pad;
  high += pad;
  return { at: (value) => from + ((value - low) * (to - from)) / (high - low), ticks: linearTicks(low, high) };
}

class Chart {
  // state is shared by the plots of a group: {hidden: Set, log, metric, role, redraw()}
  constructor(box, spec, state) {
    Object.assign(this, { box, spec, state, active: -1, points: [] });
    this.svg = svg("svg", {
      tabindex: 0, role: "group", "aria-roledescription": "plot",
      "aria-label": `${spec.label}; arrow keys step through the values`,
    });
    box.append(this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.select(-1));
    this.svg.addEventListener("blur", () => this.select(-1));
    this.svg.addEventListener("keydown", (event) => this.key(event));
  }

  get metric() {
    return this.spec.metrics[this.state.metric] || this.spec.metrics[0];
  }

  shown() {
    return this.spec.series.filter(({ key }) => this.metric.values[key] && !this.state.hidden.has(key));
  }

  value(key, place) {
    const values = this.metric.values[key];
    return values && values[place] !== undefined ? values[place] : null;
  }

  draw() {
    const { spec, state } = this, small = this.box.classList.contains("small");
    const width = Math.max(240, Math.floor(this.box.clientWidth)), height = small ? 190 : width < 560 ? 270 : 340;
    const dots = spec.kind === "dots";
    const frame = { left: 52, right: width - 10, top: 10, bottom: height - (dots ? 52 : 34) };
    const series = this.shown(), count = (spec.names || spec.index).length;
    const places = [];
    for (let i = 0; i < count; i++)
      if (!dots || !state.role || spec.roles[i] === state.role)
        if (series.some(({ key }) => this.value(key, i) !== null)) places.push(i);
    const values = series.flatMap(({ key }) => places.map((i) => this.value(key, i)));
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.points = [];
    this.frame = frame;
    if (!places.length) {
      this.svg.append(svg("text", { x: width / 2, y: height / 2, class: "empty" }, "nothing shown: choose a series"));
      return;
    }
    const y = axis(values, state.log, frame.bottom, frame.top);
    const step = (frame.right - frame.left) / places.length;
    const last = spec.index ? spec.index[count - 1] : 1;
    const across = frame.right - frame.left - 8;
    const x = dots
      ? (n) => frame.left + (n + 0.5) * step
      : (n) => frame.left + 4 + (across * (spec.index[places[n]] - 1)) / Math.max(1, last - 1);
    if (dots) this.layers(places, x, step);
    const powers = state.log && y.ticks.some((tick) => tick > 0 && tick < 1e-4);
    for (const tick of y.ticks) {
      const at = y.at(tick);
      this.svg.append(
        svg("line", { x1: frame.left, x2: frame.right, y1: at, y2: at, class: "grid-line" }),
        svg("text", { x: frame.left - 6, y: at + 4, class: "tick end" }, tickLabel(tick, powers)));
    }
    if (!dots)
      for (const tick of [1, ...linearTicks(1, last).filter((t) => t > last * 0.12 && t < last * 0.9), last])
        this.svg.append(svg("text", { x: frame.left + 4 + (across * (tick - 1)) / Math.max(1, last - 1),
          y: frame.bottom + 16, class: "tick middle" }, String(Math.round(tick))));
    this.svg.append(svg("text", { x: (frame.left + frame.right) / 2, y: height - 4, class: "axis-label" }, spec.x));
    this.guide = svg("line", { y1: frame.top, y2: frame.bottom, class: "guide", visibility: "hidden" });
    this.svg.append(this.guide);
    this.points = places.map((place, n) => ({ place, x: x(n) }));
    if (dots) this.dots(series, y, step);
    else this.lines(series, y);
    this.marker = svg("g", { class: "marker" });
    this.svg.append(this.marker);
    this.y = y;
  }

  dots(series, y, step) {
    const radius = Math.max(2, Math.min(4.5, step * 0.42));
    const links = svg("g", { class: "links" });
    this.svg.append(links);
    for (const { key } of series) {
      const ring = this.spec.series.length > 1 && key === this.spec.series[0].key;
      const group = svg("g", { class: `series s-${key} ${ring ? "ring" : "dot"}`, "data-series": key });
      for (const { place, x } of this.points) {
        const value = this.value(key, place);
        if (value !== null) group.append(svg("circle", { cx: x, cy: y.at(value), r: ring ? radius + 1 : radius }));
      }
      this.svg.append(group);
    }
    if (series.length < 2) return;
    for (const { place, x } of this.points) {
      const ends = series.map(({ key }) => this.value(key, place)).filter((value) => value !== null).map(y.at);
      if (ends.length > 1) links.append(svg("line", { x1: x, x2: x, y1: Math.min(...ends), y2: Math.max(...ends) }));
    }
  }

  lines(series, y) {
    for (const { key } of series) {
      const path = this.points.map(({ place, x }, n) => {
        return `${n ? "L" : "M"}${x.toFixed(1)} ${y.at(this.value(key, place)).toFixed(1)}`;
      });
      this.svg.append(svg("path", { d: path.join(""), class: `series line s-${key}`, "data-series": key }));
    }
  }

  // Layers of a stack as bands with their numbers below, and the names of the stacks below these.
  layers(places, x, step) {
    const { layers } = this.spec, { top, bottom } = this.frame, small = step * places.length < 500;
    const runs = (same) => {
      const found = [];
      places.forEach((place, n) => {
        const run = found[found.length - 1];
        if (run && same(layers[run.place], layers[place])) run.last = n;
        else found.push({ place, first: n, last: n });
      });
      return found;
    };
    runs((a, b) => a[0] === b[0] && a[1] === b[1]).forEach(({ place, first, last }) => {
      const number = layers[place][1], left = x(first) - step / 2, width = (last - first + 1) * step;
      if (number === null) return;
      if (number % 2 === 0)
        this.svg.append(svg("rect", { x: left, y: top, width, height: bottom - top, class: "band" }));
      if (width > 9 * String(number).length)
        this.svg.append(svg("text", { x: left + width / 2, y: bottom + 15, class: "tick middle" }, String(number)));
    });
    runs((a, b) => a[0] === b[0]).forEach(({ place, first, last }) => {
      const name = layers[place][0], width = (last - first + 1) * step, room = Math.floor(width / (small ? 6.5 : 7));
      if (!name || room < 4) return;
      const text = name.length > room ? "…" + name.slice(1 - room) : name;
      this.svg.append(svg("text", { x: x(first) - step / 2 + width / 2, y: bottom + 30, class: "tick middle" }, text));
    });
  }

  point(event) {
    if (!this.points.length) return;
    const area = this.svg.getBoundingClientRect(), scale = this.svg.viewBox.baseVal.width / area.width;
    const at = (event.clientX - area.left) * scale;
    let best = 0;
    this.points.forEach(({ x }, n) => {
      if (Math.abs(x - at) < Math.abs(this.points[best].x - at)) best = n;
    });
    this.select(best);
  }

  key(event) {
    const last = this.points.length - 1, now = this.active;
    const next = { ArrowRight: Math.min(last, now + 1), ArrowLeft: now < 0 ? last : Math.max(0, now - 1),
      Home: 0, End: last, Escape: -1 }[event.key];
    if (next === undefined || last < 0) return;
    event.preventDefault();
    this.select(next, true);
  }

  select(n, aloud = false) {
    this.active = n;
    Chart.current = n < 0 ? null : this;
    const point = this.points[n];
    if (!point) {
      if (this.guide) this.guide.setAttribute("visibility", "hidden");
      if (this.marker) this.marker.replaceChildren();
      hideTip();
      return;
    }
    for (const end of ["x1", "x2"]) this.guide.setAttribute(end, point.x);
    this.guide.setAttribute("visibility", "visible");
    const rows = this.shown().map(({ key, label }) => ({ key, label, value: this.value(key, point.place) }));
    const known = rows.filter(({ value }) => value !== null);
    this.marker.replaceChildren(...known.map(({ key, value }) =>
      svg("circle", { cx: point.x, cy: this.y.at(value), r: 6, class: `halo s-${key}` })));
    const { spec } = this;
    const title = spec.names ? spec.names[point.place] : `${spec.x} ${spec.index[point.place]}`;
    const note = spec.shapes ? spec.shapes[point.place].join("×") : "";
    const area = this.svg.getBoundingClientRect(), scale = area.width / this.svg.viewBox.baseVal.width;
    const top = known.length ? Math.min(...known.map(({ value }) => this.y.at(value))) : this.frame.top;
    showTip(title, note, this.metric.label, rows, area.left + point.x * scale, area.top + top * scale, aloud);
  }
}
