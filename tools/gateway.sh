# shellcheck shell=bash disable=SC2154
# Sourced by serve.sh: the OpenAI-style gateway beside the server, from its settings to its command.

# Refuses what cannot work, before anything is installed. Sets gateway_arguments.
check_gateway() {
  local host=$ADDRESS direct words word
  if [[ $host == 0.0.0.0 || $host == 127.0.0.1 ]]; then host=localhost; fi # certificates have names
  # gRPC would ask the proxy of http_proxy for a server on this machine.
  direct=${no_grpc_proxy:-${no_proxy:-}}
  export no_grpc_proxy="${direct:+$direct,}$host"
  gateway_arguments=(--host "$GATEWAY_HOST" --port "$GATEWAY_PORT" --triton-url "$host:$GRPC_PORT")
  if [[ "$NV_EMBED_MODEL_NAME ${added[*]-}" != 'nv-embed-v2 ' && $GATEWAY_ARGUMENTS != *--model-name* ]]; then
    for word in "$NV_EMBED_MODEL_NAME" ${added[@]+"${added[@]}"}; do gateway_arguments+=(--model-name "$word"); done
  fi
  if [[ -n $TLS_CERT ]]; then gateway_arguments+=(--triton-tls --triton-root-certificates "$TLS_CERT"); fi
  if [[ -n $GATEWAY_ARGUMENTS ]]; then
    words="$(xargs printf '%s\n' <<<"$GATEWAY_ARGUMENTS" 2>/dev/null)" ||
      refuse "GATEWAY_ARGUMENTS: expected words, quoted as in a shell; got an open quote in: $GATEWAY_ARGUMENTS"
    while IFS= read -r word; do gateway_arguments+=("$word"); done <<<"$words" # later ones win
  fi
  if [[ -n $TLS_CLIENT_CA && $GATEWAY_ARGUMENTS != *--triton-certificate-chain* ]]; then
    refuse "TLS_CLIENT_CA with GATEWAY_PORT: expected a certificate for the gateway, got none. Set" \
      "  GATEWAY_ARGUMENTS='--triton-certificate-chain FILE --triton-private-key FILE'"
  fi
  if [[ -n $TLS_CERT && $GATEWAY_ARGUMENTS != *--triton-url* ]] && command -v openssl >/dev/null &&
    openssl x509 -noout -in "$TLS_CERT" -checkhost "$host" -checkip "$host" | grep -q 'NOT match'; then
    refuse "TLS_CERT with GATEWAY_PORT: expected a certificate for $host, where the gateway finds the server; got another." \
      "Let the certificate name $host too, or set GATEWAY_ARGUMENTS='--triton-url NAME:$GRPC_PORT' to a name it has."
  fi
  # An empty key would be refused; without one anybody may ask.
  if [[ -n $GATEWAY_API_KEY ]]; then export GATEWAY_API_KEY; else unset GATEWAY_API_KEY; fi
}

# Puts the gateway before the server's command. The client is not installed but read where it stands, so it is never
# older than this script; neither the folder that serve.sh is called from nor PYTHONPATH may replace its modules.
add_gateway() {
  local start='import sys; sys.path.insert(0, sys.argv.pop(1)); from nv_embed_client.gateway.__main__ import main'
  local gateway=("$GATEWAY_VENV/bin/python" -I -c "$start; sys.exit(main())" "$repo/client/src" "${gateway_arguments[@]}")
  prepare_venv "$GATEWAY_VENV" "$repo/tools/requirements-gateway.txt"
  if [[ $RESTART == always ]]; then gateway=("$repo/tools/supervise.sh" "${gateway[@]}"); fi
  command=("$GATEWAY_VENV/bin/python" -I "$repo/tools/with_gateway.py" "${#gateway[@]}" "${gateway[@]}" "${command[@]}")
  printf '%s\n' "Once the model is loaded, a page to try it:  http://${GATEWAY_HOST/#0.0.0.0/localhost}:$GATEWAY_PORT/" \
    "OpenAI's embeddings API:                     http://$GATEWAY_HOST:$GATEWAY_PORT/v1" >&2
}
