"""Token models: one transformer over the codes of a VQ autoencoder, in masked or causal order."""
