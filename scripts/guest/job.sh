# shellcheck shell=sh
# Words for jobs, in the guest: every job begins with `. /job.sh`. What a job says to the machine outside are lines that
# begin with TANDEM:
#   TANDEM key=value               a fact
#   TANDEM-FILE key LINE           a line of a fact that has many
#   TANDEM-BEGIN TEXT              a step begins
#   TANDEM-STEP ok SECONDS TEXT    a step that worked
#   TANDEM-STEP fail SECONDS TEXT  one that did not, followed by TANDEM-LOG lines of its output
#   TANDEM-RESULT ok | fail TEXT   the end, from init
#
# The shell is busybox and prefers its own programs: /tools/bin/blkdiscard names the other one.

fact() {
    echo "TANDEM $1=$2"
}

# step TEXT COMMAND...: runs the command; if it fails, so does the job. Its output is in /tmp/step.
step() {
    step_text=$1
    shift
    echo "TANDEM-BEGIN $step_text"
    step_start=$(centiseconds)
    step_status=0
    "$@" >/tmp/step 2>&1 </dev/null || step_status=$?
    step_time=$(($(centiseconds) - step_start))
    step_time=$((step_time / 100)).$((step_time / 10 % 10))
    if [ "$step_status" -eq 0 ]; then
        echo "TANDEM-STEP ok $step_time $step_text"
        return 0
    fi
    echo "TANDEM-STEP fail $step_time $step_text"
    tail -n 20 /tmp/step | sed 's/^/TANDEM-LOG /'
    dmesg | tail -n 5 | sed 's/^/TANDEM-LOG kernel: /'
    exit 1
}

# Since the guest started.
centiseconds() {
    read -r uptime _ </proc/uptime
    echo "${uptime%.*}$(echo "${uptime#*.}" | cut -c1-2)" | sed 's/^0*\(.\)/\1/'
}

# facts DISK: what the guest's driver made of a disk such as vda.
facts() {
    disk=/sys/block/$1
    fact "$1.bytes" "$(($(cat "$disk/size") * 512))"
    fact "$1.block" "$(cat "$disk/queue/logical_block_size")"
    fact "$1.ro" "$(cat "$disk/ro")"
    fact "$1.serial" "$(cat "$disk/serial")"
    fact "$1.queues" "$(find "$disk/mq" -mindepth 1 -maxdepth 1 | wc -l)"
    fact "$1.cache" "$(cat "$disk/queue/write_cache")"
    fact "$1.discard" "$(cat "$disk/queue/discard_max_bytes")"
    fact "$1.zeroes" "$(cat "$disk/queue/write_zeroes_max_bytes")"
    fact "$1.features" "$(cat "$disk/device/features")"
}

# fio_verify FILE JOBS SIZE [OPTION...]: random reads and writes of 512 bytes to 128 KiB, each job on a CPU of its own
# (so on a virtqueue of its own) and on its own part of the file; then everything written is read back and checked.
fio_verify() {
    fio_file=$1 fio_jobs=$2 fio_size=$3
    shift 3
    fio --name=verify --filename="$fio_file" --ioengine=libaio --direct=1 --thread \
        --rw=randrw --bsrange=512-128k --iodepth=32 --numjobs="$fio_jobs" \
        --size="$fio_size" --offset_increment="$fio_size" \
        --cpus_allowed=0-"$((fio_jobs - 1))" --cpus_allowed_policy=split \
        --verify=crc32c --verify_fatal=1 --group_reporting "$@"
}
