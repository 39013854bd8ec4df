"""Everything that learns: the contract, what drawing is, the registry, and the families."""
