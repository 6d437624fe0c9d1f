"""How the pages look: system fonts (nothing is fetched from elsewhere), colours, and a few rules for small screens."""

from __future__ import annotations

import gradio as gr

_SANS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "Liberation Mono", "monospace")


def theme() -> gr.themes.Base:
    """The theme; light or dark as the browser asks."""
    return gr.themes.Soft(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=[gr.themes.Font(name) for name in _SANS],
        font_mono=[gr.themes.Font(name) for name in _MONO],
    ).set(
        block_title_background_fill="transparent",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_title_text_weight="600",
        block_label_text_weight="500",
        block_border_width="0",
        block_info_text_color="*neutral_600",  # the theme's own is too pale to read on white
        block_info_text_color_dark="*neutral_400",
        input_border_width="1px",
        input_border_color="*neutral_300",
        input_border_color_dark="*neutral_600",
        input_shadow="none",
        button_secondary_shadow="none",
        button_secondary_border_color="*border_color_primary",
        checkbox_label_shadow="none",
    )


CSS = """
.gradio-container main { width: 100%; min-width: 0; max-width: 1240px !important; margin: 0 auto !important; }
.mapo-head h1 { margin: 0; font-size: 1.35rem; }
.mapo-head p { margin: 0; opacity: .75; }
.mapo-status { font-size: .95rem; line-height: 1.5; }
.mapo-bar { height: 8px; border-radius: 4px; background: var(--neutral-200); overflow: hidden; margin: 6px 0; }
.dark .mapo-bar { background: var(--neutral-700); }
.mapo-bar > div { height: 100%; background: var(--primary-500); }
.mapo-badge { display: inline-block; padding: 1px 9px; border-radius: 10px; font-size: .82rem; font-weight: 600;
  background: var(--neutral-200); color: var(--neutral-800); }
.mapo-badge.running, .mapo-badge.starting { background: var(--primary-600); color: #fff; }
.mapo-badge.failed { background: #b91c1c; color: #fff; }
.mapo-badge.finished { background: #166534; color: #fff; }
.mapo-facts { display: flex; flex-wrap: wrap; gap: 2px 18px; }
.mapo-runs td, .mapo-runs th { white-space: nowrap; }
.mapo-log textarea { font-family: var(--font-mono) !important; font-size: .78rem !important; }
.mapo-badge.error { background: #b91c1c; color: #fff; }
.mapo-badge.warning { background: #b45309; color: #fff; }
.mapo-pair { padding: 8px 10px 4px; }
.mapo-pair.excluded img { opacity: .35; filter: grayscale(1); }
.mapo-card-head { font-size: .82rem; opacity: .85; overflow-wrap: anywhere; padding-bottom: 4px; }
.mapo-two { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.mapo-two.small { width: 136px; gap: 2px; flex: none; }
.mapo-two figure { margin: 0; }
.mapo-two figcaption { font-size: .78rem; text-align: center; opacity: .75; }
.mapo-two img { width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--neutral-100); border-radius: 4px;
  image-rendering: auto; }
.dark .mapo-two img { background: var(--neutral-800); }
.mapo-gone { aspect-ratio: 1; display: grid; place-items: center; font-size: .75rem; overflow-wrap: anywhere;
  background: var(--neutral-100); color: var(--neutral-700); border-radius: 4px; padding: 4px; text-align: center; }
.mapo-card .gr-group, .mapo-card .styler, .mapo-finding, .mapo-finding .styler {
  background: var(--block-background-fill) !important; }
.mapo-card .gr-group, .mapo-finding { border: 1px solid var(--border-color-primary); }
.gradio-container input[type="checkbox"]:not(:checked), .gradio-container input[type="radio"]:not(:checked) {
  border-color: var(--neutral-400); }
.mapo-card-row { align-items: center; padding: 4px 8px 8px; gap: 6px; }
.mapo-card-row label { background: none; border: 0; box-shadow: none; padding: 0 4px; }
.mapo-cards > .mapo-card { flex: 1 1 31% !important; }
.mapo-message { font-size: .85rem; overflow-wrap: anywhere; padding: 3px 0; }
.mapo-strip { display: flex; gap: 10px; overflow-x: auto; padding-bottom: 4px; contain: inline-size; }
.mapo-finding { padding: 8px 10px; }
.mapo-finding .mapo-finding { padding: 0; border: 0 !important; }
.mapo-grid { overflow-x: auto; contain: inline-size; }
.mapo-grid thead, .mapo-grid tbody, .mapo-grid tr { border: 0 !important; }
.mapo-grid table { border-collapse: collapse; font-size: .88rem; width: 100%; border: 0 !important; }
.mapo-grid th, .mapo-grid td { border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important;
  padding: 5px 14px 5px 2px !important; text-align: left; vertical-align: top; color: var(--body-text-color); }
.mapo-grid code { font-size: .78rem; overflow-wrap: anywhere; white-space: normal; }
.gradio-container .secondary-wrap input { text-overflow: ellipsis; padding-right: 30px; }
.mapo-fields:not(:has(.block)) { display: none; }
.mapo-finding button.secondary, .mapo-card-row button.secondary {
  border: 1px solid var(--border-color-primary) !important; border-radius: var(--button-small-radius) !important; }
.mapo-beside { align-self: flex-end; margin-bottom: 12px; flex-grow: 0 !important; }
#run-samples .thumbnail-lg { aspect-ratio: auto; height: auto; }
#run-samples .thumbnail-lg img { height: auto; }
@media (max-width: 640px) {
  .gradio-container { max-width: 100vw !important; overflow-x: clip; }
  .gradio-container main, .gradio-container .main, .gradio-container .wrap { padding-left: 4px !important;
    padding-right: 4px !important; max-width: 100% !important; }
  .mapo-head h1 { font-size: 1.15rem; }
  #mapo-tabs > .tab-wrapper button, #evaluate-parts > .tab-wrapper button, #pairs-sources > .tab-wrapper button {
    padding-left: 7px; padding-right: 7px; }
}
"""
