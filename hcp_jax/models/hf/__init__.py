"""Read and write models in Hugging Face folders: config.json and safetensors."""
