"""A launch says how it came about; Slurm's own variables and accelerate's files are understood; differences have two names."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import demo_server
import pytest
import several

from ldm.__main__ import main
from ldm.config.errors import UserError
from ldm.distributed.launcher import accelerate_file, adopt_slurm, first_host, launched
from ldm.distributed.rank_checks import code_hash, compare

ROOT = Path(__file__).parents[2]
SLURM = {
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[003-004]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NUM_NODES": "2",
}


def test_one_process_is_nobodys_launch() -> None:
    found = launched({}, parent=[])
    assert (found.by, found.world, found.machines, found.sharded, found.overruled) == ("python", 1, 1, False, ())


def test_srun_alone_is_a_launcher() -> None:
    environment = dict(SLURM)
    assert adopt_slurm(environment)
    said = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert said == {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu003", "MASTER_PORT": "24711"}
    found = launched(environment, parent=[])
    assert (found.by, found.world, found.machines) == ("srun", 16, 2)


def test_a_batch_script_and_a_launcher_within_slurm_are_left_alone() -> None:
    script = {"SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    torchrun = {**SLURM, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    for environment in (script, torchrun):
        assert not adopt_slurm(dict(environment))
    found = launched(torchrun, parent=[])
    assert (found.by, found.world, found.machines) == ("torchrun", 4, 2)


def test_what_slurm_leaves_out_is_named() -> None:
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        adopt_slurm({name: value for name, value in SLURM.items() if name != "SLURM_LOCALID"})
    with pytest.raises(UserError, match="WORLD_SIZE: got two"):
        launched({"WORLD_SIZE": "two"}, parent=[])


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu003", "gpu003"), ("gpu[003-006,9],cpu1", "gpu003"), ("a-[7,9]", "a-7"), ("x1,x2", "x1"), ("rack[2-3]-a", "rack2-a")],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize("name", ["torchrun", "srun"])
def test_slurm_scripts_are_sound_and_their_commands_are_ours(name: str, tmp_path: Path) -> None:
    """The script runs as Slurm would run it, with stand-ins for srun and scontrol, and our plan answers for all processes."""
    script = ROOT / "configs" / "slurm" / f"{name}.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    said = tmp_path / "said"
    for tool, text in {"srun": f'printf "%s\\n" "$@" > {said}', "scontrol": "printf 'gpu003\\ngpu004\\n'"}.items():
        (tmp_path / tool).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / tool).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "gpu[003-004]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "4",
    }
    subprocess.run(["bash", script, "configs/quickstart.yaml", "out=x y"], check=True, env=environment, cwd=ROOT)
    words = said.read_text().splitlines()
    command = words[words.index("train.py") + 1 :]
    assert command == ["configs/quickstart.yaml", "out=x y"] and words[0] == "--kill-on-bad-exit=1"
    if name == "torchrun":
        assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=gpu003:24711", "--rdzv-backend=c10d", "--rdzv-id=4711"} <= set(words)
        from torch.distributed.run import parse_args

        parsed = parse_args(words[words.index("torchrun") + 1 :])
        assert (parsed.nnodes, parsed.nproc_per_node, parsed.training_script) == ("2", "8", "train.py")
    else:
        assert words[1:3] == ["python", "train.py"]


def test_the_slurm_array_gives_each_task_its_part(tmp_path: Path) -> None:
    script, said = ROOT / "configs" / "slurm" / "encode.sbatch", tmp_path / "said"
    subprocess.run(["bash", "-n", script], check=True)
    (tmp_path / "srun").write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {said}\n')
    (tmp_path / "srun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "8"}
    for more, part in (({"SLURM_ARRAY_TASK_COUNT": "16"}, "3/16"), ({"SLURM_ARRAY_TASK_COUNT": "1", "PARTS": "16"}, "3/16")):
        subprocess.run(["bash", script, "a set", "--out", "x"], check=True, env=environment | more, cwd=ROOT)
        words = said.read_text().splitlines()
        assert words[1:9] == ["python", "-m", "ldm", "data", "encode", "a set", "--out", "x"]
        assert words[words.index("--part") + 1] == part and words[words.index("--workers") + 1] == "8"


def test_a_plan_under_srun_counts_its_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from ldm.__main__ import main

    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LDM_SLURM"):
        monkeypatch.setenv(variable, "")  # so that what is put there is taken away again
        monkeypatch.delenv(variable)
    for variable, value in SLURM.items():
        monkeypatch.setenv(variable, value)
    assert main(["train", "configs/quickstart.yaml", "--plan", "data.images=16", "data.val=4"]) == 0
    assert "at 16 processes" in capsys.readouterr().out
    assert main(["train", "configs/quickstart.yaml", "--plan", "data.images=16", "data.val=4", "stages.autoencoder.batch=24"]) == 2
    assert "stages.autoencoder.batch: 24 cannot be shared by 16 processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["accelerate", "launch", "--config_file", "a.yaml", "train.py"], "a.yaml"),
        (["accelerate", "launch", "--config-file=a.yaml"], "a.yaml"),
        (["bash"], ""),
    ],
)
def test_accelerates_file_is_found(command: list[str], file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert accelerate_file(command) == file
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").touch()
    assert accelerate_file(["bash"]).endswith("default_config.yaml")


@pytest.mark.parametrize(("name", "sharded"), [("one-machine", False), ("several-machines", False), ("fsdp2", True)])
def test_accelerate_reads_our_launch_files(name: str, sharded: bool) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(ROOT / f"configs/accelerate/{name}.yaml"), "--num_processes=4"]
    words += ["--num_machines=2", "--machine_rank=1", "--main_process_ip=10.0.0.1", "--main_process_port=29500"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args([*words, "train.py", "CONFIG"]))
    assert args.multi_gpu or args.use_fsdp
    before = dict(os.environ)
    environment: dict[str, Any] = prepare_multi_gpu_env(args)
    os.environ.clear()
    os.environ.update(before)
    found = launched({**environment, "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, parent=["accelerate", *words])
    assert found.by == "accelerate launch" and found.file.endswith(f"{name}.yaml") and found.machines == 2
    assert found.sharded == sharded and not found.overruled


def test_the_stages_own_precision_counts_and_that_is_said() -> None:
    found = launched({"ACCELERATE_MIXED_PRECISION": "fp16", "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, parent=[])
    assert found.overruled == ("mixed_precision fp16", "dynamo_backend inductor")


@pytest.mark.parametrize(
    ("variable", "what"),
    [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"), ("ACCELERATE_USE_FSDP", "FSDP 1"), ("ACCELERATE_USE_MEGATRON_LM", "Megatron")],
)
def test_other_ways_of_sharing_are_refused_in_one_line(variable: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        launched({variable: "true"}, parent=[])


def test_processes_that_differ_are_named_with_both_values() -> None:
    zero = {"config": {"seed": 0, "stages": {"a": {"lr": 1e-3}}}, "ldm": "1, sources ab", "torch": "2.15", "data": "48 samples"}
    compare([zero, zero, zero])
    for name, other, found in (
        ("config", {"seed": 0, "stages": {"a": {"lr": 2e-3}}}, r"config\.stages\.a\.lr: rank 0 has 0\.001, rank 2 has 0\.002"),
        ("config", {"seed": 0, "stages": {}}, r"config\.stages\.a: rank 0 has .*, rank 2 has nothing"),
        ("ldm", "1, sources cd", "ldm: rank 0 has 1, sources ab, rank 2 has 1, sources cd"),
        ("torch", "2.14", r"torch: rank 0 has 2\.15, rank 2 has 2\.14"),
        ("data", "47 samples", "data: rank 0 has 48 samples, rank 2 has 47 samples"),
    ):
        with pytest.raises(UserError, match=found):
            compare([zero, zero, {**zero, name: other}])


def test_the_code_version_sees_every_source(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    before = code_hash(tmp_path)
    (tmp_path / "b.py").write_text("2")
    after = code_hash(tmp_path)
    assert len({before, after, code_hash()}) == 3 and re.fullmatch("[0-9a-f]{12}", before)


def test_what_is_not_shared_out_is_refused_to_several_tasks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that what srun's tasks are called goes away again
        monkeypatch.delenv(name)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    for verb in ("grid", "animate", "evaluate", "classifier", "export", "report", "demo", "bench", "data"):
        assert main([verb, "check"]) == 2
        said = capsys.readouterr().err
        assert said == f"ldm {verb}: srun started 16 processes, and {verb} works as one; start it once, without srun\n"
    assert main(["info", "nothing.png"]) == 2 and "srun" not in capsys.readouterr().err


def tasks(*words: str, **more: str) -> list[subprocess.Popen[str]]:
    """Two tasks of `ldm sample`, as srun starts them."""
    port, running = several.free_port(), []
    for rank in range(2):
        slurm = {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= slurm | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, "-m", "ldm", "sample", *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        running.append(subprocess.Popen(command, cwd=ROOT, env=environment | more, text=True, **pipes))
    return running


@pytest.mark.slow
def test_the_tasks_of_srun_draw_each_picture_once(kl_model: Path, tmp_path: Path) -> None:
    running = tasks("a", "b", "c", "--model", str(kl_model), "--out", str(tmp_path), "--json")
    said = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0000{i}_seed0.png" for i in range(3)]
    drawn = [json.loads(line)["prompt"] for out, _ in said for line in out.splitlines()]
    assert sorted(drawn) == ["a", "b", "c"]


@pytest.mark.slow
def test_a_killed_task_of_sample_ends_the_other_with_its_name(kl_model: Path, tmp_path: Path) -> None:
    running = tasks("a", "--n", "4000", "--model", str(kl_model), "--out", str(tmp_path), LDM_TIMEOUT_S="20")
    try:
        demo_server.until(lambda: any(tmp_path.glob("*.png")), 300)
        running[1].kill()
        assert running[0].wait(120) == 1
        said = running[0].communicate()[1].strip().splitlines()
    finally:
        for process in running:
            process.kill()
            process.communicate()
    assert re.fullmatch(
        r"ldm sample: rank 1 (is gone, killed|gives no sign of life any more, killed) or .*rank 0 waits in working.*", said[-1]
    )
    assert not any("Traceback" in line for line in said)
