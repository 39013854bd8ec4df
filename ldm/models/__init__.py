"""Networks under diffusers' parameter names, one file each; LoRA, the inference form, costs on the meta device."""
