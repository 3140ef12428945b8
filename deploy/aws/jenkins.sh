#!/usr/bin/env bash
# Jenkins on OpenJDK 21, behind nginx with TLS; what `make check` and `make test` need.
apt-get install -y -qq --no-install-recommends \
  fontconfig make nginx-light openjdk-21-jre-headless openssl python3-venv

# Jenkins' packages are signed by a key of its own; it may vouch for that archive only.
JENKINS_URL=${JENKINS_URL:-https://pkg.jenkins.io/debian-stable}
JENKINS_KEY=${JENKINS_KEY:-jenkins.io-2026.key}
JENKINS_FINGERPRINT=${JENKINS_FINGERPRINT:-5E386EADB55F01504CAE8BCF7198F4B714ABFC68}
install -d -m 755 /etc/apt/keyrings
curl --fail --silent --show-error --location "$JENKINS_URL/$JENKINS_KEY" -o /etc/apt/keyrings/jenkins.new
found=$(gpg --batch --show-keys --with-colons /etc/apt/keyrings/jenkins.new |
  awk -F: '$1 == "pub" { primary = 1 } $1 == "fpr" && primary { print $10; primary = 0 }')
if [ "$found" != "$JENKINS_FINGERPRINT" ]; then
  rm -f /etc/apt/keyrings/jenkins.new
  echo "the key at $JENKINS_URL is ${found:-no key}, expected $JENKINS_FINGERPRINT" >&2
  exit 1
fi
mv /etc/apt/keyrings/jenkins.new /etc/apt/keyrings/jenkins.asc
printf 'deb [signed-by=/etc/apt/keyrings/jenkins.asc] %s binary/\n' "$JENKINS_URL" \
  >/etc/apt/sources.list.d/jenkins.list

# Jenkins itself is reached from this machine only; nginx is what the network sees.
install -d /etc/systemd/system/jenkins.service.d
printf '[Service]\nEnvironment="JENKINS_LISTEN_ADDRESS=127.0.0.1"\nEnvironment="JENKINS_PORT=8080"\n' \
  >/etc/systemd/system/jenkins.service.d/loopback.conf
apt-get update -qq
apt-get install -y -qq jenkins
usermod -aG docker jenkins

# Until a real certificate stands there (see the guide), one that signs itself.
install -d -m 755 /etc/chestct
if [ ! -e /etc/chestct/tls.crt ]; then
  (umask 077 && openssl req -x509 -newkey rsa:3072 -nodes -days 90 -subj /CN=jenkins \
    -keyout /etc/chestct/tls.key -out /etc/chestct/tls.crt 2>/dev/null)
fi
cat >/etc/nginx/sites-available/default <<'SITE'
server {
  listen 443 ssl default_server;
  ssl_certificate /etc/chestct/tls.crt;
  ssl_certificate_key /etc/chestct/tls.key;
  ssl_protocols TLSv1.2 TLSv1.3;
  client_max_body_size 32m;
  location / {
    proxy_pass http://127.0.0.1:8080;
    proxy_http_version 1.1;
    proxy_request_buffering off;
    proxy_read_timeout 90s;
    proxy_set_header Host $host;
    proxy_set_header X-Forwarded-For $remote_addr;
    proxy_set_header X-Forwarded-Proto $scheme;
  }
}
SITE
nginx -t
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload
  systemctl enable --now jenkins nginx
  systemctl restart jenkins nginx
fi
echo "Jenkins is set up; its first password: /var/lib/jenkins/secrets/initialAdminPassword"
