"""The examples are what a scheduler would accept, and their settings are ones that train."""

import subprocess
from pathlib import Path

import pytest
import yaml

from sitfast import config, parallel

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("script", ["slurm.sh", "torchrun.sh"])
def test_the_scripts_are_bash(script):
    assert subprocess.run(["bash", "-n", EXAMPLES / script], capture_output=True).returncode == 0


def test_the_slurm_script_saves_and_requeues(tmp_path):
    """With commands that only say how they were called: SIGTERM reaches torchrun, then the job is put back."""
    calls = tmp_path / "calls"
    commands = {
        "scontrol": f'echo "scontrol $*" >> {calls}; echo node1; echo node2',
        "srun": f'echo "srun $*" >> {calls}; case "$*" in *sitfast.train*) trap "echo saved >> {calls}; exit 0" TERM; '
        'kill -TERM "$PPID"; for i in $(seq 100); do sleep 0.05; done;; esac',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    env["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    command = ["bash", EXAMPLES / "slurm.sh", "configs/xl2.yaml", "optim.lr=2e-4"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    said = calls.read_text().splitlines()
    assert "-m sitfast.doctor --config configs/xl2.yaml optim.lr=2e-4" in said[1]
    assert "--rdzv-endpoint=node1:29500" in said[2] and "-m sitfast.train --config configs/xl2.yaml" in said[2]
    assert said[3:] == ["saved", "scontrol requeue 7"]


def test_the_manifest_trains_on_any_number_of_its_nodes():
    job = yaml.safe_load((EXAMPLES / "pytorchjob.yaml").read_text())
    elastic, worker = job["spec"]["elasticPolicy"], job["spec"]["pytorchReplicaSpecs"]["Worker"]
    command = worker["template"]["spec"]["containers"][0]["command"]
    at = command.index("--config")
    cfg = config.load(EXAMPLES.parent / command[at + 1], command[at + 2 :])
    for nodes in range(elastic["minReplicas"], elastic["maxReplicas"] + 1):
        config.check_world(cfg, 8 * nodes)
        assert parallel.shard_size(of_hosts_with_8(cfg), 8 * nodes) == 8


def of_hosts_with_8(cfg: config.Config) -> config.ParallelConfig:
    return cfg.parallel.model_copy(update={"shard_size": 8})
