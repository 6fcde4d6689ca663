#!/bin/sh
# Starts the pod's Redis: as master if it is the one, else as a replica of the master.
set -eu
umask 077
. "$CONFIG_DIR/common.sh"

conf=$RUN_DIR/redis.conf
master=$(named_master)
# A master that comes back has less than its replicas, which would then be emptied to match it.
if [ "$master" = "$ME" ] && wait_for_other_master 30; then
    master=$(named_master)
fi
[ -n "$master" ] || master=${NODES%% *}

{
    write_common "$REDIS_PORT"
    cat "$CONFIG_DIR/redis.conf"
    echo "dir $DATA_DIR"
    echo "replica-announce-ip $ME"
    [ -z "${REDISCLI_AUTH:-}" ] || echo "masterauth \"$REDISCLI_AUTH\""
    [ "$master" = "$ME" ] || echo "replicaof $master $REDIS_PORT"
} >"$conf"
echo "kvstrata: the master is $master, this is $ME"
exec redis-server "$conf"
