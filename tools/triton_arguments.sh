# shellcheck shell=bash disable=SC2034
# Sourced by serve.sh and by the image's own command. Sets triton_arguments: what every start gives to tritonserver.
# Reads ADMIN_KEY, SHM_BYTES, MAX_CONNECTION_SECONDS, TRACE_URL and TRACE_RATE.

# Each call of these must carry the key: they change the server, or show what others do. A key is drawn here unless
# given. It stands in the server's command line, so whoever can list this machine's processes can read it.
# Metadata and configuration stay open because clients such as pytriton's read them. Nothing in them is secret.
shut=shared-memory,model-repository,statistics,trace,logging
shut+=":nv-embed-admin=${ADMIN_KEY:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}"

triton_arguments=(
  --model-control-mode=none
  --disable-auto-complete-config # it would import model.py a second time, in a process of its own
  --model-load-thread-count=1 # so that each model sees what the ones before it have left of the memory
  --exit-timeout-secs=30
  "--backend-config=python,shm-default-byte-size=${SHM_BYTES:-33554432}"
  "--grpc-restricted-protocol=$shut" "--http-restricted-api=$shut"
  # Clients may ping as often as they like, also between requests. By default Triton ends a connection, and with it
  # the requests in work, at the third ping within five minutes. No limit on the rate is right: pings sent in good
  # order arrive together when the server or the network was busy.
  --grpc-keepalive-permit-without-calls=1
  --grpc-http2-max-ping-strikes=0
  # The server pings too, so that work for a client that vanished ends within 40 s, not two hours.
  --grpc-keepalive-time=30000 --grpc-keepalive-timeout=10000
  --grpc-http2-max-pings-without-data=0
  # gRPC's own clients look a name up again only when a connection ends. So a connection of this age is ended: what is on
  # its way is answered first, for up to an hour, and what comes next takes a new connection.
  "--grpc-max-connection-age=${MAX_CONNECTION_SECONDS:-60}000" --grpc-max-connection-age-grace=3600000
)
if [[ -n ${TRACE_URL:-} ]]; then
  triton_arguments+=(
    --trace-config=mode=opentelemetry --trace-config=level=TIMESTAMPS "--trace-config=rate=${TRACE_RATE:-1000}"
    "--trace-config=opentelemetry,url=$TRACE_URL" --trace-config=opentelemetry,resource=service.name=nv-embed
  )
fi
