/**
 * The only file here that registers something with ComfyUI; all others are modules that it uses. ComfyUI loads each of
 * them as an extension of its own, so none may do anything when it is imported.
 */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { dressNode, followAgain, onProgress, redrawPanels, takeUp } from "./nodes.js";
import { makeServer } from "./server.js";
import { sidebarTab } from "./sidebar.js";
import { addStyle } from "./style.js";

const server = makeServer(api);
let warned = false;
let ready = false; // there is no graph before, and asking for it is an error in newer front ends

/** Do it; a page on which it fails works as it would without us, and says so once. */
function guarded(what, action) {
  const warn = (error) => {
    if (!warned) console.warn(`MaPO: ${what} is off on this page:`, error);
    warned = true;
  };
  try {
    action()?.catch?.(warn);
  } catch (error) {
    warn(error);
  }
}

const page = {
  rootGraph: () => app.rootGraph ?? app.graph,
  openGraph: () => app.canvas?.graph,
  changed: () =>
    guarded("keeping the node's run", () => app.extensionManager?.workflow?.activeWorkflow?.changeTracker?.checkState?.()),
};

function watchTheme() {
  const observer = new MutationObserver(redrawPanels);
  for (const element of [document.documentElement, document.body]) {
    observer.observe(element, { attributes: true, attributeFilter: ["class", "style"] });
  }
}

// ComfyUI's own notice of a failed node does not say what is wrong with it.
guarded("notices", () =>
  api.addEventListener("execution_error", ({ detail }) => {
    if (!String(detail?.node_type).startsWith("MaPO")) return;
    guarded("a notice", () =>
      app.extensionManager.toast.add({
        severity: "error",
        summary: "MaPO",
        detail: String(detail.exception_message).slice(0, 600),
        life: 30000,
      }),
    );
  }),
);

// At once, because ComfyUI warns of messages that nobody listens to; what comes too early is read from the server later.
guarded("the live chart", () =>
  api.addEventListener("mapo.progress", ({ detail }) => {
    if (ready) guarded("the live chart", () => onProgress(page, detail));
  }),
);

guarded("the front end", () =>
  app.registerExtension({
    name: "MaPO.Runs",
    async setup() {
      guarded("the style", () => addStyle());
      guarded("the live chart", () => {
        ready = true;
        watchTheme();
        return takeUp(page, server);
      });
      guarded("the runs tab", () => app.extensionManager.registerSidebarTab(sidebarTab(server, followAgain)));
    },
    nodeCreated(node) {
      guarded("the chart in the node", () => dressNode(node, server, page));
    },
    afterConfigureGraph() {
      guarded("taking up running charts", () => takeUp(page, server));
    },
  }),
);
