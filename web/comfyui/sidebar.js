/** The runs tab of the side bar: all runs, newest first, kept up to date while it is open. */

import { RunCard } from "./card.js";
import { button, make, setText } from "./dom.js";

const BUSY_MS = 2500; // while something is being trained
const IDLE_MS = 12000;

/**
 * What `registerSidebarTab` takes.
 * @param {(name: string) => void} onResume called when a run was started again
 */
export function sidebarTab(server, onResume) {
  let list = null;
  return {
    id: "mapo-runs",
    icon: "pi pi-chart-line",
    title: "MaPO",
    tooltip: "MaPO: training runs",
    type: "custom",
    render: (container) => {
      list?.close();
      list = new RunTab(server, container, onResume);
    },
    destroy: () => {
      list?.close();
      list = null;
    },
  };
}

class RunTab {
  constructor(server, container, onResume) {
    this.server = server;
    this.onResume = onResume;
    this.cards = new Map();
    this.timer = 0;
    this.asking = false;
    this.closed = false;
    this.message = make("div", "mapo-hint", { role: "status" }, "Reading the runs.");
    this.list = make("div", "mapo-tab-list", {}, this.message);
    const again = button("Refresh", "Read the list of runs again", () => this.refresh());
    const head = make("div", "mapo-tab-head", {}, make("span", "", {}, "Training runs"), again);
    this.element = make("div", "mapo mapo-tab", {}, head, this.list);
    container.replaceChildren(this.element);
    this.refresh();
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    for (const card of this.cards.values()) card.dispose();
    this.cards.clear();
  }

  /** Read the list now, and again after a while. */
  async refresh() {
    clearTimeout(this.timer);
    if (this.closed || this.asking) return;
    this.asking = true;
    let busy = false;
    try {
      const runs = document.hidden ? null : await this.server.runs();
      if (runs && !this.closed) {
        this.#show(runs);
        busy = runs.some((run) => run.alive);
      }
    } catch (error) {
      this.message.hidden = false;
      setText(this.message, error.message);
    }
    this.asking = false;
    // The tab may be closed without a word: an element that has left the page asks for nothing more.
    if (!this.closed && this.element.isConnected) this.timer = setTimeout(() => this.refresh(), busy ? BUSY_MS : IDLE_MS);
  }

  #show(runs) {
    const names = new Set(runs.map((run) => run.name));
    for (const [name, card] of this.cards) {
      if (names.has(name)) continue;
      card.dispose();
      this.cards.delete(name);
    }
    this.message.hidden = runs.length > 0;
    setText(this.message, "No runs yet. Put a Train LoRA node into a workflow, or open one of the MaPO templates.");
    let before = null;
    for (const run of runs) {
      let card = this.cards.get(run.name);
      if (!card) {
        card = new RunCard(this.server, () => this.refresh(), this.onResume);
        this.cards.set(run.name, card);
      }
      const place = before ? before.nextSibling : this.list.firstChild;
      if (card.element !== place) this.list.insertBefore(card.element, place);
      card.show(run);
      before = card.element;
    }
  }
}
