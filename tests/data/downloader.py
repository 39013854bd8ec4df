"""A stand-in for img2dataset: its words, its files, and as much of its work as a test needs."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import urllib.request
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
from PIL import Image


def main(words: list[str]) -> None:
    """Fetch the links of --url_list into --output_folder."""
    said = {words[i].removeprefix("--"): words[i + 1] for i in range(0, len(words), 2)}
    out = Path(said["output_folder"])
    out.mkdir(parents=True, exist_ok=True)
    rows, size = parquet.read_table(said["url_list"]).to_pylist(), int(said["number_sample_per_shard"])
    verify = json.loads(said["verify_hash"])[0] if "verify_hash" in said else None
    for number in range(0, -(-len(rows) // size)):
        name = f"{number:05}"
        if (out / f"{name}_stats.json").exists():
            continue  # incremental
        told, good = [], 0
        with tarfile.open(out / f"{name}.tar", "w") as tar:
            for i, row in enumerate(rows[number * size : (number + 1) * size]):
                key, url = f"{name}{i:04}", row[said["url_col"]]
                record = {"url": url, "key": key, "status": "success", "error_message": None}
                try:
                    with urllib.request.urlopen(url, timeout=float(said["timeout"])) as answer:
                        data = answer.read()
                    Image.open(io.BytesIO(data)).load()
                    if verify and hashlib.sha256(data).hexdigest() != row[verify]:
                        raise ValueError("hash mismatch")
                except Exception as error:
                    record |= {"status": "failed_to_download", "error_message": str(error)}
                else:
                    good += 1
                    for suffix, content in (("jpg", data), ("txt", row[said["caption_col"]].encode())):
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
                told.append(record)
        parquet.write_table(arrow.Table.from_pylist(told), out / f"{name}.parquet")
        (out / f"{name}_stats.json").write_text(json.dumps({"count": len(told), "successes": good}))


if __name__ == "__main__":
    main(sys.argv[1:])
