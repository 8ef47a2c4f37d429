# Waits until something can be told of how cloud-init gets on, at most some seconds; then prints one
# line of JSON with its state, and what its log has gained behind an offset. As root.
# Arguments: offset into the log, how many seconds to wait, how many bytes of the log at most.
set -u
PATH=$PATH:/usr/sbin:/sbin:/usr/bin:/bin
offset=$1 tries=$(($2 * 5)) most=$3
log=/var/log/cloud-init-output.log
run=/run/cloud-init
size() {
    bytes=0
    [ ! -f "$log" ] || bytes=$(wc -c <"$log")
}
while :; do
    state=running
    if [ -s "$run/result.json" ]; then
        state=done
    elif [ -f "$run/disabled" ]; then
        state=disabled
    elif [ ! -d "$run" ] && ! command -v cloud-init >/dev/null 2>&1; then
        state=absent
    fi
    size
    tries=$((tries - 1))
    [ $state = running ] && [ "$bytes" -le "$offset" ] && [ $tries -gt 0 ] || break
    sleep 0.2
done
echo "{\"state\": \"$state\", \"size\": $bytes}"
if [ $state = done ]; then tr '\n' ' ' <"$run/result.json"; fi
echo
[ "$bytes" -le "$offset" ] || tail -c +$((offset + 1)) "$log" | tail -c "$most"
