"""The faces that a browser shows: `comfyui` inside ComfyUI, `gradio_app` on its own."""
