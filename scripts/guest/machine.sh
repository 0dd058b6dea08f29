# shellcheck shell=sh
# Words for jobs in a machine with SSDs (scripts/guest-run --ssd), besides those of job.sh.

# Programs of the payload bring their libraries.
export LD_LIBRARY_PATH=/payload/lib

# bind BDF [OPTION...]: hands an SSD such as 0000:00:05.0 from the kernel's driver to vfio-pci, whatever is on it.
bind() {
    tandem setup-vfio bind --force-data "$@"
}

# unbind BDF: gives it back to the kernel's driver.
unbind() {
    tandem setup-vfio unbind "$1"
}

# within SECONDS COMMAND...: repeats the command until it works.
within() {
    within_end=$(($(centiseconds) + $1 * 100))
    shift
    until "$@"; do
        [ "$(centiseconds)" -lt "$within_end" ] || return 1
        sleep 0.05
    done
}

# serve NAME ARGUMENT...: starts a server on CPU 0; its process is in /tmp/NAME.pid, what it says in /tmp/NAME.out and
# /tmp/NAME.log.
serve() {
    serve_name=$1
    shift
    tandem serve --cores 0 "$@" >"/tmp/$serve_name.out" 2>"/tmp/$serve_name.log" &
    echo $! >"/tmp/$serve_name.pid"
    within 30 served_or_ended "$serve_name"
    if ! served "$serve_name"; then
        cat "/tmp/$serve_name.log"
        return 1
    fi
}

# The server is ready.
served() {
    grep -q '^tandem: ready$' "/tmp/$1.out"
}

served_or_ended() {
    served "$1" || ! kill -0 "$(cat "/tmp/$1.pid")" 2>/dev/null
}

# refuses TEXT ARGUMENT...: a server that starts nothing, says why (an extended regular expression) and ends with 2.
refuses() {
    refuses_text=$1
    shift
    refuses_status=0
    timeout 30 tandem serve --cores 0 "$@" >/tmp/refused 2>&1 || refuses_status=$?
    cat /tmp/refused
    [ "$refuses_status" -eq 2 ] && grep -Eq "$refuses_text" /tmp/refused
}

# finish NAME: ends a server that was started with `serve`; its exit status.
finish() {
    finish_status=0
    kill -TERM "$(cat "/tmp/$1.pid")"
    wait "$(cat "/tmp/$1.pid")" || finish_status=$?
    return "$finish_status"
}

# tells NAME FILE: a fact of many lines, for the test outside.
tells() {
    sed "s/^/TANDEM-FILE $1 /" "$2"
}

# told TEXT COMMAND...: a step that says facts.
told() {
    step "$@"
    grep '^TANDEM ' /tmp/step || true
}

# cpu NAME: CPU time of a server so far, in centiseconds.
cpu() {
    # After the name, which ends with a parenthesis: user and system time are the 12th and 13th field.
    cpu_user=$(sed 's/.*) //' "/proc/$(cat "/tmp/$1.pid")/stat" | cut -d ' ' -f 12)
    cpu_system=$(sed 's/.*) //' "/proc/$(cat "/tmp/$1.pid")/stat" | cut -d ' ' -f 13)
    echo $((cpu_user + cpu_system))
}

# no_faults: the IOMMU has blocked nothing since the machine started.
no_faults() {
    ! dmesg | grep 'DMAR:.*fault'
}
