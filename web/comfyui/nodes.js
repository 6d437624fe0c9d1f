/** What this pack adds to its nodes: the live panel of the training node, and the text that other nodes answer with. */

import { keepEvents, make } from "./dom.js";
import { RunPanel } from "./panel.js";

export const TRAIN_NODE = "MaPOTrainLoRA";
const HINT = "Curves, pictures and buttons appear here when the training begins.";
const PANEL_HEIGHT = 400;
const TEXT_HEIGHT = 140;
const MARGIN = 20; // that the old front end leaves around an element
const REMEMBERED = "mapo_run";
const MOUNT_MS = 1000;

const panelOf = new WeakMap();
const panels = new Set();

/**
 * Add what belongs to a node; called once for every node that is made.
 * @param {{rootGraph: Function, openGraph: Function, changed: Function}} page the graph of the workflow; the graph that
 *   is open, which may be a subgraph; tells ComfyUI that the workflow is another one than it has saved
 */
export function dressNode(node, server, page) {
  if (!node.comfyClass?.startsWith("MaPO")) return;
  if (node.comfyClass === TRAIN_NODE) addPanel(node, server, page);
  after(node, "onExecuted", (output) => {
    if (output?.mapo_run?.length) showRun(node, String(output.mapo_run[0]), page);
    if (output?.mapo_text?.length) showText(node, output.mapo_text.join("\n"), page);
  });
}

/** Pass a message of the server on to the node that it is about. */
export function onProgress(page, { node: id, run, events }) {
  const node = findNode(page.rootGraph(), id);
  const panel = node && panelOf.get(node);
  if (!panel || !run) return;
  remember(node, run, page);
  panel.apply(run, events);
}

/** Show the runs that are being trained right now in their nodes, after the page was loaded again. */
export async function takeUp(page, server) {
  for (const { node: id, run } of await server.active()) {
    const node = findNode(page.rootGraph(), id);
    if (node) showRun(node, run, page);
  }
}

/** A run was started again from the runs tab: nodes that show it follow it. */
export function followAgain(name) {
  for (const panel of panels) if (panel.run?.name === name) panel.watch();
}

/** Draw the charts again, in the colours of another theme. */
export function redrawPanels() {
  for (const panel of panels) panel.redraw();
}

/**
 * The node that an id from the server means: "7", or "5:3" for node 3 in the subgraph that node 5 stands for.
 */
export function findNode(rootGraph, id) {
  let graph = rootGraph;
  let node = null;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
    graph = node?.subgraph;
  }
  return node;
}

function addPanel(node, server, page) {
  const panel = new RunPanel(server, HINT);
  panelOf.set(node, panel);
  panels.add(panel);
  addElement(node, "mapo_panel", panel.element, PANEL_HEIGHT, page);
  after(node, "onConfigure", () => panel.bind(node.properties?.[REMEMBERED]));
  after(node, "onRemoved", () => {
    panels.delete(panel);
    panel.dispose();
  });
}

function showRun(node, run, page) {
  const panel = panelOf.get(node);
  if (!panel) return;
  remember(node, run, page);
  panel.bind(run);
}

/** A saved workflow, and the one that the page keeps for itself, find their curves again. */
function remember(node, run, page) {
  node.properties ??= {};
  if (node.properties[REMEMBERED] === run) return;
  node.properties[REMEMBERED] = run;
  page.changed();
}

function showText(node, text, page) {
  let area = node.mapoText;
  if (!area) {
    area = make("textarea", "mapo mapo-text", { readonly: true, spellcheck: "false", "aria-label": `Report of ${node.title}` });
    keepEvents(area, "pointerdown", "mousedown", "keydown", "wheel", "contextmenu");
    node.mapoText = area;
    addElement(node, "mapo_text", area, TEXT_HEIGHT, page);
    grow(node);
  }
  area.value = text;
}

/** A widget that shows an element, takes all the room that is left in the node, and is not saved. */
function addElement(node, name, element, minHeight, page) {
  element.style.minHeight = `${minHeight - MARGIN}px`; // Vue nodes ask for no other height
  const options = { serialize: false, hideOnZoom: false, canvasOnly: true, getMinHeight: () => minHeight };
  const widget = node.addDOMWidget(name, name, element, options);
  // The properties panel of newer front ends sets a width of its own and leaves it there.
  Object.defineProperty(widget, "width", { get: () => undefined, set: () => {}, configurable: true });
  widget.serialize = false; // the option alone is not enough: positional widget values would shift
  const timer = setInterval(() => putIntoBody(node, element, minHeight, page), MOUNT_MS);
  after(node, "onRemoved", () => clearInterval(timer));
}

/**
 * The first Vue nodes (front end 1.27) leave out widgets that are elements. Where the page shows the node without its
 * element, the element goes to the end of the node's body; a front end that shows it later just takes it from there.
 */
function putIntoBody(node, element, minHeight, page) {
  if (element.isConnected || document.hidden || !node.graph || node.graph !== page.openGraph()) return;
  const body = document.querySelector(`[data-testid="node-body-${CSS.escape(String(node.id))}"]`);
  if (!body) return;
  const holder = make("div", "mapo-holder", {}, element);
  holder.style.height = `${minHeight}px`;
  body.append(holder);
}

/** Make the node as large as its widgets need, never smaller than it is. */
function grow(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.graph?.setDirtyCanvas?.(true, true);
}

/** Call `then` after what the node already does; ComfyUI's own handler keeps its place and its answer. */
function after(node, name, then) {
  const before = node[name];
  node[name] = function (...given) {
    const answer = before?.apply(this, given);
    try {
      then(...given);
    } catch (error) {
      console.warn(`MaPO: ${name} of node ${this.id}:`, error);
    }
    return answer;
  };
}
