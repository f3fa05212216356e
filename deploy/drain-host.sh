#!/bin/sh
# Empties this host before it ends, as a pod's preStop hook or by hand:   drain-host.sh [SECONDS]
#
# Ray is told that the host will be gone in so many seconds: nothing new is placed on it, and Serve
# starts its replicas elsewhere. Each worker that ends hands over what it runs, so streams go on. The
# script waits until no replica is left here, for at most that long; then it ends with 0 either way,
# because the host ends anyway and what was not handed over is recomputed.
set -u
seconds=${1:-150}
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "the host is about to end" \
  --deadline-remaining-seconds "$seconds" ||
  echo "drain-host: Ray does not answer or refuses; waiting for the replicas alone" >&2
until [ "$seconds" -le 0 ]; do
  # An actor writes its name into its command line.
  pgrep -f '^ray::ServeReplica' >/dev/null || exit 0
  sleep 1
  seconds=$((seconds - 1))
done
echo "drain-host: replicas are still here, and the time is over" >&2
