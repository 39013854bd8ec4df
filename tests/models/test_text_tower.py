"""Our text tower beside transformers' CLIPTextModel: states, pooled states, gradients, and what it costs to import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.config.errors import UserError
from ldm.models.text_tower import TextTower

VALUES = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
    "bos_token_id": 118,
    "eos_token_id": 119,
    "pad_token_id": 119,
}


def pair(**more: object) -> tuple[TextTower, CLIPTextModel]:
    torch.manual_seed(0)
    values = VALUES | more
    theirs = CLIPTextModel(CLIPTextConfig(**values)).double().eval()
    ours = TextTower(values).double().eval()
    state = {name.removeprefix("text_model."): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict({name: value for name, value in state.items() if "position_ids" not in name})
    return ours, theirs


def ids_of(rows: int = 5, seed: int = 1) -> torch.Tensor:
    ids = torch.randint(0, 118, (rows, 20), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 118
    for row, end in enumerate(range(3, 3 + 3 * rows, 3)):
        ids[row, end:] = 119
    return ids


@pytest.mark.parametrize("more", [{}, {"hidden_act": "gelu"}, {"eos_token_id": 2}, {"layer_norm_eps": 1e-3}])
def test_states_and_gradients_are_those_of_transformers(more: dict[str, object]) -> None:
    ours, theirs = pair(**more)
    ids = ids_of()
    found, wanted = ours(ids), theirs(ids)
    torch.testing.assert_close(found.last_hidden_state, wanted.last_hidden_state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.pooler_output, wanted.pooler_output, rtol=1e-12, atol=1e-12)
    (found.last_hidden_state.square().sum() + found.pooler_output.sum()).backward()
    (wanted.last_hidden_state.square().sum() + wanted.pooler_output.sum()).backward()
    theirs_by_name = {name.removeprefix("text_model."): value for name, value in theirs.named_parameters()}
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value.grad, theirs_by_name[name].grad, rtol=1e-10, atol=1e-10)


def test_a_token_sees_those_before_it_alone() -> None:
    ours, _ = pair()
    ids = ids_of(1)
    other = ids.clone()
    other[0, 10:] = 7
    assert torch.equal(ours(ids).last_hidden_state[:, :10], ours(other).last_hidden_state[:, :10])


def test_a_configuration_is_refused_that_makes_no_sense() -> None:
    with pytest.raises(UserError, match="hidden_act is 'swish'"):
        TextTower(VALUES | {"hidden_act": "swish"})
    with pytest.raises(UserError, match="no multiple"):
        TextTower(VALUES | {"num_attention_heads": 5})


def test_its_configuration_opens_in_transformers() -> None:
    ours, _ = pair(hidden_act="gelu")
    made = CLIPTextConfig(**ours.config.to_dict())
    assert all(getattr(made, name) == value for name, value in vars(ours.config).items())


@pytest.mark.slow
def test_drawing_does_not_import_the_models_of_transformers(kl_model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from ldm.__main__ import main; "
        f"assert main(['sample', 'a red circle', '--model', {str(kl_model)!r}, '--steps', '1', '--out', {str(tmp_path)!r}]) == 0; "
        "print([name for name in ('transformers.modeling_utils', 'diffusers', 'torchvision', 'scipy') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip().splitlines()[-1] == "[]"
