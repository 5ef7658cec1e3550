# shellcheck shell=bash
# What launch.sh and xpk.sh share: flags, messages, and calls that --dry_run prints instead of making.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PACKED=$ROOT/build/tpu/dpo_jax.tar.gz
dry_run=
action=
command=()
# Of whoever sources this: flags with a value, flags without.
known=
switches=

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "error: $*"
    exit 2
}

# Makes a call, or prints it so that it can be pasted into a shell.
call() {
    if [[ $dry_run ]]; then
        printf '%q ' "$@" | sed 's/ $//'
        echo
    else
        "$@"
    fi
}

# ask VARIABLE ASSUMED COMMAND...: sets the variable to what the command prints. A dry run lets the command print its
# calls, and goes on with the assumed answer.
ask() {
    local -n answer=$1
    local assumed=$2
    shift 2
    if [[ $dry_run ]]; then
        "$@"
    else
        assumed=$("$@") || return
    fi
    # shellcheck disable=SC2034  # a reference, which the caller reads
    answer=$assumed
}

# Reads ACTION, --flag=value and -- COMMAND into variables; flags are named by the variables in $known and $switches.
parse() {
    [[ $# -gt 0 ]] || fail "no action; $0 --help lists them"
    while (($#)); do
        case $1 in
        -h | --help)
            usage
            exit 0
            ;;
        --)
            shift
            command=("$@")
            return
            ;;
        --*=*)
            set_flag "${1%%=*}" "${1#*=}"
            ;;
        --*)
            set_switch "$1"
            ;;
        *)
            [[ -z $action ]] || fail "two actions, $action and $1; the command to be run stands behind --"
            action=$1
            ;;
        esac
        shift
    done
}

set_flag() {
    local flag=${1#--}
    [[ " $known " == *" $flag "* ]] || fail "unknown flag $1; known: $(flags)"
    [[ $2 ]] || fail "$1 is empty"
    printf -v "$flag" '%s' "$2"
}

set_switch() {
    local flag=${1#--}
    [[ " $known " != *" $flag "* ]] || fail "$1 needs a value: $1=..."
    [[ " $switches " == *" $flag "* ]] || fail "unknown flag $1; known: $(flags)"
    printf -v "$flag" 1
}

flags() {
    # shellcheck disable=SC2086  # lists of words
    printf -- '--%s=... ' $known
    # shellcheck disable=SC2086
    printf -- '--%s ' $switches
}

# need FLAG EXAMPLE: the flag must be set.
need() {
    [[ -n ${!1} ]] || fail "--$1 is missing, such as --$1=$2; $0 --help explains all flags"
}

need_command() {
    ((${#command[@]})) || fail "there is nothing to $action: put the command behind --, such as
  $0 $action ... -- python -m dpo_jax.train --config=FILE --workdir=gs://BUCKET/RUN"
}

need_program() {
    [[ $dry_run ]] || command -v "$1" >/dev/null || fail "there is no $1 on this machine; $2"
}

# The arguments as one line for a shell.
quoted() { printf '%q ' "$@" | sed 's/ $//'; }

# Packs the working tree: what git tracks and what it would, as it is now.
pack() {
    call mkdir -p "$(dirname "$PACKED")"
    # shellcheck disable=SC2016  # expanded by the inner shell
    call bash -c 'cd "$0" && git ls-files -z --cached --others --exclude-standard |
        tar --null --files-from=- --ignore-failed-read -czf "$1"' "$ROOT" "$PACKED"
}
