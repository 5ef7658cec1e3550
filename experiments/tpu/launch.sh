#!/usr/bin/env bash
# Runs a command on all hosts of a Cloud TPU pod, and again after each preemption. See --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<TEXT
Runs a command on all hosts of a Cloud TPU pod (one slice, TPU VMs), and again after each preemption.

  $0 ACTION --name=NAME --zone=ZONE [flags] [-- COMMAND]

  $0 run --name=dpo --zone=us-west4-a --type=v5litepod-64 --spot --mount=BUCKET -- \\
    python -m dpo_jax.train --config=configs/tpu/llama3_8b_v5e_64.py --workdir=/mnt/BUCKET/dpo

actions
  run        create, sync, install, start and logs; after a preemption all of it again, until COMMAND has finished
  create     asks for the TPU with a queued resource, or takes the one of this name, and waits for it
  sync       copies the working tree, uncommitted changes too, to ~/dpo_jax of all hosts
  install    Python and requirements.lock into ~/dpo_jax_venv of all hosts, unless it is there; mounts the bucket
  start      starts COMMAND in ~/dpo_jax on all hosts, unless one is running
  logs       follows what COMMAND prints on the first host
  status     tells the state of the TPU, and of COMMAND: running, an exit code, or none
  stop       asks COMMAND to save and stop (SIGTERM on all hosts)
  delete     gives the TPU back

flags
  --name=NAME           of the queued resource and its node
  --zone=ZONE           such as us-west4-a
  --project=PROJECT     that of gcloud when left out
  --type=TYPE           accelerator type, such as v5litepod-64, v4-32, v5p-16, v6e-16
  --runtime=VERSION     image of the hosts; that of the type when left out
  --spot                capacity that may be taken away at any time
  --reservation=NAME    capacity that is reserved
  --service_account=S   of the hosts; it must be able to write to the bucket
  --mount=BUCKET        mounts a bucket as /mnt/BUCKET on all hosts, with gcsfuse; for a workdir in it, the bucket needs a
                        hierarchical namespace
  --python=3.12         version on the hosts
  --restarts=100        of run, at most
  --poll=30             seconds between two looks at the TPU
  --delete_when_done    gives the TPU back when COMMAND has ended
  --dry_run             prints every command and runs none

COMMAND must be one that goes on where it was interrupted, with a workdir that outlives the TPU: gs://, or in a mounted
bucket, as a mesh over several hosts needs it. The exit code of run is COMMAND's; 75 (stopped, all saved) starts it again.
TEXT
}

known='name zone project type runtime reservation service_account mount python restarts poll'
switches='spot delete_when_done dry_run'
name='' zone='' project='' type='' runtime='' reservation='' service_account='' mount='' spot='' delete_when_done=''
python=3.12 restarts=100 poll=30

tpus() {
    local group=$1 verb=$2
    shift 2
    call gcloud compute tpus "$group" "$verb" "$name" --zone="$zone" ${project:+"--project=$project"} "$@"
}

# on WORKER SCRIPT: runs a script on one host, or on all.
on() { tpus tpu-vm ssh --worker="$1" --command="$2"; }

default_runtime() {
    case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) echo tpu-ubuntu2204-base ;;
    esac
}

# Sets tpu to the queued resource's state, to the node's where that is not READY, or to ABSENT.
look() {
    ask tpu "${1:-ACTIVE}" describe queued-resources 'value(state.state)'
    if [[ $tpu == ACTIVE ]]; then
        local node
        ask node READY describe tpu-vm 'value(state)'
        [[ $node == READY ]] || tpu=$node
    fi
}

describe() {
    local found
    if [[ $dry_run ]]; then
        tpus "$1" describe --format="$2"
    elif found=$(tpus "$1" describe --format="$2" 2>&1); then
        echo "$found"
    elif [[ $found == *NOT_FOUND* || $found == *"not found"* ]]; then
        echo ABSENT
    else
        say "$found"
        fail "gcloud cannot tell the state of $name; is --project right, and are you logged in (gcloud auth login)?"
    fi
}

create() {
    local tpu
    look ABSENT
    case $tpu in
    # What was taken away stays in the queue under its name, and never comes back.
    FAILED | SUSPENDED | SUSPENDING | PREEMPTED | TERMINATED | DELETING)
        say "$name is $tpu: asking for it anew"
        delete
        request
        ;;
    ABSENT) request ;;
    *) say "$name is there: $tpu" ;;
    esac
    wait_for_tpu
}

request() {
    need type v5litepod-64
    tpus queued-resources create --node-id="$name" --accelerator-type="$type" \
        --runtime-version="${runtime:-$(default_runtime)}" ${spot:+--spot} \
        ${reservation:+--reserved "--reservation=$reservation"} ${service_account:+"--service-account=$service_account"}
}

wait_for_tpu() {
    local tpu before=''
    while true; do
        look
        case $tpu in
        ACTIVE) return ;;
        FAILED | SUSPENDED | PREEMPTED | TERMINATED)
            fail "the TPU $name is $tpu; gcloud compute tpus queued-resources describe $name --zone=$zone tells why" ;;
        esac
        [[ $tpu == "$before" ]] || say "$name: $tpu"
        before=$tpu
        sleep "$poll"
    done
}

sync() {
    pack
    call gcloud compute tpus tpu-vm scp "$PACKED" "$name:dpo_jax.tar.gz" --worker=all --zone="$zone" \
        ${project:+"--project=$project"}
    # Old files go, runs/ stays: prepared data may lie there.
    on all 'mkdir -p dpo_jax && find dpo_jax -mindepth 1 -maxdepth 1 ! -name runs -exec rm -rf {} + && tar -xzf dpo_jax.tar.gz -C dpo_jax'
}

install() {
    on all "cd dpo_jax && want=\$(cat requirements.lock requirements-tpu.txt | sha256sum) && venv=~/dpo_jax_venv &&
if [ \"\$want\" != \"\$(cat \$venv/.installed 2>/dev/null)\" ]; then
    python3 -m pip install --user --quiet uv && uv=\"python3 -m uv\" && \$uv venv --quiet --clear --python $python \$venv &&
    \$uv pip install --quiet --python \$venv/bin/python -r requirements.lock -r requirements-tpu.txt 'jax[tpu]' &&
    echo \"\$want\" > \$venv/.installed
fi"
    if [[ $mount ]]; then mount_bucket; fi
}

mount_bucket() {
    on all "mountpoint -q /mnt/$mount || {
    command -v gcsfuse >/dev/null || { echo 'error: this image has no gcsfuse; cloud.google.com/storage/docs/gcsfuse-install tells how to get it' >&2; exit 1; }
    sudo mkdir -p /mnt/$mount && sudo chown \"\$USER\" /mnt/$mount && gcsfuse --implicit-dirs $mount /mnt/$mount
}"
}

start() {
    need_command
    local line
    # The shell outlives a SIGTERM to its group, to write down the exit code.
    line="trap : TERM; $(quoted "${command[@]}"); echo \$? > ~/dpo_jax_run/exit_code"
    on all "mkdir -p ~/dpo_jax_run && cd ~/dpo_jax && export PATH=~/dpo_jax_venv/bin:\$PATH &&
if [ -e ~/dpo_jax_run/pid ] && kill -0 \$(cat ~/dpo_jax_run/pid) 2>/dev/null; then
    echo a command is running already
else
    rm -f ~/dpo_jax_run/exit_code
    nohup setsid bash -c $(printf '%q' "$line") >> ~/dpo_jax_run/log 2>&1 < /dev/null &
    echo \$! > ~/dpo_jax_run/pid
fi"
}

# Sets progress to running, none, or the exit code.
look_at_command() {
    # shellcheck disable=SC2016  # expanded on the host
    ask progress "$1" on 0 'cd ~/dpo_jax_run 2>/dev/null || { echo none; exit; }
if [ -e exit_code ]; then cat exit_code; elif kill -0 "$(cat pid)" 2>/dev/null; then echo running; else echo none; fi'
}

logs() {
    # shellcheck disable=SC2016  # expanded on the host
    on 0 'cd ~/dpo_jax_run && tail -n 200 --pid="$(cat pid)" -F log'
}

status() {
    local tpu progress=none
    look
    if [[ $tpu == ACTIVE ]]; then look_at_command running; fi
    [[ $dry_run ]] || echo "TPU $tpu, command $progress"
}

stop() {
    # shellcheck disable=SC2016  # expanded on the hosts
    on all 'kill -TERM -- "-$(cat ~/dpo_jax_run/pid)"'
}

delete() { tpus queued-resources delete --force --quiet; }

run() {
    need_command
    local attempt progress
    for ((attempt = 0; attempt <= restarts; attempt++)); do
        create
        look_at_command none
        if [[ $progress != running ]]; then
            sync
            install
            start
        fi
        follow
        case $progress in
        gone) say "the TPU was taken away; restart $((attempt + 1)) of at most $restarts" ;;
        75) say "stopped with all saved; restart $((attempt + 1)) of at most $restarts" ;;
        *) finish "$progress" ;;
        esac
    done
    fail "still not finished after $restarts restarts (--restarts)"
}

# Follows the command to its end, and sets progress to its exit code, or to gone when the TPU was taken away.
follow() {
    local tpu
    while true; do
        logs || true # the connection may break, and the TPU may go
        # A host that goes takes the command on the others with it, moments before the TPU's state tells.
        [[ $dry_run ]] || sleep "$poll"
        look || continue # this machine's own network may fail for a while
        if [[ $tpu != ACTIVE ]]; then
            progress=gone
            return
        fi
        look_at_command 0 || continue
        [[ $progress == running ]] || return 0
    done
}

finish() {
    [[ $1 != none ]] || fail "the command ended without an exit code; $0 logs --name=$name --zone=$zone tells more"
    say "the command has ended with exit code $1"
    if [[ $delete_when_done ]]; then delete; fi
    exit "$1"
}

parse "$@"
case $action in
run | create | sync | install | start | logs | status | stop | delete) ;;
'') fail "no action; $0 --help lists them" ;;
*) fail "unknown action $action; known: run create sync install start logs status stop delete" ;;
esac
need name dpo
need zone us-west4-a
if [[ $action == run || $action == start ]]; then need_command; fi
need_program gcloud 'install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), or pass --dry_run'
"$action"
