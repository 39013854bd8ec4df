"""Model folders: what is written comes back, foreign layouts open, and each fault has one clear message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ldm.config.errors import UserError
from ldm.formats.model_folder import open_model
from ldm.formats.part import content_hash, load_module, load_part, read_safetensors, save_part

STEM = "diffusion_pytorch_model"


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.GroupNorm(1, 5))


@pytest.fixture
def part(tmp_path: Path) -> Path:
    save_part({"_class_name": "Tiny", "width": 5}, dict(tiny().state_dict()), tmp_path / "unet")
    return tmp_path / "unet"


def test_a_part_comes_back(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 4).T, "b.c": torch.tensor(2.0, dtype=torch.float16), "e": torch.zeros(0, 3)}
    save_part({"_class_name": "Tiny", "ü": [1]}, state, tmp_path / "part")
    config, found = load_part(tmp_path / "part")
    assert config == {"_class_name": "Tiny", "ü": [1]}
    assert found.keys() == state.keys()
    assert all(torch.equal(found[k], state[k]) and found[k].dtype == state[k].dtype for k in state)
    assert sorted(p.name for p in (tmp_path / "part").iterdir()) == ["config.json", f"{STEM}.safetensors"]


def test_a_failed_write_leaves_the_old_part(part: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content_hash(part)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_part({}, {"x": torch.zeros(9)}, part)
    assert content_hash(part) == before
    assert not list(part.glob(".*"))


def test_diffusers_reads_it_and_writes_what_we_read(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    theirs.save_pretrained(tmp_path / "theirs")
    config, state = load_part(tmp_path / "theirs")
    assert state.keys() == theirs.state_dict().keys()
    save_part(config, state, tmp_path / "ours")
    again = AutoencoderKL.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in theirs.state_dict().items())


def test_sharded_and_half_precision_folders_of_diffusers_open(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    theirs.save_pretrained(tmp_path / "sharded16", max_shard_size="10KB", variant="fp16")
    theirs.save_pretrained(tmp_path / "half", variant="fp16")
    for name in ("sharded", "sharded16", "half"):
        state = load_part(tmp_path / name)[1]
        assert state.keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, state[key]) for key, value in theirs.state_dict().items())


def test_attention_names_of_2022_are_understood(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    theirs = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    today = theirs.state_dict()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in today.items():
        for new, former in names.items():
            name = name.replace(f".{new}.", f".{former}.")
        old[name] = value
    assert old.keys() != today.keys()
    save_part({}, old, tmp_path / "vae")
    found = load_part(tmp_path / "vae")[1]
    assert found.keys() == today.keys() and all(torch.equal(found[k], today[k]) for k in today)


def test_a_module_gets_exactly_these_weights(part: Path) -> None:
    state = load_part(part)[1]
    before = torch.get_rng_state()
    module = load_module(tiny, state, part)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(p.requires_grad and p.device.type == "cpu" for p in module.parameters())


def test_half_precision_weights_become_what_the_module_computes_in(part: Path) -> None:
    state = {name: value.half() for name, value in load_part(part)[1].items()}
    module = load_module(tiny, state, part)
    assert all(p.dtype == torch.float32 for p in module.parameters())
    with torch.no_grad():
        module.get_parameter("0.weight").zero_()
    assert state["0.weight"].abs().sum() > 0  # a copy, not a view


def test_buffers_that_are_not_stored_are_computed(part: Path) -> None:
    class WithBuffer(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("steps", torch.arange(4), persistent=False)

    module = load_module(WithBuffer, dict(nn.Linear(2, 2).state_dict()), part)
    assert module.steps.tolist() == [0, 1, 2, 3]  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("0.weight"), ["missing: 0.weight"]),
        (lambda s: s.update(other=torch.zeros(1)), ["left over: other"]),
        (lambda s: s.update({"0.bias": torch.zeros(7)}), ["0.bias has shape [7], not [5]"]),
        (lambda s: s.update({"0.bias": torch.zeros(5, dtype=torch.int64)}), ["0.bias is int64"]),
        (lambda s: [s.update({f"n{i:02d}": torch.zeros(1)}) for i in range(40)], ["n00, n01, n02 and 37 more"]),
    ],
)
def test_weights_that_do_not_fit_are_named(part: Path, change, words: list[str]) -> None:  # type: ignore[no-untyped-def]
    state = load_part(part)[1]
    change(state)
    with pytest.raises(UserError) as caught:
        load_module(tiny, state, part)
    assert str(part) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert all(word in str(caught.value) for word in words)


def break_file(part: Path, what: str) -> str:
    """Damage a part; the words that the message must hold."""
    weights, config = part / f"{STEM}.safetensors", part / "config.json"
    index = part / f"{STEM}.safetensors.index.json"
    match what:
        case "no folder":
            weights.unlink(), config.unlink(), part.rmdir()
            return "no such folder"
        case "no config":
            config.unlink()
            return "config.json is missing"
        case "config cut":
            config.write_bytes(config.read_bytes()[:9])
            return "config.json is not readable JSON"
        case "config a list":
            config.write_text("[1]")
            return "a JSON object was expected"
        case "config deep":
            config.write_text("[" * 100_000)
            return "config.json is not readable JSON"
        case "no weights":
            weights.unlink()
            return "no weights here"
        case "pickle":
            weights.rename(part / f"{STEM}.bin")
            return "convert the model to safetensors"
        case "git lfs":
            weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
            return "git lfs pull"
        case "empty":
            weights.write_bytes(b"")
            return "empty; copy it again"
        case "shard missing":
            weights.unlink()
            index.write_text(json.dumps({"weight_map": {"a": f"{STEM}-00001-of-00001.safetensors"}}))
            return "00001-of-00001.safetensors is missing"
        case "shard outside":
            weights.rename(part.parent / "x.safetensors")
            index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
            return "no safetensors file beside it"
        case "index empty":
            weights.unlink()
            index.write_text("{}")
            return "no weight_map"
        case "twice":
            weights.unlink()
            for i in range(2):
                save_file({"a": torch.zeros(1)}, part / f"{i}.safetensors")
            index.write_text(json.dumps({"weight_map": {"a": "0.safetensors", "b": "1.safetensors"}}))
            return "in another file of this part too"
    raise AssertionError(what)


FAULTS = (
    "no folder",
    "no config",
    "config cut",
    "config a list",
    "config deep",
    "no weights",
    "pickle",
    "git lfs",
    "empty",
    "shard missing",
    "shard outside",
    "index empty",
    "twice",
)


@pytest.mark.parametrize("what", FAULTS)
def test_faults_of_a_part_are_told_in_one_line(part: Path, what: str) -> None:
    words = break_file(part, what)
    with pytest.raises(UserError) as caught:
        load_part(part)
    said = str(caught.value)
    assert words in said and str(part.name) in said and "\n" not in said


def test_every_truncation_is_refused(part: Path) -> None:
    file = part / f"{STEM}.safetensors"
    data = file.read_bytes()
    for length in range(0, len(data), max(1, len(data) // 100)):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match="copy it again"):
            read_safetensors(file)


def test_changed_headers_load_nothing_else(part: Path) -> None:
    file = part / f"{STEM}.safetensors"
    data = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    whole = load_part(part)[1]
    for bit in range(0, 8 * header, 5):
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        data[bit // 8] ^= 1 << bit % 8
        try:
            module = load_module(tiny, load_part(part)[1], part)
        except UserError:
            continue
        # What still loads has the right names and shapes; only offsets or the metadata can have changed.
        assert module.state_dict().keys() == whole.keys()


def test_a_reader_keeps_its_weights_when_the_file_is_cut(part: Path) -> None:
    state = load_part(part)[1]
    copy = {name: value.clone() for name, value in state.items()}
    (part / f"{STEM}.safetensors").write_bytes(b"")
    assert all(torch.equal(state[name], copy[name]) for name in state)


def test_the_hash_is_of_names_and_content(part: Path) -> None:
    first = content_hash(part)
    for name in ("README.md", ".partial", "manifest.json", "picture.png"):
        (part / name).write_text("{}")
    (part / ".cache").mkdir()
    (part / ".cache" / "x.json").write_text("{}")
    assert content_hash(part) == first
    (part / "more.txt").write_text("x")
    second = content_hash(part)
    (part / "more.txt").rename(part / "less.txt")
    assert len({first, second, content_hash(part)}) == 3


def whole(folder: Path, *parts: str) -> Path:
    for name in parts or ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
        (folder / name).mkdir(parents=True)
    return folder


def test_a_model_is_found_by_its_folder_or_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = whole(tmp_path / "runs" / "one" / "model")
    assert open_model(made).folder == made
    assert open_model(str(tmp_path / "runs" / "one")).folder == made
    assert open_model(made).parts == ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_model("~/runs/one").folder == made
    assert "vqvae" in open_model(whole(tmp_path / "vq", "unet", "vqvae", "text_encoder", "tokenizer", "scheduler")).parts


def test_what_is_no_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "half"
    (run / "stages").mkdir(parents=True)
    graphs = whole(tmp_path / "graphs", "unet", "text_encoder", "tokenizer", "scheduler", "vae_decoder")
    (graphs / "unet" / "model.onnx").write_bytes(b"")
    (tmp_path / "file.safetensors").write_bytes(b"")
    for name, words in {
        "runs/half": "its run is not finished, or its configuration has no export stage",
        "file.safetensors": "empty; copy it again",
        "/no/such/place": "no such folder",
        "runs/none": "no such folder or file; give",  # a folder `runs` is here, so this is no name on the hub
        "one": "no such folder",
        "": "missing",
        str(graphs): "an ONNX or OpenVINO export, which ldm writes and does not open; give the model that it was made of",
        str(whole(tmp_path / "part", "unet", "scheduler")): "vae, text_encoder, tokenizer missing",
    }.items():
        with pytest.raises(UserError, match=words) as caught:
            open_model(name)
        assert "\n" not in str(caught.value)


def test_hub_names_go_to_the_hub_for_safe_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    asked: list[tuple[str, list[str], list[str]]] = []
    offline: list[bool] = []

    def answer(name: str, *, allow_patterns: list[str], ignore_patterns: list[str], local_files_only: bool) -> str:
        asked.append((name, allow_patterns, ignore_patterns))
        offline.append(local_files_only)
        return str(tmp_path / "snapshot")

    whole(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    assert open_model("owner/name").folder == tmp_path / "snapshot"
    [(name, allowed, ignored)] = asked
    assert name == "owner/name" and offline == [True]
    monkeypatch.setenv("LDM_HUB", "1")
    open_model("owner/name")
    assert offline == [True, False]

    def fetched(file: str) -> bool:
        return any(fnmatch.fnmatch(file, p) for p in allowed) and not any(fnmatch.fnmatch(file, p) for p in ignored)

    for file in ("model_index.json", "unet/config.json", f"unet/{STEM}.safetensors", "tokenizer/merges.txt"):
        assert fetched(file)
    for file in ("v1-5.safetensors", "unet/x.bin", "unet/x.py", f"unet/{STEM}.fp16.safetensors", "safety_checker/model.safetensors"):
        assert not fetched(file)


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(*words: object, **named: object) -> str:
        raise ConnectionError("no route to host\nand many more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(UserError, match=r"owner/name: no such folder, .* only when it is asked for: --hub, or LDM_HUB=1$"):
        open_model("owner/name")
    monkeypatch.setenv("LDM_HUB", "1")
    with pytest.raises(UserError, match=r"owner/name: no such folder, and it could not be had from the hub \(no route to host\)$"):
        open_model("owner/name")
