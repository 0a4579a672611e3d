// Curves with gaps: where a series has no value its line is interrupted.
Chart.prototype.lines = function (series, y) {
  for (const { key } of series) {
    let path = "", pen = "M";
    for (const { place, x } of this.points) {
      const value = this.value(key, place);
      if (value !== null) path += `${pen}${x.toFixed(1)} ${y.at(value).toFixed(1)}`;
      pen = value === null ? "M" : "L";
    }
    this.svg.append(svg("path", { d: path, class: `series line s-${key}`, "data-series": key }));
  }
};
