/** The curves of a run on a canvas: loss, margin and held-out accuracy over the steps, with values under the pointer. */

import { extent, lastUpTo, nearest, numbers, padded, smooth } from "./curve.js";
import { number, percent } from "./format.js";

// Middle tones, so that one set reads on dark and on light backgrounds.
const COLOURS = { loss: "#4a9be0", margin: "#d98a2b", accuracy: "#45a35c" };
const TITLE_HEIGHT = 16;
const AXIS_HEIGHT = 15;
const SIDE = 6;

/**
 * What is drawn: one panel per idea, top to bottom. Lines are noisy and get a mean through them; dots are measures.
 * @param {object} run as in curve.js
 */
export function panels(run) {
  const base = run.evaluated.at(-1)?.base_accuracy;
  return [
    {
      title: "Loss",
      colour: COLOURS.loss,
      line: run.curve.map((p) => ({ step: p.step, value: p.loss })),
      dots: [],
      extent: extent(numbers(run.curve, "loss")),
      text: number,
    },
    {
      title: "Margin",
      colour: COLOURS.margin,
      line: run.curve.map((p) => ({ step: p.step, value: p.margin })),
      dots: run.evaluated.map((p) => ({ step: p.step, value: p.margin })),
      extent: extent([...numbers(run.curve, "margin"), ...numbers(run.evaluated, "margin")]),
      text: number,
    },
    {
      title: "Held-out accuracy",
      colour: COLOURS.accuracy,
      line: [],
      dots: run.evaluated.map((p) => ({ step: p.step, value: p.accuracy })),
      extent: [0, 1],
      fixed: true,
      base: Number.isFinite(base) ? base : null,
      text: percent,
    },
  ];
}

export class CurveChart {
  /** @param {HTMLElement} parent gets the canvas; its size decides the canvas's */
  constructor(parent) {
    this.canvas = document.createElement("canvas");
    this.canvas.className = "mapo-chart";
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    parent.append(this.canvas);
    this.run = null;
    this.hover = null; // a step, while the pointer or the arrow keys ask for values
    this.frame = 0;
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#setHover(null));
    this.canvas.addEventListener("blur", () => this.#setHover(null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    this.observer = new ResizeObserver(() => this.redraw());
    this.observer.observe(this.canvas);
  }

  show(run) {
    this.run = run;
    this.redraw();
  }

  /** Draw before the next frame, however often it is asked for until then. */
  redraw() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.#draw();
    });
  }

  dispose() {
    cancelAnimationFrame(this.frame);
    this.observer.disconnect();
  }

  #point(event) {
    if (!this.run?.curve.length) return;
    const width = this.canvas.clientWidth - 2 * SIDE;
    const share = Math.min(1, Math.max(0, (event.offsetX - SIDE) / width));
    this.#setHover(share * lastStep(this.run));
  }

  #key(event) {
    const towards = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!towards || !this.run?.curve.length) return;
    event.preventDefault();
    event.stopPropagation();
    const steps = this.run.curve.map((p) => p.step);
    const at = this.hover === null ? steps.length - 1 : steps.indexOf(nearest(this.run.curve, this.hover).step);
    this.#setHover(steps[Math.min(steps.length - 1, Math.max(0, at + towards))]);
  }

  #setHover(step) {
    if (step === this.hover) return;
    this.hover = step;
    this.redraw();
  }

  #draw() {
    const width = this.canvas.clientWidth;
    const height = this.canvas.clientHeight;
    if (!width || !height) return;
    // The old front end zooms its widgets with a transform; drawn at that size the lines stay sharp.
    const zoom = Math.min(2, Math.max(1, this.canvas.getBoundingClientRect().width / width));
    const scale = (globalThis.devicePixelRatio || 1) * zoom;
    const [pixelsWide, pixelsHigh] = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width !== pixelsWide || this.canvas.height !== pixelsHigh) {
      this.canvas.width = pixelsWide;
      this.canvas.height = pixelsHigh;
    }
    const pen = this.canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(this.canvas);
    const look = {
      ink: style.color,
      faint: style.getPropertyValue("--mapo-faint").trim() || "#888",
      grid: style.getPropertyValue("--mapo-grid").trim() || "rgba(128,128,128,0.3)",
      family: style.fontFamily,
    };
    if (this.run) drawRun(pen, this.run, width, height, look, this.hover);
    this.canvas.setAttribute("aria-label", describe(this.run));
  }
}

/** The last step that the horizontal axis spans: the newest one, since the bar shows how far that is. */
function lastStep(run) {
  const newest = Math.max(run.curve.at(-1)?.step ?? 0, run.evaluated.at(-1)?.step ?? 0);
  return Math.max(1, newest, Math.min(10, run.steps ?? 10));
}

function describe(run) {
  if (!run) return "No curves yet";
  const point = run.curve.at(-1);
  const accuracy = run.evaluated.at(-1)?.accuracy;
  return (
    `Curves of run ${run.name}: loss ${number(point?.loss)}, margin ${number(point?.margin)}, ` +
    `held-out accuracy ${percent(accuracy)} at step ${run.step}`
  );
}

function drawRun(pen, run, width, height, look, hover) {
  const list = panels(run);
  const share = (height - AXIS_HEIGHT) / list.length;
  const last = lastStep(run);
  const x = (step) => SIDE + (step / last) * (width - 2 * SIDE);
  const shown = hover === null ? null : nearest(run.curve, hover);
  list.forEach((panel, i) => drawPanel(pen, panel, { top: i * share, height: share, width, x, look, shown }));
  pen.font = `10px ${look.family}`;
  pen.fillStyle = look.faint;
  pen.textBaseline = "bottom";
  pen.textAlign = "left";
  pen.fillText("step 0", SIDE, height - 1);
  pen.textAlign = "right";
  pen.fillText(String(last), width - SIDE, height - 1);
  if (shown) drawCursor(pen, x(shown.step), shown.step, width, height, look);
}

function drawPanel(pen, panel, { top, height, width, x, look, shown }) {
  const [low, high] = padded(panel.extent);
  const [upper, lower] = [top + TITLE_HEIGHT + 2, top + height - 4];
  const y = (value) => lower - ((value - low) / (high - low)) * (lower - upper);
  pen.strokeStyle = look.grid;
  pen.lineWidth = 1;
  pen.strokeRect(SIDE - 0.5, Math.round(upper) - 0.5, width - 2 * SIDE + 1, Math.round(lower - upper) + 1);
  drawTitle(pen, panel, top, width, look, shown);
  pen.save();
  pen.beginPath();
  pen.rect(SIDE, upper - 1, width - 2 * SIDE, lower - upper + 2);
  pen.clip();
  if (low < 0 && high > 0) rule(pen, y(0), width, look.grid, []);
  if (panel.base !== undefined && panel.base !== null) rule(pen, y(panel.base), width, look.faint, [4, 3]);
  const noisy = panel.line.length > 30;
  if (noisy) trace(pen, panel.line, x, y, panel.colour, 1, 0.35);
  const means = noisy ? smooth(panel.line.map((p) => p.value)) : panel.line.map((p) => p.value);
  const steady = panel.line.map((p, i) => ({ step: p.step, value: means[i] }));
  trace(pen, steady, x, y, panel.colour, 2, 1);
  if (!panel.line.some((p) => Number.isFinite(p.value))) trace(pen, panel.dots, x, y, panel.colour, 1.5, 1);
  pen.restore();
  for (const dot of panel.dots) mark(pen, dot, x, y, panel.colour);
}

function drawTitle(pen, panel, top, width, look, shown) {
  pen.textBaseline = "top";
  pen.textAlign = "left";
  pen.font = `600 11px ${look.family}`;
  pen.fillStyle = panel.colour;
  pen.fillText(panel.title, SIDE, top + 3);
  const at = SIDE + pen.measureText(panel.title).width + 6;
  pen.font = `11px ${look.family}`;
  pen.fillStyle = look.ink;
  pen.fillText(reading(panel, shown?.step ?? Infinity), at, top + 3);
  if (panel.fixed || !panel.extent) return;
  pen.textAlign = "right";
  pen.font = `10px ${look.family}`;
  pen.fillStyle = look.faint;
  pen.fillText(panel.extent.map(panel.text).join(" to "), width - SIDE, top + 4);
}

/** The value at a step, as text: of the line if there is one, else of the last measure; and the base model's. */
function reading(panel, step) {
  const line = panel.line.filter((p) => Number.isFinite(p.value));
  const found = lastUpTo(line.length ? line : panel.dots.filter((p) => Number.isFinite(p.value)), step);
  if (!found) return line.length || panel.dots.length ? "–" : "not measured yet";
  const base = panel.base !== undefined && panel.base !== null ? `, base ${panel.text(panel.base)}` : "";
  return panel.text(found.value) + base;
}

function rule(pen, y, width, colour, dashes) {
  pen.strokeStyle = colour;
  pen.lineWidth = 1;
  pen.setLineDash(dashes);
  pen.beginPath();
  pen.moveTo(SIDE, y);
  pen.lineTo(width - SIDE, y);
  pen.stroke();
  pen.setLineDash([]);
}

/** A line through the points that have a value; it breaks at those that have none. */
function trace(pen, points, x, y, colour, width, alpha) {
  pen.strokeStyle = colour;
  pen.globalAlpha = alpha;
  pen.lineWidth = width;
  pen.lineJoin = "round";
  pen.beginPath();
  let down = false;
  for (const { step, value } of points) {
    if (!Number.isFinite(value)) down = false;
    else if (down) pen.lineTo(x(step), y(value));
    else {
      pen.moveTo(x(step), y(value));
      down = true;
    }
  }
  pen.stroke();
  pen.globalAlpha = 1;
}

function mark(pen, { step, value }, x, y, colour) {
  if (!Number.isFinite(value)) return;
  pen.fillStyle = colour;
  pen.beginPath();
  pen.arc(x(step), y(value), 3, 0, 2 * Math.PI);
  pen.fill();
}

function drawCursor(pen, at, step, width, height, look) {
  pen.strokeStyle = look.ink;
  pen.globalAlpha = 0.6;
  pen.lineWidth = 1;
  pen.beginPath();
  pen.moveTo(at, TITLE_HEIGHT);
  pen.lineTo(at, height - AXIS_HEIGHT);
  pen.stroke();
  pen.globalAlpha = 1;
  pen.fillStyle = look.ink;
  pen.textBaseline = "bottom";
  pen.textAlign = "center";
  pen.font = `10px ${look.family}`;
  const text = `step ${step}`;
  const half = pen.measureText(text).width / 2 + 2;
  pen.fillText(text, Math.min(width - half - 30, Math.max(half + 44, at)), height - 1);
}

/** The small curve in a list: loss, and held-out accuracy once it was measured more than once. */
export function drawSpark(canvas, run) {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width || !height) return;
  const scale = globalThis.devicePixelRatio || 1;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  const last = lastStep(run);
  const x = (step) => 2 + (step / last) * (width - 4);
  for (const { line, dots, extent: values, colour, title } of panels(run)) {
    if (title === "Margin") continue;
    const range = padded(values);
    const y = (value) => height - 3 - ((value - range[0]) / (range[1] - range[0])) * (height - 6);
    const means = smooth(line.map((p) => p.value));
    if (line.length) trace(pen, line.map((p, i) => ({ step: p.step, value: means[i] })), x, y, colour, 1.5, 1);
    if (dots.length > 1) trace(pen, dots, x, y, colour, 1.5, 1);
  }
}
