"""The launch scripts of experiments/tpu: dry runs, mistakes, and a pod on this machine that is taken away."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "experiments" / "tpu"
POD = ("--name=dpo", "--zone=us-west4-a", "--type=v5litepod-16")
CLUSTER = ("--name=dpo", "--cluster=tpus", "--project=p", "--zone=us-west4-a", "--type=v5litepod-16")
TRAIN = ("--", "python", "-m", "dpo_jax.train", "--workdir=gs://bucket/a run")

# A pod of one host, whose home is a folder; its state is a file.
GCLOUD = """#!/usr/bin/env bash
set -euo pipefail
echo "$*" >> "$POD/calls"
state=$(cat "$POD/state") all="$*"
case "$*" in
*queued-resources\\ describe*)
    [[ $state != ABSENT ]] || { echo 'NOT_FOUND: no such resource' >&2; exit 1; }
    echo "$state" ;;
*tpu-vm\\ describe*) echo READY ;;
*queued-resources\\ create*) mkdir "$POD/host" && echo ACTIVE > "$POD/state" ;;
*queued-resources\\ delete*) rm -r "$POD/host" && echo ABSENT > "$POD/state" ;;
*tpu-vm\\ scp*) cp "$5" "$POD/host/${6#*:}" ;;
*tpu-vm\\ ssh*)
    [[ $state == ACTIVE ]] || exit 255
    cd "$POD/host" && HOME=$PWD bash -c "${all#*--command=}" ;;
*) exit 2 ;;
esac
"""
PYTHON = '#!/usr/bin/env bash\ncase "$*" in *" venv "*) mkdir -p "${@: -1}" ;; esac\n'
# Taken away, then asked to stop, then through.
COMMAND = """#!/usr/bin/env bash
test -e requirements.lock || exit 3
echo "$1" >> "$POD/attempts"
case $(wc -l < "$POD/attempts") in
1) echo SUSPENDED > "$POD/state"; exit 1 ;;
2) exit 75 ;;
esac
"""


def call(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / f"{script}.sh"), *arguments]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def dry(script: str, *arguments: str) -> str:
    result = call(script, *arguments, "--dry_run", *TRAIN)
    assert result.returncode == 0, result.stderr
    subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)
    return result.stdout


def in_order(text: str, *parts: str) -> None:
    place = 0
    for part in parts:
        place = text.find(part, place)
        assert place >= 0, f"{part!r} is missing, or out of its order, in:\n{text}"


def test_a_dry_run_of_a_pod_prints_every_command(tmp_path: Path) -> None:
    text = dry("launch", "run", *POD, "--spot", "--mount=data", "--delete_when_done")
    in_order(
        text,
        "gcloud compute tpus queued-resources describe dpo --zone=us-west4-a",
        "queued-resources create dpo --zone=us-west4-a --node-id=dpo --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot",
        "git ls-files",
        "gcloud compute tpus tpu-vm scp",
        "--worker=all",
        "-r requirements.lock -r requirements-tpu.txt",
        "gcsfuse --implicit-dirs data /mnt/data",
        "nohup setsid bash -c",
        "-m\\\\ dpo_jax.train\\\\ --workdir=gs://bucket/a\\\\\\\\\\\\ run",
        "tail\\ -n\\ 200",
        "queued-resources delete dpo --zone=us-west4-a --force --quiet",
    )
    assert "--project" not in text


def test_a_dry_run_of_a_cluster_prints_every_command() -> None:
    in_order(dry("xpk", "cluster", *CLUSTER, "--spot"), "xpk cluster create --cluster=tpus --project=p", "--spot")
    start = dry("xpk", "start", *CLUSTER, "--slices=2")
    in_order(start, "git ls-files", "xpk workload create", "--num-slices=2", "pip\\ install", "gs://bucket/a\\\\\\ run")
    in_order(dry("xpk", "logs", *CLUSTER), "get-credentials tpus --region=us-west4", "kubectl logs", "jobset-name=dpo")
    in_order(dry("xpk", "status", *CLUSTER), "xpk workload list", "--filter-by-job=dpo")
    in_order(dry("xpk", "stop", *CLUSTER), "xpk workload delete", "--workload=dpo")
    in_order(dry("xpk", "delete_cluster", *CLUSTER), "xpk cluster delete --cluster=tpus")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("launch", (), "no action; "),
        ("launch", ("fly", *POD), "unknown action fly; known: run create"),
        ("launch", ("run", "stop", *POD), "two actions, run and stop"),
        ("launch", ("run", "--zone=us-west4-a", *TRAIN), "--name is missing, such as --name=dpo"),
        ("launch", ("run", *POD), "nothing to run: put the command behind --, such as"),
        ("launch", ("run", "--nmae=dpo"), "unknown flag --nmae; known: --name=... "),
        ("launch", ("run", "--name"), "--name needs a value: --name=..."),
        ("launch", ("run", "--name=", *TRAIN), "--name is empty"),
        ("launch", ("create", "--name=dpo", "--zone=us-west4-a", "--dry_run"), "--type is missing"),
        ("launch", ("create", *POD), "there is no gcloud on this machine; install the Google Cloud CLI"),
        ("xpk", ("start", *CLUSTER[1:], *TRAIN), "--name is missing"),
        ("xpk", ("start", *CLUSTER), "nothing to start: put the command behind --"),
        ("xpk", ("status", *CLUSTER), "there is no gcloud on this machine"),
    ],
)
def test_mistakes_are_told_with_their_mend(script: str, arguments: tuple[str, ...], message: str, tmp_path) -> None:
    tools = ("bash", "dirname", "sed", "mkdir")
    for tool in tools:
        (tmp_path / tool).symlink_to(next(p for d in ("/bin", "/usr/bin") if (p := Path(d, tool)).exists()))
    result = call(script, *arguments, PATH=str(tmp_path))
    assert result.returncode == 2
    assert message in result.stderr


def test_help_names_every_action_and_flag() -> None:
    for script in ("launch", "xpk"):
        result = call(script, "--help")
        assert result.returncode == 0
        source = (SCRIPTS / f"{script}.sh").read_text()
        flags = [name for kind in ("known", "switches") for name in source.split(f"{kind}='")[1].split("'")[0].split()]
        assert not [flag for flag in flags if f"--{flag}" not in result.stdout]


def test_a_run_goes_on_until_its_command_has_finished(tmp_path: Path) -> None:
    """The TPU is taken away in the first attempt, the second is stopped with all saved, the third is through."""
    for name, text in (("gcloud", GCLOUD), ("python3", PYTHON), ("command", COMMAND)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "state").write_text("ABSENT\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = ("--", str(tmp_path / "command"), "two words; and $HOME")
    result = call("launch", "run", *POD, "--poll=0", *command, PATH=path, POD=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "attempts").read_text() == "two words; and $HOME\n" * 3
    calls = (tmp_path / "calls").read_text()
    in_order(calls, "create dpo", "delete dpo", "create dpo")
    assert calls.count(" create dpo") == 2
    assert "taken away; restart 1 of at most 100" in result.stderr
    assert "stopped with all saved; restart 2" in result.stderr
