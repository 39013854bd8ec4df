from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.config.errors import UserError
from ldm.config.manual import describe, fields_of
from ldm.config.schema import BY_KIND, Count, Fraction, Positive, PositiveFloat, adapter, build, config, dump, load, read
from ldm.config.yaml_reader import Written, spoken

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TRAIN = "stages: {a: {kind: train, images: 8}}\n"


@config
class AdamW:
    """One optimiser."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-4  # peak learning rate
    beta: Fraction = 0.9  # of the first moment


@config
class Muon:
    """Another."""

    kind: Literal["muon"] = "muon"
    lr: PositiveFloat = 1e-3  # peak learning rate of matrices
    rounds: Positive = 5  # of Newton-Schulz


@config
class Work:
    """A stage that trains."""

    kind: Literal["train"] = "train"
    images: Positive  # how many
    optim: Annotated[AdamW | Muon, BY_KIND] = AdamW()  # which optimiser
    sizes: tuple[Positive, ...] = (32, 64)  # px

    def __post_init__(self) -> None:
        if self.images % 8:
            raise ValueError(f"images: got {self.images}; a multiple of 8 is needed")


@config
class Rest:
    """A stage that does not."""

    kind: Literal["rest"] = "rest"
    require: dict[str, float] = dataclasses.field(default_factory=dict)  # least values


@config
class Net:
    """A part."""

    width: Positive = 64  # channels
    flip: bool = False  # mirrored


@config
class Tree:
    """A small run."""

    name: str = ""  # what it is called
    seed: Count = 0  # of everything
    mode: Literal["fast", "slow"] = "fast"  # how
    net: Net = Net()  # the network
    prompts: tuple[str, ...] = ()  # to look at
    lists: tuple[Annotated[Work | Rest, BY_KIND], ...] = ()  # in a list
    stages: dict[str, Annotated[Work | Rest, BY_KIND]]  # in order


def tree(folder: Path, text: str, *words: str) -> Tree:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, words, Tree)


def mistakes(folder: Path, text: str, *words: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        tree(folder, text, *words)
    return [line.removeprefix(f"{folder / 'run.yaml'}: ") for line in str(raised.value).splitlines()]


# What YAML says


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e5", 1e5),
        (".5", 0.5),
        ("-2.", -2.0),
        ("012", 12),
        ("1_000", 1000),
        ("+7", 7),
        (".inf", float("inf")),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("y", "y"),
        ("12:30", "12:30"),
        ("2026-11-23", "2026-11-23"),
        ("0x10", "0x10"),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("'3'", "3"),
        ("[1, a]", [1, "a"]),
        ("{a: no}", {"a": "no"}),
        ("=", "="),
        ("<<", "<<"),
        ("1e", "1e"),
        ("e5", "e5"),
        (".", "."),
    ],
)
def test_yaml_traps(tmp_path: Path, text: str, value: Any) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"a: {text}\n")
    assert read(path, [])["a"] == value and type(read(path, [])["a"]) in (type(value), *type(value).__subclasses__())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key a stands here twice"),
        ("x: {b: 1, b: 2}\n\n", "the key b stands here twice"),
        ("a: 1\n\tb: 2", "line 2: begins with a tab"),
        ("a: [1", "expected ',' or ']'"),
        ("- 1\n- 2", "a mapping of fields was expected, got list"),
        ("~: 1\nb: 2", "the key None is not a word"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: !thing 3", "could not determine a constructor"),
        ("base: [x]", "base: names one file"),
        ("base: no.yaml", "No such file"),
        ("base: run.yaml", "base leads back to this file"),
        ("a: " + "[" * 5000, "more than 40 levels"),
        ("{" * 100_000, "more than 40 levels"),
        ("a: &a [1, *a]", "an alias inside what it stands for"),
        ("a: " + "9" * 5000, "is no number"),
        ("---\na: 1\n---\nb: 1", "another document"),
        ("a: \x07", "not allowed"),
        ("#" * 1_000_001, "has at most"),
    ],
)
def test_what_is_no_plain_data_is_one_clear_line(tmp_path: Path, text: str, said: str) -> None:
    [line] = mistakes(tmp_path, text)
    assert said in line


def test_aliases_are_counted_as_what_they_stand_for(tmp_path: Path) -> None:
    assert tree(tmp_path, "stages: {a: &a {kind: rest}, b: *a}").stages["b"] == Rest()
    bomb = "x0: &x0 [1,1,1,1,1,1,1,1,1]\n" + "".join(f"x{i}: &x{i} [{','.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 10))
    assert "more than 100,000 entries" in mistakes(tmp_path, bomb)[0]


def test_a_missing_file_names_its_nearest(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("{}")
    with pytest.raises(UserError, match=r"quikstart.yaml: No such file.*did you mean .*quickstart.yaml\?"):
        load(tmp_path / "quikstart.yaml", [], Tree)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(UserError, match="not UTF-8"):
        load(tmp_path / "latin.yaml", [], Tree)


# What is laid over what


def test_a_base_is_merged_and_null_drops_a_stage(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("seed: 4\nnet: {width: 8}\nstages: {a: {kind: train, images: 8}, b: {kind: rest}}")
    (tmp_path / "base.yaml").write_text("base: deep.yaml\nname: base\nstages: {c: {kind: rest}}")
    made = tree(tmp_path, "base: base.yaml\nnet: {flip: true}\nstages: {b: null, a: {images: 16}}")
    assert made == Tree(name="base", seed=4, net=Net(width=8, flip=True), stages={"a": Work(images=16), "c": Rest()})
    assert list(made.stages) == ["a", "c"]


def test_words_reach_every_field(tmp_path: Path) -> None:
    words = [
        "seed=3",
        "net.width=7",
        "stages.a.images=1e3",
        "stages.a.optim.lr=3e-4",
        "stages.b={kind: rest}",
        "prompts=[a b, 3]",
        "stages.b.require.x.y=0.5",
        "lists=[{kind: train, images: 8}]",
        "lists.0.images=16",
        "name=",
    ]
    made = tree(tmp_path, f"name: x\n{TRAIN}", *words)
    assert made == Tree(
        seed=3,
        net=Net(width=7),
        prompts=("a b", "3"),
        lists=(Work(images=16),),
        stages={"a": Work(images=1000, optim=AdamW(lr=3e-4)), "b": Rest(require={"x.y": 0.5})},
    )


def test_a_list_in_the_file_is_changed_by_number(tmp_path: Path) -> None:
    text = f"lists: [{{kind: rest}}, {{kind: train, images: 8}}]\n{TRAIN}"
    assert tree(tmp_path, text, "lists.1.images=24").lists == (Rest(), Work(images=24))
    assert mistakes(tmp_path, text, "lists.2.images=24")[0].startswith("lists: got {'2'")


def test_mapping_of_numbers_takes_dotted_names_and_loses_them(tmp_path: Path) -> None:
    text = "stages: {a: {kind: rest, require: {x.y: 1, x.z: 2}}}"
    assert tree(tmp_path, text, "stages.a.require.x.y=3").stages["a"] == Rest(require={"x.y": 3, "x.z": 2})
    assert tree(tmp_path, text, "stages.a.require.x.y=null").stages["a"] == Rest(require={"x.z": 2})
    assert tree(tmp_path, text, "stages.a.require=null").stages["a"] == Rest()


def test_null_gives_the_default_back(tmp_path: Path) -> None:
    assert tree(tmp_path, f"seed: 5\nnet: {{width: 8}}\n{TRAIN}", "seed=null", "net=null") == Tree(stages={"a": Work(images=8)})
    assert tree(tmp_path, f"seed: null\nnet:\n{TRAIN}") == Tree(stages={"a": Work(images=8)})


@pytest.mark.parametrize("order", [1, -1])
def test_switching_a_kind_keeps_what_both_have_and_what_words_say(tmp_path: Path, order: int) -> None:
    text = "stages: {a: {kind: train, images: 8, optim: {kind: adamw, lr: 0.5, beta: 0.1}}}"
    assert tree(tmp_path, text, "stages.a.optim.kind=muon").stages["a"] == Work(images=8, optim=Muon(lr=0.5))
    words = ["stages.a.optim.kind=muon", "stages.a.optim.rounds=3"][::order]
    assert tree(tmp_path, text, *words).stages["a"] == Work(images=8, optim=Muon(lr=0.5, rounds=3))
    assert tree(tmp_path, "stages: {a: {kind: train, images: 8}}", *words).stages["a"] == Work(images=8, optim=Muon(rounds=3))
    (tmp_path / "base.yaml").write_text(text)
    child = "base: base.yaml\nstages: {a: {optim: {kind: muon, rounds: 2}}}"
    assert tree(tmp_path, child).stages["a"] == Work(images=8, optim=Muon(lr=0.5, rounds=2))


def test_a_number_is_a_text_where_a_text_belongs(tmp_path: Path) -> None:
    assert tree(tmp_path, f"name: 007\nprompts: [1e5, 3]\n{TRAIN}").prompts == ("1e5", "3")
    assert tree(tmp_path, TRAIN, "name=007").name == "007"
    [line] = mistakes(tmp_path, f"name: true\n{TRAIN}")
    assert line == "name: got True; it should be a text, in quotes where it looks like something else"


# What is wrong


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = "sed: 1\nmode: fsat\nnet: {widht: 3, flip: maybe}\nstages: {a: {kind: trian}, b: {kind: train, images: 9}, c: {images: 8}}"
    assert sorted(mistakes(tmp_path, text, "net.width=-1", "prompts=x", "stages.d.kind=train")) == sorted(
        [
            "sed: unknown field; did you mean seed? (known are name, seed, mode, net, prompts, lists, stages)",
            "mode: got 'fsat'; did you mean fast? (allowed are fast, slow)",
            "net.widht: unknown field; did you mean width? (known are width, flip)",
            "net.flip: got 'maybe'; it should be true or false",
            "net.width: got -1; it should be greater than 0",
            "prompts: got 'x'; it should be a list, such as [x]",
            "stages.a.kind: got 'trian'; did you mean train? (allowed are train, rest)",
            "stages.b: images: got 9; a multiple of 8 is needed",
            "stages.c.kind: required, but not given (allowed are train, rest)",
            "stages.d.images: required, but not given",
        ]
    )


def test_words_that_lead_nowhere(tmp_path: Path) -> None:
    text = "stages: {diffusion: {kind: train, images: 8}, last: {kind: rest}}"
    assert mistakes(tmp_path, text, "seed", "=1", "a..b=1") == [
        "seed: a word is written PATH=VALUE, such as seed=1",
        "=1: a word is written PATH=VALUE, such as seed=1",
        "a..b=1: a word is written PATH=VALUE, such as seed=1",
    ]
    assert mistakes(tmp_path, text, "seed=[1", "mode=a: b: c") == [
        "seed: got '[1': expected ',' or ']', but got '<stream end>'",
        "mode: got 'a: b: c': mapping values are not allowed here",
    ]
    [line] = mistakes(tmp_path, text, "stages.difusion.images=16")
    assert "stages.difusion.kind: required" in line and "did you mean stages.diffusion?" in line
    [line] = mistakes(tmp_path, text, "stages.difusion=null")
    assert line.startswith("stages.difusion: null removes an entry, but there is none of this name; did you mean diffusion?")
    assert mistakes(tmp_path, text, "nett=null")[0].startswith("nett: unknown field; did you mean net?")
    assert mistakes(tmp_path, text, "stages.last.images=8") == [
        "stages.last.images: unknown field of kind rest; known are kind, require; train has it"
    ]
    assert "PATH=VALUE" in mistakes(tmp_path, text, "a" + ".b" * 3000 + "=1")[0]


def test_a_required_union_and_values_of_the_wrong_shape(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "seed: 1") == ["stages: required, but not given"]
    assert mistakes(tmp_path, "stages: 3") == ["stages: got 3; it should be a mapping, such as {name: value}"]
    assert mistakes(tmp_path, "stages: {a: 3}") == ["stages.a: got 3; it should be a mapping of fields (kind: train, rest)"]
    assert mistakes(tmp_path, f"net: [1]\n{TRAIN}") == ["net: got [1]; it should be a mapping of fields"]
    assert mistakes(tmp_path, f"seed: 1.5\n{TRAIN}") == ["seed: got 1.5; it should be a whole number"]
    assert build({"stages": {}}, Tree, "here") == Tree(stages={})


WRONG: list[Any] = [
    -1,
    0,
    1e9,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "no",
    "1e-5",
    "\u202e\0",
    "é" * 300,
    True,
    None,
    [],
    [1, "a"],
    [[]],
    {},
    {"kind": "x"},
    {"kind": ["x"]},
    {"a": {"b": {}}},
    {"kind": None},
]


@pytest.mark.slow
def test_mutated_configurations_never_end_in_a_traceback(tmp_path: Path) -> None:
    """Every field and entry of every shipped configuration, changed at random, is taken or refused in words."""
    from ldm.runs.run import Run

    chance, refused, tried = random.Random(0), 0, 0
    path = tmp_path / "taken.yaml"
    for file in CONFIGS:
        data = _unmarked(read(file, ["data.path=x"] if file.stem == "folder" else []))
        for _ in range(100):
            mutant = copy.deepcopy(data)
            for _ in range(chance.choice((1, 1, 2, 5))):
                _mutate(mutant, chance)
            tried += 1
            try:
                made = build(mutant, Run, "here")
                if chance.random() < 0.1:
                    path.write_text(dump(made), encoding="utf-8")
                    assert load(path, [], Run) == made
            except UserError as error:
                refused += 1
                assert all(line.startswith("here: ") for line in str(error).splitlines()), error
    assert refused > tried / 2


def _unmarked(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _unmarked(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_unmarked(v) for v in value]
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Written):
        return int(value) if isinstance(value, int) else float(value)  # type: ignore[call-overload]
    return value


def _mutate(data: dict[str, Any], chance: random.Random) -> None:
    while True:
        name = chance.choice(list(data) or ["new"])
        inner = data.get(name)
        if isinstance(inner, dict) and inner and chance.random() < 0.8:
            data = inner
            continue
        how = chance.random()
        if how < 0.6:
            data[name] = copy.deepcopy(chance.choice(WRONG))
        elif how < 0.8:
            data[chance.choice([f"{name}x", name[1:], name.upper(), "kind", "_target_", "${oc.env:HOME}"])] = data.get(name)
        else:
            data.pop(name, None)
        return


# What is written


texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=150, deadline=None)
@given(texts, st.lists(texts, max_size=3), st.floats(min_value=1e-30, max_value=1e30), st.integers(0, 2**63))
def test_what_is_dumped_reads_back_equal(name: str, prompts: list[str], lr: float, seed: int) -> None:
    import tempfile

    stage = Work(images=8, optim=Muon(lr=lr), sizes=(1, 2))
    made = Tree(name=name, seed=seed, prompts=tuple(prompts), stages={"b": stage, "a": Rest(require={"x.y": lr, "3": 1.0})})
    with tempfile.TemporaryDirectory() as folder:
        again = tree(Path(folder), dump(made))
    assert again == made and list(again.stages) == ["b", "a"]


ODD = ["no", "3e-4", "1_0", "012", "true", "~", "null", "0x1", ": ", "- a", "a: b", "#", "'", " ", "é\n", "\x85", "=", "<<"]


@pytest.mark.parametrize("name", ODD)
def test_texts_that_look_like_something_else_come_back(tmp_path: Path, name: str) -> None:
    made = Tree(name=name, prompts=(name,), stages={"a": Rest()})
    assert tree(tmp_path, dump(made)) == made


# What only the user can say.
WEIGHTS = "models.autoencoder.perceptual.weights=x"
THEIRS = {
    "folder": ["data.path=x"],
    "sd1": ["data.path=x"],
    "autoencoder-kl-f8": ["data.path=x", WEIGHTS],
    "autoencoder-vq-f4": ["data.path=x", WEIGHTS],
}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configurations_are_valid_and_come_back(tmp_path: Path, file: Path) -> None:
    from ldm.runs.run import Run

    made = load(file, THEIRS.get(file.stem, []), Run)
    path = tmp_path / "config.yaml"
    path.write_text(dump(made), encoding="utf-8")
    assert load(path, [], Run) == made


def test_a_tree_is_frozen_and_forbids_other_fields() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Net().width = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Net(height=3)  # type: ignore[call-arg]


# Help


def test_every_field_is_described_with_its_meaning() -> None:
    found = {path: (kind, default, said) for path, kind, default, said in fields_of(Tree)}
    assert found["seed"] == ("integer", 0, "of everything")
    assert found["net.width"] == ("integer", 64, "channels")
    assert found["mode"] == ("fast | slow", "fast", "how")
    assert found["stages.NAME.kind"][0] == "train | rest" and found["stages.NAME.kind"][2] == "in order"
    assert found["stages.NAME.optim.kind"][:2] == ("adamw | muon", "adamw")
    assert found["stages.NAME.optim.rounds"] == ("integer", 5, "[train] [muon] of Newton-Schulz")
    assert found["lists[].images"][1] is dataclasses.MISSING
    assert found["prompts"][0] == "[text, ...]" and found["stages.NAME.require"][0] == "{text: number}"
    assert "required" in describe(Tree) and "of Newton-Schulz" in describe(Tree)


def test_every_field_of_a_run_has_a_meaning_and_null_is_only_a_default() -> None:
    from ldm.runs.run import Run

    for path, kind, default, meaning in fields_of(Run):
        assert meaning, path
        assert "null" not in kind or default is None, f"{path}: null means the default, so it can be no other value"


# A validator of the kinds that are named knows what one of all kinds knows


@config
class Chooses:
    """Unions in all the places that one may stand."""

    own: Annotated[AdamW | Muon, BY_KIND] = AdamW()  # a field
    spare: Annotated[AdamW | Muon, BY_KIND] | None = None  # one that may be missing
    named: dict[str, Annotated[AdamW | Muon, BY_KIND]] = dataclasses.field(default_factory=dict)  # entries


@pytest.mark.parametrize(
    "value", ["adam", 3, [1], {}, None, {"kind": "adan"}, {"kind": None}, {"kind": [1]}, {"kind": 3}, {"lr": 1.0}, spoken("7")]
)
@pytest.mark.parametrize("kinds", [frozenset[str](), frozenset({"adamw"}), frozenset({"adamw", "muon"})])
def test_what_chooses_no_member_is_refused_alike_whatever_the_validator_was_made_for(value: Any, kinds: frozenset[str]) -> None:
    def said(kinds: frozenset[str] | None, data: dict[str, Any]) -> Any:
        try:
            return adapter(Chooses, kinds).validate_python(data)
        except pydantic.ValidationError as error:
            return [(problem["type"], problem["loc"]) for problem in error.errors()]

    for data in ({"own": value}, {"spare": value}, {"named": {"a": value}}):
        assert said(kinds, data) == said(None, data)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_validator_of_named_kinds_reads_them(kind: str) -> None:
    data = {"own": {"kind": kind, "lr": 0.5}, "named": {"a": {"kind": kind}}}
    assert adapter(Chooses, frozenset({kind})).validate_python(data) == adapter(Chooses).validate_python(data)
