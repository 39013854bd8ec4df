"""Tokenizers, frozen text encoders, prompt syntax, textual inversion."""
