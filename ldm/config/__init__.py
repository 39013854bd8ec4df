"""YAML and key=value words to a frozen, typed tree and back; command line options; errors, help and secrets."""
