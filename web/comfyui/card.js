/** One run in the runs tab: what it is, how far it is, and what can be done with it. */

import { drawSpark } from "./chart.js";
import { runFromServer } from "./curve.js";
import { button, make, setText } from "./dom.js";
import { accuracyText, ago, facts, stateText } from "./format.js";
import { RunPanel } from "./panel.js";
import { openViewer } from "./viewer.js";

const METHODS = { mapo: "MaPO", sft: "plain fine-tuning", diffusion_dpo: "Diffusion-DPO" };
const NOTE_MS = 10000;

export class RunCard {
  /**
   * @param {object} server as in server.js
   * @param {() => void} refresh asks for the list again
   * @param {(name: string) => void} onResume told of a run that was started again
   */
  constructor(server, refresh, onResume) {
    this.server = server;
    this.refresh = refresh;
    this.onResume = onResume;
    this.panel = null;
    this.name = make("span", "mapo-card-name");
    this.state = make("span", "mapo-card-state");
    this.facts = make("div", "mapo-card-facts");
    this.spark = make("canvas", "mapo-spark", { title: "Loss (blue) and held-out accuracy (green) over the steps", role: "img" });
    this.picture = make("img", "", { alt: "", loading: "lazy" });
    this.sample = make("button", "mapo-card-sample", { type: "button", onclick: () => this.#do(() => this.#enlarge()) }, this.picture);
    this.view = make("div", "mapo-card-view", {}, this.spark, this.sample);
    this.detail = make("div", "", { hidden: true });
    this.note = make("div", "mapo-message", { role: "status", hidden: true });
    this.question = make("div", "mapo-ask", { hidden: true, role: "alertdialog" });
    this.buttons = {
      open: button("Details", "Curves with values, pictures, warnings and log", () => this.#toggle()),
      stop: button("Stop and save", "End after the current step with a usable LoRA", () => this.#do(() => this.#stop())),
      resume: button("Resume", "", () => this.#do(() => this.#resume())),
      copy: button("Copy to LoRAs", "Copy the LoRA into ComfyUI's loras folder, under mapo", () => this.#do(() => this.#copy())),
      remove: button("Delete", "Delete the run's folder: checkpoints, pictures and its LoRA file", () => this.#confirm()),
    };
    this.element = make("article", "mapo-card", {},
      make("div", "mapo-card-head", {}, this.name, this.state), this.facts, this.view, this.detail, this.note,
      make("div", "mapo-buttons", {}, ...Object.values(this.buttons)), this.question);
  }

  /** Show a run as the list describes it. */
  show(entry) {
    const run = runFromServer(entry);
    this.run = run;
    this.element.dataset.state = run.state;
    this.element.setAttribute("aria-label", `Run ${run.name}`);
    setText(this.name, run.name);
    setText(this.state, stateText(run));
    setText(this.facts, this.#lines(run).join("\n"));
    this.facts.style.whiteSpace = "pre-line";
    const drawn = run.curve.length > 1;
    this.view.hidden = !(drawn || run.sample) || this.panel !== null;
    this.spark.hidden = !drawn;
    this.spark.setAttribute("aria-label", `Loss and held-out accuracy of run ${run.name}`);
    if (drawn) requestAnimationFrame(() => drawSpark(this.spark, run));
    this.#showSample(run);
    this.buttons.stop.hidden = !run.alive;
    this.buttons.stop.disabled = run.state === "stopping";
    this.buttons.resume.hidden = !run.can_resume;
    this.buttons.resume.title = `Train on from step ${run.resume_step}; free when ComfyUI's queue is empty`;
    this.buttons.copy.hidden = !run.lora || Boolean(run.lora_copy);
    this.buttons.remove.disabled = run.alive;
  }

  dispose() {
    clearTimeout(this.noteTimer);
    this.panel?.dispose();
    this.element.remove();
  }

  #lines(run) {
    const what = [run.model, METHODS[run.method] ?? run.method, ago(run.created)].filter(Boolean).join(" · ");
    const lines = [what, facts(run).slice(0, run.alive ? 3 : 1).join(" · ")];
    lines.push(accuracyText(run));
    if (run.state === "failed" || run.state === "interrupted") lines.push(run.message);
    if (run.lora_copy) lines.push(`In the LoRA list: ${run.lora_copy}`);
    return lines.filter(Boolean);
  }

  #showSample(run) {
    this.sample.hidden = !run.sample;
    if (!run.sample) return;
    const url = this.server.fileUrl(run.name, run.sample, run.step);
    if (this.picture.getAttribute("src") !== url) this.picture.src = url;
    this.sample.title = "Newest pictures: base model above, LoRA below. Click to enlarge.";
    this.sample.setAttribute("aria-label", this.sample.title);
  }

  /** Do something that asks the server; a refusal is shown in the card. */
  async #do(action) {
    try {
      this.#say((await action()) ?? "");
    } catch (error) {
      this.#say(error.message, true);
    }
    this.refresh();
  }

  #say(text, bad = false) {
    clearTimeout(this.noteTimer);
    if (text && !bad) this.noteTimer = setTimeout(() => this.#say(""), NOTE_MS);
    setText(this.note, text);
    this.note.hidden = !text;
    this.note.classList.toggle("mapo-bad", bad);
  }

  async #stop() {
    await this.server.request(this.run.name, "stop");
    return "Stopping after the current step.";
  }

  async #resume() {
    await this.server.resume(this.run.name);
    this.onResume(this.run.name);
    this.panel?.watch();
    return "Started again; loading the model.";
  }

  async #copy() {
    const { lora_name: name } = await this.server.copy(this.run.name);
    return `Copied: ${name}. Press R to refresh the lists in the nodes.`;
  }

  async #enlarge() {
    const { name, samples } = await this.server.run(this.run.name);
    if (samples.length) openViewer(name, samples, samples.length - 1, (path) => this.server.fileUrl(name, path, this.run.step));
  }

  /** Ask once more before deleting, in the card itself. */
  #confirm() {
    const keep = () => {
      this.question.hidden = true;
      this.question.replaceChildren();
      this.buttons.remove.focus();
    };
    const yes = button("Delete for good", `Delete run ${this.run.name}`, () => {
      keep();
      this.#do(async () => {
        await this.server.remove(this.run.name);
        this.element.hidden = true;
      });
    });
    yes.classList.add("mapo-danger");
    const no = button("Keep", "Delete nothing", keep);
    const copied = this.run.lora_copy ? " The copy in the loras folder stays." : "";
    const text = make("span", "", {}, `Delete ${this.run.name} with its checkpoints, pictures and LoRA file?${copied}`);
    this.question.replaceChildren(text, yes, no);
    this.question.hidden = false;
    no.focus();
  }

  async #toggle() {
    if (this.panel) {
      this.panel.dispose();
      this.panel = null;
      this.detail.replaceChildren();
      this.detail.hidden = true;
      setText(this.buttons.open, "Details");
      this.show(this.run);
      return;
    }
    this.panel = new RunPanel(this.server, "");
    const log = make("pre", "mapo-log", { tabindex: 0, "aria-label": "End of the training log", hidden: true });
    this.detail.replaceChildren(make("div", "mapo-card-detail", {}, this.panel.element), log);
    this.detail.hidden = false;
    this.view.hidden = true;
    setText(this.buttons.open, "Less");
    this.panel.bind(this.run.name);
    const found = await this.server.run(this.run.name).catch(() => null);
    setText(log, found?.log ?? "");
    log.hidden = !found?.log;
    log.scrollTop = log.scrollHeight;
  }
}
