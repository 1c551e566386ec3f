/** Two columns of the table against each other on a canvas; a dragged rectangle filters the list. */
import { el, setVars } from "./dom.js";
import { pct, sci, ticks } from "./format.js";

const [PAD_LEFT, PAD_BELOW, PAD] = [62, 34, 10];

export class Scatter {
  #points = [];
  #drag = null;

  /** @param {import("./list.js").FeatureList} features @param {{change: (patch: object) => void, open: (latent: number) => void, tip: import("./tip.js").Tip}} on */
  constructor(features, on) {
    Object.assign(this, { features, on });
    this.canvas = el("canvas", { role: "img", "aria-label": "features by two columns", "data-scatter": "" });
    this.brush = el("div", { class: "brush", hidden: true });
    this.element = el("div", {
      class: "scatter", onpointerdown: (event) => this.#press(event), onpointermove: (event) => this.#move(event), onpointerup: (event) => this.#release(event), onpointerleave: () => on.tip.leave(),
    }, this.canvas, this.brush);
    new ResizeObserver(() => this.shown && this.#paint()).observe(this.element);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.shown && this.#paint());
  }

  /** @param {{x: object, y: object, logX: boolean, logY: boolean, order: number[], list: import("./types").Listing}} shown */
  draw(shown) {
    this.shown = shown;
    this.listed = new Set(shown.order);
    this.axes = [this.#scale(shown.x, shown.logX), this.#scale(shown.y, shown.logY)];
    this.#paint();
  }

  /** A column's range, and how a value lies in it: from 0 to 1, NaN where it has no place. */
  #scale({ name, kind }, log) {
    const values = this.features.rows[name];
    const [low, high] = values.reduce(([least, most], value) => (value === null || (log && value <= 0) ? [least, most] : [Math.min(least, value), Math.max(most, value)]), [Infinity, -Infinity]);
    const turn = log ? Math.log10 : (value) => value;
    const [from, to] = [turn(low), turn(high)];
    const span = to - from || 1;
    const marks = log ? Array.from({ length: Math.max(0, Math.floor(to + 1e-9) - Math.ceil(from - 1e-9) + 1) }, (_, i) => 10 ** (Math.ceil(from - 1e-9) + i))
      : ticks(high, 6).filter((value) => value >= low);
    const write = kind === "percent" ? pct : (value) => (log ? sci(value) : String(Number(value.toPrecision(6))));
    return { name, values, marks, write, place: (value) => (value === null || (log && value <= 0) ? NaN : (turn(value) - from) / span), value: (at) => { const back = from + at * span; return log ? 10 ** back : back; } };
  }

  #paint() {
    const { clientWidth: width, clientHeight: height } = this.element;
    const ratio = devicePixelRatio || 1;
    Object.assign(this.canvas, { width: width * ratio, height: height * ratio });
    this.room = { width: width - PAD_LEFT - PAD, height: height - PAD_BELOW - PAD };
    const context = this.canvas.getContext("2d");
    const colour = (name) => getComputedStyle(this.element).getPropertyValue(name);
    context.scale(ratio, ratio);
    context.font = `11px ${colour("--sans")}`;
    this.#paintAxes(context, colour);
    const [x, y] = this.axes;
    this.#points = [];
    const groups = [[], []];
    for (let row = 0; row < this.features.size; row++) {
      const at = [x.place(x.values[row]), y.place(y.values[row])];
      if (Number.isNaN(at[0] + at[1])) continue;
      const point = [PAD_LEFT + at[0] * this.room.width, PAD + (1 - at[1]) * this.room.height, row];
      this.#points.push(point);
      groups[Number(this.listed.has(row))].push(point);
    }
    const size = this.#points.length > 5000 ? 1.6 : 2.4;
    for (const [i, points] of groups.entries()) {
      context.fillStyle = colour(i ? "--blue" : "--faint");
      context.globalAlpha = i ? (this.#points.length > 5000 ? 0.4 : 0.6) : 0.22;
      for (const [px, py] of points) {
        context.beginPath();
        context.arc(px, py, size, 0, 7);
        context.fill();
      }
    }
    this.canvas.dataset.points = this.#points.length;
  }

  #paintAxes(context, colour) {
    const { width, height } = this.room;
    const [x, y] = this.axes;
    context.strokeStyle = colour("--line");
    context.fillStyle = colour("--soft");
    for (const value of x.marks) {
      const at = PAD_LEFT + x.place(value) * width;
      context.strokeRect(at, PAD, 0, height);
      context.textAlign = "center";
      context.fillText(x.write(value), at, PAD + height + 17);
    }
    for (const value of y.marks) {
      const at = PAD + (1 - y.place(value)) * height;
      context.strokeRect(PAD_LEFT, at, width, 0);
      context.textAlign = "right";
      context.fillText(y.write(value), PAD_LEFT - 7, at + 4);
    }
  }

  #place({ clientX, clientY }) {
    const box = this.element.getBoundingClientRect();
    return [clientX - box.left, clientY - box.top];
  }

  #nearest([px, py]) {
    let [best, least] = [null, 64];
    for (const [x, y, row] of this.#points) {
      const far = (x - px) ** 2 + (y - py) ** 2;
      if (far < least) [best, least] = [row, far];
    }
    return best;
  }

  #press(event) {
    this.#drag = this.#place(event);
    this.element.setPointerCapture(event.pointerId);
    event.preventDefault();
  }

  #move(event) {
    const [px, py] = this.#place(event);
    if (this.#drag) {
      const [fromX, fromY] = this.#drag;
      this.brush.hidden = false;
      setVars(this.brush, { "--x": `${Math.min(px, fromX)}px`, "--y": `${Math.min(py, fromY)}px`, "--w": `${Math.abs(px - fromX)}px`, "--h": `${Math.abs(py - fromY)}px` });
      return;
    }
    const row = this.#nearest([px, py]);
    if (row === null) return this.on.tip.leave();
    const [x, y] = this.axes;
    this.on.tip.show({ getBoundingClientRect: () => new DOMRect(event.clientX, event.clientY, 0, 0) }, [
      el("div", { class: "tip-title" }, `feature ${this.features.rows.latent[row]}`), el("div", {}, `${this.shown.x.label} ${x.write(x.values[row])}`), el("div", {}, `${this.shown.y.label} ${y.write(y.values[row])}`)]);
  }

  #release(event) {
    if (!this.#drag) return;
    const [[fromX, fromY], [px, py]] = [this.#drag, this.#place(event)];
    this.#drag = null;
    this.brush.hidden = true;
    if (Math.abs(px - fromX) < 5 || Math.abs(py - fromY) < 5) {
      const row = this.#nearest([px, py]);
      if (row !== null) this.on.open(this.features.rows.latent[row]);
      return;
    }
    const [x, y] = this.axes;
    const bounds = (axis, ...ends) => [axis.name, ...ends.sort((a, b) => a - b).map((at) => Number(axis.value(at).toPrecision(4)))];
    const across = [fromX, px].map((at) => (at - PAD_LEFT) / this.room.width);
    const up = [fromY, py].map((at) => 1 - (at - PAD) / this.room.height);
    this.on.change({ list: { ...this.shown.list, box: [...bounds(x, ...across), ...bounds(y, ...up)].join(",") } });
  }
}
