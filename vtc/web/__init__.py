"""The demo as a web page: `vtc demo --web`. Only `app` and `serve` import gradio."""
