/** The look of panels and tab: ComfyUI's own colours, so that every theme fits. */

const CSS = `
.mapo { --mapo-ink: var(--input-text, var(--fg-color, #ddd)); --mapo-faint: var(--descrip-text, #999);
  --mapo-line: var(--border-color, #4e4e4e); --mapo-back: var(--comfy-input-bg, #222);
  --mapo-grid: color-mix(in srgb, var(--mapo-faint) 35%, transparent); --mapo-go: #45a35c; --mapo-wait: #d98a2b;
  --mapo-end: #4a9be0; --mapo-bad: var(--error-text, #e5484d);
  color: var(--mapo-ink); font: 12px/1.4 Inter, system-ui, sans-serif; box-sizing: border-box; }
.mapo *, .mapo *::before { box-sizing: border-box; }
.mapo [hidden] { display: none !important; }
.mapo-panel { width: 100%; height: 100%; min-height: 0; overflow: hidden; display: flex; flex-direction: column; }
.mapo-hint { margin: auto; padding: 12px; text-align: center; color: var(--mapo-faint); }
.mapo-panel-body { flex: 1; min-height: 0; display: flex; flex-direction: column; gap: 5px; padding: 4px 2px; }
.mapo-head { display: flex; gap: 8px; align-items: baseline; white-space: nowrap; }
.mapo-state { font-weight: 600; }
.mapo-state::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 6px;
  border-radius: 50%; background: var(--mapo-dot, var(--mapo-faint)); }
.mapo [data-state=running], .mapo[data-state=running] { --mapo-dot: var(--mapo-go); }
.mapo [data-state=paused], .mapo[data-state=paused], .mapo [data-state=stopping], .mapo[data-state=stopping],
.mapo [data-state=interrupted], .mapo[data-state=interrupted] { --mapo-dot: var(--mapo-wait); }
.mapo [data-state=finished], .mapo[data-state=finished] { --mapo-dot: var(--mapo-end); }
.mapo [data-state=failed], .mapo[data-state=failed] { --mapo-dot: var(--mapo-bad); }
.mapo-name { margin-left: auto; overflow: hidden; text-overflow: ellipsis; color: var(--mapo-faint); }
.mapo-bar { height: 5px; flex: none; border-radius: 3px; overflow: hidden; background: var(--mapo-grid); }
.mapo-bar-fill { height: 100%; width: 0; background: var(--mapo-dot, var(--mapo-end)); }
.mapo-facts { color: var(--mapo-faint); white-space: pre-wrap; font-variant-numeric: tabular-nums; }
.mapo-chart-box { position: relative; flex: 1 1 150px; min-height: 120px; }
.mapo-chart { position: absolute; inset: 0; width: 100%; height: 100%; display: block; cursor: crosshair;
  font-family: inherit; color: var(--mapo-ink); border-radius: 4px; }
.mapo-chart:focus-visible, .mapo-button:focus-visible, .mapo-strip:focus-visible {
  outline: 2px solid var(--mapo-end); outline-offset: 1px; }
.mapo-strip { flex: 0 1 72px; min-height: 40px; padding: 0; border: 0; border-radius: 4px; overflow: hidden;
  background: none; cursor: zoom-in; display: flex; justify-content: center; }
.mapo-strip-picture { max-width: 100%; height: 100%; object-fit: contain; border-radius: 4px; }
.mapo-message { color: var(--mapo-faint); overflow: hidden; display: -webkit-box; -webkit-box-orient: vertical;
  -webkit-line-clamp: 2; overflow-wrap: anywhere; flex: none; user-select: text; }
.mapo-message.mapo-bad { color: var(--mapo-bad); }
.mapo-message.mapo-warning { color: color-mix(in srgb, var(--mapo-wait) 75%, var(--mapo-ink)); }
.mapo-buttons { display: flex; flex-wrap: wrap; gap: 5px; flex: none; }
.mapo-button { flex: 1 1 auto; padding: 4px 8px; font: inherit; white-space: nowrap; cursor: pointer; border-radius: 5px;
  color: var(--mapo-ink); background: var(--mapo-back); border: 1px solid var(--mapo-line); }
.mapo-button:hover:not(:disabled) { border-color: var(--mapo-end); }
.mapo-button:disabled { opacity: 0.45; cursor: default; }
.mapo-button.mapo-danger { color: var(--mapo-bad); }
.mapo-text { width: 100%; height: 100%; resize: none; padding: 6px 8px; border: 1px solid var(--mapo-line);
  border-radius: 4px; background: var(--mapo-back); font: 11px/1.45 ui-monospace, Consolas, monospace; white-space: pre-wrap;
  overflow: auto; }
.mapo-holder { padding: 0 14px; contain: inline-size; min-width: 340px; }
.mapo-holder:empty { display: none; }
.mapo-viewer { box-shadow: 0 8px 40px rgba(0, 0, 0, 0.6); max-width: 96vw; max-height: 96vh; padding: 10px; border: 1px solid var(--mapo-line); border-radius: 8px;
  background: var(--comfy-menu-bg, #222); margin: auto; }
.mapo-viewer::backdrop { background: rgba(0, 0, 0, 0.65); }
.mapo-viewer-picture { display: block; max-width: 100%; max-height: calc(96vh - 70px); min-width: min(640px, 90vw);
  object-fit: contain; margin: 0 auto 8px; }
.mapo-viewer-bar { display: flex; gap: 6px; align-items: center; }
.mapo-viewer-bar .mapo-button { flex: none; }
.mapo-viewer-caption { margin-right: auto; }
.mapo-tab { height: 100%; display: flex; flex-direction: column; }
.mapo-tab-head { display: flex; gap: 6px; align-items: center; padding: 10px 12px; font-size: 14px; font-weight: 600;
  border-bottom: 1px solid var(--mapo-line); }
.mapo-tab-head .mapo-button { flex: none; margin-left: auto; font-weight: normal; font-size: 12px; }
.mapo-tab-list { flex: 1; min-height: 0; overflow-y: auto; padding: 10px 12px; }
.mapo-tab .mapo-hint { padding: 24px 12px; }
.mapo-card { padding: 10px; margin-bottom: 10px; border: 1px solid var(--mapo-line); border-radius: 8px;
  background: color-mix(in srgb, var(--mapo-back) 45%, transparent); display: flex; flex-direction: column; gap: 6px; }
.mapo-card .mapo-button { background: var(--comfy-menu-bg, #333); }
.mapo-card-head { display: flex; gap: 8px; align-items: baseline; }
.mapo-card-name { flex: 1; min-width: 0; font-weight: 600; overflow-wrap: anywhere; }
.mapo-card-state { flex: none; color: var(--mapo-faint); }
.mapo-card-state::before { content: ""; display: inline-block; width: 8px; height: 8px; margin-right: 5px;
  border-radius: 50%; background: var(--mapo-dot, var(--mapo-faint)); }
.mapo-card-facts { color: var(--mapo-faint); overflow-wrap: anywhere; }
.mapo-card-view { display: flex; gap: 8px; height: 56px; }
.mapo-spark { flex: 1; min-width: 0; width: 0; height: 100%; }
.mapo-card-sample { flex: 0 0 auto; max-width: 55%; padding: 0; border: 0; background: none; cursor: zoom-in; }
.mapo-card-sample img { max-width: 100%; height: 100%; object-fit: contain; border-radius: 4px; display: block; }
.mapo-card-detail { height: 420px; display: flex; flex-direction: column; }
.mapo-card-detail .mapo-head, .mapo-card-detail .mapo-message:not(.mapo-warning) { display: none; }
.mapo-log { margin: 0; max-height: 180px; overflow: auto; padding: 6px; white-space: pre; border-radius: 4px;
  border: 1px solid var(--mapo-line); font: 11px/1.4 ui-monospace, Consolas, monospace; user-select: text; }
.mapo-ask { display: flex; flex-wrap: wrap; gap: 5px; align-items: center; }
.mapo-ask > span { flex: 1 1 100%; }
`;

/** Put the rules into the page, once. */
export function addStyle() {
  if (document.getElementById("mapo-style")) return;
  const style = document.createElement("style");
  style.id = "mapo-style";
  style.textContent = CSS;
  document.head.append(style);
}
