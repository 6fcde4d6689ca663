#!/bin/sh
# Whether Redis serves: a replica does when it is in step with its master.
set -eu
. "$CONFIG_DIR/common.sh"
[ "$(ask "$LOCAL_HOST" "$REDIS_PORT" PING)" = PONG ]
ask "$LOCAL_HOST" "$REDIS_PORT" INFO replication | grep -Eq '^(role:master|master_link_status:up)'
