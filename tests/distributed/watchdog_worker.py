"""The keeper of a launch's store, or a process whose main thread waits while the keeper is killed: KIND PORT [BEFORE]."""

from __future__ import annotations

import os
import sys
import time

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as ldm.distributed.environment.prepare does

from torch.distributed import TCPStore

from ldm.distributed.watchdog import Place, Watchdog

kind, port = sys.argv[1], int(sys.argv[2])
store = TCPStore("127.0.0.1", port, None, kind == "keeper", wait_for_workers=False)
if kind == "keeper":
    if sys.argv[3:]:
        store.set("cause", sys.argv[3])
    print("there", flush=True)
    time.sleep(100)
watchdog = Watchdog(store, 1, 2, 100)
watchdog.at(Place(1, 5, 2, "backward pass", True, "autoencoder"))
print("there", flush=True)
if kind == "both":  # the main thread notices too, at the same time
    own = TCPStore("127.0.0.1", port, None, False)
    try:
        while True:
            own.check(["at/1"])
    except Exception as error:
        sys.exit(watchdog.failed(RuntimeError(f"gloo: {error}")))
time.sleep(100)
