# Sourced by the other scripts. From the pod: ME (this pod's host name), NODES (all of them, the first master first),
# SERVICE, REDIS_PORT, SENTINEL_PORT (empty without Sentinel), BIND, LOCAL_HOST, TLS_DIR (empty without TLS),
# CONFIG_DIR, DATA_DIR, RUN_DIR, and REDISCLI_AUTH, which redis-cli reads itself.

# redis-cli for a host and a port, with a deadline.
ask() {
    host=$1 port=$2
    shift 2
    # shellcheck disable=SC2086
    timeout 3 redis-cli ${TLS_DIR:+--tls --cacert "$TLS_DIR/ca.crt"} -h "$host" -p "$port" "$@" 2>/dev/null
}

# The master that a sentinel names; nothing when none of them answers.
named_master() {
    [ -n "$SENTINEL_PORT" ] || return 0
    for sentinel in $NODES; do
        found=$(ask "$sentinel" "$SENTINEL_PORT" SENTINEL GET-MASTER-ADDR-BY-NAME "$SERVICE" | head -n 1) || continue
        for node in $NODES; do
            [ "$node" != "$found" ] || { echo "$found"; return 0; }
        done
    done
}

# Wait until the sentinels have made another pod master, at most so many seconds. For a pod whose Redis is down: they
# see that by themselves. A failover ordered from here could meet theirs, and leave sentinels that disagree for good.
wait_for_other_master() {
    seconds=$1
    while [ "$seconds" -gt 0 ]; do
        named=$(named_master)
        [ -n "$named" ] || return 1
        [ "$named" = "$ME" ] || return 0
        seconds=$((seconds - 1))
        sleep 1
    done
    return 1
}

# Have another pod made master while this one still is and serves, with so many attempts, one a second. Fails when none can be: a sentinel that has just
# learnt of a new master takes up to ten seconds to find out about its replicas.
hand_over() {
    attempts=$1
    while [ "$attempts" -gt 0 ]; do
        master=$(named_master)
        [ -n "$master" ] || return 1
        [ "$master" = "$ME" ] || return 0
        for sentinel in $NODES; do
            case $(ask "$sentinel" "$SENTINEL_PORT" SENTINEL FAILOVER "$SERVICE") in
                OK | *INPROG*) break ;;
            esac
        done
        attempts=$((attempts - 1))
        sleep 1
    done
    return 1
}

# Lines of configuration that redis-server and its sentinels have in common.
write_common() {
    echo "bind $BIND"
    if [ -n "$TLS_DIR" ]; then
        echo "port 0"
        echo "tls-port $1"
        echo "tls-cert-file $TLS_DIR/tls.crt"
        echo "tls-key-file $TLS_DIR/tls.key"
        echo "tls-ca-cert-file $TLS_DIR/ca.crt"
        echo "tls-auth-clients no"
        echo "tls-replication yes"
    else
        echo "port $1"
    fi
    if [ -n "${REDISCLI_AUTH:-}" ]; then
        echo "requirepass \"$REDISCLI_AUTH\""
    else
        echo "protected-mode no"
    fi
}
