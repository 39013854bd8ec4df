"""Text encoders: the tokenizer that a run learns, what is encoded, and folders both ways."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ldm.config.errors import UserError
from ldm.text.encoder import BYTES, ROWS, SmallText, TextEncoder, small_clip_text, train_tokenizer
from ldm.text.textual_inversion import add_word

CAPTIONS = [f"a {size} {colour} {shape}" for size in ("small", "large") for colour in ("red", "blue") for shape in ("ring", "circle")]
SMALL = SmallText(width=16, layers=2, heads=2, max_tokens=12)


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, 560, SMALL.max_tokens)
    return TextEncoder(small_clip_text(SMALL, tokenizer).eval().requires_grad_(False), tokenizer)


def fresh(encoder: TextEncoder) -> TextEncoder:
    """The same without its memory."""
    return TextEncoder(encoder.model, encoder.tokenizer)


# The tokenizer


def test_special_ids_stay_clear_of_the_pooling_trap(encoder: TextEncoder) -> None:
    tokenizer = encoder.tokenizer
    assert min(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) > 2
    assert encoder.model.config.eos_token_id == tokenizer.eos_token_id
    assert len(tokenizer) <= 560 and encoder.model.config.vocab_size == len(tokenizer)


def test_pooling_is_at_the_end_token(encoder: TextEncoder) -> None:
    prompts = ["a red ring", "", "a very large red ring " * 9]
    ids, mask = encoder.tokens(prompts)
    text = fresh(encoder).encode(prompts)
    for i in range(len(prompts)):
        end = ids[i].tolist().index(encoder.tokenizer.eos_token_id)
        assert end == int(mask[i].sum()) - 1
        assert torch.equal(text.pooled[i], text.tokens[i, end])  # type: ignore[index]


def test_learned_words_are_short_and_any_text_has_a_spelling(encoder: TextEncoder) -> None:
    ids = encoder.tokenizer("a small red circle")["input_ids"]
    assert len(ids) == 2 + 4
    for text in ("日本語 ü 🙂‍↔️", "unseen wörds", "\x00\x07", "<b>&amp;"):
        ids = encoder.tokenizer(text)["input_ids"][1:-1]
        assert encoder.tokenizer.unk_token_id not in ids and len(ids) >= 1


def reading(captions: list[str], vocabulary: int) -> TextEncoder:
    tokenizer = train_tokenizer(captions, vocabulary, SMALL.max_tokens)
    return TextEncoder(small_clip_text(SMALL, tokenizer), tokenizer)


@pytest.mark.parametrize("seed", range(3))
def test_where_all_words_fit_every_other_word_is_told_as_unknown(seed: int) -> None:
    rng = random.Random(seed)
    words = sorted({"".join(rng.choices("abcdeil", k=rng.randint(2, 7))) for _ in range(90)})
    met, other = words[::2], words[1::2]
    reader = reading([" ".join(rng.sample(met, 4)) for _ in range(60)] + met, 4096)
    assert reader.unknown(" ".join(met).title()) == []
    other = [word for word in other if not any(known.endswith(word) for known in met)]  # an end of a word is a token, too
    assert reader.unknown(f"{met[0]}s, {' '.join(other)} BREAK {met[1]}") == [f"{met[0]}s", *other]


def test_where_words_had_no_room_only_letters_alone_are_unknown() -> None:
    rng = random.Random(0)
    words = sorted({"".join(rng.choices("abcdeil", k=6)) for _ in range(90)})
    reader = reading(words, BYTES + 2 + 20)
    in_letters = [word for word in words if len(reader.words(word)) == 6]
    assert len(in_letters) < 10 and reader.unknown(" ".join([*words, "zyxwvut"])) == [*in_letters, "zyxwvut"]


def test_where_words_had_no_room_only_what_is_hardly_another_word_is_misspelt() -> None:
    reader = reading(["grinning rocks", "rock", "grinning"] * 9 + ["rocket"], BYTES + 2 + 10)
    assert not reader._met_whole and {len(reader.words(word)) for word in ("rock", "grinning")} == {1} and len(reader.words("rocket")) > 1
    assert reader.misspelt("rocket") == {} and reader.misspelt("a grining rock") == {"grining": "grinning"}


def test_scenes_words_are_known_and_a_taught_word_too() -> None:
    reader = reading(CAPTIONS, 4096)
    assert reader.unknown("hello, two red circles and a ring: a painting") == ["hello", "two", "circles", "and", "painting"]
    assert reader.misspelt("two red circls") == {"circls": "circle"}
    for word in ("<thing>", "EasyNeg", "<circles>"):
        add_word(reader, word, torch.ones(1, reader.width))
    assert reader.unknown("a <thing> ring, easyneg BREAK an EasyNeg") == ["an"]
    assert reader.misspelt("a <circles> ring") == {} and reader.unknown("a <circles> ring") == []


def test_case_and_blanks_fold_as_in_clip(encoder: TextEncoder) -> None:
    one, two = encoder.tokens(["A  Red\n\tRing ", "a red ring"])[0]
    assert torch.equal(one, two)


def test_the_tokenizer_is_a_function_of_the_captions() -> None:
    one, two = (train_tokenizer(CAPTIONS, 560, 12).get_vocab() for _ in range(2))
    assert one == two != train_tokenizer(["other words than those"] * 9, 560, 12).get_vocab()


TIED = ["a photo of a cat", "a painting of a dog", "a dog and a cat on a mat", "the dogs sat on that mat", "a b c d e f g"]


def merges_by_definition(captions: list[str], count: int) -> list[list[str]]:
    """Sennrich 2016, algorithm 1; of equally frequent pairs the one with the lower numbers: letters, letters that end words, merges."""
    words = Counter(word for caption in captions for word in caption.split())
    parts = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    letters = sorted({letter for word in words for letter in word})
    number = {symbol: i for i, symbol in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges: list[list[str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(parts[word]):
                pairs[pair] += times
        if not pairs:
            break
        first, second = min(pairs, key=lambda pair: (-pairs[pair], number[pair[0]], number[pair[1]]))
        merges.append([first, second])
        number.setdefault(first + second, len(number))
        for word, old in parts.items():
            new: list[str] = []
            for part in old:
                new = [*new[:-1], first + second] if new and (new[-1], part) == (first, second) else [*new, part]
            parts[word] = new
    return merges


@pytest.mark.parametrize("captions, count", [(TIED, 46), (TIED, 12), (CAPTIONS, 46)])
def test_equally_frequent_pairs_are_merged_in_one_order(captions: list[str], count: int) -> None:
    expected = merges_by_definition(captions, count)
    for _ in range(8):  # hash tables inside are seeded anew each time
        tokenizer = train_tokenizer(captions, BYTES + 2 + count, 12)
        found = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        assert [list(pair) for pair in found] == expected


def test_a_vocabulary_without_room_is_refused() -> None:
    with pytest.raises(UserError, match=f"vocabulary: got 300; at least {BYTES + 2}"):
        train_tokenizer(CAPTIONS, 300, 12)
    assert len(train_tokenizer(CAPTIONS, BYTES + 2, 12)) == BYTES + 2
    with pytest.raises(UserError, match="heads 3 does not divide width 16"):
        SmallText(width=16, heads=3)


# Encoding


def test_states_are_the_last_layers_after_the_norm(encoder: TextEncoder) -> None:
    ids, mask = encoder.tokens(["a red ring"])
    expected = encoder.model(ids).last_hidden_state[0]
    text = fresh(encoder).encode(["a red ring"])
    assert text.tokens.shape == (1, 12, 16) and torch.equal(text.mask, mask)
    torch.testing.assert_close(text.tokens[0], expected, atol=1e-6, rtol=0)
    # Unit gain and no shift, as a fresh norm has, shows that it was applied.
    torch.testing.assert_close(text.tokens.mean(-1), torch.zeros(1, 12), atol=1e-5, rtol=0)


def test_a_prompt_does_not_depend_on_its_neighbours(encoder: TextEncoder) -> None:
    alone = [fresh(encoder).encode([c]) for c in CAPTIONS]
    for count in (2, ROWS - 1, ROWS, len(CAPTIONS)):
        some = fresh(encoder)
        together = some.encode(CAPTIONS[:count])
        again = some.encode(CAPTIONS[count - 1 :: -1])
        for i in range(count):
            for text, row in ((together, i), (again, count - 1 - i)):
                assert torch.equal(text.tokens[row], alone[i].tokens[0])
                assert torch.equal(text.mask[row], alone[i].mask[0])
                assert torch.equal(text.pooled[row], alone[i].pooled[0])  # type: ignore[index]


def test_captions_that_come_again_are_not_computed_again(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    some = fresh(encoder)
    calls: list[int] = []
    monkeypatch.setattr(some, "_run", lambda ids, mask, skip=1, run=some._run: calls.append(len(ids)) or run(ids, mask, skip))
    first = some.encode([CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]])
    assert calls == [ROWS] and torch.equal(first.tokens[0], first.tokens[2])
    first.tokens.zero_()
    assert some.encode([CAPTIONS[1], CAPTIONS[0]]).tokens.abs().sum() > 0 and calls == [ROWS]


def test_the_memory_is_bounded_and_drops_what_was_unused_longest(encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm.text.encoder.MEMORY_BYTES", 3 * 4 * 12 * 16)
    some = fresh(encoder)
    some.encode(CAPTIONS[:3])
    some.encode(CAPTIONS[:1])
    assert some.encode(CAPTIONS).tokens.shape[0] == len(CAPTIONS)
    assert [text for text, _ in some._memory] == CAPTIONS[-3:]
    some = fresh(encoder)
    some.encode(CAPTIONS[:3])
    some.encode(CAPTIONS[:1])
    some.encode(CAPTIONS[3:4])
    assert [text for text, _ in some._memory] == [CAPTIONS[2], CAPTIONS[0], CAPTIONS[3]]
    monkeypatch.setattr("ldm.text.encoder.MEMORY_BYTES", 0)
    assert some.encode(CAPTIONS[:2]).tokens.shape[0] == 2 and not some._memory


def test_where_captions_hardly_come_again_those_alone_that_did_are_remembered(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldm.text.encoder.MEMORY_BYTES", 40 * 4 * 12 * 16)
    some = fresh(encoder)
    for start in range(0, 48, 4):
        found = some.encode(["", *(f"caption {number}" for number in range(start, start + 4))])
        assert torch.equal(found.tokens[0], fresh(encoder).encode([""]).tokens[0])
    assert [text for text, _ in some._memory] == [""]
    some.encode(["caption 1", "caption 1", "caption 2"])
    assert [text for text, _ in some._memory] == [""]
    some.forget()  # as new weights do
    some.encode(["caption 1"])
    assert [text for text, _ in some._memory] == ["caption 1"]


def test_other_weights_types_are_not_mixed_in_memory(encoder: TextEncoder) -> None:
    import copy

    some = TextEncoder(copy.deepcopy(encoder.model), encoder.tokenizer)
    some.encode(CAPTIONS[:1])
    some.model.double()
    assert some.encode(CAPTIONS[:2]).tokens.dtype == torch.float64


def test_autocast_does_not_reach_the_encoder(encoder: TextEncoder) -> None:
    plain = fresh(encoder).encode(CAPTIONS[:2])
    with torch.autocast("cpu", torch.bfloat16):
        inside = fresh(encoder).encode(CAPTIONS[:2])
    assert torch.equal(plain.tokens, inside.tokens)


def test_long_prompts_are_cut(encoder: TextEncoder) -> None:
    prompts = ["a red ring", "a red ring " * 1000, "x" * 10_000, "\u0301" * 1_000_000, " " * 1_000_000 + "a red ring"]
    text = fresh(encoder).encode(prompts)
    assert text.tokens.shape == (5, 12, 16) and text.tokens.isfinite().all()
    # What is cut away before the tokenizer does not change what is read.
    assert torch.equal(encoder.tokens(prompts[1:2])[0], encoder.tokens(["a red ring " * 5])[0])


@pytest.mark.parametrize("prompt", ["", " ", "\x00", "\ud800 lone", "<|endoftext|> a", "‮abc", "🙂" * 5000, "z̸̢" * 3000])
def test_odd_prompts_are_encoded(encoder: TextEncoder, prompt: str) -> None:
    assert fresh(encoder).encode([prompt]).tokens.isfinite().all()


def test_training_reaches_the_weights() -> None:
    tokenizer = train_tokenizer(CAPTIONS, 560, 12)
    model = small_clip_text(SMALL, tokenizer)
    pooled = TextEncoder(model, tokenizer).forward_train(CAPTIONS, torch.device("cpu"))
    assert pooled.shape == (len(CAPTIONS), 16)
    pooled.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.encoder.layers[0].self_attn.v_proj.parameters())


# Folders


def test_a_folder_comes_back_here_and_in_transformers(encoder: TextEncoder, tmp_path: Path) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder.save(tmp_path)
    again = TextEncoder.load(tmp_path)
    expected = fresh(encoder).encode(CAPTIONS)
    found = again.encode(CAPTIONS)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.mask, expected.mask)
    assert not again.model.training and not any(p.requires_grad for p in again.model.parameters())
    model = CLIPTextModel.from_pretrained(tmp_path / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    assert torch.equal(ids["input_ids"], encoder.tokens(CAPTIONS)[0])
    assert torch.equal(model(ids["input_ids"]).last_hidden_state, expected.tokens)


def test_files_are_as_older_programs_want_them(encoder: TextEncoder, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import CLIPTokenizer

    encoder.save(tmp_path)
    with safe_open(tmp_path / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(name.startswith("text_model.") for name in file.keys())  # noqa: SIM118
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    for tokenizer in (
        CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
        CLIPTokenizer(vocab=str(tmp_path / "tokenizer" / "vocab.json"), merges=str(tmp_path / "tokenizer" / "merges.txt")),
    ):
        for prompt in [*CAPTIONS, "Unseen wörds 🙂"]:
            assert tokenizer(prompt)["input_ids"] == encoder.tokenizer(prompt)["input_ids"]
    assert torch.equal(TextEncoder.load(tmp_path).tokens(CAPTIONS)[0], encoder.tokens(CAPTIONS)[0])


def test_transformers_own_folders_open(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert torch.equal(TextEncoder.load(tmp_path).encode(CAPTIONS).tokens, fresh(encoder).encode(CAPTIONS).tokens)


def break_folder(folder: Path, what: str) -> str:
    """Damage a text encoder's folder; the words that the message must hold."""
    part, tokenizer = folder / "text_encoder", folder / "tokenizer"
    config = json.loads((part / "config.json").read_text())
    weights = part / "model.safetensors"
    match what:
        case "another kind":
            config["architectures"] = ["BertModel"]
        case "no head count":
            config["num_attention_heads"] = 0
        case "another shape":
            config["hidden_size"] = 32
        case "weights cut":
            weights.write_bytes(weights.read_bytes()[:-5])
        case "weights gone":
            weights.unlink()
        case "pickle":
            weights.rename(part / "pytorch_model.bin")
        case "no tokenizer":
            for file in tokenizer.iterdir():
                file.unlink()
            tokenizer.rmdir()
        case "tokenizer empty":
            for file in tokenizer.iterdir():
                file.unlink()
        case "tokenizer cut":
            for file in tokenizer.iterdir():
                file.write_bytes(file.read_bytes()[:30])
    (part / "config.json").write_text(json.dumps(config))
    return {
        "another kind": "config.json says 'BertModel'",
        "no head count": "num_attention_heads is 0; it should be greater than 0",
        "another shape": "has shape",
        "weights cut": "truncated",
        "weights gone": "no weights here",
        "pickle": "convert the model to safetensors",
        "no tokenizer": "tokenizer: no such folder",
        "tokenizer empty": "no tokenizer.json here",
        "tokenizer cut": "tokenizer_config.json is not readable JSON",
    }[what]


@pytest.mark.parametrize(
    "what",
    [
        "another kind",
        "no head count",
        "another shape",
        "weights cut",
        "weights gone",
        "pickle",
        "no tokenizer",
        "tokenizer empty",
        "tokenizer cut",
    ],
)
def test_faults_of_a_text_folder_are_told_in_one_line(encoder: TextEncoder, tmp_path: Path, what: str) -> None:
    encoder.save(tmp_path)
    words = break_folder(tmp_path, what)
    with pytest.raises(UserError) as caught:
        TextEncoder.load(tmp_path)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_strangers_configuration_names_no_code(encoder: TextEncoder, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    for file in (tmp_path / "text_encoder" / "config.json", tmp_path / "tokenizer" / "tokenizer_config.json"):
        values = json.loads(file.read_text())
        names = {"AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None], "AutoConfig": "evil.Config"}
        values |= {"auto_map": names, "trust_remote_code": True, "_name_or_path": "owner/evil"}
        file.write_text(json.dumps(values))
    canary = tmp_path / "canary"
    for part in ("text_encoder", "tokenizer"):
        (tmp_path / part / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    assert TextEncoder.load(tmp_path).encode(CAPTIONS).tokens.shape == (len(CAPTIONS), 12, 16)
    assert not canary.exists()
