#!/bin/sh
# Starts the pod's sentinel. What it learns is written to its configuration, which a restart of the container keeps.
set -eu
umask 077
. "$CONFIG_DIR/common.sh"

conf=$RUN_DIR/sentinel.conf
if [ ! -s "$conf" ]; then
    # A sentinel does not start with a master whose name does not resolve yet.
    while :; do
        master=$(named_master)
        [ -n "$master" ] || master=${NODES%% *}
        ! getent ahosts "$master" >/dev/null || break
        echo "kvstrata: waiting for the address of $master"
        sleep 1
    done
    # The same id after a restart: sentinels never forget one another, and the forgotten would count as voters.
    id=$(printf %s "$ME" | sha1sum | cut -c 1-40)
    {
        write_common "$SENTINEL_PORT"
        echo "dir $RUN_DIR"
        echo "sentinel myid $id"
        echo "sentinel resolve-hostnames yes"
        echo "sentinel announce-hostnames yes"
        echo "sentinel announce-ip $ME"
        echo "sentinel monitor $SERVICE $master $REDIS_PORT $QUORUM"
        [ -z "${REDISCLI_AUTH:-}" ] || echo "sentinel auth-pass $SERVICE $REDISCLI_AUTH"
        [ -z "${REDISCLI_AUTH:-}" ] || echo "sentinel sentinel-pass $REDISCLI_AUTH"
        sed "s/SERVICE/$SERVICE/" "$CONFIG_DIR/sentinel.conf"
    } >"$conf.new"
    mv "$conf.new" "$conf"
fi
exec redis-server "$conf" --sentinel
