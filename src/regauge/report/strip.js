"use strict";
// Relative errors on one logarithmic axis: rows [{key, label, value}], and marks [{label, value}] to compare the
// first "compared" rows with.

class Strip {
  constructor(box, spec) {
    Object.assign(this, { box, spec });
    this.svg = svg("svg", { role: "img", "aria-label": `${spec.label}; the table below has every figure` });
    box.append(this.svg);
  }

  draw() {
    const { rows, marks, compared } = this.spec, width = Math.max(240, Math.floor(this.box.clientWidth));
    const wide = width >= 620, line = wide ? 32 : 46, top = 40;
    const end = top + compared * line;
    const left = wide ? 212 : 14, right = width - (wide ? 88 : 80), bottom = top + rows.length * line;
    const all = [...rows, ...marks].map(({ value }) => value).filter((value) => value > 0);
    const first = Math.floor(Math.log10(Math.min(...all, 1e-15))), last = Math.ceil(Math.log10(Math.max(...all, 1e-9))) + 1;
    const x = (value) => {
      if (value === null) return right;
      return value > 0 ? left + ((Math.log10(value) - first) / (last - first)) * (right - left) : left;
    };
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${bottom + 30}`);
    const every = Math.ceil((last - first) / (wide ? 9 : 5));
    for (let e = first; e <= last; e += every)
      this.svg.append(
        svg("line", { x1: x(10 ** e), x2: x(10 ** e), y1: top, y2: bottom, class: "grid-line" }),
        svg("text", { x: x(10 ** e), y: bottom + 18, class: "tick middle" }, power(e)));
    marks.forEach(({ label, value }, i) => {
      const at = x(value), flip = at > width - 110;
      this.svg.append(
        svg("line", { x1: at, x2: at, y1: top - 8, y2: end, class: "mark" }),
        svg("text", { x: at + (flip ? 4 : -4), y: wide ? 24 : 12 + 14 * i, class: "tick mark-label middle" }, label));
    });
    rows.forEach(({ key, label, value }, i) => {
      const y = top + (i + 0.5) * line + (wide ? 0 : 9), at = x(value);
      const text = value === null ? "∞" : value === 0 ? "0" : padded(value.toExponential(2));
      const name = wide ? { x: left - 12, y: y + 4, class: "name end" } : { x: left, y: y - 12, class: "name" };
      const group = svg("g", { class: `strip-row r-${key}` },
        svg("text", name, label),
        svg("line", { x1: left, x2: at, y1: y, y2: y, class: "stem" }),
        svg("circle", { cx: at, cy: y, r: 5.5 }),
        svg("text", { x: at + 11, y: y + 4, class: "value" }, text));
      this.svg.append(group);
    });
  }
}
