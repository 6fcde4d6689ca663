// A chart over time with a legend that shows the values under the pointer, else the latest.

import { variable } from "./colours.js";
import { el, fill, say } from "./dom.js";
import { clock } from "./format.js";

const HEIGHT = 168;
const SPAN_SECONDS = 60;
const FONT = '11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif';

/**
 * One chart in a `<figure>`.
 *
 * `format` says a value in the legend, `axis` at the left; `steps` are the distances that its lines may have.
 * `series` are { name, colour, dash, fill, format }; with `stacked` each lies on the ones before it.
 */
export class Chart {
  constructor(figure, { title, format, axis = format, steps = null, stacked = false, max = null }) {
    this.format = format;
    this.axis = axis;
    this.steps = steps;
    this.stacked = stacked;
    this.max = max;
    this.title = title;
    this.series = [];
    this.plot = null;
    this.area = el("div", { class: "plot", role: "img", "aria-label": `${title}. Nothing yet.` });
    this.legend = el("ul", { class: "legend" });
    fill(figure, el("figcaption", {}, el("h2", {}, title)), this.area, this.legend);
    new ResizeObserver(() => this.resize()).observe(this.area);
  }

  /** Show `values` (a list for each series) at `times` (Unix seconds). */
  draw(times, series, values) {
    this.times = times;
    this.values = values;
    const names = (list) => list.map((each) => each.name + each.colour).join();
    const changed = names(series) !== names(this.series);
    this.series = series;
    if (changed || !this.plot) this.make();
    this.plot.setData([times, ...this.drawn()], false);
    const end = times.at(-1) ?? 0;
    // Both at once: setting only one scale leaves the other as it was.
    this.plot.batch(() => {
      this.plot.setScale("x", { min: Math.min(times[0] ?? end, end - SPAN_SECONDS), max: end });
      this.plot.setScale("y", { min: 0, max: this.top() });
    });
    this.tell(null);
  }

  /** What is drawn: stacked series as sums, the highest first, so that the lower ones cover its foot. */
  drawn() {
    if (!this.stacked) return this.values;
    const sums = [];
    this.values.forEach((list, i) => {
      sums.push(list.map((value, at) => (value === null ? null : value + (i ? sums[i - 1][at] : 0))));
    });
    return sums.reverse();
  }

  top() {
    if (this.max !== null) return this.max;
    const largest = Math.max(0, ...this.drawn().flat().filter((value) => value !== null));
    return largest > 0 ? largest * 1.1 : 1;
  }

  make() {
    this.plot?.destroy();
    const order = this.stacked ? [...this.series].reverse() : this.series;
    const axis = { stroke: variable("--muted"), font: FONT, ticks: { show: false } };
    const grid = { stroke: variable("--line"), width: 1 };
    this.plot = new window.uPlot(
      {
        width: this.area.clientWidth || 300,
        height: HEIGHT,
        legend: { show: false },
        padding: [8, 24, 0, 0],
        cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
        scales: { x: { time: true, auto: false }, y: { auto: false } },
        axes: [
          { ...axis, grid: { show: false }, size: 24, space: 76, values: (_, at) => at.map(clock) },
          { ...axis, grid, size: 56, space: 36, values: (_, at) => at.map(this.axis), ...(this.steps && { incrs: this.steps }) },
        ],
        series: [{}, ...order.map((each) => this.line(each))],
        hooks: { setCursor: [(plot) => this.tell(plot.cursor.idx ?? null)] },
      },
      [this.times, ...this.drawn()],
      this.area,
    );
  }

  line({ name, colour, dash }) {
    const points = { show: false };
    if (this.stacked) return { label: name, stroke: colour, fill: colour, width: 1, points };
    return { label: name, stroke: colour, width: 2, dash, points };
  }

  resize() {
    if (this.plot && this.area.clientWidth) this.plot.setSize({ width: this.area.clientWidth, height: HEIGHT });
  }

  /** Draw anew with the colours of now. */
  restyle(series) {
    if (!this.plot) return;
    this.series = series;
    this.make();
    this.draw(this.times, series, this.values);
  }

  /** Put the values at one index into the legend; null: the latest. */
  tell(index) {
    const at = index ?? this.times.length - 1;
    const told = this.series.map((each, i) => {
      const value = this.values[i][at];
      return [each, value === null || value === undefined ? "none" : this.format(value)];
    });
    while (this.legend.children.length > told.length) this.legend.lastChild.remove();
    told.forEach(([each, text], i) => {
      const item = this.legend.children[i] ?? this.legend.appendChild(legendItem());
      item.firstChild.setAttribute("class", `mark ${this.stacked ? "area" : each.mark ?? ""}`);
      item.firstChild.style.setProperty("--colour", each.colour);
      say(item.children[1], each.name);
      say(item.children[2], text);
    });
    if (index === null) {
      const words = told.map(([each, text]) => `${each.name} ${text}`).join(", ");
      this.area.setAttribute("aria-label", `${this.title}. Latest: ${words || "nothing yet"}.`);
    }
  }
}

function legendItem() {
  return el("li", {}, el("span", { class: "mark", "aria-hidden": "true" }), el("span"), el("b"));
}
