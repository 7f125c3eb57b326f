#!/usr/bin/env bash
# Starts a Ray cluster of two nodes on this machine by `ray up`, submits a job to it, and ends it by `ray down`.
#
#     sudo ops/ray_up_here.sh [FOLDER]
#
# A node is a set of Linux namespaces with an address, an sshd and processes of its own: `ray stop` meets no other Ray.
# Files, set-up commands and Ray's options are those of cluster.yaml. Needs root, openssh-server, rsync, iproute2 and
# `make setup`; takes some minutes, and 12 GB in FOLDER (/var/tmp/ray_up_here, not below /tmp), where the next run finds
# what this one installed.
set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder=${1:-/var/tmp/ray_up_here}
head=10.77.0.2 worker=10.77.0.3

# The nodes have no network but their own: what they install is fetched before.
if [[ ${INSIDE:-} != yes ]]; then
    mkdir -p "$folder/wheels"
    "$repository/.venv/bin/python" -m pip download --quiet --require-hashes --dest "$folder/wheels" \
        -r "$repository/requirements.txt"
    INSIDE=yes exec unshare --net --pid --fork --kill-child --mount --uts --ipc --mount-proc "$0" "$folder"
fi

rm -rf "$folder"/{home/.ssh,home/.ray,home/run,submitter,head,worker} "$folder"/*key*
mkdir -p "$folder"/{home/.ssh,home/.ray,submitter} /run/sshd
hostname submitter
export HOME=$folder/submitter PATH=$repository/.venv/bin:$PATH RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# The second autoscaler starts no workers on machines of one's own (Ray 2.60).
export RAY_UP_enable_autoscaler_v2=0

# The user of both nodes, first among those of its id; as on a cluster with network storage, they have one home.
sed "1i ray:*:0:0::$folder/home:/bin/bash" /etc/passwd >"$folder/passwd"
ssh-keygen -q -t ed25519 -N '' -f "$folder/key"
ssh-keygen -q -t ed25519 -N '' -f "$folder/host_key"
cp "$folder/key.pub" "$folder/home/.ssh/authorized_keys"
cat >"$folder/sshd_config" <<END
HostKey $folder/host_key
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
END
python=$(dirname "$(python -c 'import os, sys; print(os.path.realpath(sys.executable))')")
cat >"$folder/home/.bashrc" <<END
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 PIP_NO_INDEX=1 PIP_FIND_LINKS=$folder/wheels PATH=$python:\$PATH
END
echo '. ~/.bashrc' >"$folder/home/.bash_profile"

# Starts a node: its name, its address.
start_node() {
    mkdir -p "$folder/$1"
    unshare --net --pid --fork --kill-child --mount --uts --ipc --mount-proc bash -euc "
        hostname $1
        touch '$folder/$1/started'
        mount --bind '$folder/$1' /tmp
        mount --bind '$folder/passwd' /etc/passwd
        mount -t tmpfs tmpfs /dev/shm
        ip link set lo up
        until ip link show eth0 >/dev/null 2>&1; do sleep 0.1; done
        ip address add $2/24 dev eth0
        ip link set eth0 up
        ip route add default via 10.77.0.1
        exec $(command -v sshd || echo /usr/sbin/sshd) -D -f '$folder/sshd_config' -E '$folder/$1.log'" &
    until [[ -e $folder/$1/started ]]; do sleep 0.1; done
    ip link add "$1" type veth peer name eth0 netns $!
    ip link set "$1" master bridge up
}

ip link set lo up
ip link add bridge type bridge
ip address add 10.77.0.1/24 dev bridge
ip link set bridge up
start_node head "$head"
start_node worker "$worker"

ray get-auth-token --generate >/dev/null
python - "$repository/cluster.yaml" "$folder" "$head" "$worker" <<'END'
"""Writes cluster.yaml with machines of one's own in place of AWS's and of containers."""
import sys
from pathlib import Path

import yaml

source, folder, head, worker = sys.argv[1:]
text = Path(source).read_text().replace("/home/ray/", f"{folder}/home/")
cluster = yaml.safe_load(text)
for key in ("docker", "available_node_types", "head_node_type", "max_workers", "upscaling_speed"):
    del cluster[key]
cluster["provider"] = {"type": "local", "head_ip": head, "worker_ips": [worker]}
cluster["auth"] = {"ssh_user": "ray", "ssh_private_key": f"{folder}/key"}
for commands in (cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]):
    commands[1] = commands[1].replace("4000000000", "1000000000") + " --num-cpus=2"
Path(folder, "cluster.yaml").write_text(yaml.safe_dump(cluster))
END

cd "$repository"
ray up --yes --no-config-cache "$folder/cluster.yaml"
ray dashboard "$folder/cluster.yaml" >"$folder/dashboard.log" 2>&1 &
export RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265
until ray job list >/dev/null 2>&1; do sleep 1; done
until [[ $(ray list nodes --address "$RAY_API_SERVER_ADDRESS" --filter state=ALIVE 2>/dev/null | grep -c ' ALIVE ') == 2 ]]; do
    sleep 1
done
ray job submit --working-dir . -- python jobs/eval_coco.py --policies whole regions --output "$folder/home/run"
ls "$folder/home/run"
ray down --yes "$folder/cluster.yaml"
