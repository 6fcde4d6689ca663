#!/bin/sh
# Before the pod ends: another one takes over, so that nothing waits for a failover. Best effort.
set -eu
. "$CONFIG_DIR/common.sh"
[ "$(named_master)" != "$ME" ] || hand_over 20 || echo "kvstrata: no replica can take over"
