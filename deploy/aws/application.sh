#!/usr/bin/env bash
# The application host: a user for Jenkins that may run containers, and the folder of releases.
id chestct >/dev/null 2>&1 || useradd --create-home --shell /bin/bash --groups docker chestct
install -d -o chestct -g chestct -m 755 /opt/chestct /opt/chestct/model_repository \
  /opt/chestct/results
# Passwords and tokens of the services; filled in by hand, read by Compose, never sent by Jenkins.
[ -e /opt/chestct/secrets.env ] ||
  install -o chestct -g chestct -m 600 /dev/null /opt/chestct/secrets.env
install -d -o chestct -g chestct -m 700 /home/chestct/.ssh
echo "the application host is set up"
