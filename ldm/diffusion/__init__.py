"""Mathematics: schedules, process, guidance and samplers, addressed randomness, and the types that flow."""
