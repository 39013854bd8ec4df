"""Launchers, the process group, rank checks, the watchdog, FSDP2 sharding."""
