/** One run on the page: state, progress, curves, newest pictures, buttons. Nodes and the runs tab both show it. */

import { CurveChart } from "./chart.js";
import { applyEvent, emptyRun, parseLines, runFromServer } from "./curve.js";
import { button, keepEvents, make, setText } from "./dom.js";
import { facts, progress, stateText } from "./format.js";
import { openViewer } from "./viewer.js";

const POLL_MS = 3000; // only while no live events arrive
const NOTE_MS = 6000;
const START_MS = 90000; // until a run that was started again says so, at most
const ASKED = {
  stop: "Stopping after the current step.",
  save: "Saving after the current step.",
  sample: "Drawing pictures after the current step.",
  pause: "Pausing after the current step.",
  resume: "Going on.",
};

export class RunPanel {
  /**
   * @param {object} server as in server.js
   * @param {string} hint what stands there before the first run
   */
  constructor(server, hint) {
    this.server = server;
    this.run = null;
    this.waiting = null; // events that arrive while the history is being loaded
    this.latest = 0; // counts loads, so that an answer that was overtaken is dropped
    this.liveAt = 0;
    this.watchUntil = 0;
    this.note = "";
    this.noteTimer = 0;
    this.asked = null; // the state in which something was asked for
    this.#build(hint);
    this.timer = setInterval(() => this.#poll(), POLL_MS);
  }

  /** Show a run from the server's files; called again for the same run it only catches up. */
  async bind(name) {
    if (!name) return;
    const load = ++this.latest;
    this.waiting ??= [];
    if (this.run?.name !== name) this.#setRun(emptyRun(name));
    try {
      const detail = await this.server.run(name);
      if (load !== this.latest) return;
      const run = runFromServer(detail);
      const waiting = this.waiting;
      this.waiting = null;
      for (const event of waiting) applyEvent(run, event);
      this.#setRun(run);
    } catch (error) {
      if (load !== this.latest) return;
      this.waiting = null;
      if (error.status === 404) this.#forget(name);
      else this.#say(error.message);
    }
  }

  /** Live lines of events.jsonl. */
  apply(name, lines) {
    this.liveAt = Date.now();
    const events = parseLines(lines);
    if (this.run?.name !== name) {
      this.waiting = events;
      this.bind(name);
    } else if (this.waiting) {
      this.waiting.push(...events);
    } else if (events.length) {
      for (const event of events) applyEvent(this.run, event);
      const saved = events.findLast?.((event) => event.phase === "saved");
      if (saved) this.#say(saved.message ?? "Saved.");
      this.#render();
    } else if (!this.run.alive) {
      this.bind(name); // an empty message: the run begins, or is taken up again
    }
  }

  /** The run has been started again from elsewhere: look until it is under way. */
  watch() {
    this.watchUntil = Date.now() + START_MS;
  }

  /** Draw again, for example in another theme. */
  redraw() {
    this.chart.redraw();
  }

  dispose() {
    clearInterval(this.timer);
    clearTimeout(this.noteTimer);
    this.chart.dispose();
  }

  #build(hint) {
    this.state = make("span", "mapo-state");
    this.name = make("span", "mapo-name");
    this.hint = make("div", "mapo-hint", {}, hint);
    this.fill = make("div", "mapo-bar-fill");
    this.bar = make("div", "mapo-bar", { role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 }, this.fill);
    this.facts = make("div", "mapo-facts");
    const chartBox = make("div", "mapo-chart-box");
    this.chart = new CurveChart(chartBox);
    this.picture = make("img", "mapo-strip-picture", { alt: "", draggable: "false" });
    this.strip = make("button", "mapo-strip", { type: "button", onclick: () => this.#enlarge() }, this.picture);
    this.message = make("div", "mapo-message", { role: "status" });
    this.buttons = {
      stop: button("Stop and save", "End after the current step with a usable LoRA; it can be resumed", () => this.#ask("stop")),
      save: button("Save now", "Write a LoRA file of the current step and go on", () => this.#ask("save")),
      sample: button("Sample now", "Draw the validation pictures with the LoRA as it is now", () => this.#ask("sample")),
      pause: button("Pause", "", () => this.#ask(this.run?.state === "paused" ? "resume" : "pause")),
    };
    this.row = make("div", "mapo-buttons", {}, ...Object.values(this.buttons));
    this.body = make("div", "mapo-panel-body", {},
      make("div", "mapo-head", {}, this.state, this.name), this.bar, this.facts, chartBox, this.strip, this.message, this.row);
    this.body.hidden = true;
    this.element = make("div", "mapo mapo-panel", {}, this.hint, this.body);
    for (const target of [this.row, this.strip, this.chart.canvas]) keepEvents(target, "pointerdown", "mousedown", "dblclick");
  }

  #setRun(run) {
    this.run = run;
    this.#render();
  }

  /** The run has been deleted: the panel is as before the first one. */
  #forget(name) {
    this.run = null;
    this.body.hidden = true;
    this.hint.hidden = false;
    setText(this.hint, `The run ${name} is no longer there.`);
  }

  #render() {
    const run = this.run;
    if (this.asked && this.asked.state !== run.state) {
      this.note = ""; // answered
      this.asked = null;
    }
    this.hint.hidden = true;
    this.body.hidden = false;
    this.element.dataset.state = run.state;
    setText(this.state, stateText(run));
    setText(this.name, run.name);
    this.name.title = run.name;
    this.fill.style.width = `${progress(run) * 100}%`;
    this.bar.setAttribute("aria-valuenow", Math.round(progress(run) * 100));
    this.bar.setAttribute("aria-label", `Steps of run ${run.name}`);
    setText(this.facts, facts(run).join("  ·  "));
    this.chart.show(run);
    this.#renderSample(run);
    this.#renderMessage(run);
    this.row.hidden = !run.alive;
    const busy = !run.alive || run.state === "stopping";
    for (const [verb, element] of Object.entries(this.buttons)) {
      element.disabled = busy || (verb === "save" && run.step === 0) || (run.state === "paused" && verb !== "stop" && verb !== "pause");
    }
    const paused = run.state === "paused";
    setText(this.buttons.pause, paused ? "Resume" : "Pause");
    this.buttons.pause.title = paused ? "Go on with training" : "Wait after the current step; the graphics card's memory stays in use";
  }

  #renderSample(run) {
    const newest = run.samples.at(-1);
    this.strip.hidden = !newest;
    if (!newest) return;
    const url = this.server.fileUrl(run.name, newest.path, newest.step);
    if (this.picture.getAttribute("src") !== url) this.picture.src = url;
    const what = newest.step > 0 ? `step ${newest.step}: base model above, LoRA below` : "the base model";
    this.strip.title = `Newest pictures, ${what}. Click to enlarge.`;
    this.strip.setAttribute("aria-label", this.strip.title);
  }

  #renderMessage(run) {
    const bad = run.state === "failed" || run.state === "interrupted";
    const warning = run.warnings.at(-1);
    let text = this.note;
    if (!text && bad) text = run.message;
    if (!text && warning) text = warning.step ? `Step ${warning.step}: ${warning.message}` : warning.message;
    const copy = !run.alive && run.lora_copy ? `In the LoRA list: ${run.lora_copy}` : "";
    if (!text && run.state === "stopped") text = `Saved at step ${run.step}; Run goes on from there. ${copy}`;
    if (!text) text = copy;
    setText(this.message, text || "");
    this.message.hidden = !text;
    this.message.title = text || "";
    this.message.classList.toggle("mapo-bad", !this.note && bad);
    this.message.classList.toggle("mapo-warning", !this.note && !bad && Boolean(warning));
  }

  async #ask(verb) {
    this.#say(ASKED[verb]);
    this.asked = { state: this.run.state };
    const element = this.buttons[verb === "resume" ? "pause" : verb];
    element.disabled = true; // until the next event says how things stand
    try {
      await this.server.request(this.run.name, verb);
    } catch (error) {
      this.#say(error.message);
      this.bind(this.run.name);
    }
  }

  #say(text) {
    this.note = text;
    this.asked = null;
    clearTimeout(this.noteTimer);
    this.noteTimer = setTimeout(() => {
      this.note = "";
      if (this.run) this.#renderMessage(this.run);
    }, NOTE_MS);
    if (this.run) this.#renderMessage(this.run);
  }

  #enlarge() {
    const { name, samples } = this.run;
    const urlOf = (path) => this.server.fileUrl(name, path, samples.find((s) => s.path === path)?.step ?? "");
    openViewer(name, samples, samples.length - 1, urlOf);
  }

  /** A run whose live events go elsewhere, or nowhere, is read from the server now and then. */
  #poll() {
    const now = Date.now();
    const moving = this.run?.alive || (this.run && now < this.watchUntil);
    const idle = now - this.liveAt > POLL_MS && !this.waiting;
    if (moving && idle && this.element.isConnected && !document.hidden) this.bind(this.run.name);
  }
}
