#!/usr/bin/env bash
# First start of an instance, as root on Debian 13 (EC2 user data): what both instances need.
# `python -m deploy.aws.provision` puts the instance's own part behind it. May be run again.
set -euo pipefail
exec > >(tee -a /var/log/chestct-setup.log) 2>&1
export DEBIAN_FRONTEND=noninteractive

# Everything but Jenkins itself comes from Debian's archive, which apt checks against Debian's keys:
# Docker, Compose, the AWS CLI (version 2) and OpenJDK.
apt-get update -qq
apt-get upgrade -y -qq
apt-get install -y -qq --no-install-recommends \
  awscli ca-certificates curl docker-buildx docker-cli docker-compose docker.io git gnupg \
  unattended-upgrades
printf 'APT::Periodic::Update-Package-Lists "1";\nAPT::Periodic::Unattended-Upgrade "1";\n' \
  >/etc/apt/apt.conf.d/20auto-upgrades

# Logs of containers must not fill the disk.
install -d /etc/docker
printf '{"log-driver": "json-file", "log-opts": {"max-size": "20m", "max-file": "5"}}\n' \
  >/etc/docker/daemon.json

# SSH by key alone.
install -d /etc/ssh/sshd_config.d
printf 'PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin no\n' \
  >/etc/ssh/sshd_config.d/10-chestct.conf

# A chroot, where this script is tested, has no systemd.
if [ -d /run/systemd/system ]; then
  systemctl enable --now docker
  systemctl restart docker
  systemctl reload ssh
fi
