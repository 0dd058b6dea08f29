# shellcheck shell=bash
# What the scripts share: words for the terminal, Debian packages, children that are never left behind.
# Sourced after `set -euo pipefail`; it defines and sets, and does nothing else.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target=$(realpath -m "${CARGO_TARGET_DIR:-$root/target}")
# shellcheck disable=SC2034 # read by those who source this
guest_dir=$target/guest

# shellcheck disable=SC2034
bold='' red='' green='' dim='' plain=''
if [[ -t 1 && -z ${NO_COLOR:-} && ${TERM:-dumb} != dumb ]]; then
    # shellcheck disable=SC2034
    bold=$'\e[1m' red=$'\e[31m' green=$'\e[32m' dim=$'\e[2m' plain=$'\e[0m'
fi

say() {
    printf '%s\n' "$*"
}

heading() {
    printf '\n%s%s%s\n' "$bold" "$*" "$plain"
}

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# need PROGRAM [what provides it]: ends the script if the program is not there.
need() {
    command -v "$1" >/dev/null || die "the program \`$1\` is missing (${2:-package $1})"
}

# ---- Debian packages ----

can_install() {
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null
}

installed() {
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null) == installed ]]
}

# Package lists are fetched when there are none, when something could not be had with those that are there, and once a day
# for the guest's kernel.
update_package_lists() {
    say "${dim}updating the package lists${plain}"
    apt-get update -qq >/dev/null || die "apt-get update failed: is the network there?"
}

have_package() {
    local candidate
    candidate=$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p')
    [[ -n $candidate && $candidate != '(none)' ]]
}

# install_packages NAME...: installs those that are missing, if this user may; otherwise names them and goes on.
install_packages() {
    local name missing=()
    command -v dpkg-query >/dev/null || {
        say "this is not Debian; what is needed is in the packages: $*"
        return 0
    }
    for name in "$@"; do
        installed "$name" || missing+=("$name")
    done
    ((${#missing[@]})) || return 0
    if ! can_install; then
        say "please install: apt-get install --no-install-recommends ${missing[*]}"
        return 0
    fi
    for name in "${missing[@]}"; do
        have_package "$name" || {
            update_package_lists
            break
        }
    done
    say "${dim}installing ${missing[*]}${plain}"
    apt_install "${missing[@]}" || {
        # The lists may name versions that the archive no longer has.
        update_package_lists
        apt_install "${missing[@]}" || die "cannot install ${missing[*]}: run apt-get install to see why"
    }
}

apt_install() {
    local removed
    removed=$(apt-get install --simulate -qq --no-install-recommends "$@" 2>/dev/null | sed -n 's/^Remv \([^ ]*\).*/\1/p')
    if [[ -n $removed ]]; then
        say "these conflict with the above and go: ${removed//$'\n'/ }"
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null 2>&1 </dev/null
}

# The package that linux-image-cloud-amd64 stands for today, such as linux-image-6.1.0-56-cloud-amd64.
guest_kernel() {
    local name stamp=$target/package-lists
    # Old lists name a kernel whose other packages (headers, source) the archive may have no more: all that is made of it in
    # one day is of one kernel.
    if can_install && [[ -z $(find "$stamp" -mtime -1 2>/dev/null) ]]; then
        mkdir -p "$target"
        if (update_package_lists) >&2; then
            : >"$stamp"
        fi
    fi
    for _ in 1 2; do
        name=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null \
            | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
        if [[ -n $name ]]; then
            say "$name"
            return
        fi
        can_install || break
        update_package_lists >&2
    done
    die "Debian's package linux-image-cloud-amd64 is not in the package lists (apt-get update, as root)"
}

# unpack_package NAME[=VERSION] FOLDER: downloads it and unpacks it there; nothing is installed. A child, so `run` it from
# a script that ends its children.
unpack_package() {
    local folder=$2-package
    local -a archive
    mkdir "$folder"
    cd "$folder" || die "cannot enter $folder"
    if ! run apt-get download -qq "$1" >log 2>&1; then
        # The lists may name a version that the archive no longer has.
        can_install || die "cannot download $1: $(tail -n 1 log)"
        update_package_lists
        run apt-get download -qq "$1" >log 2>&1 || die "cannot download $1: $(tail -n 1 log)"
    fi
    archive=(./*.deb)
    run dpkg-deb -x "${archive[0]}" "$2"
    cd "$root" || die "cannot enter $root"
    rm -rf "$folder"
}

# ---- children ----

# Process groups of the children that run; see `start` and `end_children`.
children=()

# start COMMAND...: runs it in the background in a process group of its own, so that Ctrl-C reaches only this script,
# which then ends its children in order. Its process is $child.
start() {
    set -m
    "$@" </dev/null &
    child=$!
    set +m
    children+=("$child")
}

# finish PID: its exit status, once it has ended. Unlike a child in the foreground, it does not hold up a trap.
finish() {
    local status=0 other left=()
    wait "$1" 2>/dev/null || status=$?
    for other in "${children[@]}"; do
        [[ $other == "$1" ]] || left+=("$other")
    done
    children=("${left[@]}")
    return "$status"
}

run() {
    start "$@"
    finish "$child"
}

# Ends every child that still runs: asks, waits up to 3 s, then kills. The last one that was started goes first.
end_children() {
    local index pid
    for ((index = ${#children[@]} - 1; index >= 0; index--)); do
        pid=${children[index]}
        kill -TERM -- "-$pid" 2>/dev/null || continue
        for _ in {1..60}; do
            kill -0 -- "-$pid" 2>/dev/null || break
            sleep 0.05
        done
        kill -KILL -- "-$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    children=()
}

# ---- Rust ----

need_rust() {
    command -v cargo >/dev/null \
        || die "cargo is missing: Tandem needs Rust 1.95 or later (https://rustup.rs, then: rustup toolchain install 1.95)"
}
