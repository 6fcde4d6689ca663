#!/bin/sh
# Whether the server on port $1 answers; loading its data, or waiting for its master, is alive.
set -eu
. "$CONFIG_DIR/common.sh"
case $(ask "$LOCAL_HOST" "$1" PING) in
    PONG | LOADING* | MASTERDOWN*) ;;
    *) exit 1 ;;
esac
