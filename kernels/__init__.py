"""Pure tensor functions of the three methods: the torch reference of each, without any import of ComfyUI."""
