#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# prometheus_client 0.26.0: in the OpenMetrics format a sample whose name has a colon, as those of LLM servers do
# (vllm:..., sglang:...), has an underscore in its place, while its # TYPE line keeps the colon: the sample belongs to no
# family that is declared. In the text format the colon stays, also when the scraper asks for the same escaping by
# underscores. Colons are legal in the classic names that this escaping is to produce. 0.21.1 kept them in both formats.
# So the name that a dashboard has to ask for, and whether its type is known, depend on the Accept header of the scraper
# and on the version of the library in the server.
#
# Installs both versions from the package index into a temporary folder, and fails if what they print changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 0.21.1 0.26.0; do
  python3 -m pip install --quiet --root-user-action ignore --no-deps --target "$folder/$version" "prometheus_client==$version"
done

cat >"$folder/names.py" <<'PYTHON'
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.exposition import choose_encoder

registry = CollectorRegistry()
Gauge("vllm:num_requests_running", "Requests that run.", registry=registry).set(1)
for accept in (
    "text/plain",
    "text/plain;version=1.0.0;escaping=underscores",
    "application/openmetrics-text;version=1.0.0",
):
    encode, _ = choose_encoder(accept)
    lines = encode(registry).decode().splitlines()
    [sample] = [line for line in lines if line and not line.startswith("#")]
    [kind] = [line for line in lines if line.startswith("# TYPE")]
    print(f"{accept}: {sample.split()[0]}, {kind}")
PYTHON

names() { PYTHONPATH="$folder/$1" python3 "$folder/names.py"; }
expect() {
  diff <(names "$1") - || {
    echo "prometheus_client $1 prints other names now"
    exit 1
  }
}

expect 0.21.1 <<'TEXT'
text/plain: vllm:num_requests_running, # TYPE vllm:num_requests_running gauge
text/plain;version=1.0.0;escaping=underscores: vllm:num_requests_running, # TYPE vllm:num_requests_running gauge
application/openmetrics-text;version=1.0.0: vllm:num_requests_running, # TYPE vllm:num_requests_running gauge
TEXT
expect 0.26.0 <<'TEXT'
text/plain: vllm:num_requests_running, # TYPE vllm:num_requests_running gauge
text/plain;version=1.0.0;escaping=underscores: vllm:num_requests_running, # TYPE vllm:num_requests_running gauge
application/openmetrics-text;version=1.0.0: vllm_num_requests_running, # TYPE vllm:num_requests_running gauge
TEXT
echo "as described: in OpenMetrics the sample is vllm_num_requests_running, its # TYPE vllm:num_requests_running"
