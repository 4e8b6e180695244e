#!/usr/bin/env bash
# Runs a command and starts it again whenever it ends unasked. SIGTERM or Ctrl-C ends both, with exit code 0.
# Exit code 2 ends it for good: the command refused its settings, and would again.
set -uo pipefail

MAX_DELAY_SECONDS=${MAX_DELAY_SECONDS:-30}  # between two starts of a command that keeps failing at once

child='' asked='' delay=1
end() {
  asked=yes
  if [[ -n $child ]]; then kill -TERM "$child" 2>/dev/null; fi
}
trap end TERM INT

while [[ -z $asked ]]; do
  started=$SECONDS
  "$@" &
  child=$!
  if [[ -n $asked ]]; then end; fi  # asked for between the test above and the start
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do  # a signal cut wait short
    wait "$child"
    code=$?
  done
  if [[ -n $asked ]]; then break; fi
  if ((code == 2)); then exit 2; fi
  if ((SECONDS - started > 60)); then delay=1; fi
  echo "supervise.sh: ended with exit code $code; starting again in $delay s" >&2
  sleep "$delay" >/dev/null 2>&1 &  # in the background, so that a signal is heeded at once; holds nobody's pipe open
  wait $!
  delay=$((2 * delay > MAX_DELAY_SECONDS ? MAX_DELAY_SECONDS : 2 * delay))
done
exit 0
