/** A run's validation pictures at full size: arrow keys and buttons go through them, Escape closes. */

import { button, make, setText } from "./dom.js";

/**
 * @param {string} name of the run
 * @param {{step: number, path: string, prompts?: string[]}[]} samples oldest first
 * @param {number} index the first to show
 * @param {(path: string) => string} urlOf
 */
export function openViewer(name, samples, index, urlOf) {
  let at = index;
  const picture = make("img", "mapo-viewer-picture");
  const caption = make("div", "mapo-viewer-caption", { "aria-live": "polite" });
  const earlier = button("Earlier", "Pictures of an earlier step (left arrow)", () => go(-1));
  const later = button("Later", "Pictures of a later step (right arrow)", () => go(1));
  const close = button("Close", "Close (Escape)", () => dialog.close());
  const bar = make("div", "mapo-viewer-bar", {}, caption, earlier, later, close);
  const dialog = make("dialog", "mapo-viewer mapo", { "aria-label": `Pictures of run ${name}` }, picture, bar);

  function go(by) {
    at = Math.min(samples.length - 1, Math.max(0, at + by));
    const { step, path, prompts } = samples[at];
    picture.src = urlOf(path);
    picture.alt = `Base model above, LoRA of step ${step} below: ${(prompts ?? []).join("; ")}`;
    setText(caption, step > 0 ? `${name}, step ${step}: base model above, LoRA below` : `${name}: base model`);
    earlier.disabled = at === 0;
    later.disabled = at === samples.length - 1;
  }

  dialog.addEventListener("keydown", (event) => {
    event.stopPropagation(); // ComfyUI has its own use for these keys
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  go(0);
  dialog.showModal();
  close.focus();
}
