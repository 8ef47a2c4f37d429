#!/bin/sh
# Powers this machine off at its end, whoever is gone by then. Written by gridcloud at first boot.
#
#   end.sh watch                        stay until the end, then power off
#   end.sh first EPOCH SECONDS LEASE    tell the end, unless one was told for that lease before
#   end.sh move EPOCH SECONDS LEASE     tell another end
#
# An end has come when the clock shows EPOCH, or when the machine has run for SECONDS since it was
# told, whichever is first: so a clock that is set back wins nothing. `ends-at` holds what was told;
# `lived` how long the machine has run since, with the boot and the uptime that this was counted at.
set -u
PATH=$PATH:/usr/sbin:/sbin:/usr/bin:/bin
folder=/var/lib/gridcloud
every=20 # seconds between looks: what an end may be late by, and what an earlier one is noticed after
grace=90 # seconds that an orderly shutdown may take

tell() { # EPOCH SECONDS LEASE
    case "$1$2" in *[!0-9]*) echo "gridcloud: an end is two numbers" >&2; exit 64 ;; esac
    mkdir -p "$folder" && umask 022 &&
        echo "$1 $2 $3" >"$folder/ends-at.new" && mv -f "$folder/ends-at.new" "$folder/ends-at"
}

uptime_seconds() { # how long this boot has lasted, in $up
    up=0
    read -r up _ </proc/uptime && up=${up%%.*}
    # A container may be shown the uptime of its host; its first process started with it.
    read -r stat </proc/1/stat || return
    set -- ${stat##*) }
    shift 19
    [ "$up" -lt "$(($1 / 100))" ] || up=$((up - $1 / 100))
}

count() { # add to `lived` what has passed since it was counted last
    told_then= lived=0 boot_then= up_then=0
    [ -f "$folder/lived" ] && read -r lived boot_then up_then told_then <"$folder/lived"
    read -r boot </proc/sys/kernel/random/boot_id || boot=unknown
    uptime_seconds
    case "$lived$up_then" in '' | *[!0-9]*) lived=0 up_then=$up ;; esac
    if [ "$told_then" != "$told" ]; then
        lived=0
    elif [ "$boot_then" = "$boot" ] && [ "$up" -ge "$up_then" ]; then
        lived=$((lived + up - up_then))
    else
        lived=$((lived + up)) # it was started again meanwhile
    fi
    echo "$lived $boot $up $told" >"$folder/lived.new" && mv -f "$folder/lived.new" "$folder/lived"
}

left() { # seconds until the end, in $left
    if [ -f "$folder/ends-at" ]; then read -r told <"$folder/ends-at"; fi
    set -- $told
    case "${1:-x}${2:-x}" in *[!0-9]*) left=0; return ;; esac # no end that can be read is now
    count
    left=$(($1 - $(date +%s)))
    [ "$(($2 - lived))" -ge "$left" ] || left=$(($2 - lived))
}

power_off() {
    echo "gridcloud: the end of this machine has come" >&2
    if [ -d /run/systemd/system ]; then
        systemctl poweroff
    else
        poweroff || halt -p || shutdown -h now
    fi
}

watch() {
    told=
    while left && [ "$left" -gt 0 ]; do
        [ "$left" -lt "$every" ] || left=$every
        sleep "$left"
    done
    power_off
    sleep "$grace"
    while :; do
        poweroff -f || systemctl poweroff --force --force
        sleep 10
    done
}

case "${1:-}" in
    watch) watch ;;
    move) tell "${2:-x}" "${3:-x}" "${4:-}" ;;
    first)
        told=
        [ -f "$folder/ends-at" ] && read -r told <"$folder/ends-at"
        [ "${told##* }" = "${4:-}" ] || tell "${2:-x}" "${3:-x}" "${4:-}"
        ;;
    *)
        echo "usage: end.sh watch | first EPOCH SECONDS LEASE | move EPOCH SECONDS LEASE" >&2
        exit 64
        ;;
esac
