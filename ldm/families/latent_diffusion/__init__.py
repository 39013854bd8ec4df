"""Text-to-image latent diffusion: what learns, the sampling engine, edits, fine-tuning, the form that only draws."""
