"""Models in Hugging Face folders: their config.json and their safetensors, read and written."""
