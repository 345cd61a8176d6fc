#!/bin/sh
# Does Photon work from its wheel alone? For `make dist`, and for a site that wonders.
#
#     deploy/try-wheel.sh ENVIRONMENT          as a site has it: looks, and trains a tiny federation
#     deploy/try-wheel.sh ENVIRONMENT serve    with what an aggregator needs: brings all of it up
set -eu
photon=$(cd "$1/bin" && pwd)/photon
mode=${2:-site}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
# Of the caller's environment nothing that could lend it a package.
photon() { env -u PYTHONPATH -u VIRTUAL_ENV PATH=/usr/bin:/bin HOME="$folder" "$photon" "$@"; }

photon --help > /dev/null
photon doctor
photon init first > /dev/null
photon data prepare --input first/text --silo-folders --out first/data > /dev/null
if [ "$mode" = site ]; then
    photon simulate first/run.toml --quiet --set federation.rounds=1 --set local.steps=2 --set local.warmup_steps=0 \
        --set eval.max_tokens=2000 --set run.name=tried
    # What an aggregator needs is missed in words that say where it is.
    if photon serve first/run.toml --check 2> said; then
        echo "serve works without its extra: is it in the dependencies?" >&2
        exit 1
    fi
    grep -q 'photon-federated\[serve\]' said || { cat said >&2; exit 1; }
else
    photon serve first/run.toml --check --set serve.host=127.0.0.1
fi
