#!/usr/bin/env bash
# Runs a command on TPU slices of a GKE cluster through XPK, which restarts it after preemptions. See --help.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
    cat <<TEXT
Runs a command on all hosts of a TPU slice of a GKE cluster, through XPK; Kubernetes restarts it after preemptions.

  $0 ACTION --name=NAME --cluster=CLUSTER --zone=ZONE --project=PROJECT --type=TYPE [flags] [-- COMMAND]

  $0 start --name=dpo --cluster=tpus --project=P --zone=us-west4-a --type=v5litepod-64 -- \\
    python -m dpo_jax.train --config=configs/tpu/llama3_8b_v5e_64.py --workdir=gs://BUCKET/dpo

actions
  cluster          makes the cluster with its TPUs, or changes it when it is there
  start            puts the working tree, uncommitted changes too, into an image, and starts COMMAND
  logs             follows what COMMAND prints on the first host
  status           lists the workload
  stop             deletes the workload: COMMAND gets SIGTERM, saves and stops
  delete_cluster   gives the cluster back with all that runs in it

flags
  --name=NAME           of the workload
  --cluster=CLUSTER     of GKE
  --zone=ZONE           such as us-west4-a
  --project=PROJECT     of Google Cloud
  --type=TYPE           such as v5litepod-64, v4-32, v5p-16, v6e-16
  --slices=1            how many of them
  --spot                of cluster: capacity that may be taken away at any time
  --reservation=NAME    of cluster: capacity that is reserved
  --image=python:3.12   what the image is built on
  --restarts=100        at most
  --dry_run             prints every command and runs none

COMMAND must be one that goes on where it was interrupted, with a workdir that outlives its hosts: gs://, or a folder of
a bucket that the pods mount (xpk storage create --type=gcsfuse), as a mesh over several hosts needs it.
TEXT
}

known='name cluster zone project type slices reservation image restarts'
switches='spot dry_run'
name='' cluster='' zone='' project='' type='' reservation='' spot=''
slices=1 image=python:3.12 restarts=100

on_cluster() {
    local kind=$1 verb=$2
    shift 2
    call xpk "$kind" "$verb" --cluster="$cluster" --project="$project" --zone="$zone" "$@"
}

cluster() {
    need type v5litepod-64
    local capacity=--on-demand
    [[ -z $spot ]] || capacity=--spot
    [[ -z $reservation ]] || capacity=--reservation=$reservation
    on_cluster cluster create --tpu-type="$type" --num-slices="$slices" "$capacity"
}

start() {
    need type v5litepod-64
    local tree=$ROOT/build/tpu/dpo_jax
    pack
    call rm -rf "$tree"
    call mkdir "$tree"
    call tar -xzf "$PACKED" -C "$tree"
    # The image holds the code alone: packages are installed when a host starts.
    on_cluster workload create --workload="$name" --tpu-type="$type" --num-slices="$slices" --max-restarts="$restarts" \
        --base-docker-image="$image" --script-dir="$tree" \
        --command="pip install --quiet -r requirements.lock -r requirements-tpu.txt jax[tpu] && $(quoted "${command[@]}")"
}

logs() {
    call gcloud container clusters get-credentials "$cluster" --region="${zone%-*}" --project="$project"
    call kubectl logs --follow --tail=200 --all-containers \
        --selector="jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0"
}

status() { on_cluster workload list --filter-by-job="$name"; }

stop() { on_cluster workload delete --workload="$name" --force; }

delete_cluster() { on_cluster cluster delete --force; }

parse "$@"
case $action in
cluster | start | logs | status | stop | delete_cluster) ;;
'') fail "no action; $0 --help lists them" ;;
*) fail "unknown action $action; known: cluster start logs status stop delete_cluster" ;;
esac
need cluster tpus
need project my-project
need zone us-west4-a
case $action in
cluster | delete_cluster) ;;
*) need name dpo ;;
esac
if [[ $action == start ]]; then need_command; fi
need_program gcloud 'install the Google Cloud CLI (https://cloud.google.com/sdk/docs/install), or pass --dry_run'
need_program xpk 'install it with pip install xpk, or pass --dry_run'
"$action"
