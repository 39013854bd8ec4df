"""Signature: what a file is by its first bytes, where weights were expected."""

from __future__ import annotations

from pathlib import Path

HEAD = 4096  # bytes that are looked at
LENGTH = 8  # bytes of the header's length, in which a safetensors file begins; the header is JSON
ZIP = b"PK\x03\x04"  # torch's files are such archives, and so are others
PICKLED = tuple(bytes((0x80, protocol)) for protocol in range(2, 6))  # how torch's files began before 2020
PLAIN = (b"(", b"]", b"}", b"c")  # how pickles of protocol 0 and 1 may begin; they end in a full stop
LFS = b"version https://git-lfs"  # how the note begins that git leaves where a large file was not fetched
KINDS: tuple[tuple[bytes | tuple[bytes, ...], str], ...] = (
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive; unpack it"),
    (b"Rar!", "a RAR archive; unpack it"),
    (b"GGUF", "a GGUF file (llama.cpp, stable-diffusion.cpp), which is not read; get the model as .safetensors"),
    (b"\x89HDF", "an HDF5 file (Keras), which is not read; get the model as .safetensors"),
    (b"\x93NUMPY", "a NumPy array without names; save its tensors as .safetensors"),
    (tuple(bytes((8, version, 18)) for version in range(3, 16)), "an ONNX graph; get the weights as .safetensors"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"RIFF", "a picture or a film"),
    (b"\xfd7zX", "an xz archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it"),
)


def is_pickle(file: Path) -> bool:
    """Whether it begins as what torch saves, and not as safetensors, whose header's length may begin alike.

    Raises:
        OSError: as the file system says.
    """
    head = _head(file, LENGTH + 1)
    return head.startswith((ZIP, *PICKLED)) and head[LENGTH:] != b"{"


def is_weights(file: Path) -> bool:
    """Whether it begins as a safetensors file or as what torch saves.

    Raises:
        OSError: as the file system says.
    """
    head = _head(file, LENGTH + 1)
    return head[LENGTH:] == b"{" or head.startswith((ZIP, *PICKLED))


def _head(file: Path, many: int) -> bytes:
    with file.open("rb") as opened:
        return opened.read(many)


def instead(file: Path) -> str:
    """What a file that is no safetensors file is, and what would help; empty where that is not known."""
    with file.open("rb") as opened:
        head = opened.read(HEAD)
        opened.seek(0, 2)
        size = opened.tell()
        opened.seek(max(0, size - 1))
        last = opened.read(1)
    words = head.lstrip().lower()
    if not size:
        return "empty; copy it again"
    if head.startswith(LFS):
        return "only a Git LFS pointer, not the weights; run `git lfs pull` in that folder"
    if not head.strip(b"\0"):
        return "nothing but zeros where it begins, a download that was broken off; copy it again"
    if words.startswith(b"<"):
        return "a web page, not weights; the download needs another address or a log-in"
    if head.startswith(PLAIN) and last == b".":
        return "a pickle of protocol 0 or 1, which torch does not write; save the tensors by torch.save or as .safetensors"
    if found := next((what for start, what in KINDS if head.startswith(start) and head[LENGTH : LENGTH + 1] != b"{"), ""):
        return f"{found}; it holds no weights" if found.startswith("a picture") else found
    if words.startswith(b"{"):
        return "JSON, not weights, as a site answers a wrong address; get the file again"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    if b"\0" not in head and not any(byte < 9 for byte in head):
        return f"a text that begins with {head[:40].decode('utf-8', 'replace')!a}, not weights"
    return ""
